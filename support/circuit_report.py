"""Circuits of two models side by side: the table, the files and the pictures."""

from data.tokenizer import tokenizer_of
from support import pictures
from support.files import write_json
from support.graph import reading
from support.report import side_by_side

ROWS = {  # a figure of circuits.find_circuit or circuits.scores: (label, format)
    "candidates": ("candidate edges", ",d"),
    "edges": ("edges", ",d"),
    "heads": ("heads", "d"),
    "mlps": ("MLPs", "d"),
    "attention_edges": ("open attention edges", ",.1f"),
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


def line(name, figures):
    """A circuit in one line."""
    words = f"{name:7} bound {figures['bound']:<7.4g} seed {figures['seed']}: {figures['edges']:>6,} edges"
    words += f"  KL {figures['kl_searched']:.4f}  on others {figures['kl']:.4f}"
    return f"{words}  accuracy {figures['accuracy']:.2%}  {figures['seconds']:.0f} s"


def table(circuits, reports):
    """circuits, reports: {model's name: [a Circuit, its figures per seed]}."""
    extra = []
    if len(circuits["dense"]) > 1:
        edges = {name: [figures["edges"] for figures in found] for name, found in reports.items()}
        extra.append(("edges, all seeds", {name: f"{min(n)} to {max(n)}" for name, n in edges.items()}))
        overlaps = {name: f"{overlap(found):.2f}" for name, found in circuits.items()}
        extra.append(("overlap of seeds", overlaps))
    lines = side_by_side({name: figures[0] for name, figures in reports.items()}, ROWS, 24, extra)
    ratio = ratio_of(reports)
    words = f"{ratio:.1f}" if ratio else "no edges to compare"
    return "\n".join([*lines, "", f"edges dense / sparse{', all seeds' if extra else ''}: {words}"])


def overlap(circuits):
    """Mean over pairs of circuits of the edges in both, as a fraction of the edges in either (IoU)."""
    pairs = [(a.edges, b.edges) for i, a in enumerate(circuits) for b in circuits[:i]]
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs)


def ratio_of(reports):
    """Edges of all seeds, dense over sparse; None where the sparse circuits are empty."""
    dense, sparse = (sum(figures["edges"] for figures in reports[name]) for name in ("dense", "sparse"))
    return dense / sparse if sparse else None


def write(folder, settings, circuits, reports, task, meta):
    """circuits.json, every model's first circuit, and a picture of these. Returns the paths."""
    first = {name: found[0] for name, found in circuits.items()}
    by_position = first["dense"].by_position
    ending = "_positions" if by_position else ""
    paths = [folder / f"circuits{ending}.json", *(folder / f"circuit{ending}_{name}.json" for name in first)]
    write_json({"settings": settings, **reports, "ratio": ratio_of(reports)}, paths[0])
    for path, circuit in zip(paths[1:], first.values()):
        circuit.save(path)
    shape = first["dense"].model.config
    if by_position:
        some = task.clean[:64]
        most = reading(first["sparse"], some)[1].sum(dim=(0, 2, 3, 4)).argmax()  # where there is most to see
        tokenizer = tokenizer_of(meta)
        labels = [tokenizer.decode([token]) for token in some[most].tolist()]
        drawn = {name: (c.edges, reading(c, some)[0][:, most].cpu().numpy()) for name, c in first.items()}
        figure = pictures.positions_figure(labels, drawn, shape.n_layer)
    else:
        edges = {name: circuit.edges for name, circuit in first.items()}
        figure = pictures.circuits_figure(edges, shape.n_layer, shape.n_head)
    return [*paths, pictures.save(figure, folder / f"circuits{ending}.png")]
