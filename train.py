"""
Train a small GPT, then make its attention sparse at its own loss.

    python train.py addition                    two-digit addition on a laptop, a few minutes
    python train.py shakespeare_char            nanoGPT's CPU-sized character model
    python train.py shakespeare_char_gpu        nanoGPT's full-size character model, one GPU
    python train.py gpt2                        the weights of GPT-2 (124M), post-trained on OpenWebText
    torchrun --standalone --nproc_per_node=4 train.py gpt2
    python train.py addition --init_from=out/addition/dense.pt --seed=1 --out_dir=out/addition_seed1
    python train.py addition --resume           go on after Ctrl-C
    python train.py --help                      every field, its default and its meaning (without a recipe: addition's)

Phases, each a call of `fit`, each ending in a file under out_dir: `dense` (pretraining), `sparse` (post-training: as few
attention edges as possible while the loss stays at the dense model's), `control` (the dense model trained for the same
extra steps, because post-training also trains). Finished phases of the same settings are reused.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

import config as command_line
import parallel
import plots
from config import UserError, collected, option
from constrained import LossBound
from data.dataset import Dataset
from data.tokenizer import tokenizer_of
from gates import GATES
from model import (
    ATTENTIONS,
    GATE_INPUTS,
    GPT,
    GPTConfig,
    checkpoint_of,
    device_problems,
    find_device,
    fused_problem,
    head_problems,
    load_checkpoint,
    open_source,
    save_checkpoint,
)
from report import evaluate, progress_line, result_line, summarise, table
from resume import (
    Interrupted,
    check_settings,
    code_of,
    differences,
    fingerprint,
    keep_log_lines,
    load_run,
    read_log,
    restore,
    save,
    set_aside,
    signals_noted,
)


@dataclass
class TrainConfig:
    # data and files
    dataset: str = option("shakespeare_char", "a folder under data_dir")
    data_dir: str = option("data", "where the datasets are")
    out_dir: str = option("", "where to write; empty: out/<recipe>, or out/<dataset> if that is not the recipe's")
    init_from: str = option(
        "scratch", "scratch: pretrain first; or a dense model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path"
    )
    resume: bool = option(False, "continue the interrupted run in out_dir")
    # the model
    n_layer: int = option(4, "layers", at_least=1)
    n_head: int = option(4, "attention heads per layer", at_least=1)
    n_embd: int = option(128, "width", at_least=1)
    block_size: int = option(64, "longest context, tokens; with init_from at most the model's", at_least=1)
    dropout: float = option(0.0, "dropout while training", at_least=0, below=1)
    bias: bool = option(True, "biases in linear layers and LayerNorms")
    # the gates and the bound
    gate: str = option("hard_concrete", "distribution of the gates", choices=tuple(GATES))
    gate_input: str = option("score", "what gates see: the score, or a query and a key of their own", choices=GATE_INPUTS)
    gate_rank: int = option(16, "dimensions of that query and key, per head; with gate_input=low_rank", at_least=1)
    gate_bias: float = option(
        5.0, "where the gates' biases start; auto: so that on one batch the edges that hold the attention are open", word="auto"
    )
    loss_tolerance: float = option(0.01, "bound = the dense model's loss + this, nats", at_least=0)
    loss_accuracy: float = option(0.002, "how exactly the dense model's training loss is measured, nats", above=0)
    distill: float = option(0.0, "weight of the KL divergence from the dense model, added to the loss that trains", at_least=0)
    multiplier_max: float = option(2.0, "the price of a nat of loss, in edge costs, at the start and at most", above=0.001)
    multiplier_rate: float = option(0.02, "how far log(multiplier) moves per step at most", above=0)
    multiplier_scale: float = option(0.05, "violation of the bound that moves it that far, nats", above=0)
    # optimisation; the schedule runs anew in every phase
    pretrain_steps: int = option(2500, "steps of the dense phase", at_least=1)
    sparsify_steps: int = option(6000, "steps of the sparse phase, and of the control", at_least=1)
    control: bool = option(True, "also train the dense model for sparsify_steps more, to compare with")
    batch_size: int = option(24, "sequences per micro-step", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-steps per step, of all ranks together", at_least=1)
    learning_rate: float = option(3e-3, "of the weights", above=0)
    gate_learning_rate: float = option(3e-2, "of the gates' biases", above=0)
    min_lr: float = option(1.5e-4, "where the cosine decay of learning_rate ends", at_least=0)
    warmup_iters: int = option(100, "steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.1, "on matrices, in the dense phase only", at_least=0)
    beta1: float = option(0.9, "AdamW", at_least=0, below=1)
    beta2: float = option(0.99, "AdamW", at_least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient", above=0)
    # what to print and when
    eval_interval: int = option(500, "steps between evaluations; the run is saved as often", at_least=1)
    eval_iters: int = option(
        20, "batches per evaluation while training; the closing one takes the split, or 2^20 tokens", at_least=1
    )
    log_interval: int = option(50, "steps between two lines of the log", at_least=1)
    plot_text: str = option("", "what attention.png shows; empty: the beginning of the validation split")
    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    attention: str = option(
        "auto", "of gated models: fused (Triton, on CUDA), reference, or auto: fused if it works", choices=ATTENTIONS
    )
    dtype: str = option("float32", "of the matrix products; bfloat16 is for GPUs", choices=("float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the model; worth it on GPUs")
    activation_checkpointing: bool = option(False, "compute every block twice instead of keeping what it computed")
    seed: int = option(1337, "of everything random", at_least=0, below=2**62)

    def problems(self):
        """What is wrong between fields, or with this machine."""
        problems = head_problems(self.n_embd, self.n_head) + device_problems(self.device)
        if self.min_lr > self.learning_rate > 0:
            problems.append(f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}: lower it, too")
        n, ranks = self.gradient_accumulation_steps, parallel.world_size()
        if n % ranks:
            problems.append(
                f"--gradient_accumulation_steps {n} cannot be shared out over {ranks} processes: give a multiple of {ranks}"
            )
        if ranks > 1 and self.device.startswith("cuda:") and self.device != parallel.own_device("cuda"):
            problems.append(f"--device is {self.device}, but each of {ranks} processes takes a GPU of its own: give cuda")
        if self.attention == "fused" and not problems:
            problem = fused_problem(find_device(self.device))
            problems += [f"--attention is fused, which {problem}: choose auto or reference"] if problem else []
        return problems


GPT2 = TrainConfig(
    dataset="openwebtext",
    init_from="gpt2",
    block_size=1024,
    batch_size=8,
    gradient_accumulation_steps=24,
    gate_bias="auto",
    learning_rate=1e-4,
    gate_learning_rate=1e-2,
    min_lr=1e-5,
    beta2=0.95,
    sparsify_steps=10_000,
    dtype="bfloat16",
    compile=True,
)
RECIPES = {
    "addition": TrainConfig(
        dataset="addition",
        plot_text="57+68=125",
        n_embd=64,
        block_size=8,
        batch_size=128,
        pretrain_steps=1000,
        sparsify_steps=5000,
        learning_rate=6e-3,
        gate_learning_rate=6e-2,
        min_lr=3e-4,
        multiplier_scale=0.01,
        control=False,
    ),
    "shakespeare_char": TrainConfig(loss_tolerance=0.005),  # ends at or below the dense model's validation loss
    "shakespeare_char_gpu": TrainConfig(
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        batch_size=64,
        dropout=0.2,
        learning_rate=1e-3,
        gate_learning_rate=1e-2,
        min_lr=1e-4,
        pretrain_steps=5000,
        sparsify_steps=10_000,
        dtype="bfloat16",
        compile=True,
    ),
    "gpt2": GPT2,
    "gpt2-medium": replace(GPT2, init_from="gpt2-medium", batch_size=4, gradient_accumulation_steps=48),
    "gpt2-large": replace(
        GPT2, init_from="gpt2-large", batch_size=4, gradient_accumulation_steps=48, activation_checkpointing=True
    ),
    "gpt2-xl": replace(GPT2, init_from="gpt2-xl", batch_size=4, gradient_accumulation_steps=48, activation_checkpointing=True),
}

# Fields that do not change what a phase computes, and fields that the dense phase does not look at.
NO_RESULT = set(
    "data_dir out_dir init_from resume control eval_interval eval_iters log_interval plot_text device attention compile "
    "activation_checkpointing".split()
)
NOT_DENSE = {name for name in TrainConfig.__dataclass_fields__ if name.startswith(("gate", "multiplier_"))}
NOT_DENSE |= {"loss_tolerance", "loss_accuracy", "distill", "sparsify_steps"}


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


def training_step(model, optimizer, batches, bound, grad_clip, autocast, teacher=None, distill=0.0):
    """One step of post-training (with bound=None: of plain training) on all weights and gates. batches: the micro-steps'
    (x, y) of this rank. bound: LossBound, whose bound is the dense model's training loss plus the tolerance. With a teacher,
    the dense model, the loss that trains has `distill` times the KL divergence from it added; the bound is on the loss alone.
    Returns the mean loss in nats, over micro-steps and ranks, and the last micro-step's AttentionStats. Raises
    FloatingPointError, on all ranks and before it changes anything, if the loss, the cost or the gradient is not finite."""
    total = 0.0
    for number, (x, y) in enumerate(batches, start=1):
        with parallel.gradients_stay(model, number < len(batches)):
            with autocast():
                logits, loss, stats = model(x, y, return_stats=True)  # model.train(): the gates are sampled
            cost = stats.penalty.mean()  # of an edge, over layers, heads and causal pairs
            trained = loss if teacher is None else loss + distill * divergence(teacher, logits, x, y, autocast)
            objective = trained if bound is None else bound.lagrangian(cost, trained)
            (objective / len(batches)).backward()
        total += loss.item() / len(batches)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    total, cost = parallel.mean(total, cost.item())
    if not math.isfinite(total + cost + norm):
        raise FloatingPointError(f"the loss is {total}, the cost {cost}, the norm of the gradient {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if bound is not None:
        bound.update(total)
    return total, stats


def divergence(teacher, logits, x, y, autocast):
    """Mean KL(teacher || model) in nats over the tokens that are to be predicted. logits: the model's, (B, T, V)."""
    with torch.no_grad(), autocast():
        wanted = teacher(x, y)[0]
    wanted, logits = (t[y >= 0].float().log_softmax(-1) for t in (wanted, logits))  # (N, V)
    return torch.nn.functional.kl_div(logits, wanted, reduction="batchmean", log_target=True)


