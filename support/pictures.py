"""
Every picture of the project: each function takes numbers and returns a matplotlib figure; `save` writes it.

Colours are from Okabe and Ito's palette and matplotlib's "Blues", which colour-blind readers can tell apart.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Arc, FancyArrowPatch

from support.command_line import UserError

BLUE, RED, GREEN, PINK, LIGHT_BLUE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
HEADS = [BLUE, RED, GREEN, PINK, "#E69F00", LIGHT_BLUE, BLACK, "#999933"]
MOST_ARCS = 500  # of a layer
CLOSED = LinearSegmentedColormap.from_list("closed", ["#f0f0f0"] * 2)  # a causal pair without an edge
# from a visible blue up, so that an open edge of weight zero still differs from a closed one
WEIGHT = LinearSegmentedColormap.from_list("weight", plt.get_cmap("Blues")(np.linspace(0.22, 1.0, 256)))


def save(figure, path):
    """Write the figure to path, in the format of its ending, and close it. Raises UserError if that cannot
    be."""
    path = Path(path)
    try:
        if not path.suffix or not path.parent.is_dir():
            raise ValueError("no such folder, or no ending")
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:  # no permission; an ending that matplotlib does not know
        wanted = "give a name in an existing folder that ends in .png, .svg or .pdf"
        raise UserError(f"cannot write the picture {path} ({error}): {wanted}")
    finally:
        plt.close(figure)
    return path


def visible(text):
    """A token as an axis label: blanks and line ends get a mark, long tokens are cut."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$")
    return text if len(text) <= 8 else text[:7] + "…"


def colour(head):
    return HEADS[head % len(HEADS)]


def bare(axis, sides=("top", "bottom", "left", "right")):
    for side in sides:
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0)


def head_legend(figure, heads, place):
    lines = [Line2D([], [], color=colour(head), lw=2) for head in heads]
    names = [f"head {head}" for head in heads]
    figure.legend(lines, names, loc=f"outside {place}", ncols=8, frameon=False, fontsize=8)


