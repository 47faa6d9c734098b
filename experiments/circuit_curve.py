"""
How many edges a circuit takes, by three rankings: edge pruning, attribution patching and a random order.

    python experiments/circuit_curve.py addition        options as circuits.py

All rankings are treated alike, and cut on the examples that were not searched: the shortest prefix whose KL
is at most the bound, and, as the paper has it, the shortest one that explains 90 % of the effect (a
faithfulness of 0.9). There, edges are counted from component to component: a head's query, key and value are
one. *Swept* is the prefix that keeps the bound on the examples searched, less what it can do without. Of its
heads, and of all heads, the attention edges per prompt: those that are open, and how few are enough.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

import circuits
from circuits import CircuitConfig, Problem, circuit_output, kl_divergence, logit_difference, logits_at
from model import evaluating
from support import command_line, pictures
from support.command_line import UserError
from support.files import write_json
from support.graph import edges_read, node_of
from support.report import side_by_side
from support.runs import code_of

FILES = "circuits.py", "support/graph.py", "data/tasks.py", "gates.py", "constrained.py", "model.py"
CODE = code_of("experiments/circuit_curve.py", *FILES)  # of what finds the figures
EXPLAINED = 0.9
WAYS = ("edge pruning", "attribution", "random")
FIGURES = {  # of a way, or of the whole model: what it is, its format
    "edges": ("edges at the bound", ",d"),
    "swept": ("edges, swept", ",d"),
    "open": ("attention edges, open", ",.1f"),
    "needed": ("attention edges, enough", ",.1f"),
    "explained": ("edges for 90 %", ",d"),
    "heads": ("heads for 90 %", ",d"),
}


def attribution(problem, answers, wrong):
    """Edge attribution patching (Syed et al., arXiv 2310.10348): how much closing each edge changes the logit
    difference to first order, |d m / dz| at z = 1, (R, W, P). One backward pass over the examples."""
    z = torch.ones_like(problem.candidates, dtype=problem.ablated.dtype, device=problem.ablated.device)
    total, everything = 0.0, (problem.clean, problem.ablated, problem.positions, answers, wrong)
    for clean, ablated, positions, answer, other in zip(*(t.split(32) for t in everything)):
        with torch.enable_grad():
            z.requires_grad_()
            x = circuit_output(problem.model, clean, z.expand(len(clean), -1, -1, -1), ablated)
            difference = logit_difference(logits_at(problem.model, x, positions), answer, other)
            total = total + torch.autograd.grad(difference.sum(), z)[0]
    return total.abs()


def faithfulness_of(problem, task):
    """A function: mask -> the fraction of the task's logit difference that the circuit keeps."""
    m = lambda logits: logit_difference(logits, task.answers, task.wrong).mean().item()
    of = lambda mask: m(problem.logits(mask))
    full, empty = m(problem.full), of(torch.zeros_like(problem.candidates))
    if abs(full - empty) < 1e-6:
        raise UserError("closing all edges changes no answer: there is nothing to explain, give another task")
    return lambda mask: (of(mask) - empty) / (full - empty)


def components(problem, mask):
    """({(writer, reader, position)} of a circuit from component to component, its heads)."""
    edges = {(w, node_of(r)[0], p) for w, r, p in problem.graph.named(mask)}
    return edges, {node for edge in edges for node in edge[:2] if ".h" in node}