def learning_rate_at(step, steps, config):
    """Linear warm-up times a cosine that falls from learning_rate towards min_lr, which it reaches after the last step."""
    warmup = min(1.0, (step + 1) / (config.warmup_iters + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (config.min_lr + cosine * (config.learning_rate - config.min_lr))


def make_optimizer(model, config, weight_decay):
    """AdamW in three groups: matrices (decayed), vectors, and the gates' biases with a learning rate of their own."""
    named = list(model.named_parameters())
    gates = [p for name, p in named if name.endswith("gate_bias")]
    matrices = [p for name, p in named if p.dim() >= 2]
    vectors = [p for name, p in named if p.dim() < 2 and not name.endswith("gate_bias")]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_ratio": config.gate_learning_rate / config.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


@torch.no_grad()
def training_loss(model, run):
    """The loss of model, in training mode, on random training batches: as many as bring the standard error of the mean to
    loss_accuracy (16 at least, one pass over the data at most)."""
    config, ranks = run.config, parallel.world_size()
    print(f"measuring the dense model's training loss to {config.loss_accuracy} nats", flush=True)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed + parallel.rank())  # of dropout
    one_pass = math.ceil(len(run.data.tokens["train"]) / run.data.sequence_tokens / config.batch_size)
    losses = []  # of all ranks
    model.train()
    while len(losses) < max(16, one_pass):
        ((x, y),) = run.batches(generator, ranks)
        with run.autocast():
            loss = model(x, y)[1]
        losses += torch.stack(parallel.gathered(loss)).tolist()
        if len(losses) % (100 * ranks) == 0 and any(parallel.mean(len(run.stop))):
            raise Interrupted("while the dense model was measured: the same command with --resume goes on")
        if len(losses) < 16:
            continue
        needed = (torch.tensor(losses).std().item() / config.loss_accuracy) ** 2
        if len(losses) >= needed:
            break
        if len(losses) < 16 + ranks and needed > 500:
            print(
                f"that takes about {min(round(needed), one_pass):,} batches of {config.batch_size} (--loss_accuracy)",
                flush=True,
            )
    model.eval()
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# The plumbing: one loop for all phases, interrupted and resumed at any step


@dataclass
class Run:
    """What the phases of one command share."""

    config: TrainConfig
    data: Dataset
    folder: Path
    settings: dict  # what run_settings returned
    saved: dict  # the contents of last.pt when resuming, else {}
    stop: list = field(default_factory=list)  # a signal's number is put here when the user wants to stop

    def autocast(self):
        on = self.config.dtype == "bfloat16"
        return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16, enabled=on)

    @property
    def tokens_per_step(self):
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.data.sequence_tokens

    def batches(self, generator, n):
        """n random training batches (x, y), shared out over the ranks: together they see what one alone would see."""
        drawn = [self.data.draw("train", self.config.batch_size, generator) for _ in range(n)]
        return [self.data.cut("train", starts) for starts in drawn[parallel.rank() :: parallel.world_size()]]

    def log(self, line):
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Trained(NamedTuple):
    """What a phase returns."""

    model: GPT
    steps: int
    seconds: float
    tokens_per_second: float
    training_bound: float = None  # of the sparse phase: nats, with sampled gates


