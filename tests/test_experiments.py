"""The studies, on models so small that only their bookkeeping shows."""

import json
import re

import pytest
import torch

import model
from data.dataset import read_meta
from experiments import circuit_curve
from support.checkpoints import save_model
from tests.conftest import ROOT
from tests.test_model import tiny


def test_the_curve_of_circuits(program, tmp_path, data_dir):
    for name, gate in (("dense", "none"), ("sparse", "hard_concrete")):
        save_model(tiny(vocab_size=12, gate=gate), tmp_path / f"{name}.pt", read_meta(data_dir / "sums"), {})
    files = [f"--{name}={tmp_path}/{name}.pt" for name in ("dense", "sparse")]
    argv = ["sums", *files, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--steps=5", "--device=cpu"]
    code, out, err = program(circuit_curve.main, *argv)
    assert code == 0, err
    found = json.loads((tmp_path / "circuits_curve.json").read_text())["dense"]
    assert [p["bound"] for p in found["points"]["edge pruning"]] == pytest.approx([3e-4, 1e-3, 3e-3, 3e-2])
    for way in ("attribution", "random"):
        for point, other in zip(found["points"]["edge pruning"], found["points"][way]):
            assert other["edges"] >= point["edges"]
    assert (tmp_path / "circuits_curve.png").stat().st_size > 5000 and "at a KL of 0.001" in out


def test_the_low_rank_gates_of_the_docs(monkeypatch):
    """The code block of docs/gates.md makes a model that a dense one's weights fit, and that trains."""
    monkeypatch.setattr(model, "Attention", model.Attention)
    text = (ROOT / "docs/gates.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    exec(code, {})
    net, idx = tiny(gate="hard_concrete").train(), torch.randint(13, (2, 8))
    _, loss, stats = net(idx, idx, return_stats=True)
    (loss + stats.penalty.mean()).backward()
    assert net.h[0].attn.gate_qk.weight.grad.abs().sum() > 0 and 0 < stats.hard_edges.mean() < 1