def attention_edges(circuit, task, bound):
    """(open, enough): attention edges (layer, head, query, key) of the circuit's heads, means per prompt.
    open: the open edges of queries up to the last answer's. enough: as few of these as change the circuit's
    predictions by a mean KL of at most bound with the others set to zero, by the better of two rankings: how
    much an edge changes the answers' logits (less the mean of all logits), to first order; or its weight."""
    model, problem = circuit.model, Problem(circuit.model, *task[:3], circuit.ablation)
    mask = circuit.mask(task.clean.size(1)).to(problem.ablated)
    parts = [slice(i, i + circuits.CHUNK) for i in range(0, len(task.clean), circuits.CHUNK)]

    def run(part, factor):
        """The circuit's logits, (B, K, V), with a factor (L, B, H, T, T) on its attention weights, and these
        weights, of the same shape."""
        seen = []  # the weights of the layers so far

        def attend(attn, q, k, v):
            pattern, z = attn.pattern_and_gate(q, k)
            seen.append(pattern * z * factor[len(seen)])
            return circuits.projected(attn, seen[-1] @ v)

        clean = task.clean[part]
        z = mask.expand(len(clean), -1, -1, -1)
        x = circuit_output(model, clean, z, problem.ablated[part], attend=attend)
        return logits_at(model, x, problem.positions[part]), torch.stack(seen)

    is_open, whole, rankings = [], [], {"effect": [], "weight": []}
    for part in parts:
        edges = edges_read(circuit, task.clean[part], task.positions[part])
        with torch.enable_grad():
            factor = edges.float().requires_grad_()
            full, weights = run(part, factor)
            answers = full.gather(2, task.answers[part][:, :, None])[..., 0] - full.mean(dim=2)
            rankings["effect"].append(torch.autograd.grad(answers.sum(), factor)[0].abs())
        rankings["weight"].append(weights.detach())
        is_open.append(edges)
        whole.append(full.detach())

    def enough(ranking):
        """How many edges of a ranking are enough, in all prompts together: bisection."""
        levels = torch.cat([e[o] for e, o in zip(ranking, is_open)]).sort().values
        low, high = 0, len(levels)  # edges from levels[low] up are enough, from levels[high] up not
        while high - low > 1:
            middle = (low + high) // 2
            kept = [(o & (e >= levels[middle])).float() for e, o in zip(ranking, is_open)]
            kl = [kl_divergence(full, run(part, k)[0]) for part, full, k in zip(parts, whole, kept)]
            low, high = (middle, high) if torch.cat(kl).mean() <= bound else (low, middle)
        return (levels >= levels[low]).sum().item() if len(levels) else 0

    n_open, n = sum(edges.sum().item() for edges in is_open), len(task.clean)
    return n_open / n, min(map(enough, rankings.values())) / n


def curve(model, searched, scored, config, ways):
    """Of the rankings named in ways: {way: {figure: number}}, and {way: [(edges, faithfulness on the scored
    examples), ...]}."""
    problem, other = (Problem(model, *t[:3], config.ablation, config.positions) for t in (searched, scored))
    problem.candidates = other.candidates = problem.candidates | other.candidates
    faithfulness = faithfulness_of(other, scored)
    rng, how = torch.Generator().manual_seed(config.seed), (config.steps, config.seed, config.batch_size)
    rankings = {
        "edge pruning": lambda: circuits.search(problem, config.bound, *how),
        "attribution": lambda: attribution(problem, searched.answers, searched.wrong),
        "random": lambda: torch.rand(problem.candidates.shape, generator=rng),
    }
    everything = attention_edges(problem.circuit(problem.candidates), scored, config.bound)
    found, points = {"all edges": dict(zip(("open", "needed"), everything))}, {}
    for way in ways:
        ranking = rankings[way]()
        explained = other.short_prefix(ranking, lambda mask: faithfulness(mask) >= EXPLAINED)
        found[way] = {
            "edges": int(other.short_prefix(ranking, lambda mask: other.fits(mask, config.bound)).sum()),
            "explained": len(components(other, explained)[0]),
            "heads": len(components(other, explained)[1]),
        }
        if config.sweep:
            cut = problem.short_prefix(ranking, lambda mask: problem.fits(mask, config.bound))
            swept = problem.circuit(problem.swept(cut, ranking, config.bound))
            found[way]["swept"] = len(swept.edges)
            found[way]["open"], found[way]["needed"] = attention_edges(swept, scored, config.bound)
        sizes = torch.logspace(0, 1, 12, base=int(other.candidates.sum())).long().tolist()
        masks = [other.short_prefix(ranking, lambda mask: int(mask.sum()) >= size) for size in sizes]
        points[way] = [(int(mask.sum()), faithfulness(mask)) for mask in masks]
    return found, points


def main(argv, ways=WAYS):
    config = command_line.parse(CircuitConfig(), argv, __doc__)
    if config.seeds > 1:
        raise UserError(f"--seeds is {config.seeds}, and this is one search a model: give one --seed")
    models, _, (searched, scored) = circuits.open_task(config)
    folder = circuits.folder_of(config)
    found, points = {}, {}
    for name, model in models.items():
        with evaluating(model):
            found[name], points[name] = curve(model, searched, scored, config, ways)
    pairs = product(("all edges", *ways), FIGURES)
    rows = {(way, key): (f"{way}: {FIGURES[key][0]}", FIGURES[key][1]) for way, key in pairs}
    flat = lambda ways: {(way, key): n for way, figures in ways.items() for key, n in figures.items()}
    columns = {name: flat(ways) for name, ways in found.items()}
    print("\n".join(side_by_side(columns, rows, 37)))
    content = {"argv": argv, "code": CODE, "figures": found, "points": points}
    write_json(content, folder / "circuits_curve.json")
    print(f"\nwrote {pictures.save(pictures.curve_figure(points), folder / 'circuits_curve.png')}")


if __name__ == "__main__":
    command_line.run(main)
