"""
The study behind the defaults: which gate, which price of an edge, which multiplier; and what simpler methods
reach.

    python experiments/gate_study.py                     train all variants that have no result yet
    python experiments/gate_study.py reference cap8      these only
    python experiments/gate_study.py --tables            print the tables of docs/gates.md, of what is there

A variant is one edit of the method: fields of TrainConfig, and a function that puts something else in one
place of the project's modules. All variants post-train the same dense models, out/addition/dense.pt and
out/shakespeare_char/dense.pt. Their checkpoints in out/study only make sense to this file.
"""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script that sees the project

import torch
import torch.nn.functional as F

import constrained
import gates
import model
import train
from data.dataset import Dataset
from support import command_line
from support.command_line import UserError, arguments, option
from support.files import write_json
from support.report import evaluate
from support.runs import Run

# What every variant starts from: the CPU recipes, with these fields as they were when the study was made.
BASE = dict(
    gate="hard_concrete", gate_bias=5.0, loss_tolerance=0.01, multiplier_max=2.0, multiplier_rate=0.02,
    sparsify_steps=2500, control=False, plot_text="", device="cpu",
)  # fmt: skip
DATASETS = {
    "addition": dict(batch_size=128, learning_rate=6e-3, multiplier_scale=0.01, min_lr=3e-4),
    "shakespeare_char": dict(batch_size=24, learning_rate=3e-3, multiplier_scale=0.05, min_lr=1.5e-4),
}


# ------------------------------------------------------------------------------------------------------------
# The edits


def hard_concrete(**settings):
    """A hard-concrete gate with other settings than the project's."""
    gates.GATES["hard_concrete"] = partial(gates.HardConcrete, **{"cutoff": 0.5, **settings})


def priced(penalty):
    """Another edge_penalty(gate, log_alpha)."""
    gates.edge_penalty = penalty


def softplus_price(factor):
    priced(lambda gate, log_alpha: gate.open_probability(log_alpha) + factor * F.softplus(log_alpha))


def proportional():
    """The price that the weights see is multiplier * exp(violation / scale), clipped to the clamp."""

    class Proportional(constrained.LossBound):
        @property
        def multiplier(self):
            violation = 0 if self.average is None else (self.average - self.bound) / self.scale
            log = self.log_multiplier + min(max(violation, -1), 1)
            return math.exp(min(max(log, self.log_min), self.log_max))

    train.LossBound = Proportional


def loss_only():
    """No bound and no price: train for the loss alone."""

    class LossOnly(constrained.LossBound):
        def lagrangian(self, cost, loss):
            return loss

    train.LossBound = LossOnly


def only_attention_trains():
    make_optimizer = train.make_optimizer

    def freeze(net, config, weight_decay):
        for name, p in net.named_parameters():
            p.requires_grad_("attn" in name)
        return make_optimizer(net, config, weight_decay)

    train.make_optimizer = freeze


class OtherAttention(model.Attention):
    """Gated attention computed by `other(x, scores)` -> (pattern, log_alpha), both (B, H, T, T)."""

    def forward(self, x, cache=None):
        if self.gate is None:
            return super().forward(x, cache)
        q, k, v = self.qkv(x)
        pattern, log_alpha = self.other(x, gates.causal_scores(q, k))
        z = self.gate.sample(log_alpha) if self.training else self.gate.deterministic(log_alpha)
        y = ((pattern * z) @ v).transpose(1, 2).reshape(x.shape)
        return self.c_proj(y), gates.attention_stats(pattern, log_alpha, self.gate)


def low_rank(rank=16):
    """The gates see a query and a key of their own; keys of zeros, so that all gates start at their bias."""

    class Attention(OtherAttention):
        def __init__(self, config):
            super().__init__(config)
            if self.gate is not None:
                self.gate_qk = torch.nn.Linear(config.n_embd, 2 * config.n_head * rank, bias=False)

        def other(self, x, scores):
            B, T, _ = x.shape
            gate_q, gate_k = self.gate_qk(x).view(B, T, 2, self.n_head, rank).permute(2, 0, 3, 1, 4)
            return scores.softmax(dim=-1), gates.causal_scores(gate_q, gate_k) + self.gate_bias[:, None, None]

    initialise = model.GPT.initialise

    def with_keys_of_zeros(net, parameters):
        initialise(net, parameters)
        for name, p in parameters.items():
            if name.endswith("gate_qk.weight"):
                queries, keys = p.chunk(2)
                torch.nn.init.normal_(queries, std=net.config.n_embd**-0.5)
                torch.nn.init.zeros_(keys)

    model.Attention, model.GPT.initialise = Attention, with_keys_of_zeros