def train(config):
    """Run all phases that config asks for and that are not finished yet; write the files of out_dir, and return the
    contents of summary.json as a dict (of several ranks only the first, the others return {}). Raises UserError for bad
    settings or files, and when the loss is not finite; Interrupted (a KeyboardInterrupt) when the user stopped it and it was
    saved."""
    device = parallel.own_device(find_device(config.device))
    config = replace(config, out_dir=config.out_dir or f"out/{config.dataset}", device=device)
    if problems := device_problems(device):
        raise UserError("\n".join(problems))
    torch.set_float32_matmul_precision("high")
    with parallel.joined(device):
        run, initial, picture = prepare(config)
        with signals_noted() as run.stop:
            phases = {"dense": dense_phase(run, initial)}
            phases["sparse"] = sparse_phase(run, phases["dense"].model)
            if run.config.control:
                phases["sparse"].model.cpu()  # out of the way
                phases["control"] = control_phase(run, phases["dense"].model)
            return finish(run, phases, picture) if parallel.is_first() else {}


def prepare(config):
    """Check everything that can be checked before hours of work, and make out_dir. Returns the Run, the Source of init_from
    (None: scratch), and the tokens to draw. Raises UserError with all that is wrong."""
    folder = Path(config.out_dir)
    problems, initial, data, saved = [], None, None, {}
    with collected(problems):
        if config.init_from != "scratch":
            if not parallel.is_first():
                parallel.wait()  # the first rank downloads, then the others find it there
            initial = open_source(config.init_from)
            if parallel.is_first():
                parallel.wait()
            config = replace(config, **shape_of(initial, config))
    problems += command_line.check(config)
    with collected(problems):
        data = Dataset(config.dataset, config.block_size, config.data_dir, config.device)
        if initial is not None:
            data.check_tokenizer(initial.tokenizer, config.init_from)
        picture = tokens_to_draw(config, data)
    settings = {} if problems else run_settings(config, data, initial)
    with collected(problems):
        if config.resume:
            saved = load_run(folder)
            if not problems:
                check_settings(saved["run"], settings, folder / "last.pt")
    if problems:
        raise UserError("\n".join(problems))
    if parallel.is_first():
        make_folder(folder, saved)
    print(f"writing to {folder}", flush=True)
    return Run(config, data, folder, settings, saved), initial, picture


