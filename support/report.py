"""
What a reader sees of a model: its figures on the validation split, and the lines and tables that show them.

Two counts of edges, never mixed: *expected*, the gates' open probabilities, and *hard*, the edges whose
deterministic gate is above zero. Claims are made with hard edges. Both are fractions of the causal pairs
(key <= query) over all layers and heads.
"""

import dataclasses
from pathlib import Path

import torch

from gates import AttentionStats
from model import evaluating
from support.command_line import UserError
from support.files import damage_named, read_json
from support.ranks import device_name

ROWS = {  # figure: (label, format)
    "loss": ("loss, nats", ".4f"),
    "bound": ("bound", ".4f"),
    "over": ("OVER IT BY", ".4f"),
    "accuracy": ("accuracy", ".2%"),
    "edges_hard": ("hard edges", ".2%"),
    "edges_expected": ("expected edges", ".2%"),
    "rows_empty": ("empty rows", ".1%"),
    "mass_removed": ("mass removed", ".1%"),
}


def evaluate(model, data, batch_size, n_batches=None):
    """The model on the validation split (its first n_batches, if given) with deterministic gates, as a dict:

    loss (nats per predicted token), edges_hard and edges_expected (fractions of causal pairs), rows_empty
    (fraction of queries), mass_removed (fraction of the attention weight that closed edges held),
    edges_per_head (L x H hard fractions), and on toy tasks accuracy: the fraction of examples whose whole
    greedy answer is right. part: what a long split was cut to, in words."""
    n_tokens = n_rows = n_right = 0
    loss_sum = stats_sum = 0.0
    with evaluating(model):
        for x, y in data.sequential("val", batch_size, n_batches):
            logits, loss, stats = model(x, y, return_stats=True)
            wanted = (y >= 0).sum().item()
            n_tokens, n_rows = n_tokens + wanted, n_rows + len(x)
            loss_sum += loss.item() * wanted
            stats_sum = stats_sum + torch.stack(stats).cpu().double() * len(x)  # (figures, L, H)
            # the greedy answer is right where each token is the likeliest after the right ones before it
            n_right += ((logits.argmax(-1) == y) | (y < 0)).all(dim=1).sum().item()
    mean = AttentionStats(*(stats_sum / n_rows))
    result = {
        "loss": loss_sum / n_tokens,
        **({"accuracy": n_right / n_rows} if data.is_task else {}),
        "edges_hard": mean.hard_edges.mean().item(),
        "edges_expected": mean.expected_edges.mean().item(),
        "rows_empty": mean.empty_rows.mean().item(),
        "mass_removed": mean.mass_removed.mean().item(),
        "edges_per_head": mean.hard_edges.tolist(),
    }
    if part := data.part("val"):
        result["part"] = part
    return result


def result_line(name, result):
    """What `evaluate` found, in one line."""
    words = f"{name} loss {result['loss']:.4f}"
    if "accuracy" in result:
        words += f"  accuracy {result['accuracy']:.2%}"
    if result["edges_hard"] < 1:
        words += f"  hard edges {result['edges_hard']:.2%}, expected {result['edges_expected']:.2%}"
        words += f"  empty rows {result['rows_empty']:.1%}"
    return words


def progress_line(line, steps, spent):
    """A line of log.jsonl for the terminal. steps: of the whole phase; spent: seconds so far."""
    words = f"{line['phase']:7} {line['step']:>6}/{steps}  loss {line['loss']:.4f}"
    if "bound" in line:
        words += f"  held out {line['held_out_loss']:.4f} (bound {line['bound']:.4f})"
        words += f"  multiplier {line['multiplier']:<5.3g}"
        words += f"  edges {line['expected_edges']:6.2%} expected, {line['hard_edges']:6.2%} hard"
    minutes, seconds = divmod(round(spent / line["step"] * (steps - line["step"])), 60)
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    return f"{words}  lr {line['learning_rate']:.1e}  {speed}  {minutes}:{seconds:02d} left"


def summarise(config, phases, results, device):
    """The contents of summary.json. config: TrainConfig; phases: {name: how it was trained}; results: {name:
    what evaluate found}."""
    sparse = results["sparse"]
    bound = results["dense"]["loss"] + config.loss_tolerance
    summary = {f"{name}_loss": result["loss"] for name, result in results.items()}
    summary |= {"bound": bound, "within_bound": sparse["loss"] <= bound}
    summary |= {key: phases["sparse"][key] for key in ("training_bound", "training_loss")}
    summary |= {key: sparse[key] for key in ("edges_hard", "edges_expected", "rows_empty", "edges_per_head")}
    if "accuracy" in sparse:
        summary |= {f"{name}_accuracy": result["accuracy"] for name, result in results.items()}
    if "part" in sparse:
        summary["part"] = sparse["part"]
    for key in ("steps", "seconds", "tokens_per_second"):
        summary[key] = {name: round(phase.get(key, 0)) for name, phase in phases.items()}
    return summary | {"device": device_name(device), "config": dataclasses.asdict(config)}


def read_summary(folder):
    """The contents of a run's summary.json. Raises UserError for a folder without one, and for a
    damaged one."""
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run: give one that train.py wrote")
    with damage_named(path, "delete it, or give another folder"):
        summary = read_json(path)
        summary["config"]  # KeyError: it is another file
        return summary


def open_heads(summary):
    """How many heads have an open edge, of summary.json."""
    return sum(fraction > 0 for layer in summary["edges_per_head"] for fraction in layer)


def read_summaries(folders):
    """{Path: contents of summary.json} of runs. Raises UserError also where two folders have one name."""
    summaries = {Path(folder): read_summary(folder) for folder in folders}
    if len({folder.name for folder in summaries}) < len(folders):
        raise UserError(f"two of {', '.join(folders)} have one name: rename a folder")
    return summaries


def missed_bound(summary):
    """A sentence with the remedy, in a list, if a bound of summary.json was missed; else []."""
    over = summary["sparse_loss"] - summary["bound"]
    held_out = summary["training_loss"] - summary["training_bound"]
    words = f"the sparse model is over its bound by {over:.4f} nats"
    remedy = "give a larger --multiplier_max, more --sparsify_steps or a larger --loss_tolerance"
    if over <= 0:
        words = f"on the held-out data that the bound is enforced on, the loss is {held_out:.4f} nats over it"
    elif held_out <= 0:  # what moves the multiplier is content
        words += ", though not on the held-out data"
        remedy = "give a larger --loss_tolerance, or for a text --distill"
    return [f"note: {words}: {remedy}"] if max(over, held_out) > 0 else []


def table(results, bound=None, extra=()):
    """Models side by side, then the hard edges of every layer and head of the one named sparse.

    results: {name: what evaluate found}; bound: nats, shown under sparse; extra: as in side_by_side."""
    columns = dict(results)
    if bound is not None:
        over = results["sparse"]["loss"] - bound
        columns["sparse"] = results["sparse"] | {"bound": bound} | ({"over": over} if over > 0 else {})
    lines = side_by_side(columns, ROWS, 16, extra)
    lines += [f"all on {part}" for part in dict.fromkeys(r["part"] for r in results.values() if "part" in r)]
    if "sparse" in results:
        heads = results["sparse"]["edges_per_head"]
        lines += ["", "sparse: hard edges left, % of each head's causal pairs"]
        lines.append(f"{'':10}" + "".join(f"{f'head {h}':>9}" for h in range(len(heads[0]))))
        for layer, row in enumerate(heads):
            lines.append(f"{f'layer {layer}':10}" + "".join(f"{100 * fraction:9.2f}" for fraction in row))
    return "\n".join(lines)


def side_by_side(columns, forms, width, extra=()):
    """The lines of a table. columns: {name: figures}; forms: {figure: (label, format)}; width: of the labels;
    extra: more rows, (label, {name: text})."""
    rows = [("", {name: name for name in columns})]
    for key, (label, form) in forms.items():
        rows.append((label, {name: format(f[key], form) for name, f in columns.items() if key in f}))
    cells = lambda row: "".join(f"{row.get(name, ''):>{max(12, len(name) + 2)}}" for name in columns)
    return ["", *(f"{label:{width}}{cells(row)}" for label, row in [*rows, *extra] if row)]
