"""
A run that can be stopped at any step and go on: what last.pt and log.jsonl hold, and which settings must stay the same.

Everything here is bookkeeping; the algorithm is in train.py.
"""

import hashlib
import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import torch

import parallel
from config import UserError
from model import load_checkpoint, save_checkpoint


class Interrupted(KeyboardInterrupt):
    """The user stopped the run, and it was saved."""


def save(run, phase, settings, state, step, seconds, recent):
    """Write last.pt: everything that going on after this many steps needs. state: {name: model, optimizer, LossBound or
    generator of the batches}; seconds: spent so far; recent: losses not logged yet. All ranks call it, the first writes."""
    noise = parallel.gathered(torch.get_rng_state())
    on_gpu = run.config.device.startswith("cuda")
    noise_cuda = parallel.gathered(torch.cuda.get_rng_state(run.config.device)) if on_gpu else []
    if not parallel.is_first():
        return
    saved = {
        "format": "nanosparse run",
        "run": run.settings,
        "phase": phase,
        "settings": settings,
        "step": step,
        "seconds": seconds,
        "recent": recent,
        "state": {name: part.get_state() if name == "batches" else part.state_dict() for name, part in state.items()},
        "noise": noise,
        "noise_cuda": noise_cuda,
    }
    save_checkpoint(saved, run.folder / "last.pt")


def restore(run, settings, state):
    """Put what `save` wrote back into state. Returns the steps done, the seconds spent, and the losses not logged yet."""
    saved = run.saved
    if saved["settings"].get("dense") != settings.get("dense"):
        raise UserError(f"cannot resume {run.folder / 'last.pt'}: dense.pt is another one now: start without --resume")
    if saved["settings"].get("code") != settings.get("code"):
        print("note: the code was edited since this run began; its result will say so, and not be reused")
        settings["code"] = f"{saved['settings'].get('code')}, then {settings.get('code')}"
    for name, part in state.items():
        (part.set_state if name == "batches" else part.load_state_dict)(saved["state"][name])
    torch.set_rng_state(saved["noise"][parallel.rank()])
    if saved["noise_cuda"] and run.config.device.startswith("cuda"):
        torch.cuda.set_rng_state(saved["noise_cuda"][parallel.rank()], run.config.device)
    run.saved = {}  # it holds a copy of everything
    return saved["step"], saved["seconds"], saved["recent"]


def load_run(folder):
    """last.pt as a dict. Raises UserError if there is none."""
    if not (folder / "last.pt").is_file():
        raise UserError(f"there is nothing to resume: {folder / 'last.pt'} does not exist; start without --resume")
    return load_checkpoint(folder / "last.pt", format="nanosparse run")


def differences(old, new):
    """In words, how settings differ; empty if they do not."""
    return "; ".join(f"{key} was {old.get(key)}, now {value}" for key, value in new.items() if old.get(key) != value)


def check_settings(old, new, path):
    """Raise UserError that names every setting which differs."""
    changed = differences(old, new)
    if changed:
        raise UserError(f"cannot resume {path}: {changed}: give the same values, or start anew without --resume")


def set_aside(path):
    """Rename <name>.pt, where there is one, to <name>.old.pt."""
    if path.is_file():
        os.replace(path, path.with_name(f"{path.stem}.old.pt"))


def code_of(*files):
    """A hash of some of the project's source files, so that an edited algorithm is not taken for a finished run."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in files)).hexdigest()[:12]


def fingerprint(named_tensors):
    """A hash of all weights, (name, tensor) in any order."""
    digests = []
    for name, tensor in named_tensors:
        digest = hashlib.sha256(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def keep_log_lines(path, phase, step):
    """Drop what log.jsonl says of this phase after this step, because it will be written again."""
    kept = [line for line in read_log(path) if line["phase"] != phase or line["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def read_log(path):
    """The lines of log.jsonl as dicts, but for one that was cut short when the machine died."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


@contextmanager
def signals_noted():
    """Inside, the first Ctrl-C or SIGTERM only puts its number into the list that this yields; a second one is real."""
    stop, old = [], {}

    def note(number, frame):
        stop.append(number)
        signal.signal(number, old[number])
        print("\nstopping after this step; once more stops at once", flush=True)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals go elsewhere
        pass
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
