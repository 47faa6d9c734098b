"""
What a reader sees of a model: its figures on the validation split, and the lines and the table that show them.

Three counts of edges, never mixed: *expected*, the sum of the gates' open probabilities; *sampled*, in one training step;
*hard*, the edges whose deterministic gate is above zero. Claims are made with hard edges. All are fractions of the causal
(key <= query) pairs over all layers and heads.
"""

import dataclasses

import torch

from gates import AttentionStats


@torch.no_grad()
def evaluate(model, data, batch_size, n_batches=None):
    """The model on the validation split (its first n_batches, if given; of a split of more than a million tokens the part that
    `Dataset.sequential` takes) with deterministic gates, as a dict:

    loss (nats per predicted token), edges_hard and edges_expected (fractions of causal pairs), rows_empty (fraction of
    queries), mass_removed (fraction of the attention weight that closed edges held), edges_per_head (L x H hard fractions),
    and on toy tasks accuracy: the fraction of examples whose whole answer the model gets right greedily (each token likeliest
    given the right ones before it, which is the same). part: what the split was cut to, in words, where it was."""
    was_training = model.training
    model.eval()
    n_tokens = n_rows = n_right = 0
    loss_sum, stats_sum = 0.0, 0.0
    for x, y in data.sequential("val", batch_size, n_batches):
        logits, loss, stats = model(x, y, return_stats=True)
        wanted = (y >= 0).sum().item()
        n_tokens, n_rows = n_tokens + wanted, n_rows + len(x)
        loss_sum += loss.item() * wanted
        stats_sum = stats_sum + torch.stack(stats).cpu().double() * len(x)  # (figures, L, H)
        n_right += ((logits.argmax(-1) == y) | (y < 0)).all(dim=1).sum().item()
    model.train(was_training)
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
    """One step of log.jsonl in one line. steps: of the whole phase; spent: seconds so far."""
    words = [f"{line['phase']:7} {line['step']:>6}/{steps}  loss {line['loss']:.4f}"]
    if "bound" in line:
        words.append(f"(bound {line['bound']:.4f})  multiplier {line['multiplier']:<7.3g}")
        words.append(f"edges {line['expected_edges']:6.2%} expected, {line['hard_edges']:6.2%} hard")
    minutes, seconds = divmod(round(spent / line["step"] * (steps - line["step"])), 60)
    words.append(f"lr {line['learning_rate']:.1e}  {line['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(words) + f"  {minutes}:{seconds:02d} left"


def table(results, bound=None, extra=()):
    """Models side by side, then the hard edges of every layer and head of the one named sparse.

    results: {name: what evaluate found}; bound: nats, shown under sparse; extra: further rows (label, {name: text})."""
    rows = [("loss, nats", {name: f"{r['loss']:.4f}" for name, r in results.items()})]
    if bound is not None:
        rows.append(("bound", {"sparse": f"{bound:.4f}"}))
        if results["sparse"]["loss"] > bound:
            rows.append(("OVER IT BY", {"sparse": f"{results['sparse']['loss'] - bound:.4f}"}))
    if all("accuracy" in r for r in results.values()):
        rows.append(("accuracy", {name: f"{r['accuracy']:.2%}" for name, r in results.items()}))
    rows.append(("hard edges", {name: f"{r['edges_hard']:.2%}" for name, r in results.items()}))
    rows.append(("expected edges", {name: f"{r['edges_expected']:.2%}" for name, r in results.items()}))
    rows.append(("empty rows", {name: f"{r['rows_empty']:.1%}" for name, r in results.items()}))
    rows.append(("mass removed", {name: f"{r['mass_removed']:.1%}" for name, r in results.items()}))
    lines = side_by_side(results, [*rows, *extra], 16)
    parts = {result["part"]: None for result in results.values() if "part" in result}
    lines += [f"all on {part}" for part in parts]
    if "sparse" in results:
        heads = results["sparse"]["edges_per_head"]
        lines += ["", "sparse: hard edges left, % of each head's causal pairs"]
        lines.append(f"{'':10}" + "".join(f"{f'head {h}':>9}" for h in range(len(heads[0]))))
        for layer, row in enumerate(heads):
            lines.append(f"{f'layer {layer}':10}" + "".join(f"{100 * fraction:9.2f}" for fraction in row))
    return "\n".join(lines)


def side_by_side(names, rows, width):
    """The lines of a table with a column per name. rows: (label, {name: text}); width: of the labels, characters."""
    rows = [("", {name: name for name in names}), *rows]
    return ["", *(f"{label:{width}}" + "".join(f"{cells.get(name, ''):>12}" for name in names) for label, cells in rows)]


def summarise(config, is_task, phases, results):
    """The contents of summary.json. config: TrainConfig; phases: {name: train.Trained}; results: {name: from evaluate}."""
    sparse = results["sparse"]
    summary = {
        "dense_loss": results["dense"]["loss"],
        "bound": results["dense"]["loss"] + config.loss_tolerance,
        "sparse_loss": sparse["loss"],
        **{key: sparse[key] for key in ("edges_hard", "edges_expected", "rows_empty", "edges_per_head")},
        "training_bound": phases["sparse"].training_bound,
    }
    if is_task:
        summary |= {f"{name}_accuracy": result["accuracy"] for name, result in results.items()}
    if "control" in results:
        summary["control_loss"] = results["control"]["loss"]
    if "part" in sparse:
        summary["part"] = sparse["part"]
    for key in ("steps", "seconds", "tokens_per_second"):
        summary[key] = {name: round(getattr(phase, key)) for name, phase in phases.items()}
    return {**summary, "device": device_name(config.device), "config": dataclasses.asdict(config)}


def device_name(device):
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


CIRCUIT_ROWS = {  # figure of circuits.examine: (label, format)
    "edges": ("edges", ",d"),
    "heads": ("heads", "d"),
    "mlps": ("MLPs", "d"),
    "attention_edges": ("tokens read, per prompt", ",.1f"),
    "bound": ("bound on the KL, nats", ".4f"),
    "kl_searched": ("KL", ".4f"),
    "kl": ("KL, other examples", ".4f"),
    "logit_difference": ("logit difference", ".2f"),
    "faithfulness": ("faithfulness", ".4f"),
    "accuracy": ("accuracy", ".2%"),
    "full_accuracy": ("full model's accuracy", ".2%"),
    "preference": ("right above wrong", ".2%"),
    "seconds": ("seconds", ".0f"),
}


def circuits_table(reports):
    """The circuits of two models side by side. reports: {name: what circuits.examine says of the model}."""
    first = {name: report["seeds"][0] for name, report in reports.items()}
    rows = [("edges of the model", {name: f"{report['candidates']:,}" for name, report in reports.items()})]
    for key, (label, form) in CIRCUIT_ROWS.items():
        rows.append((label, {name: format(figures[key], form) for name, figures in first.items()}))
    for way in ("attribution", "random"):
        cells = {name: f"{report[way]['edges_at_the_bound']:,}" for name, report in reports.items() if way in report}
        rows += [(f"edges, {way}", cells)] if cells else []
    if all("overlap" in report for report in reports.values()):
        edges = {name: [figures["edges"] for figures in report["seeds"]] for name, report in reports.items()}
        rows.append(("edges, all seeds", {name: f"{min(n)} to {max(n)}" for name, n in edges.items()}))
        rows.append(("overlap of seeds", {name: f"{report['overlap']:.2f}" for name, report in reports.items()}))
    ratio = ratio_of(reports)
    return "\n".join(
        side_by_side(reports, rows, 24)
        + ["", f"edges dense / sparse: {'no edges to compare' if ratio is None else f'{ratio:.1f}'}"]
    )


def ratio_of(reports):
    """Mean edges over seeds, dense over sparse; None where the sparse circuits are empty."""
    dense, sparse = (sum(figures["edges"] for figures in reports[name]["seeds"]) for name in ("dense", "sparse"))
    return dense / sparse if sparse else None
