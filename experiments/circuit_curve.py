"""
Circuits at several bounds, and simpler ways to choose edges: the curve of docs/circuits.md.

    python experiments/circuit_curve.py addition        options as circuits.py

For a dense and a sparse model: edge pruning at four bounds, as many edges by attribution patching and in a
random order, and how many edges these take at the bound. No way is swept at the end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

import circuits
from circuits import CircuitConfig, Problem, circuit_output, logit_difference, read_out, scores
from model import evaluating
from support import command_line, pictures
from support.files import make_folder, write_json


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


def curve(model, task, others, config):
    """{way: figures on the others, a point per bound}, and {way: edges that it takes at config.bound}."""
    problem = Problem(model, task.clean, task.corrupted, task.positions, config.ablation, config.positions)
    random = torch.rand(problem.candidates.shape, generator=torch.Generator().manual_seed(config.seed))
    rankings = {"attribution": attribution(problem, task.answers, task.wrong), "random": random}
    points = {way: [] for way in ("edge pruning", *rankings)}
    for factor in (0.3, 1, 3, 30):
        bound = factor * config.bound
        ranking = circuits.search(problem, bound, config.steps, config.seed, config.batch_size)
        masks = {"edge pruning": problem.short_prefix(ranking, lambda mask: problem.fits(mask, bound))}
        n = int(masks["edge pruning"].sum())
        for way, other in rankings.items():
            masks[way] = problem.short_prefix(other, lambda mask: int(mask.sum()) >= n)
        for way, mask in masks.items():
            points[way].append({"bound": bound, **scores(problem.circuit(mask), others)})
    at_bound = {"edge pruning": points["edge pruning"][1]["edges"]}
    for way, other in rankings.items():
        found = problem.short_prefix(other, lambda mask: problem.fits(mask, config.bound))
        at_bound[way] = int(found.sum())
    return points, at_bound


def main(argv):
    config = command_line.parse(CircuitConfig(), argv, __doc__)
    models, _, (searched, scored) = circuits.open_task(config)
    folder = make_folder(config.out_dir or f"out/{config.task[0]}")
    found, curves = {}, {}
    for name, model in models.items():
        with evaluating(model):
            points, at_bound = curve(model, searched, scored, config)
        found[name] = {"points": points, "edges at the bound": at_bound}
        curves[name] = {way: [(p["edges"], p["faithfulness"]) for p in some] for way, some in points.items()}
        print(f"{name}: edges at a KL of {config.bound}: {at_bound}", flush=True)
    write_json(found, folder / "circuits_curve.json")
    print(f"wrote {pictures.save(pictures.curve_figure(curves), folder / 'circuits_curve.png')}")


if __name__ == "__main__":
    command_line.run(main)
