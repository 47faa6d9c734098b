"""bench.py on sizes so small that only its bookkeeping shows."""

import json

import pytest
import torch

import bench

SMALL = ("--rounds=2", "--heads=1", "--head_size=16", "--tokens=256", "--lengths=8,16", "--device=cpu")


def test_attention_is_measured_written_and_shown(program, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)  # takes longer than all the rest
    code, out, _ = program(bench.main, "attention", *SMALL, f"--out={tmp_path}/b.json")
    written = json.loads((tmp_path / "b.json").read_text())
    assert code == 0 and len(written["tables"]) == 4 and written["config"]["heads"] == 1
    for title, results in written["tables"].items():
        assert title in out and {"dense (SDPA)", "reference"} <= results.keys()
        assert all(0 < r["low"] <= r["median"] <= r["high"] for r in results.values())


def test_steps_are_measured(program, tmp_path, monkeypatch):
    tiny = bench.TrainConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, batch_size=2)
    monkeypatch.setattr(bench, "RECIPES", {"addition": tiny, "shakespeare_char": tiny})
    code, out, _ = program(bench.main, "step", *SMALL, f"--out={tmp_path}/b.json")
    assert code == 0 and out.count("gated, reference") == 2 and "tokens/s" in out


def test_a_candidate_that_fails_is_a_row_and_the_others_are_measured():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    results = bench.measure({"large": fail, "small": lambda: None}, bench.BenchConfig(("step",), rounds=2, device="cpu"))
    assert results["large"] == "out of memory" and results["small"]["median"] >= 0


def test_a_step_of_the_circuit_search_is_measured(program, tmp_path):
    code, out, _ = program(bench.main, "circuits", *SMALL, f"--out={tmp_path}/b.json")
    (results,) = json.loads((tmp_path / "b.json").read_text())["tables"].values()
    assert code == 0 and "circuit search" in out and results.keys() == {"dense", "gated"}


@pytest.mark.parametrize("argv, word", [(["speed"], "'speed'"), (["attention", "--lengths=8,x"], "'8,x'")])
def test_bad_options_are_one_sentence(program, argv, word):
    code, _, err = program(bench.main, *argv)
    assert code == 2 and len(err.splitlines()) == 1 and word in err