def sealed():
    """Closed keys keep their place in the softmax but no longer tell what they hold: their scores are
    replaced by the batch's mean score of the same head, query and key position. A model that hears only open
    keys does not mind."""
    base = model.Attention if issubclass(model.Attention, OtherAttention) else OtherAttention

    class Attention(base):
        def other(self, x, scores):
            is_low_rank = base is not OtherAttention
            log_alpha = super().other(x, scores)[1] if is_low_rank else scores + self.gate_bias[:, None, None]
            is_open = self.gate.deterministic(log_alpha) > 0
            return torch.where(is_open, scores, scores.mean(dim=0, keepdim=True)).softmax(dim=-1), log_alpha

    model.Attention = Attention


def fixed(log_alpha_of):
    """No learned gates: edges are open where log_alpha_of(layer, pattern) is; trained for the loss alone."""
    created = itertools.count()  # a model creates its layers in order

    class Attention(OtherAttention):
        def __init__(self, config):
            super().__init__(config)
            self.layer = next(created) % config.n_layer

        def other(self, x, scores):
            pattern = scores.softmax(dim=-1)
            with torch.no_grad():
                edges = log_alpha_of(self.layer, pattern) & model.causal_mask(x.size(1), x.size(1), x.device)
            if log_alpha_of is window:  # its softmax runs over its edges only
                pattern = scores.masked_fill(~edges, torch.finfo(scores.dtype).min / 2).softmax(dim=-1)
            return pattern, torch.full_like(pattern, -20.0).masked_fill(edges, 20.0)

    model.Attention = Attention
    loss_only()


def window(layer, pattern, width=4):
    """Head 0 of layer 0 reads the last `width` positions before its own; no other head reads."""
    back = torch.ones_like(pattern, dtype=torch.bool).triu(-width).tril(-1)
    return back & (torch.arange(pattern.size(1), device=pattern.device) == 0)[:, None, None] & (layer == 0)


def largest(layer, pattern, fraction=0.0075):
    """This fraction of the causal pairs of every head, those of largest weight in the sequence. A weight
    counts in multiples of its query's mean weight, or the first query, whose only weight is one, would
    always win."""
    T = pattern.size(-1)
    flat = (pattern * torch.arange(1, T + 1, device=pattern.device)[:, None]).flatten(2)
    k = math.ceil(fraction * T * (T + 1) / 2)
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(2, flat.topk(k).indices, True).view_as(pattern)


# ------------------------------------------------------------------------------------------------------------
# The variants


@dataclass
class Variant:
    text: str
    edit: object = None  # called before the run with nothing, puts something else into the project's modules
    fields: dict = None  # of TrainConfig
    of: str = ""  # not trained, only evaluated: the weights of this variant, or of "dense"
    lr_factor: float = 1.0  # times the dataset's learning rates


def both(*edits):
    return lambda: [edit() for edit in edits]


VARIANTS = {
    "reference": Variant("the reference"),
    # the distribution
    "above25": Variant("the same weights, cutoff 0.25", partial(hard_concrete, cutoff=0.25), of="reference"),
    "above0": Variant("the same weights, cutoff 0", partial(hard_concrete, cutoff=0.0), of="reference"),
    "wide": Variant("hard concrete, stretched to (-0.5, 1.5)", partial(hard_concrete, gamma=-0.5, zeta=1.5)),
    "bernoulli": Variant("Bernoulli, straight-through", fields=dict(gate="bernoulli")),
    # what the gate sees
    "low_rank": Variant("own query and key, 16 dimensions", low_rank),
    "reference_sealed": Variant("the reference, sealed", sealed, of="reference"),
    "low_rank_sealed": Variant("`low_rank`, sealed", both(low_rank, sealed), of="low_rank"),
    # the price of an edge
    "softplus03": Variant("P + 0.3 softplus", partial(softplus_price, 0.3)),
    "expected": Variant("P", partial(softplus_price, 0.0)),
    "softplus": Variant("softplus", partial(priced, lambda gate, log_alpha: F.softplus(log_alpha))),
    # the multiplier
    "cap1": Variant("at most 1", fields=dict(multiplier_max=1.0)),
    "cap4": Variant("at most 4", fields=dict(multiplier_max=4.0)),
    "cap8": Variant("at most 8", fields=dict(multiplier_max=8.0)),
    "proportional": Variant("with a proportional term", proportional),
    "tolerance03": Variant("tolerance 0.03", fields=dict(loss_tolerance=0.03)),
    # what trains, for how long
    "attention": Variant("attention and gates train, nothing else", only_attention_trains),
    "lr_double": Variant("twice the learning rates", lr_factor=2.0),
    "steps2": Variant("5,000 steps", fields=dict(sparsify_steps=5000)),
    # simpler ways to as few edges
    "top": Variant("largest weights of each head, not trained", partial(fixed, largest), of="dense"),
    "top_trained": Variant("largest weights of each head, trained", partial(fixed, largest)),
    "window": Variant("sliding window, trained", partial(fixed, window)),
}


