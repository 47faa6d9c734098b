"""The studies, on models so small that only their bookkeeping shows."""

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import model
from circuits import Circuit
from data import prepare
from data.dataset import read_meta
from data.tasks import Task
from experiments import baselines, carry, circuit_curve, growth, peer, seeds
from experiments.carry import carry_edge
from gates import GATES
from model import AttentionRecord
from support.checkpoints import save_model
from support.command_line import UserError
from support.files import read_json, write_json
from support.graph import Graph
from support.runs import read_log
from tests.conftest import ROOT
from tests.planted import T, previous_token
from tests.test_model import tiny
from train import RECIPES, train


def test_the_curve_of_circuits(program, tmp_path, data_dir):
    for name, gate in (("dense", "none"), ("sparse", "hard_concrete")):
        save_model(tiny(vocab_size=12, gate=gate), tmp_path / f"{name}.pt", read_meta(data_dir / "sums"), {})
    files = [f"--{name}={tmp_path}/{name}.pt" for name in ("dense", "sparse")]
    argv = ["sums", *files, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--steps=5", "--device=cpu"]
    code, out, err = program(circuit_curve.main, *argv)
    assert code == 0, err
    report = json.loads((tmp_path / "circuits_curve.json").read_text())
    for name in ("dense", "sparse"):
        n = report["figures"][name]["all edges"]
        assert 0 <= n["needed"] <= n["open"] <= 4 * 15 and (name == "sparse" or n["open"] == 4 * 15)
        for way in circuit_curve.WAYS:
            n, points = report["figures"][name][way], report["points"][name][way]
            assert max(n["edges"], n["swept"]) <= points[-1][0] and n["heads"] <= 4
            assert 0 <= n["needed"] <= n["open"] <= 4 * 15
            assert name == "sparse" or n["open"] % 15 == 0, "all edges of a dense head are open"
            assert points[-1][1] == pytest.approx(1, abs=1e-4), "all edges explain everything"
            assert points == sorted(points) and points[0][0] < points[-1][0]
    assert (tmp_path / "circuits_curve.png").stat().st_size > 5000 and "edge pruning: edges for 90 %" in out


def test_growth_reads_the_figures_that_are_there(program, tmp_path):
    """The table's ratios are those of the folders' circuits; a folder without a run is refused."""
    for n, edges in ((2, 30), (3, 60)):
        folder = tmp_path / f"n{n}"
        (folder / "sums").mkdir(parents=True)
        heads = [[0.5] * n] * (n - 1) + [[0.0] * n]
        summary = {"dense_loss": 1.0, "sparse_loss": 1.0, "edges_hard": 0.3, "edges_per_head": heads}
        summary["config"] = {"dataset": "sums", "data_dir": "nowhere"}
        (folder / "summary.json").write_text(json.dumps(summary))
        figures = {"edges": edges, "explained": edges, "heads": 4}
        ways = {way: figures for way in circuit_curve.WAYS}
        both = {"dense": ways, "sparse": {way: figures | {"edges": 10, "explained": 5} for way in ways}}
        for name, needed in (("dense", 200.0), ("sparse", 25.0)):
            both[name] = both[name] | {"all edges": {"open": 300.0, "needed": needed}}
        for name in ("dense.pt", "sparse.pt"):
            (folder / name).write_text("")
        files = [f"--dense={folder}/dense.pt", f"--sparse={folder}/sparse.pt", f"--out_dir={folder}/sums"]
        argv = ["sums", *files, "--data_dir=nowhere", "--bound=0.01", "--steps=400", "--no-sweep"]
        found = {"argv": argv, "code": circuit_curve.CODE, "figures": both}
        (folder / "sums" / "circuits_curve.json").write_text(json.dumps(found))
    argv = [f"{tmp_path}/n2", f"{tmp_path}/n3", f"--picture={tmp_path}/growth.png"]
    code, out, err = program(growth.main, *argv)
    assert code == 0, err
    rows = {line[:36].strip(): line[36:].split() for line in out.splitlines() if line}
    assert rows["edges at the bound, ratio"] == ["3.0", "6.0"]
    assert rows["edges for 90 %, ratio"] == ["6.0", "12.0"]
    assert rows["attention edges, enough, ratio"] == ["8.0", "8.0"]
    assert rows["heads with an open edge"] == ["2", "6"]
    assert (tmp_path / "growth.png").stat().st_size > 5000
    code, out, err = program(growth.main, *argv, "--bound=0.02")
    assert code == 2 and "no task 'sums'" in err, "figures of another bound are not taken"
    os.utime(tmp_path / "n3" / "sparse.pt", (2**31, 2**31))
    code, out, err = program(growth.main, *argv)
    assert code == 2 and "no task 'sums'" in err, "nor those of other models"
    code, _, err = program(growth.main, f"{tmp_path}/n2", f"{tmp_path}/n2/../n2")
    assert code == 2 and "have one name: rename a folder" in err
    code, out, err = program(growth.main, str(tmp_path))
    assert code == 2 and "holds no finished run" in err


def test_of_a_head_that_copies_a_token_one_attention_edge_is_enough(monkeypatch):
    """The planted head has a weight at every query; the answer needs the last one's, of the token before,
    unless the corrupted prompt's last token, which the logits read otherwise, is the same."""
    model, prompts, edges = previous_token()
    clean, corrupted = (prompts(32, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    last = torch.full((32, 1), T - 1)
    task = Task(clean, corrupted, last, clean[:, -2:-1], corrupted[:, -2:-1])
    n_open, enough = circuit_curve.attention_edges(Circuit(model, edges), task, bound=0.01)
    assert enough == (corrupted[:, -1] != clean[:, -2]).float().mean() and n_open == T * (T + 1) / 2
    monkeypatch.setattr(torch.autograd, "grad", lambda output, factor: [torch.zeros_like(factor)])
    n_open, enough = circuit_curve.attention_edges(Circuit(model, edges), task, bound=0.01)
    assert enough <= T, "where effects say nothing, weights do: one large one at every query"


def test_edges_are_counted_from_component_to_component():
    """A head that reads the embedding as query and as value has one edge, where the graph has two."""
    graph = Graph(n_layer=1, n_head=2)
    rest = {("a0.h1", "m0"), ("a0.h1", "logits"), ("m0", "logits")}
    mask = graph.mask({("embed", "a0.h1.q"), ("embed", "a0.h1.v"), *rest})
    edges, heads = circuit_curve.components(SimpleNamespace(graph=graph), mask)
    assert edges == {(writer, reader, 0) for writer, reader in {("embed", "a0.h1"), *rest}}
    assert heads == {"a0.h1"}


def test_auto_circuit_names_every_edge():
    """Its own rule: attention and MLPs are layers 1, 2, ..., and an edge leads to a later layer."""
    graph, writers, readers = Graph(n_layer=2, n_head=2), {"Resid Start": 0}, {"Resid End": 5}
    for layer, head in product(range(2), range(2)):
        writers[f"A{layer}.{head}"] = 2 * layer + 1
        readers |= {f"A{layer}.{head}.{part}": 2 * layer + 1 for part in "QKV"}
        writers[f"MLP {layer}"] = readers[f"MLP {layer}"] = 2 * layer + 2
    names = [f"{w}->{r}" for w, r in product(writers, readers) if writers[w] < readers[r]]
    scores = {name: 1.0 + number for number, name in enumerate(names)}
    ranking = peer.ranking_of(graph, scores)
    assert torch.equal(ranking[..., 0] > 0, graph.edges)
    k, value = (graph.readers.index(name) for name in ("a1.h0.k", "a1.h1.v"))
    assert ranking[k, graph.writers.index("m0")] == scores["MLP 0->A1.0.K"]
    assert ranking[value, graph.writers.index("a0.h1")] == scores["A0.1->A1.1.V"]
    assert ranking[-1, 0] == scores["Resid Start->Resid End"]
    del scores["MLP 0->A1.0.K"]
    with pytest.raises(UserError, match=f"{len(scores)} edges there are not the {len(names)} here"):
        peer.ranking_of(graph, scores)


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


# ------------------------------------------------------------------------------------------------------------
# Seeds and baselines


@pytest.mark.slow
def test_seeds_trains_what_is_missing_and_shows_the_median(program, tmp_path, data_dir):
    sizes = "--n_layer=1 --n_head=2 --n_embd=8 --block_size=5 --pretrain_steps=2 --sparsify_steps=2"
    options = f"--dataset=sums --data_dir={data_dir} --device=cpu --head_price=0.1 {sizes}"
    argv = ["addition", "--seeds=3", "--threads=1", f"--options={options}", f"--out_dir={tmp_path}"]
    code, out, err = program(seeds.main, *argv)
    assert code == 0 and out.count("is done") == 3, err
    rows = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words}
    assert rows["highest"][5] in ("0", "1", "2"), "heads with an open edge, as they have a price"
    losses = sorted(float(line.split()[4]) for line in out.splitlines() if line.startswith("seed "))
    assert [rows[name][2] for name in ("lowest", "median", "highest")] == [f"{loss:.4f}" for loss in losses]
    code, out, err = program(seeds.main, *argv)
    assert code == 0 and "is done" not in out, "finished runs are read"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """The folder of a small run on the task sums."""
    folder = tmp_path_factory.mktemp("baselines") / "run"
    config = replace(
        RECIPES["addition"], dataset="sums", data_dir=str(data_dir), out_dir=str(folder), device="cpu",
        n_layer=2, n_head=2, n_embd=16, block_size=5, pretrain_steps=30, sparsify_steps=20,
    )  # fmt: skip
    write_json(train(config) | {"edges_hard": 0.2}, folder / "summary.json")
    return folder


def test_every_baseline_trains_on_the_same_number_of_edges(program, trained):
    picture = trained / "baselines.png"
    code, out, err = program(baselines.main, trained, f"--picture={picture}")
    assert code == 0 and picture.stat().st_size > 5000, err
    names = ["top", "learned", "fixed"]  # hand has nothing for this task
    found = {name: read_json(trained / "baselines" / f"{name}.json") for name in names}
    n_edges = 0.2 * 2 * 2 * 15  # of 15 pairs in each of 4 heads
    assert found["fixed"]["edges_hard"] * 60 == pytest.approx(n_edges)
    assert 0 < found["top"]["edges_hard"] < 1
    assert not list((trained / "baselines" / "top").glob("t*.pt")), "it would not attend as it was trained"
    assert [line.split()[0] for line in out.splitlines()[-6:-2]] == ["sparse", *names]
    code, out, err = program(baselines.main, trained / "nothing")
    assert code == 2 and "holds no finished run: give one that train.py wrote" in err


def test_baselines_learn_from_the_teacher_that_the_sparse_model_had(trained, tmp_path):
    first_loss = {}
    for distill in (False, True):
        folder = shutil.copytree(trained, tmp_path / str(distill), ignore=shutil.ignore_patterns("baselines"))
        summary = read_json(folder / "summary.json")
        summary["config"] |= {"distill": distill, "sparsify_steps": 2, "log_interval": 1}
        baselines.train_baselines(folder, summary)
        logs = [read_log(folder / "baselines" / name / "log.jsonl") for name in ("top", "learned", "fixed")]
        first_loss[distill] = [next(line["loss"] for line in log if "loss" in line) for log in logs]
    assert all(text != teacher for text, teacher in zip(first_loss[False], first_loss[True]))


def test_the_largest_weights_are_as_many_as_wanted_in_the_end():
    top, (q, k, v) = baselines.Top(0.1, n_layer=1, n_passes=300), torch.randn(3, 8, 2, 10, 4)
    fractions = [top(q, k, v, None, None, True)[1].hard_edges.mean().item() for _ in range(300)]
    assert fractions[0] > 0.3 and fractions[-1] == pytest.approx(0.1, abs=0.02)


def test_patterns_by_hand_run_forward_and_are_as_many_as_they_say():
    for dataset, edges in baselines.HAND.items():
        mask = baselines.hand_edges(tiny(n_layer=2), dataset, 9)
        assert mask.sum() == len(edges) and (mask.nonzero()[:, 3] < mask.nonzero()[:, 2]).all()


def test_fixed_edges_are_attention_over_these_edges_only():
    q, k, v = torch.randn(3, 2, 2, 6, 4).double()
    edges = torch.rand(2, 6, 6).tril() > 0.3
    edges[0, 2] = False
    y, stats = baselines.masked_attention(edges, q, k, v, None, None, True)
    for h in range(2):
        for i in range(6):
            keys = edges[h, i].nonzero()[:, 0]
            weights = torch.softmax(q[:, h, i, None] @ k[:, h, keys].mT / 2, dim=-1)
            wanted = (weights @ v[:, h, keys])[:, 0] if len(keys) else torch.zeros(2, 4)
            assert torch.allclose(y[:, h, i], wanted.double())
    assert stats.hard_edges.tolist() == pytest.approx((edges.float().sum(dim=(1, 2)) / 21).tolist())
    empty = 1 - edges.any(dim=2).float().mean(dim=1)
    assert torch.allclose(stats.empty_rows, empty) and torch.allclose(stats.mass_removed.float(), empty)


def test_learned_edges_that_are_all_open_are_plain_attention():
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    gate = GATES["hard_concrete"]()
    y, stats = baselines.learned_attention(lambda: torch.full((2, 6, 6), 9.0), q, k, v, None, gate, False)
    assert torch.allclose(stats.expected_edges, gate.open_probability(torch.full((2,), 9.0)))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_the_edge_that_tells_the_carry_is_found(monkeypatch):
    """Edges as if planted: layer 1 reads 4 from 6 where there is a carry, layer 2 at random."""
    carry = torch.arange(40) % 3 == 0
    edges = torch.zeros(3, 40, 2, 8, 8, dtype=torch.bool)
    edges[1, carry, 1, 6, 4] = True
    edges[2, :, 0, 7, 1] = torch.arange(40) % 2 == 0

    class Planted:
        def attention(self, idx):
            return AttentionRecord(edges.float(), edges.float())

    assert carry_edge(Planted(), torch.zeros(40, 8), carry) == (1, 6, 4, 1.0, 0.0)


def test_the_carry_edge_of_a_model_of_addition(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program(prepare.main, "addition")[0] == 0
    for gate, wanted, sentence in [
        ("none", 2, "is dense or has one layer only: give a sparse model of two or more"),
        ("hard_concrete", 0, "in 0 of 1 an edge is open in over 90 % with a carry, under 10 % without"),
    ]:
        save_model(tiny(vocab_size=12, gate=gate), tmp_path / "m.pt", read_meta("data/addition"), {})
        code, out, err = program(carry.main, tmp_path / "m.pt")
        assert code == wanted and sentence in out + err
