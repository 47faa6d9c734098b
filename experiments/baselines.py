"""
What a sceptic would try instead of gates that see the content, trained as long from the same dense model.

    python experiments/baselines.py out/addition out/recall     folders that train.py wrote

Prints a table and draws a picture, loss against edges. A baseline that is trained already is read, not
repeated, unless the code has changed; one that is interrupted starts anew.

Where a pattern is fixed, the softmax runs over its edges only. `learned` finds the best pattern: a gate of
its own for every (layer, head, offset), or (layer, head, query, key) of a toy task, trained under the sparse
model's own bound, but blind to content. `fixed` keeps the best of these edges, as many as the sparse model
has, and trains again without noise. `hand`: a pattern that a person wrote, for addition and recall. `top`:
the attention weights that are furthest above their query's mean, of all layers and heads; edges close slowly.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import train
from data.dataset import Dataset
from gates import AttentionStats, causal_scores, edge_penalty
from model import GPT
from support import command_line, pictures, ranks
from support.command_line import arguments, option
from support.files import read_json, write_json
from support.held_out import HeldOut
from support.report import evaluate, read_summaries, result_line
from support.runs import Run, code_of

BASELINES = ("top", "learned", "fixed", "hand")  # in this order: fixed takes the edges of learned
HAND = {  # layer, query, key, all of head 0
    # sums are formed where the second digits stand, and read by the positions that predict the answer
    "addition": [(0, 3, 0), (0, 4, 1), (1, 5, 3), (1, 5, 4), (1, 6, 3), (1, 6, 4), (1, 7, 4)],
    # every digit reads its letter, and the question reads every digit
    "recall": [(0, 1, 0), (0, 3, 2), (0, 5, 4), (0, 7, 6), (1, 8, 1), (1, 8, 3), (1, 8, 5), (1, 8, 7)],
}


@dataclass
class BaselineConfig:
    folders: tuple = arguments("one or more folders that train.py wrote", 1, 100)
    picture: str = option("out/baselines.png", "where to draw")


# ------------------------------------------------------------------------------------------------------------
# Attention: each takes what gates.gated_attention takes, and returns (y, AttentionStats)


def output(weights, v, edges, penalty=None, expected=None):
    """weights (B, H, T, T), zero where edges is False -> y and AttentionStats. penalty, expected: (H,)."""
    edges, T = edges.expand_as(weights).float(), weights.size(-1)
    hard = edges.sum(dim=(0, 2, 3)) / (len(weights) * T * (T + 1) / 2)  # (H,)
    empty = 1 - edges.amax(dim=-1).mean(dim=(0, 2))
    removed = 1 - weights.detach().sum(dim=-1).mean(dim=(0, 2))
    penalty = torch.zeros_like(hard) if penalty is None else penalty
    return weights @ v, AttentionStats(penalty, hard if expected is None else expected, hard, empty, removed)


def masked_attention(edges, q, k, v, bias, gate, training):
    """Attention along fixed edges, (H, T, T) bool."""
    scores = causal_scores(q, k).masked_fill(~edges, torch.finfo(torch.float32).min / 4)
    return output(scores.softmax(dim=-1) * edges, v, edges)


def learned_attention(log_alpha, q, k, v, bias, gate, training):
    """Attention through gates that do not see the content. log_alpha: a function -> (H, T, T)."""
    a, T = log_alpha(), q.size(2)
    z = gate.sample(a.expand(len(q), -1, -1, -1)) if training else gate.deterministic(a)
    z = z.tril()
    scores = causal_scores(q, k).masked_fill(z == 0, torch.finfo(torch.float32).min / 4)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * z
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)  # over the open edges only
    figures = edge_penalty(gate, a), gate.open_probability(a).detach()
    means = (figure.tril().sum(dim=(1, 2)) / (T * (T + 1) / 2) for figure in figures)  # (H,) each
    return output(weights, v, gate.deterministic(a).tril() > 0, *means)


class Top:
    """Edges whose weight is above their query's mean weight by more than a threshold, one for all layers and
    heads. (Without the mean the first queries, which have few keys, would take all.) The threshold moves
    until the wanted fraction is open, which falls from 1 to `fraction`, geometrically, over the first 70 % of
    n_passes forward passes."""

    LOWEST = math.log(1e-3)  # of the threshold's logarithm, where it starts

    def __init__(self, fraction, n_layer, n_passes):
        self.fraction, self.n_layer, self.n_passes = fraction, n_layer, n_passes
        self.log_threshold, self.n_done, self.seen = self.LOWEST, 0, []

    def __call__(self, q, k, v, bias, gate, training):
        pattern = causal_scores(q, k).softmax(dim=-1)
        n_keys = torch.arange(1, q.size(2) + 1, device=q.device)[:, None]  # of each query
        edges = pattern - 1 / n_keys > math.exp(self.log_threshold)
        y, stats = output(pattern * edges, v, edges)
        if training:
            self.seen.append(stats.hard_edges.mean().item())
            if len(self.seen) == self.n_layer:
                self.n_done += 1
                wanted = self.fraction ** min(1.0, self.n_done / (0.7 * self.n_passes))
                excess = sum(self.seen) / self.n_layer / wanted - 1
                moved = self.log_threshold + 0.05 * min(max(excess, -1), 1)
                self.log_threshold, self.seen = max(moved, self.LOWEST), []
        return y, stats


# ------------------------------------------------------------------------------------------------------------
# Patterns


class Learned(torch.nn.Module):
    """log_alpha of every (layer, head, offset), or of every (layer, head, query, key) of a toy task."""

    def __init__(self, config, T, by_offset):
        super().__init__()
        size = (T,) if by_offset else (T, T)
        # by that name, it has the gates' learning rate
        self.gate_bias = torch.nn.Parameter(torch.full((config.n_layer, config.n_head, *size), 2.0))
        self.offset = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0) if by_offset else None

    def forward(self, layer):
        a = self.gate_bias[layer]
        return a if self.offset is None else a[:, self.offset]  # (H, T, T)


def hand_edges(model, dataset, T):
    """(L, H, T, T) bool: what HAND has for this dataset."""
    edges = torch.zeros(model.config.n_layer, model.config.n_head, T, T, dtype=torch.bool)
    for layer, query, key in HAND[dataset]:
        edges[layer, 0, query, key] = True
    return edges


def best_edges(learned, n_layer, fraction, T):
    """(L, H, T, T) bool: the largest log_alpha, until the fraction is reached (offsets are taken whole)."""
    a = torch.stack([learned(layer).detach() for layer in range(n_layer)])
    later = torch.ones(T, T, dtype=torch.bool, device=a.device).triu(1)
    a = a.masked_fill(later, float("-inf"))
    n_edges = max(1, round(fraction * a.isfinite().sum().item()))
    return a >= a.flatten().topk(n_edges).values[-1]


# ------------------------------------------------------------------------------------------------------------
# Training


def gated_copy(dense, attends, gate):
    """The dense model, whose layers attend by these functions. gate: a name in gates.GATES."""
    model = GPT(replace(dense.config, gate=gate))
    model.load_state_dict(dense.state_dict(), strict=False)
    for block, attend in zip(model.h, attends):
        block.attn.attend = attend
    return model


def train_baselines(folder, summary):
    """Train the baselines that a folder lacks. Returns {name: what evaluate found}."""
    known = train.TrainConfig.__dataclass_fields__.keys() & summary["config"].keys()
    config = train.TrainConfig(**{name: summary["config"][name] for name in known})
    data = Dataset(config.dataset, config.block_size, config.data_dir, ranks.find_device(config.device))
    out = folder / "baselines"
    dense = GPT.from_pretrained(folder / "dense.pt").to(data.device)
    fraction = summary["edges_hard"]
    T, n_layer = data.sequence_tokens, dense.config.n_layer
    learned = Learned(dense.config, T, by_offset=not data.is_task).to(data.device)
    files = "experiments/baselines.py", "train.py", "gates.py", "constrained.py", "model.py"
    of_what = {"edges": fraction, "dense_loss": summary["dense_loss"], "code": code_of(*files)}
    results = {}
    for name in BASELINES:
        if name == "hand" and (config.dataset not in HAND or n_layer < 2):
            continue
        path = out / f"{name}.json"
        if path.is_file() and of_what.items() <= read_json(path).items():
            results[name] = read_json(path)
            continue
        print(f"{folder}: {name}, {fraction:.2%} of the edges")
        run = Run(replace(config, out_dir=str(out / name)), data, data.device, None, [])
        if name == "top":
            n_passes = config.sparsify_steps * config.gradient_accumulation_steps
            attends = [Top(fraction, n_layer, n_passes)] * n_layer
        elif name == "learned":
            attends = [partial(learned_attention, partial(learned, layer)) for layer in range(n_layer)]
        elif name == "fixed":
            learned.load_state_dict(torch.load(out / "learned_gates.pt", weights_only=True))
            attends = [partial(masked_attention, e) for e in best_edges(learned, n_layer, fraction, T)]
        else:
            edges = hand_edges(dense, config.dataset, T).to(data.device)
            attends = [partial(masked_attention, e) for e in edges]
        model = gated_copy(dense, attends, config.gate).to(data.device)
        teacher = dense if config.distill else None
        if name == "learned":  # under the sparse model's bound; the others for the loss alone
            model.learned = learned  # its parameters train, too
            train.fit(run, name, model, HeldOut(run, dense), teacher)
            torch.save(learned.state_dict(), out / "learned_gates.pt")
        else:
            train.fit(run, name, model, teacher=teacher)
        (run.folder / f"{name}.pt").unlink()  # it lacks the attention
        results[name] = {**of_what, **evaluate(model, data, config.batch_size)}
        write_json(results[name], path)
    return results


def main(argv):
    options = command_line.parse(BaselineConfig(), argv, __doc__)
    panels = {}
    for folder, summary in read_summaries(options.folders).items():
        found = train_baselines(folder, summary)
        sparse = {"loss": summary["sparse_loss"], **summary, "accuracy": summary.get("sparse_accuracy")}
        found = {"sparse": {key: value for key, value in sparse.items() if value is not None}, **found}
        panels[folder.name] = summary, found
        print(f"\n{folder}: dense {summary['dense_loss']:.4f}, bound {summary['bound']:.4f}")
        print("\n".join(result_line(f"{name:8}", result) for name, result in found.items()))
    print(f"\nwrote {pictures.save(pictures.baselines_figure(panels), options.picture)}")


if __name__ == "__main__":
    command_line.run(main)
