"""
How fast it is, against what you would take instead.

    python bench.py attention     gated attention: fused, reference, compiled reference; dense attention
    python bench.py step          whole training steps, dense and gated
    python bench.py circuits      one step of the search for a circuit
    python bench.py all --heads=12 --head_size=64
    python bench.py --help        every field, its default and its meaning

Candidates are timed in turns, one after the other in every round; a row shows the median of the rounds and,
in brackets, the middle half of them. (Training steps: one model after the other, since two may not fit.)
Memory is the peak beyond what was there before: not inputs and weights, but outputs and gradients.
Everything is written as JSON, too.
"""

import gc
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import gates
from circuits import Problem, search
from constrained import LossBound
from gates import GATES
from model import GPT, GPTConfig, evaluating
from support import command_line
from support.command_line import UserError, arguments, option
from support.files import write_json
from support.gated import choose_attention
from support.ranks import device_name, find_device
from train import RECIPES, TrainConfig, make_optimizer, training_step

GPT2_SHAPES = {"gpt2": (12, 12, 768, 16), "gpt2-medium": (24, 16, 1024, 8), "gpt2-xl": (48, 25, 1600, 2)}
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class BenchConfig:
    what: tuple = arguments("what to measure: attention, step, circuits or all", 1, 1)
    rounds: int = option(0, "measured rounds; 0: 20 on CUDA, else 5", at_least=0)
    lengths: str = option("", "of attention: tokens, with commas; empty: 256 to 8192 on CUDA, else 64 to 256")
    tokens: int = option(16384, "of attention: per batch on CUDA, else a sixteenth", at_least=16)
    heads: int = option(12, "of attention", at_least=1)
    head_size: int = option(64, "of attention, dimensions per head", at_least=1)
    gate: str = option("hard_concrete", "distribution of the gates", choices=tuple(GATES))
    dtype: str = option("auto", "auto: bfloat16 on CUDA, else float32", choices=DTYPES)
    compile: bool = option(False, "of step: torch.compile the models")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    out: str = option("", "where to write the figures; empty: out/bench_<what>.json")

    def check(self):
        if self.what[0] not in (*MEASUREMENTS, "all"):
            known = ", ".join(MEASUREMENTS)
            raise UserError(f"there is no {self.what[0]!r} to measure: choose one of {known}, all")
        if not all(word.strip().isdigit() for word in self.lengths.split(",") if self.lengths):
            raise UserError(f"--lengths is {self.lengths!r}: give whole numbers with commas, such as 256,1024")


# ------------------------------------------------------------------------------------------------------------
# Measuring


def measure(candidates, config, warm_up=3):
    """candidates: {name: function without arguments}. Returns {name: figures or, in words, why there are
    none}: median, low and high quartile in milliseconds, and peak memory in MB (None where PyTorch does not
    count it)."""
    cuda = config.device.startswith("cuda")
    synchronise = torch.cuda.synchronize if cuda else torch.mps.synchronize if config.device == "mps" else int
    results, times = {}, {name: [] for name in candidates}
    for name, run in candidates.items():
        try:
            for _ in range(warm_up):
                run()
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
            results[name] = {"memory": peak}
        except Exception as error:  # of PyTorch, Triton or the project: the others are still worth measuring
            words = str(error).strip() or type(error).__name__
            results[name] = "out of memory" if "out of memory" in words else words.splitlines()[0]
        gc.collect()
    for _ in range(config.rounds):
        for name, run in candidates.items():
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


def show(title, results, tokens=None):
    """Print one table. tokens: per run, for tokens per second."""
    print(f"\n{title}\n{'':28}{'ms':>10}  {'(middle half)':20}{'MB':>9}{'tokens/s':>12}")
    for name, r in results.items():
        if isinstance(r, str):
            print(f"{name:28}{'':>10}  {r}")
            continue
        memory = "" if r["memory"] is None else f"{r['memory']:,.0f}"
        speed = f"{1000 * tokens / r['median']:,.0f}" if tokens else ""
        spread = f"({r['low']:.2f} to {r['high']:.2f})"
        print(f"{name:28}{r['median']:>10.2f}  {spread:20}{memory:>9}{speed:>12}", flush=True)


# ------------------------------------------------------------------------------------------------------------
# What is measured. Each returns {title: results}.


def attention(config):
    """Forward, and forward with backward, at every length; gates sampled, as in training."""
    cuda, tables = config.device.startswith("cuda"), {}
    lengths = config.lengths or ("256,512,1024,2048,4096,8192" if cuda else "64,128,256")
    for T in map(int, lengths.split(",")):
        B = max(1, (config.tokens if cuda else config.tokens // 16) // T)
        candidates = attention_candidates(config, (B, config.heads, T, config.head_size))
        for backward in (False, True):
            title = f"attention, {'forward + backward' if backward else 'forward'}: B={B}, T={T}"
            runs = {name: partial(once, *candidate, backward) for name, candidate in candidates.items()}
            tables[title] = measure(runs, config)
            show(title, tables[title])
    return tables


def attention_candidates(config, shape):
    """{name: (function of inputs -> (y, penalty) or (y,), inputs, dy)}"""
    gate, dtype = GATES[config.gate](), getattr(torch, config.dtype)
    q, k, v, dy = (torch.randn(shape, device=config.device, dtype=dtype) for _ in range(4))
    bias = torch.full((config.heads,), 2.0, device=config.device)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]

    def gated(attend, *inputs):
        y, stats = attend(*inputs, gate, True)
        return y, stats.penalty

    reference = partial(gated, gates.gated_attention)
    dense = lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, is_causal=True),)
    candidates = {
        "dense (SDPA)": (dense, inputs[:3], dy),
        "reference": (reference, inputs, dy),
        "reference, torch.compile": (torch.compile(reference, dynamic=False), inputs, dy),
    }
    if config.device.startswith("cuda") and find_spec("triton"):
        import fused_attention

        candidates["fused"] = (partial(gated, fused_attention.gated_attention), inputs, dy)
    if find_spec("splash_attention"):  # the paper authors' kernel: Bernoulli; p: what its penalty is made of
        from splash_attention import splash_attention

        options = (2.0, True, True, False)  # bias, causal, sample, return_map
        candidates["splash_attention"] = (lambda q, k, v: splash_attention(q, k, v, *options)[:2], inputs[:3], dy)
    return candidates


