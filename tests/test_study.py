"""Every variant of the study runs, its edit changes what it says, and the queue and its errors behave."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

import gates
import model
import train as train_module
from config import UserError
from model import load_checkpoint, save_checkpoint
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
        (model, "gated_attention"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(train_module, "draw", lambda *args: [])
    monkeypatch.setitem(gates.GATES, "hard_concrete", gates.GATES["hard_concrete"])
    monkeypatch.setattr(study, "folder_of", lambda dataset, name, seed: tmp_path / name)
    config_of = study.config_of

    def small(dataset, name, seed):
        config = config_of(dataset, name, seed)
        short = dict(sparsify_steps=config.sparsify_steps // 250, dataset="sums", data_dir=str(data_dir))
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


def test_variants_that_are_only_evaluated(run_one, tmp_path):
    run_one("reference")
    checkpoint = load_checkpoint(tmp_path / "reference" / "sparse.pt")
    for name, p in checkpoint["model"].items():
        if name.endswith("gate_bias"):
            p.copy_(torch.tensor([-2.0, -1.0]))  # gates of 0.04 and 0.22: open only without a cutoff
    save_checkpoint(checkpoint, tmp_path / "reference" / "sparse.pt")
    edges = [run_one(name)["edges_hard"] for name in ("above25", "above0")]
    assert edges[0] < edges[1]
    assert run_one("top")["edges_hard"] == pytest.approx(1 / 15)  # one of the 15 causal pairs of every head


@pytest.mark.parametrize("name, wanted", [("wide", (2 / 3, -0.5, 1.5, 0.5)), ("above25", (2 / 3, -0.1, 1.1, 0.25))])
def test_edits_of_the_distribution(monkeypatch, name, wanted):
    monkeypatch.setitem(gates.GATES, "hard_concrete", None)
    study.VARIANTS[name].edit()
    gate = gates.GATES["hard_concrete"]()
    assert (gate.beta, gate.gamma, gate.zeta, gate.cutoff) == wanted


def test_the_largest_weights_are_not_the_first_querys(monkeypatch):
    """Its one key has all its weight, which says nothing."""
    monkeypatch.setattr(model, "Attention", model.Attention)
    monkeypatch.setattr(train_module, "LossBound", train_module.LossBound)
    study.largest_weights(1 / 6)
    net = model.GPT(model.GPTConfig(block_size=3, vocab_size=7, n_layer=1, n_head=1, n_embd=8, gate="bernoulli"))
    pattern = torch.tensor([[1.0, 0, 0], [0.6, 0.4, 0], [0.1, 0.1, 0.8]])[None, None]
    assert net.h[0].attn.edges(pattern).nonzero().tolist() == [[0, 0, 2, 2]]


def test_sealing_takes_away_what_closed_keys_tell(monkeypatch):
    """One head, two sequences that differ in a key whose gate is closed: its score moves the weight of the open one."""
    monkeypatch.setattr(model, "gated_attention", model.gated_attention)
    q, k, v = (torch.randn(2, 1, 3, 4) for _ in range(3))
    gate_q, gate_k = torch.ones(2, 1, 3, 1), torch.tensor([9.0, -9.0, -9.0]).view(1, 1, 3, 1).expand(2, 1, 3, 1)
    q[1], v[1], k[1, :, [0, 2]] = q[0], v[0], k[0, :, [0, 2]]  # only the key at position 1 differs, which no query reads
    inputs = (q, k, v, torch.zeros(1), gates.Bernoulli(), False, None, gate_q, gate_k)
    told = gates.gated_attention(*inputs)[0]
    study.sealed()
    silent = model.gated_attention(*inputs)[0]
    assert not torch.allclose(told[0], told[1]) and torch.allclose(silent[0], silent[1])


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """train_all with programs that only write a summary, or fail; returns the order in which they were started."""
    started = []

    class Program:
        def __init__(self, command, **_):
            dataset, name, seed = command[-3:]
            started.append(name)
            self.returncode = int(name == "wide")
            if not self.returncode:
                (study.folder_of(dataset, name, seed) / "summary.json").write_text("{}")

        poll = wait = lambda self: self.returncode

    monkeypatch.setattr(study.subprocess, "Popen", Program)
    monkeypatch.setattr(study, "folder_of", lambda dataset, name, seed: tmp_path / dataset / name / str(seed))
    return started


def test_runs_wait_for_what_they_need_and_finished_ones_are_not_run_again(queue):
    jobs = [("addition", name, 1) for name in ("above0", "reference", "cap1")]
    study.train_all(jobs, 2)
    assert sorted(queue) == ["above0", "cap1", "reference"] and queue.index("reference") < queue.index("above0")
    study.train_all(jobs, 2)
    assert len(queue) == 3


def test_a_run_that_fails_is_reported_and_the_others_go_on(queue):
    with pytest.raises(UserError, match="addition wide 1 stopped: see .*output.txt"):
        study.train_all([("addition", "wide", 1), ("addition", "cap1", 1)], 1)
    assert queue == ["wide", "cap1"]
    with pytest.raises(UserError, match="addition above0 1 needs reference"):
        study.train_all([("addition", "above0", 1)], 1)


def test_bad_options(program):
    code, _, err = program(study.main, "--only=prize", "--datasets=addition,foo", "--seeds=x")
    assert code == 2 and [line.split(":")[1] for line in err.splitlines()] == [
        " --only names 'prize'",
        " --datasets names 'foo'",
        " --seeds names 'x'",
    ]
    code, out, _ = program(study.main, "--help")
    assert code == 0 and "--lanes" in out


def test_a_window_is_what_its_name_says(monkeypatch):
    monkeypatch.setattr(model, "Attention", model.Attention)
    monkeypatch.setattr(train_module, "LossBound", train_module.LossBound)
    study.window(2)
    net = model.GPT(model.GPTConfig(block_size=6, vocab_size=7, n_layer=2, n_head=2, n_embd=8, gate="bernoulli")).eval()
    first, second = (block.attn.edges(torch.ones(1, 2, 6, 6)) for block in net.h)
    assert first[0, 0].nonzero().tolist() == [[i, j] for i in range(6) for j in range(6) if 1 <= i - j <= 2]
    assert not first[0, 1].any() and not second.any()
