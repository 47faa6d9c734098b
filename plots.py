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

from config import UserError

HEAD_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
MOST_ARCS = 500
CLOSED = "#f0f0f0"  # a causal pair without an edge
# from a visible blue up, so that an open edge of weight zero still differs from a closed one
WEIGHT_COLOURS = LinearSegmentedColormap.from_list("weight", plt.get_cmap("Blues")(np.linspace(0.22, 1.0, 256)))


def save(figure, path):
    """Write the figure to path, in the format of its ending, and close it. Raises UserError if that cannot be."""
    path = Path(path)
    try:
        if not path.suffix:
            raise ValueError("its name has no ending")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:  # no such folder, no permission; an ending that matplotlib does not know
        raise UserError(
            f"cannot write the picture {path} ({error}): give a name in an existing folder that ends in .png, .svg or .pdf"
        )
    finally:
        plt.close(figure)
    return path


def visible(text):
    """A token as an axis label: blanks and line ends get a mark, long tokens are cut."""
    text = text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$")
    return text if len(text) <= 8 else text[:7] + "…"


def attention_figure(labels, records):
    """Attention of every head on one sequence, one block of panels per model, all on one colour scale.

    labels: T strings. records: {model's name: (weight, edges)}, arrays (L, H, T, T): effective attention weights (pattern
    times gate) and whether an edge is open. A cell is coloured where its edge is open and grey where it is closed; pairs
    that causality forbids are white. Rows are queries, columns are keys. Where a cell would be smaller than a letter, as with
    GPT-2's 144 heads, tokens are not written.
    """
    labels = [visible(label) for label in labels]
    n_layer, n_head, T, _ = next(iter(records.values()))[0].shape
    layers_per_row = min(n_layer, max(1, (8 if T <= 12 else 4) // n_head))  # longer sequences need larger panels
    n_rows, n_columns = -(-n_layer // layers_per_row), layers_per_row * n_head
    cell = 500 / n_columns / T  # points, a little less than that
    figure = plt.figure(figsize=(10, len(records) * (n_rows * 9.2 / n_columns + 0.55) + 0.5), layout="constrained")
    blocks = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
    for block, (name, (weight, edges)) in zip(blocks, records.items()):
        pairs = n_layer * n_head * T * (T + 1) / 2
        block.suptitle(f"{name}: {edges.sum() / pairs:.1%} of the edges are open", fontsize=11, x=0.01, ha="left")
        axes = block.subplots(n_rows, n_columns, squeeze=False)
        for panel, axis in enumerate(axes.flat):
            layer, head = divmod(panel, n_head)
            if layer >= n_layer:
                axis.axis("off")
                continue
            image = draw_head(axis, weight[layer, head], edges[layer, head])
            if cell < 2:
                axis.set(xticks=[], yticks=[])
                if layer == 0:
                    axis.set_title(f"head {head}", fontsize=7, pad=2)
                if head == 0:
                    axis.set_ylabel(f"layer {layer}", fontsize=7, labelpad=2)
                continue
            axis.set_title(f"layer {layer} head {head}", fontsize=7, pad=2)
            style = dict(fontsize=float(np.clip(cell, 2.5, 7)), family="monospace")
            axis.set_xticks(range(T), labels, **style)
            axis.set_yticks(range(T), labels, **style)
            axis.tick_params(length=0, pad=1)
            if panel == 0:
                axis.set_xlabel("key", fontsize=7, labelpad=1)
                axis.set_ylabel("query", fontsize=7, labelpad=1)
        if cell < 2:
            block.supxlabel("in each panel, columns are keys and rows are queries", fontsize=7)
        bar = block.colorbar(image, ax=axes, shrink=0.6, pad=0.01, aspect=25)
        bar.set_label("attention weight", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def draw_head(axis, weight, edges):
    """One head's T x T matrix: grey where a causal edge is closed, coloured where it is open."""
    T = len(weight)
    causal = np.tril(np.ones((T, T), dtype=bool))
    axis.imshow(np.where(causal, 1.0, np.nan), cmap=LinearSegmentedColormap.from_list("closed", [CLOSED, CLOSED]))
    image = axis.imshow(np.where(edges, weight, np.nan), cmap=WEIGHT_COLOURS, vmin=0, vmax=1)
    for side in axis.spines.values():
        side.set_visible(False)
    return image


def arcs_figure(labels, weight, edges):
    """The open edges of one sequence as arcs over its tokens, one strip per layer, the last layer on top.

    labels: T strings; weight, edges: (L, H, T, T) as in attention_figure. An arc runs from a key to the query that reads
    it, at its arrow head; a ring is a token that reads itself; the colour is the head, the width the attention weight. Of a
    layer with more than MOST_ARCS edges those with the largest weights are drawn.
    """
    labels = [visible(label) for label in labels]
    n_layer, n_head, T, _ = weight.shape
    tall = [1.5 if edges[layer].any() else 0.45 for layer in reversed(range(n_layer))]  # inches; a closed layer is a line
    figure, axes = plt.subplots(
        n_layer, 1, figsize=(10, sum(tall) + 0.3 * n_layer + 0.4), height_ratios=tall, squeeze=False, layout="constrained"
    )
    for layer, axis in zip(reversed(range(n_layer)), axes[:, 0]):
        found = np.argwhere(edges[layer])
        heaviest = weight[layer][edges[layer]].argsort()[::-1][:MOST_ARCS]
        for head, query, key in found[np.sort(heaviest)]:
            style = dict(color=HEAD_COLOURS[head % len(HEAD_COLOURS)], lw=0.6 + 2.4 * weight[layer, head, query, key])
            shift = (head - (n_head - 1) / 2) * 0.5 / n_head  # heads side by side, so that none hides another
            if query == key:
                axis.add_patch(Arc((query + shift, 0.16), 0.16, 0.2, **style))
            else:
                middle, width = (query + key) / 2 + shift, query - key
                axis.add_patch(Arc((middle, 0), width, 2 * height(width, T), theta2=180, **style))
                axis.plot(query + shift, 0.03, marker="v", color=style["color"], ms=5, clip_on=False)  # into the query
        n_open = len(found)
        words = f"layer {layer}\n{n_open} edge{'s' * (n_open != 1)}" + f"\n({MOST_ARCS} drawn)" * (n_open > MOST_ARCS)
        axis.set_ylabel(words, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xlim=(-0.6, T - 0.4), ylim=(0, 1.05), yticks=[])
        axis.set_xticks(range(T), labels, family="monospace", fontsize=float(np.clip(300 / T, 4, 13)))
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
    used = [head for head in range(n_head) if edges[:, head].any()]
    lines = [Line2D([], [], color=HEAD_COLOURS[head % len(HEAD_COLOURS)], lw=2) for head in used]
    figure.legend(lines, [f"head {head}" for head in used], loc="outside upper right", ncols=8, frameon=False, fontsize=8)
    return figure


def height(distance, T):
    """Of an arc over so many tokens: longer ones rise higher, none above 1."""
    return 0.25 + 0.72 * (distance / max(T - 1, 1)) ** 0.7


def training_figure(lines):
    """The sparse phase, step by step. lines: log.jsonl's, as dicts."""
    steps = [line for line in lines if line["phase"] == "sparse" and "multiplier" in line]
    evaluations = [line for line in lines if line["phase"] == "sparse" and "val_loss" in line]

    def column(rows, key):
        return [row[key] for row in rows]

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(10, 7), sharex=True, layout="constrained")
    top.plot(column(steps, "step"), column(steps, "loss"), color="#0072B2", label="training loss, sampled gates")
    top.plot(
        column(steps, "step"),
        column(steps, "bound"),
        color="#D55E00",
        ls="--",
        label="its bound: the dense model's training loss + tolerance",
    )
    top.plot(column(evaluations, "step"), column(evaluations, "val_loss"), "o", color="#009E73", ms=4,
             label="validation loss, deterministic gates")  # fmt: skip
    losses = column(steps, "loss") + column(evaluations, "val_loss")
    spread = max(losses, default=1) > 10 * min(losses, default=1)  # of addition: from 0.1 to 0.001
    top.set(ylabel="loss (nats)", yscale="log" if spread else "linear")
    middle.plot(column(steps, "step"), column(steps, "multiplier"), color="#CC79A7")
    middle.set(ylabel="multiplier", yscale="log")
    bottom.plot(column(steps, "step"), column(steps, "expected_edges"), color="#56B4E9", label="expected")
    bottom.plot(column(steps, "step"), column(steps, "hard_edges"), color="#000000", label="hard (deterministic gate > 0)")
    bottom.set(ylabel="open edges (fraction)", xlabel="step of the sparse phase", yscale="log")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    top.legend(frameon=False, fontsize=9)
    bottom.legend(frameon=False, fontsize=9)
    return figure


def comparison_figure(curves, finals):
    """Variants of the method against each other, one column per dataset.

    curves: {dataset: {variant: (steps, expected edges in percent)}}, drawn above, while training;
    finals: {dataset: {variant: [(hard edges in percent, whether the loss ended within its bound), one per seed]}}, below.
    """
    rows = max(map(len, finals.values()))
    figure, axes = plt.subplots(
        2, len(finals), figsize=(10, 3.2 + 0.2 * rows), height_ratios=[2.6, 0.2 * rows], squeeze=False, layout="constrained"
    )
    colours = {variant: HEAD_COLOURS[i] for i, variant in enumerate(dict.fromkeys(v for c in curves.values() for v in c))}
    for (above, below), dataset in zip(axes.T, finals):
        for variant, (steps, edges) in curves[dataset].items():
            above.plot(steps, edges, color=colours[variant], label=variant, lw=1.2)
        above.set(title=dataset, yscale="log", ylabel="expected edges, %", xlabel="step")
        above.legend(frameon=False, fontsize=8)
        for row, results in enumerate(finals[dataset].values()):
            for edges, within in results:
                below.plot(edges, row, "o", ms=6, color="#0072B2", mfc="#0072B2" if within else "none")
        below.set(xlabel="hard edges at the end, %", ylim=(len(finals[dataset]) - 0.5, -0.5))
        below.set_yticks(range(len(finals[dataset])), finals[dataset], fontsize=8, family="monospace")
        for axis in (above, below):
            axis.grid(alpha=0.3)
        below.set_xscale("log")
        for axis, labelled in ((above.yaxis, "235"), (below.xaxis, "123456789")):  # first digits of the ticks that get a label
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(lambda x, _, labelled=labelled: f"{x:.3g}" if f"{x:e}"[0] in labelled else "")
    style = dict(ls="", marker="o", color="#0072B2")
    handles = [Line2D([], [], **style), Line2D([], [], mfc="none", **style)]
    figure.legend(handles, ["loss within the bound", "over it"], loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


# Edges of a circuit by what reads them.
EDGE_COLOURS = {"query": "#0072B2", "key": "#E69F00", "value": "#009E73", "MLP or logits": "#7f7f7f"}
NODE_COLOURS = {"a": "#56B4E9", "m": "#CC79A7", "e": "#000000", "l": "#000000"}


def edge_colour(reader):
    """Of the edge into a reader such as a0.h1.q, m2 or logits."""
    kind = {"q": "query", "k": "key", "v": "value"}.get(reader.split(".")[-1], "MLP or logits")
    return EDGE_COLOURS[kind]


def circuits_figure(circuits, n_layer, n_head):
    """Circuits side by side, layers from bottom to top: a dot per head and MLP that takes part, a ring where one does not, and
    an arc per edge.

    circuits: {model's name: set of (writer, reader) names}.
    """
    middle = (n_head - 1) / 2
    places = {"embed": (middle, 0), "logits": (middle, 2 * n_layer + 1)}
    for layer in range(n_layer):
        places |= {f"a{layer}.h{head}": (head, 2 * layer + 1) for head in range(n_head)}
        places[f"m{layer}"] = (n_head + 0.4, 2 * layer + 2)
    figure, axes = plt.subplots(
        1, len(circuits), figsize=(10, 1.6 + 0.62 * (2 * n_layer + 1)), squeeze=False, layout="constrained"
    )
    for axis, (name, edges) in zip(axes[0], circuits.items()):
        used = {"embed", "logits"}
        for writer, reader in sorted(edges):
            node = reader if reader in places else reader.rsplit(".", 1)[0]
            used |= {writer, node}
            bend = {"q": 0.06, "v": -0.06}.get(reader[-1], 0) if "." in reader else 0.16
            arrow = FancyArrowPatch(
                places[writer], places[node], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=6,
                color=edge_colour(reader), lw=0.9, alpha=0.7, shrinkA=5, shrinkB=6, zorder=1,
            )  # fmt: skip
            axis.add_patch(arrow)
        for node, (x, y) in places.items():
            colour = NODE_COLOURS[node[0]]
            axis.plot(x, y, "o", ms=9, color=colour, mfc=colour if node in used else "white", alpha=1 if node in used else 0.35)
        axis.set_title(f"{name}: {len(edges)} edge{'s' * (len(edges) != 1)}", fontsize=11, loc="left")
        axis.set(xlim=(-0.7, n_head + 1.1), ylim=(-0.5, 2 * n_layer + 1.5))
        rows = ["embed"] + [f"{kind} {layer}" for layer in range(n_layer) for kind in ("heads", "MLP")] + ["logits"]
        axis.set_yticks(range(2 * n_layer + 2), rows, fontsize=8)
        axis.set_xticks(range(n_head), [f"head {head}" for head in range(n_head)], fontsize=8)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    lines = [Line2D([], [], color=colour, lw=2) for colour in EDGE_COLOURS.values()]
    names = [f"read by {kind}" for kind in EDGE_COLOURS]
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def curve_figure(curves):
    """Faithfulness against number of edges, one line per model and way to choose edges.

    curves: {model's name: {way: [(edges, faithfulness, bound), ...]}}; the same ways for every model, and the same numbers of
    edges for all of a model's ways, the first of which found them under these bounds.
    """
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for colour, (name, ways) in zip(HEAD_COLOURS, curves.items()):
        for style, marker, (way, points) in zip(("-", "--", ":"), "os^", ways.items()):
            edges, faithfulness, bounds = zip(*sorted(points))
            axis.plot(edges, faithfulness, style, marker=marker, ms=5, color=colour, label=f"{name}, {way}")
            if style == "-":
                for x, y, bound in zip(edges, faithfulness, bounds):
                    where = dict(xytext=(0, 6), textcoords="offset points", ha="center", rotation=90)
                    axis.annotate(f"{bound:.1g}", (x, y), **where, size=7, color=colour)
    axis.axhline(1, color="#000000", lw=0.6)
    axis.set(xlabel="effective edges of the circuit", ylabel="faithfulness (1: the full model, 0: no edge)", xlim=(0, None))
    axis.set_ylim(top=max(1.2, axis.get_ylim()[1]))  # room for the bounds
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, title="circles: the bound on the KL, nats", title_fontsize=8)
    return figure


def positions_figure(labels, circuits, n_layer):
    """Circuits over the tokens of one prompt, one panel per model, layers from bottom to top.

    labels: T strings; circuits: {model's name: (edges, weight)}, edges a set of (writer, reader, position), weight (L, H, T, T)
    the attention weight of this prompt where a head of the circuit reads, else zero. A line that crosses columns is a head
    reading another token, its colour the head; a dot is a head or MLP that takes part at that position, and the grey lines are
    the edges between them.
    """
    labels, T = [visible(label) for label in labels], len(labels)
    gap = 0.65  # between what a head writes and what its queries, keys and values read, below
    figure, axes = plt.subplots(
        1, len(circuits), figsize=(10, 1.6 + 0.62 * (2 * n_layer + 1)), squeeze=False, sharey=True, layout="constrained"
    )
    heads = set()
    for axis, (name, (edges, weight)) in zip(axes[0], circuits.items()):
        n_head = weight.shape[1]

        def shift(head):
            return (head - (n_head - 1) / 2) * 0.6 / n_head  # heads side by side within a token's column

        def place(node, position):
            if node in ("embed", "logits"):
                return position, 0 if node == "embed" else 2 * n_layer + 1
            layer = int(node.split(".")[0][1:])
            if node.startswith("m"):
                return position, 2 * layer + 2
            return position + shift(int(node.split(".h")[1].split(".")[0])), 2 * layer + 1

        for writer, reader, position in edges:
            (x0, y0), (x1, y1) = place(writer, position), place(reader, position)
            axis.plot([x0, x1], [y0, y1 - (gap if "." in reader else 0)], color="#999999", lw=0.6, zorder=1)
            for node in (writer, reader):
                x, y = place(node, position)
                if node == reader and "." in reader:  # what a head reads is below what it writes
                    axis.plot(x, y - gap, ".", ms=3, color="#999999", zorder=2)
                else:
                    axis.plot(x, y, "o", ms=4, color=NODE_COLOURS[node[0]], zorder=2)
        for layer, head, query, key in zip(*np.nonzero(weight)):
            heads.add(int(head))
            style = dict(color=HEAD_COLOURS[head % len(HEAD_COLOURS)], lw=0.5 + 2.5 * weight[layer, head, query, key])
            x0, x1, y = key + shift(head), query + shift(head), 2 * layer + 1
            axis.plot([x0, x1], [y - gap, y], solid_capstyle="round", zorder=3, **style)
        n_links = np.count_nonzero(weight)
        axis.set_title(f"{name}: {len(edges)} edges, heads read {n_links} times", fontsize=10, loc="left")
        axis.set_xticks(range(T), labels, family="monospace", fontsize=float(np.clip(150 / T, 4, 12)))
        axis.set(xlim=(-0.6, T - 0.4), ylim=(-0.4, 2 * n_layer + 1.4))
        rows = ["embed"] + [f"{kind} {layer}" for layer in range(n_layer) for kind in ("heads", "MLP")] + ["logits"]
        axis.set_yticks(range(2 * n_layer + 2), rows, fontsize=8)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    lines = [Line2D([], [], color=HEAD_COLOURS[head % len(HEAD_COLOURS)], lw=2) for head in sorted(heads)]
    names = [f"head {head}" for head in sorted(heads)]
    figure.legend(lines, names, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    return figure
