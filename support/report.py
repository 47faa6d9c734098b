"""
What a reader sees of a model: its figures on the validation split, and the lines and tables that show them.

Two counts of edges, never mixed: *expected*, the gates' open probabilities, and *hard*, the edges whose
deterministic gate is above zero. Claims are made with hard edges. Both are fractions of the causal (key <=
query) pairs over all layers and heads.
"""

import dataclasses

import torch

from gates import AttentionStats
from model import evaluating
from support.ranks import device_name


def evaluate(model, data, batch_size, n_batches=None):
    """The model on the validation split (its first n_batches, if given) with deterministic gates, as a dict:

    loss (nats per predicted token), edges_hard and edges_expected (fractions of causal pairs), rows_empty
    (fraction of queries), mass_removed (fraction of the attention weight that closed edges held),
    edges_per_head (L x H hard fractions), and on toy tasks accuracy: the fraction of examples whose whole
    greedy answer is right. part: what a long split was cut to, in words."""
    n_tokens = n_rows = n_right = 0
    loss_sum, stats_sum = 0.0, 0.0
    with evaluating(model):
        for x, y in data.sequential("val", batch_size, n_batches):
            logits, loss, stats = model(x, y, return_stats=True)
            wanted = (y >= 0).sum().item()
            n_tokens, n_rows = n_tokens + wanted, n_rows + len(x)
            loss_sum += loss.item() * wanted
            stats_sum = stats_sum + torch.stack(stats).cpu().double() * len(x)  # (figures, L, H)
            # each token likeliest given the right ones before it: then the greedy answer is right, and only
            # then
            n_right += ((logits.argmax(-1) == y) | (y < 0)).all(dim=1).sum().item()
    mean = AttentionStats(*(stats_sum / n_rows))
    result = {
        "loss": loss_sum / n_tokens,
        "edges_hard": mean.hard_edges.mean().item(),
        "edges_expected": mean.expected_edges.mean().item(),
        "rows_empty": mean.empty_rows.mean().item(),
        "mass_removed": mean.mass_removed.mean().item(),
        "edges_per_head": mean.hard_edges.tolist(),
    }
    if data.is_task:
        result["accuracy"] = n_right / n_rows
    if part := data.part("val"):
        result["part"] = part
    return result


def result_line(name, result):
    """What `evaluate` found, in one line."""
    words = [f"{name} loss {result['loss']:.4f}"]
    if "accuracy" in result:
        words.append(f"accuracy {result['accuracy']:.2%}")
    if result["edges_hard"] < 1:
        words.append(f"hard edges {result['edges_hard']:.2%}, expected {result['edges_expected']:.2%}")
        words.append(f"empty rows {result['rows_empty']:.1%}")
    return "  ".join(words)


def progress_line(line, steps, spent):
    """A line of log.jsonl for the terminal. steps: of the whole phase; spent: seconds so far."""
    words = [f"{line['phase']:7} {line['step']:>6}/{steps}  loss {line['loss']:.4f}"]
    if "bound" in line:
        words.append(f"(bound {line['bound']:.4f})  multiplier {line['multiplier']:<7.3g}")
        words.append(f"edges {line['expected_edges']:6.2%} expected, {line['hard_edges']:6.2%} hard")
    minutes, seconds = divmod(round(spent / line["step"] * (steps - line["step"])), 60)
    words.append(f"lr {line['learning_rate']:.1e}  {line['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(words) + f"  {minutes}:{seconds:02d} left"


def summarise(config, phases, results, device):
    """The contents of summary.json. config: TrainConfig; phases: {name: how it was trained}; results: {name:
    what evaluate found}."""
    sparse, trained = results["sparse"], phases["sparse"]
    bound = results["dense"]["loss"] + config.loss_tolerance
    summary = {
        "dense_loss": results["dense"]["loss"],
        "bound": bound,
        "sparse_loss": sparse["loss"],
        "within_bound": sparse["loss"] <= bound,
        "training_bound": trained["training_bound"],
        "training_loss": trained["training_loss"],
        **{key: sparse[key] for key in ("edges_hard", "edges_expected", "rows_empty", "edges_per_head")},
    }
    if "accuracy" in sparse:
        summary |= {f"{name}_accuracy": result["accuracy"] for name, result in results.items()}
    if "control" in results:
        summary["control_loss"] = results["control"]["loss"]
    if "part" in sparse:
        summary["part"] = sparse["part"]
    for key in ("steps", "seconds", "tokens_per_second"):
        summary[key] = {name: round(phase.get(key, 0)) for name, phase in phases.items()}
    return {**summary, "device": device_name(device), "config": dataclasses.asdict(config)}


def missed_bound(summary):
    """A sentence with the remedy for the bound of a summary.json that was missed; [] if none was."""
    remedy = "give a larger --multiplier_max, more --sparsify_steps or a larger --loss_tolerance"
    over = summary["sparse_loss"] - summary["bound"]
    if over > 0:
        return [f"note: the sparse model is over its bound by {over:.4f} nats: {remedy}"]
    over = summary["training_loss"] - summary["training_bound"]
    if over > 0:
        return [f"note: with sampled gates, the training loss is {over:.4f} nats over its bound: {remedy}"]
    return []


def table(results, bound=None, extra=()):
    """Models side by side, then the hard edges of every layer and head of the one named sparse.

    results: {name: what evaluate found}; bound: nats, shown under sparse; extra: more rows (label, {name:
    text})."""
    forms = {"loss, nats": "{loss:.4f}", "accuracy": "{accuracy:.2%}", "hard edges": "{edges_hard:.2%}"}
    forms |= {"expected edges": "{edges_expected:.2%}", "empty rows": "{rows_empty:.1%}"}
    forms |= {"mass removed": "{mass_removed:.1%}"}
    if not all("accuracy" in r for r in results.values()):
        del forms["accuracy"]
    rows = [(label, {name: f.format(**r) for name, r in results.items()}) for label, f in forms.items()]
    if bound is not None:
        over = results["sparse"]["loss"] - bound
        rows.insert(1, ("bound", {"sparse": f"{bound:.4f}"}))
        rows[2:2] = [("OVER IT BY", {"sparse": f"{over:.4f}"})] if over > 0 else []
    lines = side_by_side(results, [*rows, *extra], 16)
    lines += [f"all on {part}" for part in {r["part"]: None for r in results.values() if "part" in r}]
    if "sparse" in results:
        heads = results["sparse"]["edges_per_head"]
        lines += ["", "sparse: hard edges left, % of each head's causal pairs"]
        lines.append(f"{'':10}" + "".join(f"{f'head {h}':>9}" for h in range(len(heads[0]))))
        for layer, row in enumerate(heads):
            lines.append(f"{f'layer {layer}':10}" + "".join(f"{100 * fraction:9.2f}" for fraction in row))
    return "\n".join(lines)


def side_by_side(names, rows, width):
    """The lines of a table with a column per name. rows: (label, {name: text}); width: of the labels."""
    rows = [("", {name: name for name in names}), *rows]
    cells = lambda row: "".join(f"{row.get(name, ''):>12}" for name in names)
    return ["", *(f"{label:{width}}{cells(row)}" for label, row in rows)]
