"""
Every picture of the project: each function takes numbers and returns a matplotlib figure; `save` writes it.

Colours are from Okabe and Ito's palette and matplotlib's "Blues", which colour-blind readers can tell apart.
"""

from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from support.command_line import UserError
from support.graph import node_of

BLUE, RED, GREEN, PINK, LIGHT_BLUE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000"
HEADS = [BLUE, RED, GREEN, PINK, "#E69F00", LIGHT_BLUE, BLACK, "#999933"]
CLOSED = LinearSegmentedColormap.from_list("closed", ["#f0f0f0"] * 2)  # a causal pair without an edge
# from a visible blue up, so that an open edge of weight zero still differs from a closed one
WEIGHT = LinearSegmentedColormap.from_list("weight", plt.get_cmap("Blues")(np.linspace(0.22, 1.0, 256)))


def save(figure, path):
    """Write the figure to path, in the format of its ending, and close it. Returns path; raises UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, format=Path(path).suffix[1:])
    except (OSError, ValueError) as error:  # a full disk; an ending that matplotlib does not know
        wanted = "give a name that ends in .png, .svg or .pdf, in another folder"
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


def legend(figure, colours, place):
    """colours: {name: colour}."""
    lines = [Line2D([], [], color=shade, lw=2) for shade in colours.values()]
    figure.legend(lines, colours, loc=f"outside {place}", ncols=8, frameon=False, fontsize=8)


def records_of(models, tokenizer, idx):
    """What attention_figure and edges_figure take: the texts of tokens idx (N, T), lists of T strings, and of
    every model {name: [(weight, edges) of every text]}, arrays (L, H, T, T): the attention weight (pattern
    times gate), and whether an edge is open."""
    texts = [[tokenizer.decode([token]) for token in row] for row in idx.tolist()]

    def of(model):
        r = model.attention(idx)
        return list(zip(*(t.transpose(0, 1).cpu().numpy() for t in (r.pattern * r.gate, r.edges))))

    return texts, {name: of(model) for name, model in models.items()}


def attention_figure(texts, records):
    """Attention of every head on one sequence, one block of panels per model, all on one colour scale; heads
    that the last model has closed are left out. Both of records_of, of one text.

    A cell is coloured where its edge is open, grey where it is closed, white where the key is later. Tokens
    are not written where cells are smaller than a letter."""
    labels = [visible(label) for label in texts[0]]
    T = len(labels)
    heads = np.argwhere(list(records.values())[-1][0][1].any(axis=(2, 3)))  # (panels, 2): layer, head
    n_columns = min(max(1, len(heads)), 8 if T <= 12 else 4)  # long sequences need large panels
    n_rows = -(-max(1, len(heads)) // n_columns)
    cell = 500 / n_columns / T  # its size in points, rounded down
    height = len(records) * (n_rows * 9.2 / n_columns + 0.55) + 0.5
    figure = plt.figure(figsize=(10, height), layout="constrained")
    blocks = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
    causal = np.tril(np.ones((T, T), dtype=bool))
    for block, (name, [(weight, edges)]) in zip(blocks, records.items()):
        fraction = edges.sum() / (edges.shape[0] * edges.shape[1] * causal.sum())
        block.suptitle(f"{name}: {fraction:.1%} of the edges are open", fontsize=11, x=0.01, ha="left")
        axes = block.subplots(n_rows, n_columns, squeeze=False)
        for axis in axes.flat[len(heads) :]:
            axis.axis("off")
        for (layer, head), axis in zip(heads, axes.flat):
            axis.spines[:].set_visible(False)
            axis.imshow(np.where(causal, 1.0, np.nan), cmap=CLOSED)
            shown = np.where(edges[layer, head], weight[layer, head], np.nan)
            image = axis.imshow(shown, cmap=WEIGHT, vmin=0, vmax=1)
            axis.set_title(f"layer {layer} head {head}", fontsize=7, pad=2)
            axis.set(xticks=[], yticks=[])
            if cell >= 2:
                axis.tick_params(length=0)
                style = dict(fontsize=float(np.clip(cell, 2.5, 9)), family="monospace")
                axis.set_xticks(range(T), labels, **style)
                axis.set_yticks(range(T), labels, **style)
        axes[0, 0].set_xlabel("key", fontsize=7, labelpad=1)
        axes[0, 0].set_ylabel("query", fontsize=7, labelpad=1)
        if len(heads):
            bar = block.colorbar(image, ax=axes, shrink=0.6, pad=0.01, aspect=25)
            bar.set_label("attention weight", fontsize=7)
            bar.ax.tick_params(labelsize=7)
    return figure


def edges_figure(texts, records):
    """Open edges between layers, a column per text and a row per model: the paper's Figure 1.

    Both of records_of. Layers go from bottom to top; a line runs from a key, below, to the query that reads
    it, above; the colour is the head, the width the attention weight."""
    first = next(iter(records.values()))
    n_layer, n_head = first[0][0].shape[:2]
    size = dict(figsize=(10, 0.5 + len(records) * (0.8 + 0.55 * n_layer)), squeeze=False)
    figure, axes = plt.subplots(len(records), len(texts), sharey=True, layout="constrained", **size)
    for (name, found), row in zip(records.items(), axes):
        for (weight, edges), labels, axis in zip(found, texts, row):
            T = len(labels)
            axis.vlines(range(T), 0, n_layer, color="#e8e8e8", lw=1, zorder=0)
            for head in range(n_head):
                layer, query, key = edges[:, head].nonzero()
                shift = (head - (n_head - 1) / 2) * 0.01 / n_head * T * len(texts)  # side by side
                ends = np.stack([key + shift, layer, query + shift, layer + 1], axis=1).reshape(-1, 2, 2)
                widths = 0.1 + 2.4 * weight[layer, head, query, key]
                axis.add_collection(LineCollection(ends, linewidths=widths, colors=colour(head), zorder=2))
            dots = np.stack(np.meshgrid(range(T), range(n_layer + 1))).reshape(2, -1)
            axis.scatter(*dots, s=max(1, 60 / T), color="#b0b0b0", zorder=1)
            n = int(edges.sum())
            title = f"{name}: {n} edge{'s' * (n != 1)}"
            axis.set_title(title, fontsize=9, loc="left")
            style = dict(family="monospace", fontsize=float(np.clip(300 / T / len(texts), 5, 13)))
            axis.set_xticks(range(T), [visible(label) for label in labels], **style)
            axis.set_yticks([layer + 0.5 for layer in range(n_layer)], [f"layer {n}" for n in range(n_layer)])
            axis.tick_params(length=0, labelleft=axis is row[0])
            axis.spines[:].set_visible(False)
    last = list(records.values())[-1]
    is_open = np.any([edges.any(axis=(0, 2, 3)) for _, edges in last], axis=0)
    legend(figure, {f"head {h}": colour(h) for h in range(n_head) if is_open[h]}, "lower center")
    return figure


def heads_figure(cards, labels):
    """How often each edge of a head is open, a panel per card of readings.read_heads. labels: names of a toy
    task's positions; without them, of running text, a panel shows the edges' distances."""
    n_columns = min(4, max(2, len(cards)))
    n_rows = -(-max(1, len(cards)) // n_columns)
    size = dict(figsize=(2.5 * n_columns, n_rows * (2.9 if labels else 1.9) + 0.4), squeeze=False)
    figure, axes = plt.subplots(n_rows, n_columns, layout="constrained", **size)
    for axis in axes.flat[len(cards) :]:
        axis.axis("off")
    for card, axis in zip(cards, axes.flat):
        T = len(card.frequency)
        title = [f"layer {card.layer} head {card.head}", *wrap(card.name, 30)]
        axis.set_title("\n".join(title), fontsize=8)
        axis.tick_params(length=0, labelsize=7)
        if labels:
            causal = np.tril(np.ones((T, T), dtype=bool))
            axis.imshow(np.where(causal, 1.0, np.nan), cmap=CLOSED)
            shown = np.where(card.frequency > 0, card.frequency, np.nan)
            image = axis.imshow(shown, cmap=WEIGHT, vmin=0, vmax=1)
            axis.set_xticks(range(T), labels[:T], rotation=90)
            axis.set_yticks(range(T), labels[:T])
            axis.spines[:].set_visible(False)
        else:
            sums = np.array([np.trace(card.frequency, -distance) for distance in range(min(T, 16))])
            axis.bar(range(len(sums)), sums / card.per_sequence, color=BLUE)
            axis.set(ylim=(0, 1))
    axes[0, 0].set_xlabel("key" if labels else "positions back", fontsize=8)
    axes[0, 0].set_ylabel("query" if labels else "fraction of its edges", fontsize=8)
    if labels and cards:
        bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01)
        bar.set_label("open in this fraction of examples", fontsize=8)
    return figure


def training_figure(lines):
    """The sparse phase, step by step. lines: log.jsonl's, as dicts."""
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(10, 7), sharex=True, layout="constrained")

    def plot(axis, key, color, label=None, **style):
        points = [(line["step"], line[key]) for line in lines if line["phase"] == "sparse" and key in line]
        axis.plot(*zip(*points), color=color, label=label, **style)

    plot(top, "loss", LIGHT_BLUE, "training loss, sampled gates")
    plot(top, "held_out_loss", BLUE, "held-out loss, deterministic gates, running average")
    plot(top, "bound", RED, "its bound, with the allowance of the step", ls="--")
    plot(top, "val_loss", GREEN, "validation loss, deterministic gates", ls="", marker="o", ms=4)
    spread = top.dataLim.ymax > 10 * top.dataLim.ymin  # of addition: from 0.1 to 0.001
    top.set(ylabel="loss (nats)", yscale="log" if spread else "linear")
    plot(middle, "multiplier", PINK)
    middle.set(ylabel="multiplier", yscale="log")
    plot(bottom, "expected_edges", LIGHT_BLUE, "expected")
    plot(bottom, "hard_edges", BLACK, "hard (deterministic gate > 0)")
    bottom.set(ylabel="open edges (fraction)", xlabel="step of the sparse phase", yscale="log")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    for axis in (top, bottom):
        axis.legend(frameon=False, fontsize=9)
    return figure