SEEDS = (1, 2)  # of the sparse phase


def folder_of(dataset, name, seed):
    return ROOT / "out" / "study" / dataset / name / f"seed{seed}"


def run_one(dataset, name, seed):
    """One run, in a process of its own: nothing of the edit outlives it."""
    variant, folder = VARIANTS[name], folder_of(dataset, name, seed)
    hard_concrete()
    Run.draw = lambda *_: []  # pictures would show the project's gates, not the variant's
    if variant.edit is not None:
        variant.edit()
    fields = {**BASE, **DATASETS[dataset], **(variant.fields or {})}
    fields |= {rate: fields[rate] * variant.lr_factor for rate in ("learning_rate", "min_lr")}
    fields["gate_learning_rate"] = 10 * fields["learning_rate"]
    fields |= {"init_from": str(ROOT / "out" / dataset / "dense.pt"), "data_dir": str(ROOT / "data")}
    resume = (folder / "last.pt").is_file()
    config = replace(train.RECIPES[dataset], **fields, seed=seed, out_dir=str(folder), resume=resume)
    if not variant.of:
        train.train(config)
        return
    path = config.init_from if variant.of == "dense" else folder_of(dataset, variant.of, seed) / "sparse.pt"
    data = Dataset(dataset, config.block_size, config.data_dir, "cpu")
    result = evaluate(model.GPT.from_pretrained(path, gate=config.gate), data, config.batch_size)
    summary = {"edges_hard": result["edges_hard"], "sparse_loss": result["loss"]}
    write_json(summary | {"sparse_accuracy": result.get("accuracy")}, folder / "summary.json")


def print_row(dataset, name):
    """A row of a table of docs/gates.md, with a number per seed that is there."""
    found = []
    for folder in (folder_of(dataset, name, seed) for seed in SEEDS):
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text())
            cells = [f"{100 * summary['edges_hard']:.2f}", f"{summary['sparse_loss']:.4f}"]
            accuracy, training_loss = summary.get("sparse_accuracy"), summary.get("training_loss")
            cells.append(f"{100 * accuracy:.2f}" if accuracy is not None else "")
            cells.append(f"{training_loss - summary['training_bound']:+.4f}" if training_loss is not None else "")
            found.append(cells)
    if found:
        cells = " | ".join(" / ".join(filter(None, column)) for column in zip(*found))
        print(f"| {VARIANTS[name].text} | `{name}` | {cells} |")


@dataclass
class StudyConfig:
    names: tuple = arguments("variants", 0, 100)
    tables: bool = option(False, "train nothing, print the tables")

    def check(self):
        for name in self.names:
            if name not in VARIANTS:
                raise UserError(f"there is no variant {name!r}: choose some of {', '.join(VARIANTS)}")


def main(argv):
    if argv[:1] == ["--run"]:
        return run_one(argv[1], argv[2], int(argv[3]))
    config = command_line.parse(StudyConfig(), argv, __doc__)
    names = config.names or tuple(VARIANTS)
    for dataset in DATASETS:
        if config.tables:
            print(f"\n**{dataset}**: variant, name, hard edges (%), loss, accuracy (%), training loss - bound\n")
            for name in names:
                print_row(dataset, name)
            continue
        for name, seed in itertools.product(names, SEEDS):
            if not (folder_of(dataset, name, seed) / "summary.json").is_file():
                print(dataset, name, seed, flush=True)
                subprocess.run([sys.executable, __file__, "--run", dataset, name, str(seed)], check=True)


if __name__ == "__main__":
    command_line.run(main)