def finish(run, phases, picture):
    """Measure all models, write summary.json and the pictures, print the table. Returns the contents of summary.json."""
    config, folder = run.config, run.folder
    print("measuring all models on the validation split", flush=True)
    results = {name: evaluate(phase.model.to(config.device), run.data, config.batch_size) for name, phase in phases.items()}
    summary = summarise(config, run.data.is_task, phases, results)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    cost = [(key, {name: f"{n:,}" for name, n in summary[key].items()}) for key in ("steps", "seconds")]
    pictures = draw(run, phases["dense"].model, phases["sparse"].model, picture)
    print(table(results, summary["bound"], cost))
    print("\npictures: " + "  ".join(map(str, pictures)))
    return summary


def dense_phase(run, initial):
    """The dense model: loaded from init_from, or pretrained."""
    config = run.config
    if initial is not None:
        model = GPT.from_source(initial, dropout=config.dropout).to(config.device)
        if parallel.is_first():
            keep_dense(checkpoint_of(model, run.data.meta, initial.trained_on), run.folder / "dense.pt")
        shape = f"{model.config.n_layer} layers, {model.config.n_head} heads, width {model.config.n_embd}"
        print(f"dense: {config.init_from} ({shape}, as it was trained)")
        return trained_as(model, initial.trained_on)
    settings = settings_of(config, run.data, NO_RESULT | NOT_DENSE)
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig) if hasattr(config, f.name)}
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**{**shape, "vocab_size": run.data.meta["vocab_size"], "gate": "none"}))
    return train_or_reuse(run, "dense", settings, model, config.pretrain_steps, config.weight_decay)


