"""
A run that can be stopped at any step and goes on, bit for bit: what its folder holds.

log.jsonl has a line per logged step. last.pt has everything that going on needs: configuration, phase and
step, weights, optimiser, multiplier, random states, and the length of the log.
"""

import dataclasses
import hashlib
import json
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data.tokenizer import tokenizer_of
from support import pictures, ranks
from support.checkpoints import RUN, load_checkpoint, save_checkpoint
from support.command_line import UserError
from support.files import make_folder
from support.report import evaluate, progress_line, read_summary, result_line

PHASES = ("dense", "sparse", "control")


def resumed(config):
    """(configuration, contents of last.pt) of the interrupted run in config.out_dir. Raises UserError."""
    path = Path(config.out_dir) / "last.pt"
    if not path.is_file():
        raise UserError(f"there is nothing to resume: {path} does not exist; start without --resume")
    if path.with_name("summary.json").is_file():
        raise UserError(f"there is nothing to resume: the run in {path.parent} is finished")
    saved = load_checkpoint(path, RUN)
    if len(saved["noise"]) != ranks.world_size():
        sizes = f"{path} is of {len(saved['noise'])} processes, here are {ranks.world_size()}"
        raise UserError(f"{sizes}: give torchrun the same --nproc_per_node")
    fields = saved["config"] | {"resume": True, "out_dir": config.out_dir}
    try:
        return dataclasses.replace(config, **fields), saved
    except TypeError as error:  # a field that is no more
        raise UserError(f"{path} is of another version ({error}): start over in another --out_dir")


def check_folder(config):
    """Raise UserError if config.out_dir holds a run with other settings, or one that was interrupted."""
    folder = Path(config.out_dir)
    if (folder / "summary.json").is_file():
        old = read_summary(folder)["config"]
        new = dataclasses.asdict(config) | {name: old.get(name) for name in ("resume", "out_dir")}
        different = [name for name in new if old.get(name) != new[name]]
        if different:
            changes = "; ".join(f"{name} was {old.get(name)}, now {new[name]}" for name in different)
            raise UserError(f"{folder} holds a run with other settings ({changes}): give another --out_dir")
    elif (folder / "last.pt").is_file():
        raise UserError(f"{folder} holds an interrupted run: --resume it, or give another --out_dir")


