"""
The study behind the defaults: which gate, which price of an edge, which multiplier; and what simpler methods reach.

    python results/study.py                              train all variants that have no result yet, one after the other
    python results/study.py --lanes=2                    two at a time, each with one thread
    python results/study.py --only=price,cap8            these tables or variants only
    python results/study.py --tables                     print the tables of what is there, and draw results/gates.png

A variant is one edit of the method: fields of TrainConfig, and a function that puts something else in one place of the
project's modules. All variants post-train the same dense models, `out/addition/dense.pt` and `out/shakespeare_char/dense.pt`,
with the same data, for the same number of steps. Their checkpoints in out/study only make sense to this file.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file sees the project, too

import torch
import torch.nn.functional as F

import config as command_line
import constrained
import gates
import model
import plots
import train
from config import UserError, option
from data.dataset import Dataset
from report import evaluate
from resume import read_log

# What every variant starts from: the CPU recipes, with these fields as they were when the study was made.
BASE = dict(
    gate="hard_concrete",
    gate_input="score",
    gate_bias=5.0,
    loss_tolerance=0.01,
    multiplier_max=2.0,
    multiplier_rate=0.02,
    sparsify_steps=2500,
    control=False,
    plot_text="",
    device="cpu",
)
DATASETS = {
    "addition": dict(batch_size=128, learning_rate=6e-3, gate_learning_rate=6e-2, min_lr=3e-4, multiplier_scale=0.01),
    "shakespeare_char": dict(batch_size=24, learning_rate=3e-3, gate_learning_rate=3e-2, min_lr=1.5e-4, multiplier_scale=0.05),
}


# ---------------------------------------------------------------------------------------------------------------------
# The edits


def hard_concrete(**settings):
    """A hard-concrete gate with other settings than the project's."""
    gates.GATES["hard_concrete"] = partial(gates.HardConcrete, **{"cutoff": 0.5, **settings})


def sealed():
    """Closed keys keep their place in the softmax but no longer tell what they hold: their scores are replaced by the batch's
    mean score of the same head, query and key position. A model that hears only open keys does not mind."""

    def attention(q, k, v, bias, gate, training, u=None, gate_q=None, gate_k=None):
        scores = gates.causal_scores(q, k)
        _, log_alpha = gates.attention_pattern(q, k, bias, gate_q, gate_k)
        z = gate.deterministic(log_alpha)
        pattern = torch.where(z > 0, scores, scores.mean(dim=0, keepdim=True)).softmax(dim=-1)
        return (pattern * z) @ v, gates.attention_stats(pattern, log_alpha, gate)

    model.gated_attention = attention


def priced(penalty):
    """Another edge_penalty(gate, log_alpha)."""
    gates.edge_penalty = penalty


def multiplier(start=None, decay=0.9, proportional=0.0):
    """A multiplier that starts elsewhere, averages longer, or gets a proportional term: the price that the weights see is
    multiplier * exp(proportional * violation / scale), the violation clipped to one scale, the price to the clamp."""

    class Bound(constrained.LossBound):
        def __init__(self, bound, **settings):
            super().__init__(bound, **{**settings, "decay": decay})
            if start is not None:
                self.log_multiplier = math.log(start)

        @property
        def multiplier(self):
            violation = 0 if self.average is None else (self.average - self.bound) / self.scale
            log = self.log_multiplier + proportional * min(max(violation, -1), 1)
            return math.exp(min(max(log, self.log_min), self.log_max))

    train.LossBound = Bound


def loss_only():
    """No bound and no price: train for the loss alone."""

    class LossOnly(constrained.LossBound):
        def lagrangian(self, cost, loss):
            return loss

    train.LossBound = LossOnly


def trains(wanted):
    """Only parameters whose name contains one of these words train."""
    make_optimizer = train.make_optimizer

    def freeze(net, config, weight_decay):
        for name, p in net.named_parameters():
            p.requires_grad_(any(word in name for word in wanted))
        return make_optimizer(net, config, weight_decay)

    train.make_optimizer = freeze


class Masked(model.Attention):
    """No learned gates: attention keeps the edges that `edges(pattern)` marks."""

    softmax_over_edges = False

    def forward(self, x, cache=None):
        if self.gate is None:
            return super().forward(x, cache)
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        scores = gates.causal_scores(q, k)
        pattern = scores.softmax(dim=-1)
        with torch.no_grad():
            edges = self.edges(pattern) & gates.causal_mask(T, T, x.device)
        if self.softmax_over_edges:
            pattern = scores.masked_fill(~edges, torch.finfo(scores.dtype).min / 2).softmax(dim=-1)
        y = ((pattern * edges).to(v.dtype) @ v).transpose(1, 2).reshape(B, T, C)
        counted = torch.full_like(pattern, -20.0).masked_fill(edges, 20.0)
        return self.c_proj(y), gates.attention_stats(pattern, counted, self.gate)


