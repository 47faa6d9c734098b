"""bench.py on sizes so small that only its bookkeeping shows."""

import json
from functools import partial

import torch

import bench

SMALL = ("--rounds=2", "--heads=1", "--head_size=16", "--length=8", "--device=cpu")


def run(program, tmp_path, what):
    """What it prints and the tables that it writes."""
    code, out, err = program(bench.main, what, *SMALL, f"--out={tmp_path}/b.json")
    assert code == 0, err
    return out, json.loads((tmp_path / "b.json").read_text())["tables"]


def test_attention_is_measured_written_and_shown(program, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)  # takes longer than all the rest
    out, tables = run(program, tmp_path, "attention")
    assert len(tables) == 2
    for title, rows in tables.items():
        assert title in out and {"dense (SDPA)", "reference"} <= rows.keys()
        assert all(0 < r["low"] <= r["median"] <= r["high"] for r in rows.values())


def test_steps_are_measured(program, tmp_path, monkeypatch):
    tiny = bench.TrainConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, batch_size=2)
    monkeypatch.setattr(bench, "RECIPES", {"addition": tiny, "shakespeare_char": tiny})
    out, tables = run(program, tmp_path, "step")
    assert out.count("training step") == len(tables) == 2  # each title once, though its rows come one by one
    for rows in tables.values():
        assert rows.keys() == {"dense", "gated, reference"}
        assert all(row["median"] > 0 for row in rows.values()), rows


def test_a_candidate_that_fails_is_seen_in_the_exit_code(program, tmp_path, monkeypatch):
    for words, wanted in (("CUDA out of memory", 0), ("no compiler", 1)):
        fail = partial(exec, f"raise RuntimeError({words!r})")
        tables = [("a table", {"one": lambda: None, "other": fail}, None)]

        monkeypatch.setitem(bench.MEASUREMENTS, "step", lambda config, tables=tables: tables)
        code, out, _ = program(bench.main, "step", *SMALL, f"--out={tmp_path}/b.json")
        assert code == wanted and words.removeprefix("CUDA ") in out and "wrote" in out
        assert json.loads((tmp_path / "b.json").read_text())["tables"]["a table"]["one"]["median"] >= 0


def test_an_unknown_measurement_is_one_sentence(program):
    code, _, err = program(bench.main, "speed")
    assert code == 2 and len(err.splitlines()) == 1 and "'speed'" in err
