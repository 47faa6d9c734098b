"""Every variant of the study is trained or evaluated, and none of its edits comes to nothing."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

import gates
import model
import train as train_module
from model import load_checkpoint
from tests.conftest import ROOT
from tests.test_train import SMALL

spec = importlib.util.spec_from_file_location("study", ROOT / "results" / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


@pytest.fixture(scope="module")
def dense(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "draw", lambda *args: [])
        train_module.train(replace(SMALL, dropout=0.0, data_dir=str(data_dir), out_dir=str(folder), sparsify_steps=1))
    return folder / "dense.pt"


@pytest.fixture
def run_one(dense, data_dir, tmp_path, monkeypatch):
    """Run a variant for a few steps on the small task; everything that its edit replaced is put back afterwards."""
    for module, name in [
        (model, "Attention"),
        (gates, "edge_penalty"),
        (train_module, "LossBound"),
        (train_module, "make_optimizer"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(train_module, "draw", lambda *args: [])
    monkeypatch.setitem(gates.GATES, "hard_concrete", gates.GATES["hard_concrete"])
    monkeypatch.setattr(study, "folder_of", lambda dataset, name, seed: tmp_path / name)
    config_of = study.config_of

    def small(dataset, name, seed):
        config = config_of(dataset, name, seed)
        short = dict(sparsify_steps=config.sparsify_steps // 250, dataset="sums", data_dir=str(data_dir), device="cpu")
        return replace(config, init_from=str(dense), n_layer=2, n_head=2, n_embd=16, block_size=5, batch_size=16, **short)

    monkeypatch.setattr(study, "config_of", small)

    def run(name):
        (tmp_path / name).mkdir()
        study.run_one("addition", name, "1")
        return json.loads((tmp_path / name / "summary.json").read_text())

    return run


@pytest.mark.parametrize("name", [name for name in study.VARIANTS if name != "reference" and not study.VARIANTS[name].of])
def test_a_trained_variant_differs_from_the_reference(run_one, name, tmp_path):
    run_one("reference")
    summary = run_one(name)
    assert 0 <= summary["edges_hard"] <= 1 and summary["sparse_loss"] > 0
    weights = [load_checkpoint(tmp_path / folder / "sparse.pt")["model"] for folder in ("reference", name)]
    assert weights[0].keys() != weights[1].keys() or not all(
        torch.equal(weights[0][key], weights[1][key]) for key in weights[0]
    )


def test_variants_that_are_only_evaluated(run_one):
    reference, above50, top = run_one("reference"), run_one("above50"), run_one("top")
    assert above50["edges_hard"] <= reference["edges_hard"]
    assert top["edges_hard"] == pytest.approx(1 / 15)  # one of the 15 causal pairs of every head


def test_a_window_is_what_its_name_says(monkeypatch):
    monkeypatch.setattr(model, "Attention", model.Attention)
    monkeypatch.setattr(train_module, "LossBound", train_module.LossBound)
    study.window(2)
    net = model.GPT(model.GPTConfig(block_size=6, vocab_size=7, n_layer=2, n_head=2, n_embd=8, gate="bernoulli")).eval()
    first, second = (block.attn.edges(torch.ones(1, 2, 6, 6)) for block in net.h)
    assert first[0, 0].nonzero().tolist() == [[i, j] for i in range(6) for j in range(6) if 1 <= i - j <= 2]
    assert not first[0, 1].any() and not second.any()
