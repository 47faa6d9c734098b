"""
How fast it is, against what you would take instead.

    python bench.py attention     gated attention: fused, reference, compiled reference; dense attention
    python bench.py step          whole training steps, dense and gated
    python bench.py all --heads=12 --head_size=64
    python bench.py --help        every field, its default and its meaning

Candidates are timed in turns, one after the other in every round; a row shows the median of the rounds and,
in brackets, the middle half of them. (Training steps: one model after the other, since two may not fit.)
Memory is the peak beyond what was there before: not inputs and weights, but outputs and gradients.
Everything is written as JSON, too. The exit code is 1 if a candidate fails for another reason than too little
memory.
"""

import gc
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import gates
from constrained import LossBound
from gates import GATES
from model import GPT, GPTConfig, evaluating
from support import command_line
from support.command_line import UserError, arguments, option
from support.files import write_json
from support.gated import choose_attention
from support.ranks import device_name, find_device
from train import RECIPES, TrainConfig, make_optimizer, training_step


@dataclass
class BenchConfig:
    what: tuple = arguments("what to measure: attention, step or all", 1, 1)
    rounds: int = option(0, "measured rounds; 0: 20 on CUDA, else 5", at_least=0)
    length: int = option(0, "of attention, in tokens; 0: 256 to 8192 on CUDA, else 64 to 256", at_least=0)
    heads: int = option(12, "of attention", at_least=1)
    head_size: int = option(64, "of attention, dimensions per head", at_least=1)
    gate: str = option("hard_concrete", "distribution of the gates", choices=tuple(GATES))
    dtype: str = option("auto", "bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "of step: torch.compile the models")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    out: str = option("", "where to write the figures; empty: out/bench_<what>.json")

    def check(self):
        if self.what[0] not in (*MEASUREMENTS, "all"):
            known = ", ".join(MEASUREMENTS)
            raise UserError(f"there is no {self.what[0]!r} to measure: choose one of {known}, all")

    @property
    def cuda(self):
        return self.device.startswith("cuda")


# ------------------------------------------------------------------------------------------------------------
# What is measured. Each yields tables: title, {row: function without arguments}, tokens per run or None.


def attention(config):
    """Forward, and forward with backward, at every length; gates sampled, as in training."""
    lengths = (256, 512, 1024, 2048, 4096, 8192) if config.cuda else (64, 128, 256)
    for T in [config.length] if config.length else lengths:
        B = max(1, (16384 if config.cuda else 1024) // T)
        for passes in ("forward", "forward + backward"):
            rows = attention_rows(config, (B, config.heads, T, config.head_size), passes != "forward")
            yield f"attention, {passes}: B={B}, T={T}", rows, None


def attention_rows(config, shape, backward):
    gate, dtype = GATES[config.gate](), getattr(torch, config.dtype)
    q, k, v, dy = (torch.randn(shape, device=config.device, dtype=dtype) for _ in range(4))
    bias = torch.full((config.heads,), 2.0, device=config.device)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]

    def run(attend, inputs):
        """attend: inputs -> y or y, penalty."""
        with torch.set_grad_enabled(backward):
            y, *penalty = attend(*inputs)
        if backward:
            torch.autograd.grad([y, *penalty], inputs, [dy, *map(torch.ones_like, penalty)])

    def gated(attend, *inputs):
        y, stats = attend(*inputs, gate, True)
        return y, stats.penalty

    reference = partial(gated, gates.gated_attention)
    dense = lambda q, k, v: [F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    rows = {
        "dense (SDPA)": partial(run, dense, inputs[:3]),
        "reference": partial(run, reference, inputs),
        "reference, torch.compile": partial(run, torch.compile(reference, dynamic=False), inputs),
    }
    if config.cuda and find_spec("triton"):
        import fused_attention

        rows["fused"] = partial(run, partial(gated, fused_attention.gated_attention), inputs)
    return rows


def steps(config):
    """Whole training steps with AdamW: dense, and gated under a bound, held-out pass included."""
    settings = {name: RECIPES[name] for name in ("addition", "shakespeare_char")}
    if config.cuda:
        gpt2 = partial(TrainConfig, block_size=1024)
        settings = {
            "gpt2": gpt2(n_layer=12, n_head=12, n_embd=768, batch_size=16),
            "gpt2-xl": gpt2(n_layer=48, n_head=25, n_embd=1600, batch_size=2),
        }
    for name, s in settings.items():
        title = f"training step: {name}, batch {s.batch_size} of {s.block_size} tokens"
        for attend in ("dense", "fused", "reference") if config.cuda else ("dense", "reference"):
            step = cache(partial(trainer, config, s, 50257 if config.cuda else 65, attend))
            row = attend if attend == "dense" else f"gated, {attend}"
            yield title, {row: lambda: step()()}, s.batch_size * s.block_size  # step() makes the model once


def trainer(config, s, vocab_size, attend):
    """A function that trains a new model by one step on random tokens. s: TrainConfig."""
    gate = "none" if attend == "dense" else config.gate
    shape = (s.block_size, vocab_size, s.n_layer, s.n_head, s.n_embd)
    with torch.device(config.device):  # GPT-2 XL's numbers take a CPU half a minute
        model = GPT(GPTConfig(*shape, gate=gate)).train()
    if attend != "dense":
        choose_attention(model, attend)
    tokens = torch.randint(vocab_size, (s.batch_size, s.block_size + 1), device=config.device)
    kind, half = torch.device(config.device).type, config.dtype == "bfloat16"
    autocast = partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=half)
    optimizer, batches = make_optimizer(model, s, 0.0), [(tokens[:, :-1], tokens[:, 1:])]
    bound = None if attend == "dense" else LossBound(10.0)
    forward = torch.compile(model) if config.compile else model

    def step():
        held_out_loss = 0.0
        if bound is not None:  # what HeldOut.loss does, on a quarter of a batch
            with evaluating(model), autocast():
                held_out_loss = model(*(t[: max(1, s.batch_size // 4)] for t in batches[0]))[1].item()
        training_step(forward, optimizer, batches, bound, s.grad_clip, held_out_loss, autocast)

    return step


MEASUREMENTS = {"attention": attention, "step": steps}


# ------------------------------------------------------------------------------------------------------------
# Measuring


def measure(rows, config):
    """rows: {name: function without arguments}. Returns {name: figures or, in words, why there are none}:
    median, low and high quartile in milliseconds, and peak memory in MB (None where it is not counted)."""
    synchronise = (lambda: None) if config.device == "cpu" else torch.accelerator.synchronize
    results, times = {}, {name: [] for name in rows}
    for name, run in rows.items():
        try:
            for _ in range(3):  # to warm up
                run()
            results[name] = {"memory": None}
            if config.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                results[name]["memory"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # of PyTorch, Triton or the project: the others are still worth measuring
            words = str(error).strip() or type(error).__name__
            results[name] = "out of memory" if "out of memory" in words else words.splitlines()[0]
        gc.collect()
    for _ in range(config.rounds):
        for name, run in rows.items():
            if isinstance(results[name], dict):
                synchronise()
                start = time.perf_counter()
                run()
                synchronise()
                times[name].append(1000 * (time.perf_counter() - start))
    for name, seen in times.items():
        if seen:
            quartiles = torch.tensor(seen).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            results[name] |= dict(zip(("low", "median", "high"), quartiles))
    return results


def show(results, tokens):
    """Print rows of a table. tokens: per run, for tokens per second, or None."""
    for name, r in results.items():
        if isinstance(r, str):
            print(f"{name:28}{'':>10}  {r}")
            continue
        memory = "" if r["memory"] is None else f"{r['memory']:,.0f}"
        speed = f"{1000 * tokens / r['median']:,.0f}" if tokens else ""
        spread = f"({r['low']:.2f} to {r['high']:.2f})"
        print(f"{name:28}{r['median']:>10.2f}  {spread:20}{memory:>9}{speed:>12}", flush=True)


def main(argv):
    config = command_line.parse(BenchConfig(), argv, __doc__)
    config.device = find_device(config.device)
    config.rounds = config.rounds or (20 if config.cuda else 5)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if config.cuda else "float32"
    if config.cuda:
        torch.cuda.set_device(config.device)
    torch.manual_seed(0)
    print(f"{device_name(config.device)}, {config.dtype}, {config.rounds} rounds")
    tables = {}
    for what in MEASUREMENTS if config.what[0] == "all" else config.what:
        torch.set_float32_matmul_precision("high")  # as in train.py
        for title, rows, tokens in MEASUREMENTS[what](config):
            if title not in tables:
                print(f"\n{title}\n{'':28}{'ms':>10}  {'(middle half)':20}{'MB':>9}{'tokens/s':>12}")
            results = measure(rows, config)
            show(results, tokens)
            tables[title] = tables.get(title, {}) | results
    path = config.out or f"out/bench_{config.what[0]}.json"
    write_json({"device": device_name(config.device), "config": asdict(config), "tables": tables}, path)
    print(f"\nwrote {path}")
    words = [r for rows in tables.values() for r in rows.values() if isinstance(r, str)]
    sys.exit(any(r != "out of memory" for r in words))


if __name__ == "__main__":
    command_line.run(main)
