"""Pictures show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.patches import FancyArrowPatch

from support import pictures
from support.report import table

LABELS = list("ab c")


@pytest.fixture(autouse=True)
def closed_afterwards():
    yield
    plt.close("all")


@pytest.fixture
def record():
    """Weights and edges (L=2, H=2, T=4): in layer 0, head 1 reads (2, 0) and (3, 3); layer 1 is closed."""
    weight, edges = np.zeros((2, 2, 4, 4)), np.zeros((2, 2, 4, 4), dtype=bool)
    for query, key, w in [(2, 0, 0.7), (3, 3, 0.2)]:
        weight[0, 1, query, key], edges[0, 1, query, key] = w, True
    return weight, edges


def test_attention_colours_open_edges_only(record):
    dense = np.tril(np.full((2, 2, 4, 4), 0.25)), np.tril(np.ones((2, 2, 4, 4), dtype=bool))
    figure = pictures.attention_figure([LABELS], {"dense": [dense], "sparse": [record]})
    above, below = figure.subfigs
    assert above.get_suptitle() == "dense: 100.0% of the edges are open"
    assert below.get_suptitle() == "sparse: 5.0% of the edges are open"
    panels = {axis.get_title(): axis for axis in below.axes if axis.get_title()}
    assert list(panels) == ["layer 0 head 1"], "heads without an open edge are left out"
    panel = panels["layer 0 head 1"]
    grey, colour = (image.get_array() for image in panel.images)
    assert np.argwhere(np.ma.filled(colour, np.nan) >= 0).tolist() == [[2, 0], [3, 3]]
    assert colour[2, 0] == 0.7 and panel.images[1].get_clim() == (0, 1)
    assert (np.isfinite(grey) == np.tril(np.ones((4, 4)))).all()
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b", "␣", "c"]


def test_lines_are_the_open_edges_from_key_to_query(record):
    dense = np.tril(np.full((2, 2, 4, 4), 0.25)), np.tril(np.ones((2, 2, 4, 4), dtype=bool))
    figure = pictures.edges_figure([LABELS, LABELS], {"dense": [dense, dense], "sparse": [record, record]})
    dense, _, sparse, other = figure.axes
    assert dense.get_title("left") == "dense: 40 edges" and sparse.get_title("left") == "sparse: 2 edges"
    lines = [c for c in sparse.collections if isinstance(c, LineCollection) and len(c.get_segments()) == 2]
    ends = np.round(lines[0].get_segments()).astype(int).tolist()  # heads are shifted by less than a half
    assert ends == [[[0, 0], [2, 1]], [[3, 0], [3, 1]]], "(key, layer) to (query, layer + 1)"
    assert lines[0].get_linewidths()[0] > lines[0].get_linewidths()[1], "the width is the weight"
    assert [label.get_text() for label in other.get_xticklabels()] == ["a", "b", "␣", "c"]


def test_training_curves_are_the_logs():
    rest = {"bound": 0.07, "multiplier": 3, "expected_edges": 0.2, "hard_edges": 0.1}
    lines = [{"phase": "dense", "step": 5, "loss": 9.0}]
    lines += [{"phase": "sparse", "step": step, "loss": 1 / step, **rest} for step in (10, 20)]
    lines += [{"phase": "sparse", "step": 20, "val_loss": 0.06, "val_edges_hard": 0.1}]
    top, middle, bottom = pictures.training_figure(lines).axes
    assert [line.get_ydata().tolist() for line in top.lines] == [[0.1, 0.05], [0.07, 0.07], [0.06]]
    assert middle.lines[0].get_xdata().tolist() == [10, 20]
    assert bottom.lines[1].get_ydata().tolist() == [0.1, 0.1]


def test_the_table_has_a_column_per_model_and_a_row_per_layer():
    sparse = dict(loss=0.5, edges_hard=0.02, edges_per_head=[[0.01, 0.02], [0.03, 0.04]])
    results = {"dense": {**sparse, "loss": 0.4, "edges_hard": 1.0}, "sparse": sparse}
    lines = table(results, bound=0.6, extra=[("seconds", {"sparse": "7"})]).splitlines()
    rows = {line[:16].strip(): line[16:].split() for line in lines if line}
    assert rows["loss, nats"] == ["0.4000", "0.5000"] and rows["hard edges"] == ["100.00%", "2.00%"]
    assert rows["bound"] == ["0.6000"] and rows["seconds"] == ["7"]
    assert lines[-1].split() == ["layer", "1", "3.00", "4.00"]
    assert "OVER IT BY" not in rows and "accuracy" not in rows
    assert f"OVER IT BY{'0.1000':>30}" in table(results, bound=0.4)


EDGES = {("embed", "a0.h1.v"), ("embed", "a0.h1.q"), ("a0.h1", "m1"), ("m1", "logits")}


def test_circuits_have_an_arrow_per_edge_and_a_full_dot_per_node():
    circuits = {"dense": EDGES | {("m0", "logits")}, "sparse": EDGES}
    dense, sparse = axes = pictures.circuits_figure(circuits, n_layer=2, n_head=2).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["dense: 5 edges", "sparse: 4 edges"]
    arrows = [patch for patch in sparse.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 4 and len(dense.patches) == 5
    colours = [tuple(round(part, 2) for part in arrow.get_edgecolor()[:3]) for arrow in arrows]
    assert len(set(colours)) == 3  # value, query, and two others
    full = {tuple(line.get_xydata()[0]) for line in sparse.lines if line.get_markerfacecolor() != "white"}
    assert full == {(0.5, 0), (1, 1), (2.4, 4), (0.5, 5)}  # embed, layer 0's head 1, layer 1's MLP, logits


def test_the_curve_has_a_line_per_model_and_way():
    curves = {
        "dense": {"a": [(30, 1.0), (20, 0.5)], "b": [(30, 0.1)]},
        "sparse": {"a": [(9, 0.9)], "b": [(9, 0.2)]},
    }
    (axis,) = pictures.curve_figure(curves).axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"dense, a", "dense, b", "sparse, a", "sparse, b"}
    assert lines["dense, a"].get_xydata().tolist() == [[20, 0.5], [30, 1.0]], "in order of the edges"
    assert lines["dense, a"].get_color() == lines["dense, b"].get_color() != lines["sparse, a"].get_color()


def test_a_circuit_over_tokens_has_a_line_per_edge_and_per_token_read(record):
    weight, _ = record
    edges = {("embed", "a0.h1.v", 0), ("a0.h1", "m0", 2), ("m0", "logits", 3)}
    (axis,) = pictures.positions_figure(LABELS, {"sparse": (edges, weight)}, n_layer=2).axes
    assert axis.get_title(loc="left") == "sparse: 3 edges, heads read 2 times"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "␣", "c"]
    reads = [line for line in axis.lines if line.get_color() == pictures.HEADS[1]]
    ends = sorted([round(float(x)) for x in line.get_xdata()] for line in reads)
    assert ends == [[0, 2], [3, 3]]  # from the key to the query
    assert reads[0].get_linewidth() != reads[1].get_linewidth()
