"""
All that needs a GPU, in one go and in under nine minutes (`make gpu`).

    python experiments/gpu.py [--text=FILE]     what the character model trains on

Every part is a process with a time limit of its own; after one that fails the next one runs. In out/gpu/ it
leaves gpu.json, gpu.md (a table for docs/speed.md), what each part printed, and work/, with which a part's
command can be run again.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script that sees the project

from circuits import find_circuit
from data.prepare import prepare_text, write_dataset
from data.tasks import induction
from model import GPT, GPTConfig
from support import command_line
from support.command_line import UserError, option
from support.files import make_folder, replacing, write_json

FOLDER = Path("out/gpu")
SECONDS = 520  # for all parts together; the last ones get what is left
TOKENS = 2**21  # random ones, for gpt2
KERNELS = "float64 or shapes or blocks"  # tests that compare the kernels with gates.py in float64
TIMES = r"^(attention|training step|circuit search)\W|\(\S+ to \S+\)|middle half|out of memory"
TRAINED = r"^\w+ [1-9]\d* validation:"
TRAIN = "--data_dir={work}/data --sparsify_steps=300 --no-control --attention=fused"
PARTS = {  # name: limit in seconds, what Python is given, which of the lines it prints are its result
    "tests": (120, f"-m pytest tests/test_fused_attention.py -m '' -k 'not ({KERNELS})'", " passed"),
    "kernels": (120, f"-m pytest tests/test_fused_attention.py -m '' -k '{KERNELS}'", " passed"),
    "attention": (90, "bench.py attention --length=1024 --out={work}/attention.json", TIMES),
    "step": (100, "bench.py step --out={work}/step.json", TIMES),
    "circuits": (40, "bench.py circuits --out={work}/circuit_step.json", TIMES),
    "nccl": (
        90,
        "-m torch.distributed.run --standalone --nproc_per_node=2 train.py shakespeare_char"
        f" --out_dir={{work}}/nccl --gradient_accumulation_steps=2 --pretrain_steps=300 {TRAIN}",
        TRAINED,
    ),
    "shakespeare_char_gpu": (
        150,
        f"train.py shakespeare_char_gpu --out_dir={{work}}/shakespeare_char_gpu --pretrain_steps=300 {TRAIN}",
        TRAINED,
    ),
    "gpt2": (
        150,
        "train.py gpt2 --out_dir={work}/gpt2 --init_from={work}/dense --dataset=random"
        f" --gradient_accumulation_steps=2 {TRAIN}",
        TRAINED,
    ),
    "search": (60, """-c 'from experiments.gpu import search; search("{work}")'""", " steps: "),
}


def search(work, steps=300, device="cuda"):
    """Circuits at GPT-2's shape, of random weights: so many edges that circuits.py would draw for minutes."""
    for name in ("dense", "gated"):
        model = GPT.from_pretrained(f"{work}/{name}").to(device).requires_grad_(False)
        task = induction(model.config.vocab_size, model.config.block_size, 200, seed=0).to(device)
        circuit = find_circuit(model, *task[:3], bound=0.1, steps=steps, sweep=False)
        print(f"{name}, {steps} steps: {circuit.found['seconds']} s, {len(circuit.edges):,} edges")


@dataclass
class GPUConfig:
    text: str = option("", "a text; empty: NANOSPARSE_TEXT, else this project's own code")


def prepare(work, text):
    """GPT-2 at random weights, dense and gated, in Hugging Face's layout; random tokens; a text."""
    for name, gate in (("dense", "none"), ("gated", "hard_concrete")):
        GPT(GPTConfig(gate=gate)).save_pretrained(work / name)
    tokens = np.random.default_rng(0).integers(50257, size=TOKENS).astype(np.uint16)
    pieces = ("train", tokens[TOKENS // 32 :]), ("val", tokens[: TOKENS // 32])
    write_dataset(work / "data/random", pieces, {"tokenizer": "gpt2", "vocab_size": 50257})
    files = [text] if text else sorted(ROOT.glob("*.py"))
    prepare_text(files, work / "data/shakespeare_char", "char", 0.1)


def run(command, limit, log):
    """A command's exit code, or None if it was stopped. What it prints goes into a file."""
    how = dict(env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, **how) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then stops its ranks
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def speeds(lines):
    """Tokens per second of train.py's phases, from the first line of each on: without compilation."""
    found = {}
    for phase, step, speed in re.findall(r"^(\w+) (\d+)/\d+ .* ([\d,]+) tokens/s", "\n".join(lines), re.M):
        found.setdefault(phase, []).append((int(step), int(speed.replace(",", ""))))
    for phase, seen in found.items():
        (a, u), (b, v) = seen[0], seen[-1]
        if a < b:
            yield f"{phase} {(b - a) / (b / v - a / u):,.0f} tokens/s"


def outcome(name, limit):
    """Run a part. Returns its row, a dict of plain values; in its result a failed part has its last line."""
    _, words, wanted = PARTS[name]
    words = shlex.split(words.format(work=FOLDER / "work"))
    row = {"part": name, "command": shlex.join(["python", *words]), "seconds": 0, "state": "not run"}
    if name == "nccl" and torch.cuda.device_count() < 2:
        return row | {"result": ["there is one GPU"]}
    started, log = time.monotonic(), FOLDER / f"{name}.txt"
    code = run([sys.executable, *words], limit, log)
    row["seconds"] = round(time.monotonic() - started)
    row["state"] = {0: "done", None: "timed out"}.get(code, "failed")
    printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [" ".join(line.split()) for line in printed if re.search(r"\w", line)]
    last = lines[-1:] if code != 0 else []
    return row | {"result": [*filter(re.compile(wanted).search, lines), *speeds(lines), *last]}


def table(report):
    """Markdown: the machine, then a row per part."""
    lines = [f"{report['machine']}; text: {report['text']}", ""]
    lines += ["| part | command | seconds | result |", "|---|---|---|---|"]
    for row in report["parts"]:
        state = [] if row["state"] == "done" else [f"**{row['state']}**"]
        result = "<br>".join(state + row["result"]).replace("|", "/")
        lines.append(f"| {row['part']} | `{row['command']}` | {row['seconds']} | {result} |")
    return "\n".join(lines) + "\n"


def main(argv):
    config = command_line.parse(GPUConfig(), argv, __doc__)
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here: run this on a machine with one")
    started, text = time.monotonic(), config.text or os.environ.get("NANOSPARSE_TEXT", "")
    versions = sorted(f"{d.name} {d.version}" for d in distributions() if d.name in ("torch", "triton"))
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    machine = ", ".join([gpus, *versions, f"CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"])
    report = {"machine": machine, "text": Path(text).name or "this project's own code", "parts": []}
    shutil.rmtree(FOLDER / "work", ignore_errors=True)
    prepare(make_folder(FOLDER / "work"), text)
    for name, (limit, *_) in PARTS.items():
        row = outcome(name, min(limit, max(0, started + SECONDS - time.monotonic())))
        print(f"{name}: {row['state']}, {row['seconds']} s", *row["result"], sep="\n    ", flush=True)
        report["parts"].append(row)
        write_json(report, FOLDER / "gpu.json")
        with replacing(FOLDER / "gpu.md") as temporary:
            temporary.write_text(table(report), encoding="utf-8")
    failed = [row["part"] for row in report["parts"] if row["state"] in ("failed", "timed out")]
    print(f"wrote {FOLDER / 'gpu.md'} and gpu.json" + f"; not done: {', '.join(failed)}" * bool(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    command_line.run(main)
