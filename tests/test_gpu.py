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


@pytest.mark.slow
def test_every_part_runs_and_what_fails_is_named(program, tmp_path, monkeypatch):
    """Attention has one second, and circuits is given half a round."""
    pytest.importorskip("triton", reason="triton is not installed: `make test` installs it")
    parts = {}
    for name, (_, words, wanted) in gpu.PARTS.items():
        words = f"{words} {SHORT.get(name, '')}".replace('")', '", 2, "cpu")')  # of search
        parts[name] = 1 if name == "attention" else 300, words, wanted
    changed = {"PARTS": parts, "FOLDER": tmp_path / "gpu", "SECONDS": 3600, "TOKENS": 2**12}
    changed["GPTConfig"] = partial(GPTConfig, block_size=16, n_layer=2, n_head=2, n_embd=8)
    for name, value in changed.items():
        monkeypatch.setattr(gpu, name, value)
    for name, value in {"is_available": True, "device_count": 2, "get_device_name": "a card"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    code, out, err = program(gpu.main)
    report = json.loads((tmp_path / "gpu/gpu.json").read_text())
    rows = {row["part"]: row for row in report["parts"]}
    failed = {name: row["state"] for name, row in rows.items() if row["state"] != "done"}
    assert failed == {"attention": "timed out", "circuits": "failed"}, (rows, err)
    assert code == 1 and "not done: attention, circuits" in out
    assert list(rows) == list(gpu.PARTS) and report["machine"].startswith("2 x a card, torch ")
    for name, words in {
        "tests": "1 passed", "kernels": "4 passed", "step": "gated, reference", "circuits": "error: --rounds",
        "nccl": "dense 4 validation: loss", "shakespeare_char_gpu": "sparse 4 validation: loss",
        "gpt2": "tokens/s", "search": "gated, 2 steps: ",
    }.items():  # fmt: skip
        assert words in " ".join(rows[name]["result"]), rows[name]
    assert any(line.startswith("sparse ") and line.endswith("tokens/s") for line in rows["gpt2"]["result"])
    lines = (tmp_path / "gpu/gpu.md").read_text().splitlines()
    assert len(lines) == 4 + len(rows) and all(line.count("|") == 5 for line in lines[2:])
    assert "**timed out**" in lines[4 + list(rows).index("attention")]
    assert lines[-2].startswith("| gpt2 | `python train.py gpt2 --out_dir=")


def test_a_table_says_why_there_is_no_figure(tmp_path, monkeypatch):
    """One GPU, and no time left: two processes are not tried, the next part is stopped at once."""
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows = [gpu.outcome("nccl", 60), gpu.outcome("search", 0)]
    assert [row["state"] for row in rows] == ["not run", "timed out"]
    text = gpu.table({"machine": "a card", "text": "none", "parts": rows})
    assert "| 0 | **not run**<br>there is one GPU |" in text


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
