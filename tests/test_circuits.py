"""Circuits against weights written down by hand, a slow forward pass, and their own definitions."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import circuits
from circuits import Circuit, Problem, ablated_writers, all_writers, circuit_output, find_circuit, scores
from data.dataset import read_meta
from data.tasks import Task
from experiments.circuit_curve import attribution
from gates import attention_pattern
from model import GPT, evaluating
from support.checkpoints import save_model
from support.circuit_report import overlap
from support.command_line import UserError
from support.graph import Graph, graph_of
from tests.planted import PLANTED, T, previous_token, random_prompts
from tests.test_model import tiny

GATES = [dict(), dict(gate="hard_concrete"), dict(gate="bernoulli"), dict(bias=False)]
ALL_GATES = pytest.mark.parametrize("gates", GATES, ids=["dense", "hard_concrete", "bernoulli", "no_bias"])


def examples(n, length=7):
    """Random (clean, corrupted) tokens and the last position."""
    return [torch.randint(13, (n, length)) for _ in range(2)] + [torch.full((n,), length - 1)]


def task_of(clean, corrupted, positions):
    """A Task whose answers are the clean and the corrupted prompts' last tokens."""
    return Task(clean, corrupted, positions.view(-1, 1), clean[:, -1:], corrupted[:, -1:])


def mask_of(model, value=True):
    return graph_of(model).edges[:, :, None] & value


def logits_of(model, mask, clean, corrupted, ablation="corrupted"):
    everywhere = torch.arange(clean.size(1)).expand_as(clean)
    with evaluating(model):
        problem = Problem(model, clean, corrupted, everywhere, ablation, mask.size(2) > 1)
        return problem.logits(mask)


def assert_close(a, b):
    assert (a - b).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------
# The graph


def test_names_and_numbers():
    graph = Graph(4, 4)
    assert graph.edges.sum() == 479
    assert graph.writers[:3] == ["embed", "a0.h0", "a0.h1"] and graph.readers[-1] == "logits"
    assert graph.readers[:13] == [f"a0.h{h}.{part}" for part in "qkv" for h in range(4)] + ["m0"]
    gpt2 = Graph(12, 12)
    assert (len(gpt2.writers), len(gpt2.readers), int(gpt2.edges.sum())) == (157, 445, 32_491)


def effective_by_paths(graph, mask):
    """The edges of all paths from embed to logits, walked one by one."""
    open_edges = [(graph.writers[w], graph.readers[r]) for r, w in mask.nonzero().tolist()]
    found = set()

    def walk(writer, path):
        for edge in open_edges:
            if edge[0] == writer:
                if edge[1] == "logits":
                    found.update([*path, edge])
                else:
                    walk(edge[1].rsplit(".", 1)[0] if edge[1].startswith("a") else edge[1], [*path, edge])

    walk("embed", [])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_effective_edges_lie_on_a_path_from_embedding_to_logits(seed):
    graph, generator = Graph(2, 2), torch.Generator().manual_seed(seed)
    mask = graph.edges & (torch.rand(graph.edges.shape, generator=generator) < 0.3)
    got = graph.effective(mask[:, :, None], torch.ones(2, 2, 1, 1, dtype=torch.bool))
    assert {edge[:2] for edge in graph.named(got)} == effective_by_paths(graph, mask)


def test_effective_edges_by_position_follow_the_heads():
    """Token 0 is read at position 1 by a head whose output is read there; all else leads nowhere."""
    graph = Graph(1, 1)  # readers: a0.h0.q, .k, .v, m0, logits; writers: embed, a0.h0, m0
    mask = torch.zeros(5, 3, 3, dtype=torch.bool)
    mask[2, 0] = True  # embed -> a0.h0.v everywhere
    mask[4, 1, 1] = True  # a0.h0 -> logits at position 1
    mask[3, 1, 2] = True  # a0.h0 -> m0 at position 2, which nobody reads
    links = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    assert graph.effective(mask, links).nonzero().tolist() == [[2, 0, 0], [2, 0, 1], [4, 1, 1]]
    only_itself = torch.eye(3, dtype=torch.bool)[None, None]
    assert graph.effective(mask, only_itself).nonzero().tolist() == [[2, 0, 1], [4, 1, 1]]


# ------------------------------------------------------------------------------------------------------------
# The masked forward pass


@ALL_GATES
@pytest.mark.parametrize("ablation", ["corrupted", "mean", "zero"])
def test_with_all_edges_open_it_is_the_model(gates, ablation):
    model = tiny(**gates)
    clean, corrupted, _ = examples(5)
    expected = model(clean, clean)[0]
    for mask in (mask_of(model), mask_of(model).expand(-1, -1, 7)):
        assert_close(logits_of(model, mask, clean, corrupted, ablation), expected)


