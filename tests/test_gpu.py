"""`make gpu` where there is no GPU: every part in its own process, tiny, on the CPU."""

import json
from functools import partial

import pytest
import torch

from experiments import gpu
from model import GPTConfig

TRAIN = "--device=cpu --attention=reference --dtype=float32 --no-compile --eval_iters=1 --log_interval=2"
CHAR = f"{TRAIN} --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --pretrain_steps=4 --sparsify_steps=4"
SHORT = {  # what is appended to a part's words
    "tests": "-k autocast",
    "kernels": "-k shapes",
    "step": "--rounds=1 --device=cpu",
    "circuits": "--rounds=0.5",
    "nccl": CHAR,
    "shakespeare_char_gpu": CHAR,
    "gpt2": f"{TRAIN} --batch_size=2 --sparsify_steps=4",
}


@pytest.fixture
def report(program, tmp_path, monkeypatch):
    """Run all parts with tiny models, as if there were GPUs -> (exit code, gpu.json, lines of gpu.md)."""

    def run(n_gpus, **changed):
        changed |= {"FOLDER": tmp_path / "gpu", "TOKENS": 2**12}
        changed["GPTConfig"] = partial(GPTConfig, block_size=16, n_layer=2, n_head=2, n_embd=8)
        for name, value in changed.items():
            monkeypatch.setattr(gpu, name, value)
        cuda = {"is_available": True, "device_count": n_gpus, "get_device_name": "a card"}
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        code, out, _ = program(gpu.main)
        found = json.loads((tmp_path / "gpu/gpu.json").read_text())
        failed = [row["part"] for row in found["parts"] if row["state"] in ("failed", "timed out")]
        assert f"not done: {', '.join(failed)}\n" in out
        return code, found, (tmp_path / "gpu/gpu.md").read_text().splitlines()

    return run


@pytest.mark.slow
def test_every_part_runs_and_what_fails_is_named(report):
    """Attention has one second, and circuits is given half a round."""
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
    parts = {}
    for name, (_, words, wanted) in gpu.PARTS.items():
        words = f"{words} {SHORT.get(name, '')}".replace('")', '", 2, "cpu")')  # of search
        parts[name] = 1 if name == "attention" else 600, words, wanted
    code, found, lines = report(2, PARTS=parts, SECONDS=6000)
    rows = {row["part"]: row for row in found["parts"]}
    failed = {name: row["state"] for name, row in rows.items() if row["state"] != "done"}
    assert failed == {"attention": "timed out", "circuits": "failed"}, rows
    assert code == 1 and found["machine"].startswith("2 x a card, torch ")
    for name, words in {
        "tests": "1 passed", "kernels": "4 passed", "step": "gated, reference", "circuits": "error: --rounds",
        "nccl": "dense 4 validation: loss", "shakespeare_char_gpu": "sparse 4 validation: loss",
        "gpt2": "tokens/s", "search": "gated, 2 steps: ",
    }.items():  # fmt: skip
        assert words in " ".join(rows[name]["result"]), rows[name]
    assert any(line.startswith("sparse ") and line.endswith("tokens/s") for line in rows["gpt2"]["result"])
    assert len(lines) == 4 + len(rows) and all(line.count("|") == 5 for line in lines[2:])
    assert "**timed out**" in lines[4 + list(rows).index("attention")]
    assert lines[-2].startswith("| gpt2 | `python train.py gpt2 --out_dir=")


def test_when_time_is_up_the_other_parts_are_stopped_and_one_gpu_is_no_two(report):
    code, found, lines = report(1, SECONDS=0)
    states = {row["part"]: row["state"] for row in found["parts"]}
    assert code == 1 and states == dict.fromkeys(gpu.PARTS, "timed out") | {"nccl": "not run"}
    assert any(line.endswith("| 0 | **not run**<br>there is one GPU |") for line in lines)


def test_speed_leaves_out_what_comes_before_the_first_line():
    """The first 50 steps, of 100 tokens each, took 10 seconds, the other 100 two."""
    line = "dense {}/150 loss 2.5 lr 1.0e-03 {:,} tokens/s 0:01 left"
    lines = ["dense 0 validation: loss 3", *(line.format(*at) for at in ((50, 500), (100, 909), (150, 1250)))]
    assert list(gpu.speeds(lines)) == ["dense 5,000 tokens/s"] and list(gpu.speeds(lines[:2])) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence(program, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "gpu")
    code, _, err = program(gpu.main)
    assert code == 2 and err.startswith("error: PyTorch sees no CUDA device") and len(err.splitlines()) == 1
    assert not (tmp_path / "gpu").exists()