NODE_COLOURS = {"a": LIGHT_BLUE, "m": PINK, "e": BLACK, "l": BLACK}  # by the first letter of a node's name
READERS = {  # what reads an edge: its name, its colour, the bend of its arrow
    "q": ("query", BLUE, 0.06),
    "k": ("key", "#E69F00", 0.0),
    "v": ("value", GREEN, -0.06),
    "": ("MLP or logits", "#7f7f7f", 0.16),
}


def circuit_axes(names, n_layer, **options):
    """(figure, axes) with a column per model, whose rows are layers from bottom to top."""
    size = (10, 1.6 + 0.62 * (2 * n_layer + 1))
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained", **options)
    rows = ["embed", *(f"{kind} {layer}" for layer in range(n_layer) for kind in ("heads", "MLP")), "logits"]
    for axis in axes[0]:
        axis.set_yticks(range(2 * n_layer + 2), rows, fontsize=8)
        axis.set_ylim(-0.5, 2 * n_layer + 1.5)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return figure, axes[0]


def node_places(n_layer, heads, mlp, ends):
    """{node: (x, y)} in the rows of circuit_axes. heads, mlp, ends: x of heads, MLPs, embed and logits."""
    places = {"embed": (ends, 0), "logits": (ends, 2 * n_layer + 1)}
    for layer in range(n_layer):
        places |= {f"a{layer}.h{head}": (x, 2 * layer + 1) for head, x in enumerate(heads)}
        places[f"m{layer}"] = (mlp, 2 * layer + 2)
    return places