def largest_weights(fraction):
    """This fraction of the causal pairs of every head and layer, those of largest attention weight in the sequence. A weight
    counts in multiples of its query's mean weight, or the first query, whose only weight is one, would always win."""

    class Attention(Masked):
        def edges(self, pattern):
            T = pattern.size(-1)
            flat = (pattern * torch.arange(1, T + 1, device=pattern.device)[:, None]).flatten(2)
            k = math.ceil(fraction * T * (T + 1) / 2)
            return torch.zeros_like(flat, dtype=torch.bool).scatter_(2, flat.topk(k).indices, True).view_as(pattern)

    model.Attention = Attention
    loss_only()


def window(width):
    """Head 0 of layer 0 reads the last `width` positions before its own, with a softmax over these; no other head reads."""
    created = itertools.count()  # a model creates its layers in order

    class Attention(Masked):
        softmax_over_edges = True

        def __init__(self, config):
            super().__init__(config)
            self.reads = next(created) % config.n_layer == 0

        def edges(self, pattern):
            back = torch.ones_like(pattern, dtype=torch.bool).triu(-width).tril(-1)
            return back & (torch.arange(pattern.size(1), device=pattern.device) == 0)[:, None, None] & self.reads

    model.Attention = Attention
    loss_only()


# ---------------------------------------------------------------------------------------------------------------------
# The variants


@dataclass
class Variant:
    text: str
    edit: Callable | None = None  # called before the run with nothing, puts something else into the project's modules
    fields: dict = None  # of TrainConfig
    datasets: tuple = tuple(DATASETS)
    seeds: tuple = (1, 2)
    lr_factor: float = 1.0  # times the dataset's learning rates
    priced: bool = True  # edges have a price; False: trained for the loss alone
    of: str = ""  # not trained, only evaluated: the weights of this variant, or of "dense"


def softplus_price(factor):
    return lambda gate, log_alpha: gate.open_probability(log_alpha) + factor * F.softplus(log_alpha)