def slow_logits(model, graph, mask, clean, corrupted):
    """The definition, spelled out: one reader after the other, each from a dict of activations. mask: (R, W,
    T)."""
    H, D = model.config.n_head, model.config.n_embd // model.config.n_head

    def run(idx, other):
        """Activations of all writers, and what the logits read; where an edge is closed, readers take the
        activation of `other`, another run's."""
        acts = {"embed": model.embed(idx)}

        def read(reader):
            total, row = 0, mask[graph.readers.index(reader)]
            for w, writer in enumerate(graph.writers):
                if graph.edges[graph.readers.index(reader), w]:
                    z = row[w][None, :, None].float()
                    closed = acts if other is None else other
                    total = total + z * acts[writer] + (1 - z) * closed[writer]
            return total

        for layer, block in enumerate(model.h):
            attn = block.attn
            for h in range(H):
                inputs = {part: block.ln_1(read(f"a{layer}.h{h}.{part}")) for part in "qkv"}
                q, k, v = (attn.qkv(inputs[part])[i][:, [h]] for i, part in enumerate("qkv"))
                bias = torch.zeros(1) if attn.gate is None else attn.gate_bias[[h]]
                pattern, log_alpha = attention_pattern(q, k, bias)
                z = 1.0 if attn.gate is None else attn.gate.deterministic(log_alpha)
                y = torch.zeros(len(idx), idx.size(1), H * D)
                y[:, :, h * D : (h + 1) * D] = ((pattern * z) @ v)[:, 0]
                out = F.linear(y, attn.c_proj.weight)
                acts[f"a{layer}.h{h}"] = out if attn.c_proj.bias is None else out + attn.c_proj.bias / H
            acts[f"m{layer}"] = block.mlp(block.ln_2(read(f"m{layer}")))
        return acts, read("logits")

    other, _ = run(corrupted, None)
    return F.linear(model.ln_f(run(clean, other)[1]), model.wte.weight)


@ALL_GATES
@torch.no_grad()
def test_any_mask_gives_what_a_slow_forward_pass_gives(gates):
    model = tiny(**gates)
    clean, corrupted, _ = examples(3)
    for n_positions in (1, 7):
        mask = mask_of(model) & (torch.rand(*graph_of(model).edges.shape, n_positions) < 0.5)
        expected = slow_logits(model, graph_of(model), mask.expand(-1, -1, 7), clean, corrupted)
        assert_close(logits_of(model, mask, clean, corrupted), expected)


@torch.no_grad()
def test_what_ablations_deliver():
    model = tiny()
    _, corrupted, _ = examples(4)
    writers = all_writers(model, corrupted)
    assert torch.equal(ablated_writers(model, corrupted, "corrupted"), writers)
    assert torch.allclose(ablated_writers(model, corrupted, "mean")[0], writers.mean(dim=0), atol=1e-6)
    zero = ablated_writers(model, corrupted, "zero")
    assert (zero[:, [0, 3, 6]] == 0).all()  # the embedding and the MLPs
    assert torch.allclose(zero[0, 1, 0], model.h[0].attn.c_proj.bias / 2)


# ------------------------------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_finds_the_planted_circuit_edge_for_edge(planted, seed):
    model, prompts, edges = planted()
    generator = torch.Generator().manual_seed(0)
    given = prompts(64, generator), random_prompts(64, generator), torch.full((64,), T - 1)
    found = find_circuit(model, *given, bound=0.01, steps=60, seed=seed, batch_size=8).edges
    assert found == edges, f"too many: {found - edges}, missing: {edges - found}"


def test_by_position_it_finds_where_the_planted_head_reads():
    model, prompts, _ = previous_token()
    generator = torch.Generator().manual_seed(0)
    given = *(prompts(64, generator) for _ in range(2)), torch.full((64,), T - 1)
    circuit = find_circuit(model, *given, bound=0.01, steps=60, batch_size=8, by_position=True)
    assert circuit.edges == {("embed", "a0.h0.v", T - 2), ("a0.h0", "logits", T - 1)}


def bound_of(model, clean, corrupted, positions, fraction=0.05):
    """A bound that takes some edges to keep: a fraction of the empty circuit's KL."""
    return fraction * scores(Circuit(model, set()), task_of(clean, corrupted, positions))["kl"]