def attention_figure(labels, records):
    """Attention of every head on one sequence, one block of panels per model, all on one colour scale.

    labels: T strings. records: {model's name: (weight, edges)}, arrays (L, H, T, T): effective attention
    weights (pattern times gate) and whether an edge is open. A cell is coloured where its edge is open and
    grey where it is closed; later keys are white. Rows are queries, columns are keys. Where cells are
    smaller than a letter, as with GPT-2's 144 heads, tokens are not written."""
    labels = [visible(label) for label in labels]
    n_layer, n_head, T, _ = next(iter(records.values()))[0].shape
    layers_per_row = min(n_layer, max(1, (8 if T <= 12 else 4) // n_head))  # long sequences need large panels
    n_rows, n_columns = -(-n_layer // layers_per_row), layers_per_row * n_head
    cell = 500 / n_columns / T  # points, a little less than that
    height = len(records) * (n_rows * 9.2 / n_columns + 0.55) + 0.5
    figure = plt.figure(figsize=(10, height), layout="constrained")
    blocks = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
    causal = np.tril(np.ones((T, T), dtype=bool))
    for block, (name, (weight, edges)) in zip(blocks, records.items()):
        fraction = edges.sum() / (n_layer * n_head * causal.sum())
        block.suptitle(f"{name}: {fraction:.1%} of the edges are open", fontsize=11, x=0.01, ha="left")
        axes = block.subplots(n_rows, n_columns, squeeze=False)
        for panel, axis in enumerate(axes.flat):
            bare(axis)
            layer, head = divmod(panel, n_head)
            if layer >= n_layer:
                axis.axis("off")
                continue
            axis.imshow(np.where(causal, 1.0, np.nan), cmap=CLOSED)
            shown = np.where(edges[layer, head], weight[layer, head], np.nan)
            image = axis.imshow(shown, cmap=WEIGHT, vmin=0, vmax=1)
            axis.set_title(f"layer {layer} head {head}" if n_columns <= 8 else f"{layer}.{head}", fontsize=7, pad=2)
            axis.set(xticks=[], yticks=[])
            if cell >= 2:
                style = dict(fontsize=float(np.clip(cell, 2.5, 7)), family="monospace")
                axis.set_xticks(range(T), labels, **style)
                axis.set_yticks(range(T), labels, **style)
            if panel == 0:
                axis.set_xlabel("key", fontsize=7, labelpad=1)
                axis.set_ylabel("query", fontsize=7, labelpad=1)
        bar = block.colorbar(image, ax=axes, shrink=0.6, pad=0.01, aspect=25)
        bar.set_label("attention weight", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def arcs_figure(labels, weight, edges):
    """The open edges of one sequence as arcs over its tokens, one strip per layer, the last layer on top.

    labels: T strings; weight, edges: (L, H, T, T) as in attention_figure. An arc runs from a key to the
    query that reads it, at its arrow head; a ring is a token that reads itself; the colour is the head, the
    width the attention weight. Of a layer with more than MOST_ARCS edges those with the largest weights are
    drawn."""
    n_layer, n_head, T, _ = weight.shape
    tall = [1.5 if edges[layer].any() else 0.45 for layer in reversed(range(n_layer))]  # inches
    size = (10, sum(tall) + 0.3 * n_layer + 0.4)
    figure, axes = plt.subplots(n_layer, 1, figsize=size, height_ratios=tall, squeeze=False, layout="constrained")
    for layer, axis in zip(reversed(range(n_layer)), axes[:, 0]):
        found = np.argwhere(edges[layer])
        heaviest = weight[layer][edges[layer]].argsort()[::-1][:MOST_ARCS]
        for head, query, key in found[np.sort(heaviest)]:
            style = dict(color=colour(head), lw=0.6 + 2.4 * weight[layer, head, query, key])
            shift = (head - (n_head - 1) / 2) * 0.5 / n_head  # heads side by side, so that none hides another
            if query == key:
                axis.add_patch(Arc((query + shift, 0.16), 0.16, 0.2, **style))
                continue
            middle, width = (query + key) / 2 + shift, query - key
            height = 2 * (0.25 + 0.72 * (width / max(T - 1, 1)) ** 0.7)  # longer ones rise higher
            axis.add_patch(Arc((middle, 0), width, height, theta2=180, **style))
            axis.plot(query + shift, 0.03, marker="v", color=style["color"], ms=5, clip_on=False)
        words = f"layer {layer}\n{len(found)} edge{'s' * (len(found) != 1)}"
        words += f"\n({MOST_ARCS} drawn)" * (len(found) > MOST_ARCS)
        axis.set_ylabel(words, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xlim=(-0.6, T - 0.4), ylim=(0, 1.05), yticks=[])
        style = dict(family="monospace", fontsize=float(np.clip(300 / T, 4, 13)))
        axis.set_xticks(range(T), [visible(label) for label in labels], **style)
        bare(axis, ("top", "left", "right"))
    head_legend(figure, [head for head in range(n_head) if edges[:, head].any()], "upper right")
    return figure


def training_figure(lines):
    """The sparse phase, step by step. lines: log.jsonl's, as dicts."""
    lines = [line for line in lines if line["phase"] == "sparse"]
    steps = [line for line in lines if "multiplier" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    column = lambda rows, key: [row[key] for row in rows]
    figure, axes = plt.subplots(3, 1, figsize=(10, 7), sharex=True, layout="constrained")
    top, middle, bottom = axes
    x = column(steps, "step")
    top.plot(x, column(steps, "loss"), color=BLUE, label="training loss, sampled gates")
    bound = "its bound: the dense model's training loss + tolerance"
    top.plot(x, column(steps, "bound"), color=RED, ls="--", label=bound)
    style = dict(ls="", marker="o", ms=4, color=GREEN, label="validation loss, deterministic gates")
    top.plot(column(evaluations, "step"), column(evaluations, "val_loss"), **style)
    losses = column(steps, "loss") + column(evaluations, "val_loss")
    spread = max(losses, default=1) > 10 * min(losses, default=1)  # of addition: from 0.1 to 0.001
    top.set(ylabel="loss (nats)", yscale="log" if spread else "linear")
    middle.plot(x, column(steps, "multiplier"), color=PINK)
    middle.set(ylabel="multiplier", yscale="log")
    bottom.plot(x, column(steps, "expected_edges"), color=LIGHT_BLUE, label="expected")
    bottom.plot(x, column(steps, "hard_edges"), color=BLACK, label="hard (deterministic gate > 0)")
    bottom.set(ylabel="open edges (fraction)", xlabel="step of the sparse phase", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    top.legend(frameon=False, fontsize=9)
    bottom.legend(frameon=False, fontsize=9)
    return figure


# Of edges by what reads them, of nodes by the first letter of their names.
EDGE_COLOURS = {"query": BLUE, "key": "#E69F00", "value": GREEN, "MLP or logits": "#7f7f7f"}
NODE_COLOURS = {"a": LIGHT_BLUE, "m": PINK, "e": BLACK, "l": BLACK}


def circuit_axes(names, n_layer, **options):
    """(figure, axes) with a column per model, whose rows are layers from bottom to top."""
    size = (10, 1.6 + 0.62 * (2 * n_layer + 1))
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained", **options)
    rows = ["embed", *(f"{kind} {layer}" for layer in range(n_layer) for kind in ("heads", "MLP")), "logits"]
    for axis in axes[0]:
        axis.set_yticks(range(2 * n_layer + 2), rows, fontsize=8)
        axis.set_ylim(-0.5, 2 * n_layer + 1.5)
        bare(axis)
    return figure, axes[0]


def circuits_figure(circuits, n_layer, n_head):
    """Circuits side by side, layers from bottom to top: a dot per head and MLP that takes part, a ring where
    one does not, and an arc per edge. circuits: {model's name: set of (writer, reader) names}."""
    places = {"embed": ((n_head - 1) / 2, 0), "logits": ((n_head - 1) / 2, 2 * n_layer + 1)}
    for layer in range(n_layer):
        places |= {f"a{layer}.h{head}": (head, 2 * layer + 1) for head in range(n_head)}
        places[f"m{layer}"] = (n_head + 0.4, 2 * layer + 2)
    figure, axes = circuit_axes(circuits, n_layer)
    for axis, (name, edges) in zip(axes, circuits.items()):
        used = {"embed", "logits"}
        for writer, reader in sorted(edges):
            node, _, part = reader.rpartition(".") if reader not in places else (reader, "", "")
            kind = {"q": "query", "k": "key", "v": "value"}.get(part, "MLP or logits")
            bend = {"q": 0.06, "k": 0, "v": -0.06}.get(part, 0.16)
            used |= {writer, node}
            axis.add_patch(FancyArrowPatch(
                places[writer], places[node], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                mutation_scale=6, color=EDGE_COLOURS[kind], lw=0.9, alpha=0.7, shrinkA=5, shrinkB=6, zorder=1,
            ))  # fmt: skip
        for node, (x, y) in places.items():
            shade = NODE_COLOURS[node[0]]
            style = dict(mfc=shade) if node in used else dict(mfc="white", alpha=0.35)
            axis.plot(x, y, "o", ms=9, color=shade, **style)
        axis.set_title(f"{name}: {len(edges)} edge{'s' * (len(edges) != 1)}", fontsize=11, loc="left")
        axis.set_xlim(-0.7, n_head + 1.1)
        axis.set_xticks(range(n_head), [f"head {head}" for head in range(n_head)], fontsize=8)
    lines = [Line2D([], [], color=shade, lw=2) for shade in EDGE_COLOURS.values()]
    names = [f"read by {kind}" for kind in EDGE_COLOURS]
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def positions_figure(labels, circuits, n_layer):
    """Circuits over the tokens of one prompt, one panel per model, layers from bottom to top.

    labels: T strings; circuits: {model's name: (edges, weight)}, edges a set of (writer, reader, position),
    weight (L, H, T, T) the attention weight of this prompt where a head of the circuit reads, else zero. A
    line that crosses columns is a head reading another token, its colour the head; a dot is a head or MLP
    that takes part at that position, and the grey lines are the edges between them."""
    T, gap, heads = len(labels), 0.65, set()  # gap: between what a head writes and what it reads, below
    figure, axes = circuit_axes(circuits, n_layer, sharey=True)
    for axis, (name, (edges, weight)) in zip(axes, circuits.items()):
        shift = lambda head, n=weight.shape[1]: (head - (n - 1) / 2) * 0.6 / n  # heads side by side in a column

        def place(node, position):
            if node in ("embed", "logits"):
                return position, 0 if node == "embed" else 2 * n_layer + 1
            layer, _, head = node[1:].partition(".h")
            if not head:
                return position, 2 * int(layer) + 2
            return position + shift(int(head.split(".")[0])), 2 * int(layer) + 1

        for writer, reader, position in edges:
            below = gap if "." in reader else 0
            (x0, y0), (x1, y1) = place(writer, position), place(reader, position)
            axis.plot([x0, x1], [y0, y1 - below], color="#999999", lw=0.6, zorder=1)
            axis.plot(x0, y0, "o", ms=4, color=NODE_COLOURS[writer[0]], zorder=2)
            style = dict(marker=".", ms=3, color="#999999") if below else dict(marker="o", ms=4)
            axis.plot(x1, y1 - below, zorder=2, **{"color": NODE_COLOURS[reader[0]], **style})
        for layer, head, query, key in zip(*np.nonzero(weight)):
            heads.add(int(head))
            style = dict(color=colour(head), lw=0.5 + 2.5 * weight[layer, head, query, key], zorder=3)
            x, y = [key + shift(head), query + shift(head)], 2 * layer + 1
            axis.plot(x, [y - gap, y], solid_capstyle="round", **style)
        reads = np.count_nonzero(weight)
        axis.set_title(f"{name}: {len(edges)} edges, heads read {reads} times", fontsize=10, loc="left")
        style = dict(family="monospace", fontsize=float(np.clip(150 / T, 4, 12)))
        axis.set_xticks(range(T), [visible(label) for label in labels], **style)
        axis.set_xlim(-0.6, T - 0.4)
    head_legend(figure, sorted(heads), "lower center")
    return figure


def curve_figure(curves):
    """Faithfulness against number of edges, one line per model and way to choose edges. curves: {model's
    name: {way: [(edges, faithfulness), ...]}}; the same ways for every model."""
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for shade, (name, ways) in zip(HEADS, curves.items()):
        for style, (way, points) in zip(("o-", "s--", "^:"), ways.items()):
            axis.plot(*zip(*sorted(points)), style, ms=5, color=shade, label=f"{name}, {way}")
    axis.axhline(1, color=BLACK, lw=0.6)
    axis.set(xlabel="effective edges of the circuit", ylabel="faithfulness (1: the full model, 0: no edge)")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure
