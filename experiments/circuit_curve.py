"""
Circuits at several bounds, and other ways to choose edges: the curve of docs/circuits.md.

    python experiments/circuit_curve.py addition        options as circuits.py

For a dense and a sparse model: edge pruning at four bounds, the same number of edges by attribution patching
and in a random order, and how many edges these take at the bound. No way is swept at the end.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

from circuits import CircuitConfig, Problem, circuit_output, load_pair, logit_difference, read_out, scores, search
from data import tasks
from model import evaluating
from support import command_line, pictures
from support.files import make_folder, write_json
from support.ranks import find_device


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
    """{way: [figures on the others, a point per bound]}, and the edges that each way takes at
    config.bound."""
    problem = Problem(model, task.clean, task.corrupted, task.positions, config.ablation, config.positions)
    generator = torch.Generator().manual_seed(config.seed)
    rankings = {"attribution": attribution(problem, task.answers, task.wrong)}
    rankings["random"] = torch.rand(problem.candidates.shape, generator=generator)
    points, at_bound = {way: [] for way in ("edge pruning", *rankings)}, {}
    for factor in (0.3, 1, 3, 30):
        bound = factor * config.bound
        ranking = search(problem, bound, config.steps, config.seed, config.batch_size)
        masks = {"edge pruning": problem.shortest_prefix(ranking, lambda mask: problem.fits(mask, bound))}
        n = int(masks["edge pruning"].sum())
        for way, other in rankings.items():
            masks[way] = problem.shortest_prefix(other, lambda mask: int(mask.sum()) >= n)
        for way, mask in masks.items():
            points[way].append({"bound": bound, **scores(problem.circuit(mask), others)})
        if factor == 1:
            at_bound["edge pruning"] = n
    for way, other in rankings.items():
        found = problem.shortest_prefix(other, lambda mask: problem.fits(mask, config.bound))
        at_bound[way] = int(found.sum())
    return points, at_bound


def main(argv):
    config = command_line.parse(replace(CircuitConfig(), sweep=False), argv, __doc__)
    device = find_device(config.device)
    models, meta = load_pair(config, device)
    task = tasks.find(config.task[0], config.data, models["dense"].config, meta, 2 * config.examples, config.seed,
                      config.data_dir, aligned=config.positions)  # fmt: skip
    searched, scored = (half.to(device) for half in task.halves())
    folder = make_folder(config.out_dir or f"out/{config.task[0]}")
    found, curves = {}, {}
    for name, model in models.items():
        with evaluating(model):
            points, at_bound = curve(model, searched, scored, config)
        found[name] = {"points": points, "edges at the bound": at_bound}
        curves[name] = {way: [(p["edges"], p["faithfulness"]) for p in some] for way, some in points.items()}
        edges = ", ".join(f"{way} {[p['edges'] for p in some]}" for way, some in points.items())
        print(f"{name}: edges {edges}; at a KL of {config.bound}: {at_bound}", flush=True)
    write_json(found, folder / "circuits_curve.json")
    print(f"wrote {pictures.save(pictures.curve_figure(curves), folder / 'circuits_curve.png')}")


if __name__ == "__main__":
    command_line.run(main)
