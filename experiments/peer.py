"""
Edge pruning beside auto-circuit 1.0.1, on the same models, tasks and edges.

    python experiments/peer.py          needs out/addition/dense.pt and sparse.pt, or --dense=... --sparse=...

auto-circuit wants other libraries: the first run makes an environment for it in out/peer, and peer_scores.py
runs there. It hands back a score per edge, and all rankings are treated alike: how many edges has the
shortest prefix whose KL is at most the bound, on examples that were not searched? Closed edges deliver what
they do on the corrupted prompt; there is no sweep. Edges that change nothing are in nobody's ranking: those
on no path from the embedding to the logits, and heads without an open attention edge are no path.

The tasks are `carry`, `last_digit` and the last digit of ordinary problems (`addition`). Cells are edges of
the dense and of the sparse model, then CPU seconds of one search, the mean of all.
"""

import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

import circuits
from circuits import CircuitConfig, Problem
from experiments.circuit_curve import attribution
from model import evaluating
from support import command_line
from support.command_line import UserError, option
from support.files import make_folder
from support.report import side_by_side

PACKAGES = "auto-circuit==1.0.1 transformer-lens==2.15.4 transformers<5 narwhals torch==2.13.0".split()
TASKS = "carry", "last_digit", "addition"
ENDS = {"embed": "Resid Start", "logits": "Resid End"}


@dataclass
class PeerConfig:
    dense: str = option("out/addition/dense.pt", "the dense model")
    sparse: str = option("out/addition/sparse.pt", "the sparse model")
    bound: float = option(0.01, "KL(full model || circuit) at most, nats", above=0)
    steps: int = option(400, "steps of every search", at_least=1)
    examples: int = option(500, "pairs of prompts to search on, and others to score on", at_least=25)
    seed: int = option(0, "of the examples and of the searches", at_least=0, below=2**31)


def call(python, *words):
    code = subprocess.run([python, *map(str, words)]).returncode
    if code:
        raise UserError(f"{python} {' '.join(map(str, words))} ended with code {code}: see above")


def environment(folder):
    """The Python of an environment that has PACKAGES, made if it is not there. Raises UserError."""
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        print(f"making {folder}, which takes minutes", flush=True)
        call(sys.executable, "-m", "venv", "--clear", folder)
        call(python, "-m", "pip", "install", "--quiet", *PACKAGES)
        complete.touch()
    return python


def peer_name(node):
    """What auto-circuit calls a writer or a reader: a1.h2.q is A1.2.Q, m3 is MLP 3."""
    if node.startswith("m"):
        return f"MLP {node[1:]}"
    return ENDS.get(node) or node.replace(".h", ".").upper()


def ranking_of(graph, scores):
    """{edge: score} of auto-circuit as (R, W, 1). Raises UserError if its edges are not the graph's."""
    named = lambda w, r: f"{peer_name(graph.writers[w])}->{peer_name(graph.readers[r])}"
    places = {named(w, r): (r, w) for r, w in graph.edges.nonzero().tolist()}
    if places.keys() != scores.keys():
        raise UserError(f"{len(scores)} edges there are not the {len(places)} here: delete the environment")
    ranking = torch.zeros(*graph.edges.shape, 1)
    for name, place in places.items():
        ranking[place] = scores[name]
    return ranking


def timed(function, *args):
    started = time.process_time()
    return function(*args), time.process_time() - started


def edges_and_seconds(model, searched, scored, peer, config):
    """{way: (edges at the bound, CPU seconds)} of one model on one task. peer: {way: (scores, seconds)}."""
    problem, before = timed(Problem, model, *searched[:3])
    other = Problem(model, *scored[:3])
    problem.candidates = other.candidates = problem.candidates | other.candidates
    pruned = timed(circuits.search, problem, config.bound, config.steps, config.seed, 32)
    attributed = timed(attribution, problem, searched.answers, searched.wrong)
    ways = {"edge pruning": pruned, "attribution": attributed}
    rankings = {way: (ranking, before + seconds) for way, (ranking, seconds) in ways.items()}
    for way, (scores, seconds) in peer.items():
        rankings[f"auto-circuit, {way}"] = ranking_of(problem.graph, scores), seconds
    fits = lambda mask: other.fits(mask, config.bound)
    return {way: (int(other.short_prefix(r, fits).sum()), seconds) for way, (r, seconds) in rankings.items()}


def main(argv):
    config = command_line.parse(PeerConfig(), argv, __doc__)
    folder, tasks = make_folder("out/peer"), {}
    for name in TASKS:
        models, _, halves = circuits.open_task(CircuitConfig((name,), device="cpu", **asdict(config)))
        last = lambda t: {key: getattr(t, key)[:, -1:] for key in ("positions", "answers", "wrong")}
        tasks[name] = [half._replace(**last(half)) for half in halves]
    python = environment(folder / "env")
    for name, model in models.items():
        model.save_pretrained(folder / name, layout="transformer_lens")
    pairs = {name: (t.clean, t.corrupted, t.answers, t.wrong) for name, (t, _) in tasks.items()}
    torch.save(pairs, folder / "pairs.pt")
    call(python, Path(__file__).with_name("peer_scores.py"), folder, config.steps, config.seed)
    peers, found = torch.load(folder / "scores.pt"), {}
    for (task, name), peer in peers.items():
        with evaluating(models[name]):
            found[task, name] = edges_and_seconds(models[name], *tasks[task], peer, config)
    rows = {}
    for way in found["carry", "dense"]:
        rows[way] = {task: " / ".join(f"{found[task, name][way][0]}" for name in models) for task in TASKS}
        rows[way]["CPU s"] = f"{sum(ways[way][1] for ways in found.values()) / len(found):.1f}"
    columns = {name: {} for name in (*TASKS, "CPU s")}
    print("\n".join(side_by_side(columns, {}, 40, rows.items())))


if __name__ == "__main__":
    command_line.run(main)