def circuits_figure(circuits, n_layer, n_head):
    """Circuits side by side, layers from bottom to top: a dot per head and MLP that takes part, a ring where
    one does not, and an arc per edge. circuits: {model's name: set of (writer, reader) names}."""
    places = node_places(n_layer, range(n_head), mlp=n_head + 0.4, ends=(n_head - 1) / 2)
    figure, axes = circuit_axes(circuits, n_layer)
    for axis, (name, edges) in zip(axes, circuits.items()):
        used = {"embed", "logits"}
        for writer, reader in sorted(edges):
            node, part = node_of(reader)
            _, shade, bend = READERS[part]
            used |= {writer, node}
            axis.add_patch(FancyArrowPatch(
                places[writer], places[node], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                mutation_scale=6, color=shade, lw=0.9, alpha=0.7, shrinkA=5, shrinkB=6, zorder=1,
            ))  # fmt: skip
        for node, place in places.items():
            shade = NODE_COLOURS[node[0]]
            style = dict(mfc=shade) if node in used else dict(mfc="white", alpha=0.35)
            axis.plot(*place, "o", ms=9, color=shade, **style)
        axis.set_title(f"{name}: {len(edges)} edge{'s' * (len(edges) != 1)}", fontsize=11, loc="left")
        axis.set_xlim(-0.7, n_head + 1.1)
        axis.set_xticks(range(n_head), [f"head {head}" for head in range(n_head)], fontsize=8)
    colours = {f"read by {kind}": shade for kind, shade, _ in READERS.values()}
    legend(figure, colours, "lower center")
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
        n_head = weight.shape[1]
        shift = [(head - (n_head - 1) / 2) * 0.6 / n_head for head in range(n_head)]  # side by side
        places = node_places(n_layer, shift, mlp=0, ends=0)
        for writer, reader, position in edges:
            node, part = node_of(reader)
            (x0, y0), (x1, y1) = places[writer], places[node]
            x0, x1, y1 = position + x0, position + x1, y1 - gap * bool(part)
            axis.plot([x0, x1], [y0, y1], color="#999999", lw=0.6, zorder=1)
            axis.plot(x0, y0, "o", ms=4, color=NODE_COLOURS[writer[0]], zorder=2)
            style = dict(marker=".", ms=3, color="#999999") if part else dict(marker="o", ms=4)
            axis.plot(x1, y1, zorder=2, **{"color": NODE_COLOURS[node[0]], **style})
        for layer, head, query, key in np.argwhere(weight):
            heads.add(int(head))
            style = dict(color=colour(head), lw=0.5 + 2.5 * weight[layer, head, query, key], zorder=3)
            x, y = [key + shift[head], query + shift[head]], 2 * layer + 1
            axis.plot(x, [y - gap, y], solid_capstyle="round", **style)
        reads = np.count_nonzero(weight)
        axis.set_title(f"{name}: {len(edges)} edges, heads read {reads} times", fontsize=10, loc="left")
        style = dict(family="monospace", fontsize=float(np.clip(150 / T, 4, 12)))
        axis.set_xticks(range(T), [visible(label) for label in labels], **style)
        axis.set_xlim(-0.6, T - 0.4)
    legend(figure, {f"head {head}": colour(head) for head in sorted(heads)}, "lower center")
    return figure