class Run:
    """The folder of a run, and what its phases share. saved: the contents of last.pt when resuming, else
    None; stop: a list that fills once the user wants to stop (signals_noted)."""

    def __init__(self, config, data, device, saved, stop):
        self.config, self.data, self.device, self.saved, self.stop = config, data, device, saved, stop
        self.folder = make_folder(config.out_dir)
        self.log_path = self.folder / "log.jsonl"
        self.step_tokens = config.batch_size * config.gradient_accumulation_steps * data.sequence_tokens
        self.phase = None
        # of what device the noise is, beside the CPU
        self.accelerator = {"cuda": torch.cuda, "mps": torch.mps}.get(torch.device(device).type)
        if saved and saved.get("data") != data.meta:
            other = f"{data.name} is not the data that the run in {self.folder} began with"
            raise UserError(f"{other}: make it again as it was, or start over in another --out_dir")

    def autocast(self):
        on = self.config.dtype == "bfloat16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=on)

    def batches(self, generator, n):
        """n random training batches (x, y), shared out: all ranks together see what one alone would see."""
        drawn = [self.data.draw("train", self.config.batch_size, generator) for _ in range(n)]
        return [self.data.cut("train", starts) for starts in drawn[ranks.rank() :: ranks.world_size()]]

    def is_past(self, phase):
        """Whether the run was interrupted in a later phase than this."""
        return self.saved is not None and PHASES.index(phase) < PHASES.index(self.saved["phase"])

    def begin(self, phase, steps, model, optimizer, generator, bound):
        """Start a phase, or take up the interrupted one. Returns the number of steps that are done."""
        if self.phase is None and ranks.is_first():
            self.clear()
        self.phase, self.steps, self.step, self.recent = phase, steps, 0, []
        self.model, self.generator, self.bound, self.started = model, generator, bound, time.time()
        self.parts = {"model": model, "optimizer": optimizer} | ({} if bound is None else {"bound": bound})
        if self.saved is None:
            self.validate()
            self.save()
        else:
            self.restore()
            print(f"{phase}: resumed after step {self.step} of {steps}")
        return self.step

    def clear(self):
        """Remove what the run before this one left, or what was logged after last.pt was saved."""
        try:
            (self.folder / "summary.json").unlink(missing_ok=True)
            with open(self.log_path, "ab") as file:
                file.truncate(min(self.saved["log_length"], file.tell()) if self.saved else 0)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}): give another --out_dir")

    def after_step(self, step, loss, stats, learning_rate):
        """Log, evaluate and save where it is time to. Raises KeyboardInterrupt, on all ranks after the same
        step and when all is saved, if one of them is to stop."""
        self.step = step
        stop = ranks.mean(torch.tensor(float(len(self.stop))))[0] > 0
        self.recent.append(loss)
        if step % self.config.log_interval == 0 or step == self.steps:
            seconds = time.time() - self.started
            line = {"phase": self.phase, "step": step, "loss": sum(self.recent) / len(self.recent)}
            if self.bound is not None:
                ranks.check_same("the multiplier", self.bound.multiplier)
                line["held_out_loss"] = self.bound.average
                line["bound"] = self.bound.bound + self.bound.allowance
                line["multiplier"] = self.bound.multiplier
                line |= {key: getattr(stats, key).mean().item() for key in ("expected_edges", "hard_edges")}
            line |= {"learning_rate": learning_rate, "tokens_per_second": step * self.step_tokens / seconds}
            self.log(line)
            print(progress_line(line, self.steps, seconds), flush=True)
            self.recent.clear()
        if step % self.config.eval_interval == 0 or step == self.steps:
            self.validate()
        if step % self.config.eval_interval == 0 or stop:
            self.save()
        if stop:
            done = f"{self.phase} after step {step} of {self.steps}"
            raise KeyboardInterrupt(f"{done}, and saved: --resume --out_dir={self.folder} goes on")

    def end(self):
        """How the phase trained its model, plain values."""
        seconds = time.time() - self.started
        speed = self.steps * self.step_tokens / seconds
        return {"steps": self.steps, "seconds": seconds, "tokens_per_second": speed}

    def validate(self):
        """Evaluate on eval_iters validation batches; log and print the result."""
        if ranks.is_first():
            result = evaluate(self.model, self.data, self.config.batch_size, self.config.eval_iters)
            keys = [key for key in ("loss", "edges_hard", "accuracy") if key in result]
            self.log({"phase": self.phase, "step": self.step, **{f"val_{key}": result[key] for key in keys}})
            print(result_line(f"{self.phase:7} {self.step:>6}  validation:", result), flush=True)

    def log(self, line):
        """Append a dict to log.jsonl."""
        if not ranks.is_first():
            return
        try:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_path} ({error.strerror}): make room, then --resume")

    def save(self):
        """Write last.pt. All ranks call it, the first one writes."""
        noise = ranks.gathered(torch.get_rng_state())
        accelerator_noise = ranks.gathered(self.accelerator.get_rng_state()) if self.accelerator else []
        if ranks.is_first():
            kept = {name: getattr(self, name) for name in ("phase", "step", "recent")}
            kept |= {"config": dataclasses.asdict(self.config), "data": self.data.meta}
            kept |= {"noise": noise, "accelerator_noise": accelerator_noise}
            kept |= {"seconds": time.time() - self.started, "log_length": self.log_path.stat().st_size}
            kept |= {"parts": {name: part.state_dict() for name, part in self.parts.items()}}
            kept |= {"generator": self.generator.get_state()}
            save_checkpoint({"format": RUN, **kept}, self.folder / "last.pt")

    def restore(self):
        """What save wrote, back in its places. Raises UserError if it does not fit the code."""
        saved, self.saved = self.saved, None
        self.step, self.recent = saved["step"], saved["recent"]
        self.started = time.time() - saved["seconds"]
        try:
            self.generator.set_state(saved["generator"])
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            wrong = f"{self.folder / 'last.pt'} does not fit this code ({str(error).splitlines()[0]})"
            raise UserError(f"{wrong}: delete {self.folder}, or start over in another --out_dir")
        torch.set_rng_state(saved["noise"][ranks.rank()])
        if self.accelerator and saved["accelerator_noise"]:  # none where it began on a CPU
            self.accelerator.set_rng_state(saved["accelerator_noise"][ranks.rank()])

    def draw(self, dense, sparse):
        """Write edges.png, attention.png and training.png, and return their paths. They show the dataset's
        own choice, or the first example of the validation split; of running text, edges.png has the sparse
        model alone. Where GPT-2's tokenizer cannot be downloaded, nothing is drawn: the run is worth more
        than that."""
        try:
            tokenizer = tokenizer_of(self.data.meta)
        except UserError as error:
            print(f"note: nothing is drawn: {error}")
            return []
        idx = next(self.data.sequential("val", 1))[0][:, :24]
        if "shown" in self.data.meta:
            tokens = torch.from_numpy(tokenizer.encode(self.data.meta["shown"]).astype("int64"))
            idx = tokens.view(-1, self.data.example_length)[:, :-1].to(self.device)
        models = {"dense": dense, "sparse": sparse}
        shown = models if self.data.is_task else {"sparse": sparse}
        figures = {
            "edges.png": pictures.edges_figure(*pictures.records_of(shown, tokenizer, idx)),
            "attention.png": pictures.attention_figure(*pictures.records_of(models, tokenizer, idx[-1:])),
        }
        figures["training.png"] = pictures.training_figure(read_log(self.log_path))
        return [pictures.save(figure, self.folder / name) for name, figure in figures.items()]


def code_of(*files):
    """A hash of some of the project's source files."""
    root = Path(__file__).parent.parent
    return hashlib.sha256(b"".join((root / file).read_bytes() for file in files)).hexdigest()[:12]


def read_log(path):
    """The lines of log.jsonl as dicts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def signals_noted():
    """Within it, the first Ctrl-C or SIGTERM only goes into the list that this yields; a second is real."""
    stop, old = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        stop.append(number)
        signal.signal(number, old[number])
        print("\nstopping after this step; once more stops at once", flush=True)

    with suppress(ValueError):  # not in the main thread: signals go elsewhere
        for number in old:
            signal.signal(number, note)
    try:
        yield stop
    finally:
        with suppress(ValueError):
            for number, handler in old.items():
                signal.signal(number, handler)