@ALL_GATES
@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_the_circuit_keeps_the_bound_with_effective_edges_alone(gates, ablation):
    model = tiny(**gates)
    given = examples(20)
    bound = bound_of(model, *given)
    circuit = find_circuit(model, *given, bound=bound, ablation=ablation, steps=40, batch_size=10, seed=3)
    figures = scores(circuit, task_of(*given))
    assert 0 < figures["edges"] == len(circuit.edges) < graph_of(model).edges.sum()
    assert figures["kl"] <= bound
    with evaluating(model):
        problem, mask = Problem(model, *given, ablation), circuit.mask(7)
        assert torch.equal(problem.graph.effective(mask, problem.links), mask)
        assert problem.fits(mask, bound) and not problem.fits(mask, 0.9 * figures["kl"])


@torch.no_grad()
@pytest.mark.parametrize("by_position", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_sweep_leaves_no_edge_out_or_in_that_the_definition_would_not(by_position, monkeypatch):
    monkeypatch.setattr(circuits, "CHUNK", 8)
    model, given = tiny(gate="hard_concrete"), examples(10, length=3)
    bound, problem = bound_of(model, *given), Problem(model, *given, by_position=by_position)
    ranking = torch.rand(problem.candidates.shape)
    expected = problem.candidates
    for edge in problem.order(ranking).flip(0).tolist():
        smaller = expected.clone()
        smaller.view(-1)[edge] = False
        smaller = problem.graph.effective(smaller, problem.links)
        expected = smaller if problem.fits(smaller, bound) else expected
    assert torch.equal(problem.swept(problem.candidates, ranking, bound), expected)
    assert torch.equal(problem.clean, given[0]), "whoever goes on with the problem has its examples in order"
    assert expected.sum() < problem.candidates.sum()


def test_edge_pruning_ranks_better_than_attribution_where_the_answer_hangs_on_many_edges():
    """If the price of the KL is too low at first, all 479 edges close together, and few come back."""
    model, given = tiny(n_layer=4, n_head=4, n_embd=16), examples(64, length=5)
    bound, task = bound_of(model, *given), task_of(*given)
    with evaluating(model):
        problem = Problem(model, *given)
        rankings = circuits.search(problem, bound, 150, 0, 16), attribution(problem, task.answers, task.wrong)
        fits = lambda mask: problem.fits(mask, bound)
        pruned, attributed = (problem.short_prefix(ranking, fits).sum() for ranking in rankings)
    assert 0 < pruned < attributed * 2 / 3


def test_the_same_seed_finds_the_same_circuit():
    model, given = tiny(), examples(20)
    bound = bound_of(model, *given)
    one, two = (find_circuit(model, *given, bound=bound, steps=20, seed=4) for _ in range(2))
    assert one.edges == two.edges != set() and overlap([one, two]) == 1


def test_several_answer_positions_are_bounded_together():
    model = tiny()
    clean, corrupted, last = examples(20)
    positions = torch.tensor([[3, 6]]).expand(20, 2)
    bound = bound_of(model, clean, corrupted, last)
    circuit = find_circuit(model, clean, corrupted, positions, bound=bound, steps=20)
    full, logits = model(clean, clean)[0][:, [3, 6]], circuit.run(clean, corrupted)[:, [3, 6]]
    kl = F.kl_div(logits.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none")
    kl = kl.sum(-1).mean().item()
    task = Task(clean, corrupted, positions, clean[:, :2], clean[:, 2:4])
    assert 0 < kl <= bound and kl == pytest.approx(scores(circuit, task)["kl"], abs=1e-6)


@pytest.mark.parametrize("gates", GATES[1:3], ids=["hard_concrete", "bernoulli"])
def test_a_head_without_open_attention_keeps_no_edge(gates):
    model = tiny(**gates)
    with torch.no_grad():
        model.h[0].attn.gate_bias[1] = model.h[1].attn.gate_bias[0] = -1e4
    circuit = find_circuit(model, *examples(20), bound=1e-9, steps=5)  # nothing else can be left out
    nodes = {tuple(node.split(".")[:2]) for edge in circuit.edges for node in edge}
    assert ("a0", "h1") not in nodes and ("a1", "h0") not in nodes and ("a0", "h0") in nodes


def test_attention_gates_are_not_sampled_and_weights_stay_as_they_were():
    model = tiny(gate="hard_concrete").train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    clean, corrupted, positions = examples(20)
    z = mask_of(model).float().expand(20, -1, -1, -1)
    x = circuit_output(model, clean, z, ablated_writers(model, corrupted, "zero"))
    assert_close(model.read_out(x), model.eval()(clean, clean)[0])
    model.train()
    find_circuit(model, clean, corrupted, positions, bound=0.2, steps=5)
    assert model.training and all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_cannot_be_searched_is_one_sentence_and_leaves_the_model_as_it_was():
    model = tiny().train()
    with pytest.raises(UserError, match="the ablation is 'means': choose one of corrupted, mean, zero"):
        find_circuit(model, *examples(4), bound=0.2, ablation="means")
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        find_circuit(model, *examples(4), bound=0.2)
    assert model.training and all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------
# Figures, files, baselines


@pytest.mark.parametrize("ablation", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("n_layer", [1, 2])
def test_an_empty_circuit_and_a_constant_task_give_numbers(n_layer, ablation):
    model = tiny(n_layer=n_layer)
    clean, corrupted, positions = examples(6)
    empty = scores(Circuit(model, set(), ablation), task_of(clean, corrupted, positions))
    assert empty["faithfulness"] == 0 and empty["edges"] == empty["heads"] == empty["mlps"] == 0
    given = clean[:1].repeat(6, 1), clean[:1].repeat(6, 1), positions
    circuit, constant = find_circuit(model, *given, bound=0.1, ablation=ablation, steps=5), task_of(*given)
    assert all(math.isfinite(value) for value in scores(circuit, constant).values())
    if ablation != "zero":
        assert circuit.edges == set()
        assert "faithfulness" not in scores(circuit, constant), "there is nothing to explain"


def test_the_whole_graph_scores_as_the_model():
    model = tiny().eval()
    clean, corrupted, positions = examples(30)
    full = model(clean, clean)[0][:, -1]
    task = task_of(clean, corrupted, positions)._replace(answers=full.argmax(-1, keepdim=True))
    with evaluating(model):
        problem = Problem(model, clean, corrupted, positions)
    figures = scores(problem.circuit(problem.candidates), task)
    assert figures["faithfulness"] == pytest.approx(1, abs=1e-4)
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["attention_edges"] == 4 * 7 * 8 / 2  # all causal pairs of four heads
    assert figures["accuracy"] == figures["full_accuracy"] == 1
    assert (figures["heads"], figures["mlps"]) == (4, 2)
    picked = full.gather(1, task.answers) - full.gather(1, task.wrong)
    assert figures["logit_difference"] == pytest.approx(picked.mean().item(), abs=1e-4)
    assert figures["preference"] == pytest.approx((picked > 0).float().mean().item())


@pytest.mark.parametrize("by_position", [False, True])
def test_a_saved_circuit_loads_and_scores_the_same(tmp_path, by_position):
    model = tiny(gate="hard_concrete")
    given = examples(20)
    settings = dict(bound=bound_of(model, *given), steps=20, ablation="mean", by_position=by_position)
    circuit = find_circuit(model, *given, **settings)
    assert circuit.edges
    circuit.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json", model)
    assert loaded.edges == circuit.edges and loaded.found == circuit.found
    assert scores(loaded, task_of(*given)) == scores(circuit, task_of(*given))
    assert torch.equal(loaded.run(*given[:2]), circuit.run(*given[:2]))


def test_a_file_that_is_no_circuit_of_the_model(tmp_path):
    with pytest.raises(UserError, match="circuit.json holds no circuit of this model"):
        Circuit.load(tmp_path / "circuit.json", tiny())
    wrong = {("a9.h1", "logits"): "'a9.h1' is not in list", ("a1.h1", "a0.h0.q"): "runs backwards"}
    for edge, words in wrong.items():
        Circuit(tiny(), {edge}).save(tmp_path / "circuit.json")
        with pytest.raises(UserError, match=words):
            Circuit.load(tmp_path / "circuit.json", tiny())


def test_attribution_is_the_slope_of_the_logit_difference():
    """Against finite differences at z = 1, edge by edge."""
    model = tiny(n_layer=1).double()
    clean, corrupted, positions = examples(4)
    task = task_of(clean, corrupted, positions)
    with evaluating(model):
        problem = Problem(model, clean, corrupted, positions)
        got = attribution(problem, task.answers, task.wrong)

    def difference(z):
        x = circuit_output(model, clean, z.expand(4, -1, -1, -1), problem.ablated)
        last = F.linear(model.ln_f(x[:, -1]), model.wte.weight)
        return (last.gather(1, task.answers) - last.gather(1, task.wrong)).sum().item()

    ones = torch.ones(*problem.graph.edges.shape, 1, dtype=torch.double)
    for r, w in itertools.product(range(8), range(4)):
        if problem.graph.edges[r, w]:
            up, down = ones.clone(), ones.clone()
            up[r, w], down[r, w] = 1 + 1e-4, 1 - 1e-4
            slope = abs(difference(up) - difference(down)) / 2e-4
            assert got[r, w, 0].item() == pytest.approx(slope, abs=1e-4)


def test_overlap_is_intersection_over_union():
    one, two, three = (Circuit(None, set(edges)) for edges in ("ab", "bc", ""))
    assert overlap([one, two]) == pytest.approx(1 / 3)
    assert overlap([one, three]) == overlap([three, three]) == 0


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def checkpoints(tmp_path, data_dir):
    """An untrained model of the task `sums`, dense and gated; the second's last layer reads nothing."""
    sparse = tiny(vocab_size=12, gate="hard_concrete")
    with torch.no_grad():
        sparse.h[1].attn.gate_bias.fill_(-1e4)
    models = {"dense": tiny(vocab_size=12), "sparse": sparse, "short": tiny(vocab_size=12, n_layer=1)}
    for name, model in models.items():
        save_model(model, tmp_path / f"{name}.pt", read_meta(data_dir / "sums"), {})
    return tmp_path


def options(folder, data_dir):
    files = [f"--{name}={folder}/{name}.pt" for name in ("dense", "sparse")]
    files += [f"--data_dir={data_dir}", f"--out_dir={folder}"]
    return [*files, "--steps=15", "--bound=1e-4", "--batch_size=8", "--device=cpu"]


def test_dense_against_sparse_on_the_command_line(program, checkpoints, data_dir):
    code, out, err = program(circuits.main, "sums", *options(checkpoints, data_dir), "--seeds=2")
    assert code == 0, err
    content = json.loads((checkpoints / "circuits.json").read_text())
    for name, n_candidates in (("dense", 46), ("sparse", 18)):
        figures = content[name]
        assert [f["candidates"] for f in figures] == [n_candidates] * 2
        assert all(f["kl_searched"] <= f["bound"] == 1e-4 for f in figures)
        model = GPT.from_pretrained(checkpoints / f"{name}.pt")
        circuit = Circuit.load(checkpoints / f"circuit_{name}.json", model)
        assert len(circuit.edges) == figures[0]["edges"] and circuit.found["seed"] == 0
    dense, sparse = (sum(f["edges"] for f in content[name]) for name in ("dense", "sparse"))
    assert content["ratio"] == pytest.approx(dense / sparse)
    assert f"edges dense / sparse, all seeds: {dense / sparse:.1f}" in out
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert rows["candidate edges"] == ["46", "18"] and len(rows["overlap of seeds"]) == 2
    assert (checkpoints / "circuits.png").stat().st_size > 5000


def test_positions_and_ones_own_examples(program, checkpoints, data_dir):
    pairs = itertools.product("0123", "4567")
    names = ("clean", "corrupted", "answer", "wrong_answer")
    lines = [dict(zip(names, (f"{a}+{b}=", f"{b}+{a}=", a, b))) for a, b in pairs]
    (checkpoints / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = [*options(checkpoints, data_dir), f"--data={checkpoints}/own.jsonl", "--bound=1e-8"]
    code, out, err = program(circuits.main, "own", *argv, "--positions", "--out_dir=")
    assert code == 0, err
    folder = checkpoints / "own"
    assert "edges dense / sparse" in out and (folder / "circuits_positions.png").stat().st_size > 5000
    edges = json.loads((folder / "circuit_positions_dense.json").read_text())["edges"]
    assert edges and all(0 <= position < 4 for _, _, position in edges)


WRONG = [
    (["sums", "--sparse={}/short.pt"], "short.pt has 1: compare models of one shape"),
    (["sums", "--sparse={}"], " is a run: give one of its models, such as "),
    (["nothing", "--dense=none.pt"], "no task 'nothing': choose one of induction, carry, last_digit, "),
    ([], "give one task, such as addition: 0 were given"),
    (["sums", "--ablation=noise"], "--ablation is 'noise': choose one of corrupted, mean, zero"),
    (["sums", "--bound=0"], "--bound is 0.0: give more than 0"),
    (["sums", "--data={}/none.jsonl"], "cannot read"),
    (["ioi"], "the model does not know"),
]


@pytest.mark.parametrize("argv, sentence", WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_bad_input_is_one_sentence_and_exit_code_2(program, checkpoints, data_dir, argv, sentence):
    words = [word.format(checkpoints) for word in argv]
    code, _, err = program(circuits.main, *options(checkpoints, data_dir), *words)
    assert code == 2 and sentence in err and len(err.splitlines()) == 1


def test_circuits_of_a_model_in_a_folder_go_beside_it(tmp_path):
    (tmp_path / "exported").mkdir()
    config = circuits.CircuitConfig(task=("sums",), sparse=str(tmp_path / "exported"))
    assert circuits.folder_of(config) == tmp_path / "sums"