def baselines_figure(panels):
    """Loss against edges, a panel per dataset. panels: {dataset: (summary.json, {model: what evaluate
    found})}."""
    size = (max(10, 3.6 * len(panels)), 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    names = dict.fromkeys(name for _, models in panels.values() for name in models)  # all, in order
    looks = {name: dict(color=shade, marker=m) for name, shade, m in zip(names, HEADS, "*os^DvP")}
    for axis, (dataset, (summary, models)) in zip(axes[0], panels.items()):
        for name, result in models.items():
            area = 220 if name == "sparse" else 60
            point = 100 * result["edges_hard"], result["loss"]
            axis.scatter(*point, s=area, label=name, zorder=3, **looks[name])
        axis.axhline(summary["dense_loss"], color=BLACK, lw=0.8, label="dense")
        axis.axhline(summary["bound"], color=BLACK, lw=0.8, ls="--", label="bound")
        if "control_loss" in summary:
            axis.axhline(summary["control_loss"], color=BLACK, lw=0.8, ls=":", label="control")
        losses = [result["loss"] for result in models.values()]
        axis.set(xlabel="open edges (%)", yscale="log" if max(losses) > 10 * min(losses) else "linear")
        axis.set_title(dataset, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss (nats)")
    shown = {}
    for axis in axes[0]:
        shown |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False)
    return figure


def curve_figure(curves):
    """Faithfulness against number of edges, one line per model and way to choose edges. curves: {model's
    name: {way: [(edges, faithfulness), ...]}}; the same ways for every model."""
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for shade, (name, ways) in zip(HEADS, curves.items()):
        for style, (way, points) in zip(("o-", "s--", "^:"), ways.items()):
            axis.plot(*zip(*sorted(points)), style, ms=5, color=shade, label=f"{name}, {way}")
    for height, style in ((1, "-"), (0.9, ":")):
        axis.axhline(height, color=BLACK, lw=0.6, ls=style)
    axis.set(xlabel="edges of the circuit", ylabel="faithfulness (1: the full model, 0: no edge)")
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


PAPER = [(144, 97.0), (144, 42.8), (1024, 8.6), (1024, 5.4)]  # heads; how many times fewer edges for 90 %


def growth_figure(ratios):
    """How many times fewer edges a sparse model's circuit has, against the number of heads. ratios: {measure:
    [(heads, dense / sparse), ...]}."""
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for shade, marker, (measure, points) in zip(HEADS, "osD^v", ratios.items()):
        axis.plot(*zip(*sorted(points)), marker + "-", color=shade, label=measure)
    axis.plot(*zip(*PAPER), "*", ms=11, color=BLACK, label="edges for 90 %, the paper: GPT-2, OLMo-7B")
    axis.axhline(1, color=BLACK, lw=0.6)
    axis.set(xlabel="attention heads of the model", ylabel="dense / sparse", xscale="log", yscale="log")
    heads = sorted({n for points in (PAPER, *ratios.values()) for n, _ in points})
    low, high = axis.get_ylim()
    times = [n for n in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= n <= high]
    axis.set_xticks(heads, map(str, heads))
    axis.set_yticks(times, map(str, times))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure
