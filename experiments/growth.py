"""
Do circuits shrink more in larger models? Circuits of models of several sizes, dense and sparse.

    python experiments/growth.py out/novels_2 out/novels_4 out/novels_8      folders that train.py wrote
    python experiments/growth.py out/novels_2 out/novels_4 --task=sentence

Prints a table, and draws the ratios dense / sparse against the number of heads, with the paper's beside them.
The figures of a folder are those of circuit_curve.py without the sweep and the random order; where they are
there, made after these models, by the same command and the same code, they are read.
"""

import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

from experiments import circuit_curve
from support import command_line, pictures
from support.command_line import arguments, option
from support.files import read_json
from support.report import open_heads, read_summaries, side_by_side

BOTH = ("edge pruning", "attribution")
MEASURES = {  # as in circuit_curve: what is counted, and the rankings, of which the better counts
    "attention edges, enough": ("needed", ["all edges"]),
    "edges at the bound": ("edges", BOTH),
    "edges for 90 %": ("explained", BOTH),
    "edges for 90 %, attribution": ("explained", ["attribution"]),
    "heads for 90 %, attribution": ("heads", ["attribution"]),
}


@dataclass
class GrowthConfig:
    folders: tuple = arguments("one or more folders that train.py wrote", 1, 100)
    task: str = option("", "as for circuits.py; empty: the dataset that the models were trained on")
    bound: float = option(0.01, "KL(full model || circuit) at most, nats", above=0)
    steps: int = option(400, "steps of the search", at_least=1)
    picture: str = option("out/growth.png", "where to draw")


def figures_of(folder, summary, config):
    """circuit_curve's figures of a folder's two models, {dense, sparse: {way: {figure: number}}}."""
    task = config.task or summary["config"]["dataset"]
    path, models = folder / task / "circuits_curve.json", [folder / "dense.pt", folder / "sparse.pt"]
    argv = [task, f"--dense={models[0]}", f"--sparse={models[1]}", f"--out_dir={path.parent}"]
    argv += [f"--data_dir={summary['config']['data_dir']}"]
    argv += [f"--bound={config.bound}", f"--steps={config.steps}", "--no-sweep"]
    found = read_json(path) if path.is_file() else {}
    is_same = (found.get("argv"), found.get("code")) == (argv, circuit_curve.CODE)
    is_newer = lambda model: not model.is_file() or model.stat().st_mtime > path.stat().st_mtime
    if not is_same or any(map(is_newer, models)):
        print(f"{folder}: circuits of {task}", flush=True)
        circuit_curve.main(argv, BOTH)
    return read_json(path)["figures"]


def column_of(folder, summary, config):
    """One folder's column of the table, and its models' number of heads."""
    found = figures_of(folder, summary, config)
    column = summary | {"heads": open_heads(summary)}
    for measure, (figure, ways) in MEASURES.items():
        dense, sparse = (min(found[name][way][figure] for way in ways) for name in ("dense", "sparse"))
        column |= {f"{measure}, dense": dense, f"{measure}, sparse": sparse}
        column[f"{measure}, ratio"] = dense / sparse if sparse else math.nan
    return column, sum(map(len, summary["edges_per_head"]))


def main(argv):
    config = command_line.parse(GrowthConfig(), argv, __doc__)
    columns, ratios = {}, {measure: [] for measure in MEASURES}
    for folder, summary in read_summaries(config.folders).items():
        column, n_heads = column_of(folder, summary, config)
        columns[folder.name] = column
        for measure in MEASURES:
            ratios[measure].append((n_heads, column[f"{measure}, ratio"]))
    rows = {"dense_loss": ("dense loss, nats", ".4f"), "sparse_loss": ("sparse loss, nats", ".4f")}
    rows |= {"edges_hard": ("hard edges", ".2%"), "heads": ("heads with an open edge", ",d")}
    for measure, (name, form) in product(MEASURES, (("dense", ",.0f"), ("sparse", ",.0f"), ("ratio", ".1f"))):
        rows[f"{measure}, {name}"] = f"{measure}, {name}", form
    print("\n".join(side_by_side(columns, rows, 36)))
    print(f"\nwrote {pictures.save(pictures.growth_figure(ratios), config.picture)}")


if __name__ == "__main__":
    command_line.run(main)