def once(attend, inputs, dy, backward):
    with torch.set_grad_enabled(backward):
        y, *penalty = attend(*inputs)
        if backward:
            torch.autograd.backward([y, *penalty], [dy, *(p.detach() for p in penalty)])
    for t in inputs:
        t.grad = None


def steps(config):
    """Whole training steps with AdamW, dense, and gated under a bound."""
    cuda, tables = config.device.startswith("cuda"), {}
    settings = {name: RECIPES[name] for name in ("addition", "shakespeare_char")}
    if cuda:
        names = ("n_layer", "n_head", "n_embd", "batch_size")
        shapes = {name: dict(zip(names, sizes)) for name, sizes in GPT2_SHAPES.items()}
        settings = {name: TrainConfig(**shape, block_size=1024) for name, shape in shapes.items()}
    for name, s in settings.items():
        title = f"training step: {name}, batch {s.batch_size} of {s.block_size} tokens"
        tables[title] = {}
        for which in ("dense", "fused", "reference") if cuda else ("dense", "reference"):
            run = cache(partial(trainer, config, s, 50257 if cuda else 65, which))  # made on its first call
            label = which if which == "dense" else f"gated, {which}"
            tables[title] |= measure({label: lambda: run()()}, config)
        show(title, tables[title], s.batch_size * s.block_size)
    return tables


def trainer(config, s, vocab_size, which):
    """A function that trains a new model by one step on random tokens. s: TrainConfig."""
    shape = (s.block_size, vocab_size, s.n_layer, s.n_head, s.n_embd)
    model = GPT(GPTConfig(*shape, gate="none" if which == "dense" else config.gate)).to(config.device).train()
    if which != "dense":
        choose_attention(model, which)
    tokens = torch.randint(vocab_size, (s.batch_size, s.block_size + 1), device=config.device)
    half, kind = config.dtype == "bfloat16", torch.device(config.device).type
    autocast = partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=half)
    forward, batches = torch.compile(model) if config.compile else model, [(tokens[:, :-1], tokens[:, 1:])]
    bound = None if which == "dense" else LossBound(10.0)
    return partial(training_step, forward, make_optimizer(model, s, 0.0), batches, bound, s.grad_clip, autocast)


def circuits(config):
    """A step of the search for a circuit, float32 as in circuits.py, batch 32: pairs of the addition
    recipe's shape, dense and gated; on CUDA also 200 pairs of 16 tokens in GPT-2 small's shape, dense."""
    torch.set_float32_matmul_precision("highest")
    s, tables = RECIPES["addition"], {}
    cases = [("addition", (s.block_size, 13, s.n_layer, s.n_head, s.n_embd), 64, ("none", config.gate))]
    if config.device.startswith("cuda"):
        cases.append(("gpt2", (16, 50257, 12, 12, 768), 200, ("none",)))
    for name, shape, n, kinds in cases:
        clean, corrupted = torch.randint(shape[1], (2, n, shape[0]), device=config.device)
        positions, runs = torch.full((n,), shape[0] - 1, device=config.device), {}
        for kind in kinds:
            model = GPT(GPTConfig(*shape, gate=kind)).to(config.device).eval().requires_grad_(False)
            with evaluating(model):
                problem = Problem(model, clean, corrupted, positions)
            runs["dense" if kind == "none" else "gated"] = partial(search_step, problem)
        title = f"circuit search: one step, batch 32 of {n} pairs of {shape[0]} tokens, {name}, float32"
        tables[title] = measure(runs, config, warm_up=1)
        show(title, tables[title])
    return tables


def search_step(problem):
    with evaluating(problem.model):
        search(problem, bound=0.05, steps=1, seed=0, batch_size=32)


MEASUREMENTS = {"attention": attention, "step": steps, "circuits": circuits}


def main(argv):
    config = command_line.parse(BenchConfig(), argv, __doc__)
    config.device = find_device(config.device)
    cuda = config.device.startswith("cuda")
    config.rounds = config.rounds or (20 if cuda else 5)
    config.dtype = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    if cuda:
        torch.cuda.set_device(config.device)
    torch.manual_seed(0)
    print(f"{device_name(config.device)}, {config.dtype}, {config.rounds} rounds")
    tables = {}
    for name, measured in MEASUREMENTS.items():
        if config.what[0] in (name, "all"):
            torch.set_float32_matmul_precision("high")  # as in train.py
            tables |= measured(config)
    path = config.out or f"out/bench_{config.what[0]}.json"
    write_json({"device": device_name(config.device), "config": asdict(config), "tables": tables}, path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    command_line.run(main)