def keep_dense(checkpoint, path):
    """Write the dense model to out_dir. One that is there already, unless it is the same, becomes dense.old.pt."""
    if path.is_file():
        if fingerprint(load_checkpoint(path)["model"].items()) == fingerprint(checkpoint["model"].items()):
            return
        print(f"note: {path} is another model: it will be kept as dense.old.pt")
        set_aside(path)
    save_checkpoint(checkpoint, path)


def sparse_phase(run, dense):
    """The dense model with gates, post-trained under the bound."""
    config = run.config
    code = code_of("gates.py", "kernels.py", "constrained.py", "model.py", "train.py")
    settings = {**settings_of(config, run.data, NO_RESULT), "dense": fingerprint(dense.state_dict().items()), "code": code}
    torch.manual_seed(config.seed)
    gated = {name: getattr(config, name) for name in ("gate", "gate_input", "gate_rank")}
    automatic = config.gate_bias == "auto"
    model = GPT(replace(dense.config, **gated, gate_bias=5.0 if automatic else config.gate_bias))
    model.load_state_dict(dense.state_dict(), strict=False)  # all but what belongs to the gates
    if automatic:
        n = max(1, min(config.batch_size, 4096 // run.data.sequence_tokens))
        x, _ = run.data.batch("train", n, torch.Generator().manual_seed(config.seed))
        model.to(config.device).open_gates(x)
    print(f"gated attention: {model.use_attention(config.attention, config.device)}")
    return train_or_reuse(run, "sparse", settings, model, config.sparsify_steps, 0.0, dense)


def control_phase(run, dense):
    """The dense model, trained on as the sparse one is, but for the loss alone."""
    left_out = NO_RESULT | (NOT_DENSE - {"sparsify_steps"})
    settings = {**settings_of(run.config, run.data, left_out), "dense": fingerprint(dense.state_dict().items())}
    model = GPT(dense.config)
    model.load_state_dict(dense.state_dict())
    return train_or_reuse(run, "control", settings, model, run.config.sparsify_steps, 0.0)


def train_or_reuse(run, name, settings, model, steps, weight_decay, bounded_by=None):
    """Train model for so many steps and write <name>.pt, or load that file where it was trained with the same settings.
    bounded_by: the dense model whose loss bounds the sparse phase. Returns Trained."""
    path = run.folder / f"{name}.pt"
    parallel.wait()
    if path.is_file():
        checkpoint = load_checkpoint(path)
        changed = differences(checkpoint["trained_on"].get("settings", {}), settings)
        if not changed:
            print(f"{name}: {path} has the same settings: reused (to train again, delete it or give another --out_dir)")
            model.load_state_dict(checkpoint["model"])
            return trained_as(model.to(run.config.device).eval(), checkpoint["trained_on"])
        print(f"note: {path} has other settings ({changed}): it will be kept as {name}.old.pt")
    seconds, bound = fit(run, name, settings, model.to(run.config.device), steps, weight_decay, bounded_by)
    trained_on = {
        "settings": settings,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": steps * run.tokens_per_step / seconds,
        "training_bound": bound.bound if bound else None,
    }
    if parallel.is_first():
        set_aside(path)
        save_checkpoint(checkpoint_of(model, run.data.meta, trained_on), path)
    return trained_as(model.eval(), trained_on)


def trained_as(model, trained_on):
    """Trained, from what a checkpoint says of its training (zeros where it says nothing)."""
    return Trained(model, *(trained_on.get(key, 0) for key in ("steps", "seconds", "tokens_per_second", "training_bound")))


def fit(run, name, settings, model, steps, weight_decay, bounded_by):
    """The training loop of one phase, from its first step or from where last.pt left it. Returns seconds and the bound."""
    config = run.config
    resumed = bool(run.saved) and run.saved["phase"] == name
    if parallel.is_first():
        (run.folder / "summary.json").unlink(missing_ok=True)  # of an older run
        keep_log_lines(run.folder / "log.jsonl", name, run.saved["step"] if resumed else -1)
    bound = None
    if bounded_by is not None:
        loss = run.saved["state"]["bound"]["bound"] - config.loss_tolerance if resumed else training_loss(bounded_by, run)
        bound = LossBound(
            loss + config.loss_tolerance,
            scale=config.multiplier_scale,
            rate=config.multiplier_rate,
            largest=config.multiplier_max,
        )
        print(f"the dense model's training loss is {loss:.4f}; the bound while training is {bound.bound:.4f}")
        if not resumed and parallel.is_first():
            result = evaluate(bounded_by, run.data, config.batch_size, config.eval_iters)
            print(result_line("the dense model's validation:", result))
    optimizer = make_optimizer(model, config, weight_decay)
    generator = torch.Generator().manual_seed(config.seed + 1)  # of the batches
    torch.manual_seed(config.seed + 2 + parallel.rank())  # of the gates' noise and dropout
    state = {"model": model, "optimizer": optimizer, "batches": generator} | ({"bound": bound} if bound else {})
    first, elapsed, recent = 0, 0.0, []  # recent: losses since the last line of the log
    if resumed:
        first, elapsed, recent = restore(run, settings, state)
        print(f"{name}: resumed after step {first} of {steps}")
    started = time.time() - elapsed
    model.activation_checkpointing = config.activation_checkpointing
    forward = parallel.replicated(torch.compile(model) if config.compile else model, config.device)
    teacher = bounded_by if config.distill else None
    model.train()
    for step in range(first, steps):
        if step % config.eval_interval == 0 and not (resumed and step == first):
            validate(run, name, step, model)
            save(run, name, settings, state, step, time.time() - started, recent)
        if any(parallel.mean(len(run.stop))):  # on any rank
            save(run, name, settings, state, step, time.time() - started, recent)
            raise Interrupted(f"{name} after step {step} of {steps}, and saved: the same command with --resume goes on")
        lr = learning_rate_at(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        batches = run.batches(generator, config.gradient_accumulation_steps)
        try:
            loss, stats = training_step(
                forward, optimizer, batches, bound, config.grad_clip, run.autocast, teacher, config.distill
            )
        except FloatingPointError as error:
            raise UserError(
                f"{name}: {error} in step {step + 1}: {run.folder / 'last.pt'} holds the last good state; try a smaller "
                "--learning_rate"
            )
        recent.append(loss)
        if (step + 1) % config.log_interval == 0 or step + 1 == steps:
            spent = time.time() - started
            line = {"phase": name, "step": step + 1, "loss": sum(recent) / len(recent)}
            if bound is not None:
                parallel.check_same("the multiplier", bound.log_multiplier)
                line |= {"bound": bound.bound, "multiplier": bound.multiplier}
                line |= {"expected_edges": stats.expected_edges.mean().item(), "hard_edges": stats.hard_edges.mean().item()}
            line |= {"learning_rate": lr, "tokens_per_second": (step + 1) * run.tokens_per_step / spent}
            if parallel.is_first():
                run.log(line)
            print(progress_line(line, steps, spent), flush=True)
            recent.clear()
    validate(run, name, steps, model)
    return time.time() - started, bound


def validate(run, name, step, model):
    """Evaluate on eval_iters validation batches; log and print the result."""
    if not parallel.is_first():
        return
    result = evaluate(model, run.data, run.config.batch_size, run.config.eval_iters)
    line = {"phase": name, "step": step, "val_loss": result["loss"], "val_edges_hard": result["edges_hard"]}
    if "accuracy" in result:
        line["val_accuracy"] = result["accuracy"]
    run.log(line)
    print(result_line(f"{name:7} {step:>6}  validation:", result), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def settings_of(config, data, left_out):
    """Everything that decides what a phase computes, as plain values: fields, and which data."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    return {**values, "data": data.fingerprint()}


def run_settings(config, data, initial):
    """The settings of all phases together, and where they begin; what a resumed run must share with the interrupted one."""
    start = "scratch" if initial is None else fingerprint(initial.tensors())[:12]
    return {**settings_of(config, data, NO_RESULT), "init_from": start, "processes": parallel.world_size()}


def shape_of(initial, config):
    """The fields of TrainConfig that a dense model, a Source, decides."""
    shape = initial.model_config
    if shape.get("gate") != "none":
        raise UserError(
            f"--init_from {initial.name} has gates already ({shape.get('gate')}): give a dense model, such as dense.pt"
        )
    if config.block_size < shape["block_size"]:
        print(f"note: sequences of {config.block_size} tokens; {initial.name} reads up to {shape['block_size']} (--block_size)")
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "bias")}
    return {**sizes, "block_size": min(config.block_size, shape["block_size"])}


def make_folder(folder, saved):
    """Make out_dir, and keep an interrupted run that is not resumed. saved: the contents of last.pt when resuming, else {}."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").touch()
    except OSError as error:
        raise UserError(f"cannot write to --out_dir {folder} ({error.strerror}): choose another")
    if not saved and (folder / "last.pt").is_file() and not (folder / "summary.json").is_file():
        print("note: starting over, and the interrupted run's last.pt is kept as last.old.pt (--resume would have gone on)")
        set_aside(folder / "last.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run


def tokens_to_draw(config, data, longest=24):
    """plot_text as tokens (1, T), or the beginning of the validation split. Raises UserError if there is no tokenizer."""
    tokenizer = tokenizer_of(data.meta)
    x, _ = next(data.sequential("val", 1))
    if config.plot_text:
        try:
            tokens = tokenizer.encode(config.plot_text)[: config.block_size]
            x = torch.from_numpy(tokens.astype("int64"))[None].to(config.device)
        except UserError as error:
            print(f"note: --plot_text {config.plot_text!r} is not drawn ({error})")
    return x[:, :longest]


def draw(run, dense, sparse, x):
    """attention.png, arcs.png and training.png in the run's folder, of tokens x (1, T). Returns their paths."""
    tokenizer = tokenizer_of(run.data.meta)
    labels = [tokenizer.decode([t]) for t in x[0].tolist()]
    records = {"dense": dense.attention(x).first_sequence(), "sparse": sparse.attention(x).first_sequence()}
    return [
        plots.save(plots.attention_figure(labels, records), run.folder / "attention.png"),
        plots.save(plots.arcs_figure(labels, *records["sparse"]), run.folder / "arcs.png"),
        plots.save(plots.training_figure(read_log(run.folder / "log.jsonl")), run.folder / "training.png"),
    ]


def main(argv):
    problems = []
    name = "addition"
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    if name not in RECIPES:
        problems.append(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES.get(name, TrainConfig())
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nfields, with the values of recipe {name}:\n{command_line.help_text(recipe)}")
        return
    config = command_line.parse(recipe, argv, problems)
    if config.dataset == recipe.dataset:
        config.out_dir = config.out_dir or f"out/{name}"
    elif config.plot_text == recipe.plot_text:
        config.plot_text = ""  # the recipe's is of another dataset
    train(config)


if __name__ == "__main__":
    command_line.run(main)
