"""
How many edges a circuit takes, by three rankings: edge pruning, attribution patching and a random order.

    python experiments/circuit_curve.py addition        options as circuits.py

All rankings are treated alike, and cut on the examples that were not searched: the shortest prefix whose KL
is at most the bound, and, as the paper has it, the shortest one that explains 90 % of the effect (a
faithfulness of 0.9). There, edges are counted from component to component: a head's query, key and value are
one. *Swept* is the prefix that keeps the bound on the examples searched, less what it can do without.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

import circuits
from circuits import CircuitConfig, Problem, circuit_output, logit_difference, read_out
from model import evaluating
from support import command_line, pictures
from support.command_line import UserError
from support.files import make_folder, write_json
from support.report import side_by_side

EXPLAINED = 0.9
WAYS = ("edge pruning", "attribution", "random")
FIGURES = {  # of a way: what it is
    "edges": "edges at the bound",
    "swept": "edges, swept",
    "explained": "edges for 90 %",
    "heads": "heads for 90 %",
}


def attribution(problem, answers, wrong):
    """Edge attribution patching (Syed et al., arXiv 2310.10348): how much closing each edge changes the logit
    difference to first order, |d m / dz| at z = 1, (R, W, P). One backward pass over the examples."""
    z = torch.ones_like(problem.candidates, dtype=problem.ablated.dtype, device=problem.ablated.device)
    total, everything = 0.0, (problem.clean, problem.ablated, problem.positions, answers, wrong)
    for clean, ablated, positions, answer, other in zip(*(t.split(32) for t in everything)):
        with torch.enable_grad():
            z.requires_grad_()
            x, _ = circuit_output(problem.model, clean, z.expand(len(clean), -1, -1, -1), ablated)
            difference = logit_difference(read_out(problem.model, x, positions), answer, other)
            total = total + torch.autograd.grad(difference.sum(), z)[0]
    return total.abs()


def faithfulness_of(problem, task):
    """A function: mask -> the fraction of the task's logit difference that the circuit keeps."""
    m = lambda logits: logit_difference(logits, task.answers, task.wrong).mean().item()
    of = lambda mask: m(torch.cat([logits for logits, _ in problem.logits(mask)]))
    full, empty = m(problem.full), of(torch.zeros_like(problem.candidates))
    if abs(full - empty) < 1e-6:
        raise UserError("closing all edges changes no answer: there is nothing to explain, give another task")
    return lambda mask: (of(mask) - empty) / (full - empty)


def components(problem, mask):
    """({(writer, reader)} of a circuit from component to component, its heads)."""
    edges = {(w, r.rstrip("qkv").rstrip(".")) for w, r, _ in problem.graph.named(mask)}
    return edges, {node for edge in edges for node in edge if ".h" in node}


def curve(model, searched, scored, config):
    """{way: {figure: number}}, and {way: [(edges, faithfulness on the scored examples), ...]}."""
    problem, other = (Problem(model, *t[:3], config.ablation, config.positions) for t in (searched, scored))
    problem.candidates = other.candidates = problem.candidates | other.candidates
    faithfulness = faithfulness_of(other, scored)
    rankings = {
        "edge pruning": circuits.search(problem, config.bound, config.steps, config.seed, config.batch_size),
        "attribution": attribution(problem, searched.answers, searched.wrong),
        "random": torch.rand(problem.candidates.shape, generator=torch.Generator().manual_seed(config.seed)),
    }
    found, points = {}, {}
    for way, ranking in rankings.items():
        cut = problem.short_prefix(ranking, lambda mask: problem.fits(mask, config.bound))
        explained = other.short_prefix(ranking, lambda mask: faithfulness(mask) >= EXPLAINED)
        found[way] = {
            "edges": int(other.short_prefix(ranking, lambda mask: other.fits(mask, config.bound)).sum()),
            "explained": len(components(other, explained)[0]),
            "heads": len(components(other, explained)[1]),
        }
        if config.sweep:
            found[way]["swept"] = int(problem.swept(cut, ranking, config.bound).sum())
        sizes = torch.logspace(0, 1, 12, base=int(other.candidates.sum())).long().tolist()
        masks = [other.short_prefix(ranking, lambda mask: int(mask.sum()) >= size) for size in sizes]
        points[way] = [(int(mask.sum()), faithfulness(mask)) for mask in masks]
    return found, points


def main(argv):
    config = command_line.parse(CircuitConfig(), argv, __doc__)
    models, _, (searched, scored) = circuits.open_task(config)
    folder = make_folder(config.out_dir or f"out/{config.task[0]}")
    found, points = {}, {}
    for name, model in models.items():
        with evaluating(model):
            found[name], points[name] = curve(model, searched, scored, config)
    rows = {(way, key): (f"{way}: {words}", ",d") for way in WAYS for key, words in FIGURES.items()}
    flat = lambda ways: {(way, key): n for way, figures in ways.items() for key, n in figures.items()}
    columns = {name: flat(ways) for name, ways in found.items()}
    print("\n".join(side_by_side(columns, rows, 34)))
    write_json({"figures": found, "points": points}, folder / "circuits_curve.json")
    print(f"\nwrote {pictures.save(pictures.curve_figure(points), folder / 'circuits_curve.png')}")


if __name__ == "__main__":
    command_line.run(main)
