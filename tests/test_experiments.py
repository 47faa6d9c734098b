"""The studies: every variant runs and changes what it says, and the curve of circuits is drawn."""

import json
from dataclasses import replace

import pytest
import torch

import gates
import model
import train
from data.dataset import read_meta
from experiments import circuit_curve, gate_study
from support import runs
from support.checkpoints import load_checkpoint, save_checkpoint, save_model
from tests.test_model import tiny
from tests.test_train import SMALL


@pytest.fixture(scope="module")
def dense(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "draw", lambda *_: [])
        train.train(replace(SMALL, dropout=0.0, data_dir=str(data_dir), out_dir=str(folder), sparsify_steps=1))
    return folder / "dense.pt"


@pytest.fixture
def run_one(dense, data_dir, tmp_path, monkeypatch):
    """Run a variant for a few steps on the small task; what its edit replaced is put back afterwards."""
    replaced = [(model, "Attention"), (model.GPT, "initialise"), (gates, "edge_penalty"), (runs.Run, "draw")]
    for owner, name in [*replaced, (train, "LossBound"), (train, "make_optimizer")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(gates.GATES, "hard_concrete", gates.GATES["hard_concrete"])
    monkeypatch.setattr(gate_study, "folder_of", lambda dataset, name, seed: tmp_path / name)
    monkeypatch.setattr(gate_study, "Dataset", lambda *_: train.Dataset("sums", 5, data_dir))

    def small(config):
        shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=5, batch_size=16, bound_stderr=0.05)
        steps = config.sparsify_steps // 250
        return run(replace(config, **shape, init_from=str(dense), sparsify_steps=steps, dataset="sums", data_dir=str(data_dir)))

    run = train.train
    monkeypatch.setattr(train, "train", small)

    def result(name):
        gate_study.run_one("addition", name, 1)
        return json.loads((tmp_path / name / "summary.json").read_text())

    return result


TRAINED = [name for name, variant in gate_study.VARIANTS.items() if name != "reference" and not variant.of]


@pytest.mark.parametrize("name", ["low_rank", *(pytest.param(n, marks=pytest.mark.slow) for n in TRAINED if n != "low_rank")])
def test_a_trained_variant_differs_from_the_reference(run_one, name, tmp_path):
    run_one("reference")
    summary = run_one(name)
    assert 0 <= summary["edges_hard"] <= 1 and summary["sparse_loss"] > 0
    one, two = (load_checkpoint(tmp_path / folder / "sparse.pt")["model"] for folder in ("reference", name))
    assert one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one)


def test_variants_that_are_only_evaluated(run_one, tmp_path):
    run_one("reference")
    path = tmp_path / "reference" / "sparse.pt"
    saved = load_checkpoint(path)
    biases = {name: torch.tensor([-2.0, -1.0]) for name in saved["model"] if name.endswith("gate_bias")}
    save_checkpoint({**saved, "model": saved["model"] | biases}, path)  # gates of 0.04 and 0.22
    above25, above0 = (run_one(name)["edges_hard"] for name in ("above25", "above0"))
    assert above25 < above0
    run_one("reference_sealed")


def test_fixed_edges_are_what_their_names_say():
    pattern = torch.tensor([[1.0, 0, 0], [0.6, 0.4, 0], [0.1, 0.1, 0.8]])[None, None]
    edges = gate_study.largest(0, pattern, 1 / 6)  # not the first query's, whose one key has all its weight
    assert edges.nonzero().tolist() == [[0, 0, 2, 2]]
    first, second = (gate_study.window(layer, torch.ones(1, 2, 6, 6), 2) for layer in (0, 1))
    causal = model.causal_mask(6, 6)
    found = (first[0, 0] & causal).nonzero().tolist()
    assert found == [[i, j] for i in range(6) for j in range(6) if 1 <= i - j <= 2]
    assert not first[0, 1].any() and not second.any()


def test_sealing_takes_away_what_closed_keys_tell(monkeypatch):
    """Two sequences that differ in a token that no open edge reads: sealed, the model says the same of both."""
    monkeypatch.setattr(model, "Attention", model.Attention)
    net = tiny(gate="bernoulli", n_layer=1, gate_bias=0.0)
    idx = torch.randint(13, (40, 8))
    gate_study.sealed()
    other = model.GPT(net.config).eval()
    other.load_state_dict(net.state_dict())
    assert not torch.allclose(net(idx, idx)[0], other(idx, idx)[0])
    assert torch.allclose(net(idx, idx, return_stats=True)[2].hard_edges, other(idx, idx, return_stats=True)[2].hard_edges)


def test_the_tables_of_what_is_there(run_one, program):
    run_one("reference")
    code, out, _ = program(gate_study.main, "reference", "cap8", "--tables")
    assert code == 0 and out.count("| the reference | `reference` |") == 2 and "cap8" not in out
    code, _, err = program(gate_study.main, "prize")
    assert code == 2 and "there is no variant 'prize': choose some of reference" in err


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
