"""
A recipe over several seeds: every run in a table, then the median with the lowest and the highest.

    python experiments/seeds.py addition --seeds=10 --threads=1 --at_once=2
    python experiments/seeds.py recall --options="--multiplier_max=10"

A run that is finished is read, not repeated: the same command prints its table again. Every run trains a
dense model of its own.
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script that sees the project

from support import command_line
from support.command_line import UserError, arguments, option
from support.report import open_heads, read_summary, side_by_side

COLUMNS = {  # of the table, from summary.json
    "dense": ("dense_loss", "{:.4f}"),
    "control": ("control_loss", "{:.4f}"),
    "bound": ("bound", "{:.4f}"),
    "sparse": ("sparse_loss", "{:.4f}"),
    "accuracy": ("sparse_accuracy", "{:.2%}"),
    "hard edges": ("edges_hard", "{:.2%}"),
    "heads": ("heads", "{:.0f}"),  # with an open edge; where they have a price
    "seconds": ("seconds", "{:.0f}"),
}


@dataclass
class SeedsConfig:
    recipe: tuple = arguments("one recipe of train.py", 1, 1)
    seeds: int = option(3, "how many", at_least=1)
    first: int = option(100, "the first of them", at_least=0)
    threads: int = option(0, "of a run; 0: as many as PyTorch takes", at_least=0)
    at_once: int = option(1, "runs at the same time", at_least=1)
    options: str = option("", 'further options of train.py, such as "--multiplier_max=10"')
    out_dir: str = option("out/seeds", "where the runs are")


def run(config, seed):
    """Train one seed, unless that is done. Returns its summary.json."""
    words = config.options.split()
    name = [config.recipe[0], *words, f"{config.threads or 'all'}_threads", f"seed_{seed}"]
    folder = Path(config.out_dir) / "_".join(name).replace("--", "")
    summary = folder / "summary.json"
    if not summary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        how = ["--resume"] if (folder / "last.pt").is_file() else [*words, f"--seed={seed}"]
        command = [sys.executable, ROOT / "train.py", config.recipe[0], *how, f"--out_dir={folder}"]
        environment = os.environ | ({"OMP_NUM_THREADS": str(config.threads)} if config.threads else {})
        with open(folder / "output.txt", "a") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"seed {seed} failed: see {folder / 'output.txt'}")
        print(f"{folder} is done", flush=True)
    return read_summary(folder)


def table(summaries):
    """A row per run, then the median, the lowest and the highest of every column, and how many runs are
    within their bound."""
    runs = [summary | {"seconds": sum(summary["seconds"].values())} for summary in summaries]
    if summaries[0]["config"].get("head_price"):
        runs = [run | {"heads": open_heads(run)} for run in runs]
    columns = {name: column for name, column in COLUMNS.items() if column[0] in runs[0]}
    of = lambda pick: {name: form.format(pick(key)) for name, (key, form) in columns.items()}
    rows = [(f"seed {run['config']['seed']}", of(run.get)) for run in runs]
    for name, pick in (("median", statistics.median), ("lowest", min), ("highest", max)):
        rows.append((name, of(lambda key: pick(run[key] for run in runs))))
    n = sum(summary["within_bound"] for summary in summaries)
    lines = side_by_side(dict.fromkeys(columns, {}), {}, 10, rows)
    return "\n".join([*lines[1:], f"{n} of {len(summaries)} are within their bound"])


def main(argv):
    config = command_line.parse(SeedsConfig(), argv, __doc__)
    with ThreadPoolExecutor(config.at_once) as pool:
        seeds = range(config.first, config.first + config.seeds)
        summaries = list(pool.map(lambda seed: run(config, seed), seeds))
    print(f"{config.recipe[0]} {config.options}: {summaries[0]['device']}")
    print(table(summaries))


if __name__ == "__main__":
    command_line.run(main)