VARIANTS = {
    "reference": Variant("the reference"),
    # what distribution
    "above0": Variant("the same weights, cutoff 0", partial(hard_concrete, cutoff=0.0), of="reference"),
    "above25": Variant("the same weights, cutoff 0.25", partial(hard_concrete, cutoff=0.25), of="reference"),
    "wide": Variant("hard concrete, stretched to (-0.5, 1.5)", partial(hard_concrete, gamma=-0.5, zeta=1.5)),
    "cold": Variant("hard concrete, temperature 1/3", partial(hard_concrete, beta=1 / 3)),
    "bernoulli": Variant("Bernoulli, straight-through", fields=dict(gate="bernoulli")),
    # what the gate sees
    "low_rank": Variant("own query and key, 16 dimensions", fields=dict(gate_input="low_rank")),
    "reference_sealed": Variant("the reference, sealed", sealed, of="reference"),
    "low_rank_sealed": Variant("`low_rank`, sealed", sealed, of="low_rank", fields=dict(gate_input="low_rank")),
    # what an edge costs
    "expected": Variant("P", partial(priced, softplus_price(0))),
    "softplus03": Variant("P + 0.3 softplus", partial(priced, softplus_price(0.3))),
    "softplus": Variant("softplus", partial(priced, lambda gate, log_alpha: F.softplus(log_alpha))),
    # how the multiplier moves
    "cap1": Variant("at most 1", fields=dict(multiplier_max=1.0)),
    "cap4": Variant("at most 4", fields=dict(multiplier_max=4.0)),
    "cap8": Variant("at most 8", fields=dict(multiplier_max=8.0)),
    "start01": Variant("starts at 0.1", partial(multiplier, start=0.1)),
    "rate3": Variant("moves 3 times as fast", fields=dict(multiplier_rate=0.06)),
    "slow": Variant("averages the loss over 100 steps", partial(multiplier, decay=0.99)),
    "proportional": Variant("with a proportional term", partial(multiplier, proportional=1.0)),
    "tolerance03": Variant("tolerance 0.03", fields=dict(loss_tolerance=0.03)),
    # which weights, how fast, how long
    "attention": Variant("attention and gates train, nothing else", partial(trains, ["attn"])),
    "gates": Variant("only the gates train", partial(trains, ["gate"])),
    "lr_half": Variant("half the learning rates", lr_factor=0.5),
    "lr_double": Variant("twice the learning rates", lr_factor=2.0),
    "steps2": Variant("5,000 steps", fields=dict(sparsify_steps=5000)),
    "steps4": Variant("10,000 steps", fields=dict(sparsify_steps=10_000)),
    # simpler ways to as few edges
    "top": Variant("largest weights of each head, not trained", partial(largest_weights, 0.0075), of="dense", seeds=(1,)),
    "top_trained": Variant("largest weights of each head, trained", partial(largest_weights, 0.0075), priced=False),
    "window": Variant("sliding window, trained", partial(window, 4), datasets=("shakespeare_char",), priced=False),
}
TABLES = {
    "distribution": ["reference", "above25", "above0", "wide", "cold", "bernoulli"],
    "input": ["reference", "low_rank", "reference_sealed", "low_rank_sealed"],
    "price": ["reference", "softplus03", "expected", "softplus"],
    "multiplier": ["cap1", "reference", "cap4", "cap8", "start01", "rate3", "slow", "proportional", "tolerance03"],
    "training": ["attention", "gates", "lr_half", "reference", "lr_double", "steps2", "steps4"],
    "baselines": ["reference", "top", "top_trained", "window"],
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def folder_of(dataset, name, seed):
    return ROOT / "out" / "study" / dataset / name / f"seed{seed}"


def config_of(dataset, name, seed):
    folder = folder_of(dataset, name, seed)
    fields = {**BASE, **DATASETS[dataset], **(VARIANTS[name].fields or {})}
    for rate in ("learning_rate", "gate_learning_rate", "min_lr"):
        fields[rate] *= VARIANTS[name].lr_factor
    return replace(
        train.RECIPES[dataset],
        **fields,
        seed=seed,
        init_from=str(ROOT / "out" / dataset / "dense.pt"),
        data_dir=str(ROOT / "data"),
        out_dir=str(folder),
        resume=(folder / "last.pt").is_file(),
    )


def run_one(dataset, name, seed):
    """One run, in this process: nothing of the edit outlives it."""
    variant = VARIANTS[name]
    hard_concrete()
    train.draw = lambda *args: []  # pictures would show the project's gates, not the variant's
    if variant.edit is not None:
        variant.edit()
    config = config_of(dataset, name, int(seed))
    if variant.of:
        evaluate_only(config, variant.of, int(seed))
    else:
        train.train(config)


def evaluate_only(config, of, seed):
    """Give the weights of the dense model, or of a variant's sparse one, this variant's attention, and write a summary."""
    path = config.init_from if of == "dense" else folder_of(config.dataset, of, seed) / "sparse.pt"
    data = Dataset(config.dataset, config.block_size, config.data_dir, "cpu")
    result = evaluate(model.GPT.from_pretrained(path, gate=config.gate), data, config.batch_size)
    summary = {"edges_hard": result["edges_hard"], "sparse_loss": result["loss"]}
    if "accuracy" in result:
        summary["sparse_accuracy"] = result["accuracy"]
    (Path(config.out_dir) / "summary.json").write_text(json.dumps(summary))


def finished(job):
    return (folder_of(*job) / "summary.json").is_file()


def train_all(jobs, lanes):
    """Run every job (dataset, variant, seed) without a summary.json, in processes of their own. Raises UserError, after the
    others are done, if some failed."""
    waiting, running, failed = [job for job in jobs if not finished(job)], {}, []
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if lanes > 1 else dict(os.environ)

    def ready(job):
        """Whether the weights that it needs are there."""
        of = VARIANTS[job[1]].of
        return of in ("", "dense") or finished((job[0], of, job[2]))

    try:
        while waiting or running:
            for job in [job for job in waiting if ready(job)][: lanes - len(running)]:
                waiting.remove(job)
                folder_of(*job).mkdir(parents=True, exist_ok=True)
                command = [sys.executable, __file__, "--run", *map(str, job)]
                print(time.strftime("%H:%M"), *job, f"({len(waiting)} waiting)", flush=True)
                with open(folder_of(*job) / "output.txt", "a") as output:
                    running[subprocess.Popen(command, env=environment, stdout=output, stderr=output)] = job
            if not running:
                failed += [f"{' '.join(map(str, job))} needs {VARIANTS[job[1]].of}: name it in --only, too" for job in waiting]
                break
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if process.returncode:
                    failed.append(f"{' '.join(map(str, job))} stopped: see {folder_of(*job) / 'output.txt'}")
    finally:  # on Ctrl-C: they save, and go on next time
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise UserError("\n".join(failed))


# ---------------------------------------------------------------------------------------------------------------------
# The tables and the picture

COLUMNS = {
    "hard edges, %": lambda run: f"{100 * run['edges_hard']:.2f}",
    "loss": lambda run: f"{run['sparse_loss']:.4f}",
    "accuracy, %": lambda run: f"{100 * run['sparse_accuracy']:.2f}" if "sparse_accuracy" in run else "",
    "training loss - bound": lambda run: f"{run['excess']:+.4f}" if run["lines"] else "",
    "last step at the largest price": lambda run: str(run["at_cap"]) if run["lines"] else "",
    "seconds": lambda run: str(run["seconds"]["sparse"]) if run["lines"] else "",
}


def runs_of(dataset, name):
    """The finished runs of one variant, one per seed: summary.json, and what log.jsonl says of the multiplier."""
    runs = []
    for seed in VARIANTS[name].seeds:
        folder = folder_of(dataset, name, seed)
        if not (folder / "summary.json").is_file():
            continue
        run = json.loads((folder / "summary.json").read_text())
        log = read_log(folder / "log.jsonl") if not VARIANTS[name].of else []
        run["lines"] = [line for line in log if line["phase"] == "sparse" and "multiplier" in line]
        if run["lines"]:
            last = run["lines"][-5:]
            run["excess"] = sum(line["loss"] - line["bound"] for line in last) / len(last)
            largest = 0.99 * run["config"]["multiplier_max"]
            run["at_cap"] = max((line["step"] for line in run["lines"] if line["multiplier"] > largest), default=0)
            if not VARIANTS[name].priced:
                run["at_cap"] = ""
        runs.append(run)
    return runs


def print_tables(tables):
    for dataset in DATASETS:
        for table in tables:
            rows = {name: runs_of(dataset, name) for name in TABLES[table]}
            if not any(rows.values()):
                continue
            print(f"\n**{table}, {dataset}**\n\n| variant | name | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
            for name, runs in rows.items():
                cells = [" / ".join(filter(None, map(cell, runs))) for cell in COLUMNS.values()]
                if runs:
                    print(f"| {VARIANTS[name].text} | `{name}` | {' | '.join(cells)} |")


def draw(path):
    """The picture of results/gates.md: edges while training of some variants, and where all end."""
    curves, finals = {}, {}
    for dataset in DATASETS:
        runs = {name: runs_of(dataset, name) for name in VARIANTS}
        if not runs["reference"]:
            raise UserError(f"{dataset} has no reference yet: run `python results/study.py --only=reference` first")
        curves[dataset] = {
            name: list(zip(*((line["step"], 100 * line["expected_edges"]) for line in runs[name][0]["lines"])))
            for name in ("cap8", "reference", "cap1", "low_rank", "bernoulli")
            if runs[name]
        }
        bound = runs["reference"][0]["dense_loss"] + BASE["loss_tolerance"]
        finals[dataset] = {
            name: [(100 * run["edges_hard"], run["sparse_loss"] <= bound) for run in runs[name]] for name in runs if runs[name]
        }
    print("\n" + str(plots.save(plots.comparison_figure(curves, finals), path)))


@dataclass
class StudyConfig:
    lanes: int = option(1, "runs at a time; with more than one, each gets one thread", at_least=1)
    only: str = option("", "tables or variants, separated by commas; empty: all tables")
    datasets: str = option(",".join(DATASETS), "separated by commas")
    seeds: str = option("1,2", "of the sparse phase, separated by commas")
    tables: bool = option(False, "train nothing; print the tables and draw the picture")

    def problems(self):
        known = {"only": [*TABLES, *VARIANTS], "datasets": list(DATASETS), "seeds": ["1", "2"]}
        return [
            f"--{field} names {word!r}: give some of {', '.join(words)}"
            for field, words in known.items()
            for word in listed(getattr(self, field))
            if word not in words
        ]


def listed(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def main(argv):
    if argv[:1] == ["--run"]:
        return run_one(*argv[1:])
    config = command_line.parse_or_help(StudyConfig(), argv, __doc__)
    words = listed(config.only) or list(TABLES)
    if config.tables:
        print_tables([word for word in words if word in TABLES])
        return draw(ROOT / "results" / "gates.png")
    jobs = [
        (dataset, name, int(seed))
        for seed in listed(config.seeds)
        for dataset in listed(config.datasets)
        for name in dict.fromkeys(name for word in words for name in TABLES.get(word, [word]))
        if int(seed) in VARIANTS[name].seeds and dataset in VARIANTS[name].datasets
    ]
    for dataset in {dataset for dataset, _, _ in jobs}:
        if not (ROOT / "out" / dataset / "dense.pt").is_file():
            raise UserError(f"out/{dataset}/dense.pt is not there: train it with `python train.py {dataset}`")
    train_all(jobs, config.lanes)


if __name__ == "__main__":
    command_line.run(main)
