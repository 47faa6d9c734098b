"""
Train a small GPT, then make its attention sparse at its own loss.

    python train.py addition                    two-digit addition on a laptop, a few minutes
    python train.py recall                      which digit followed this letter? A few minutes
    python train.py shakespeare_char            nanoGPT's CPU-sized character model
    python train.py shakespeare_8x8             8 layers of 8 heads, with a price per head, two hours
    python train.py novels_char                 the size of shakespeare_char on ten novels, an hour
    python train.py shakespeare_char_gpu        nanoGPT's full-size character model, one GPU
    python train.py gpt2                        the weights of GPT-2 (124M), post-trained on OpenWebText
    torchrun --standalone --nproc_per_node=4 train.py gpt2
    python train.py addition --init_from=out/addition/dense.pt --seed=1 --out_dir=out/addition_seed1
    python train.py addition --resume           go on after Ctrl-C, with the settings of then
    python train.py --help                      every field and its default (without a recipe: addition's)

Up to three phases, each ending in a file of out_dir: `dense` (pretraining, or the model of --init_from),
`sparse` (post-training: as few attention edges as possible while the loss stays at the dense model's), and of
some recipes `control` (the dense model trained for the same extra steps, because post-training also trains).
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from constrained import LossBound
from data.dataset import Dataset
from gates import GATES, head_penalty
from model import GPT, GPTConfig, evaluating
from support import command_line, ranks
from support.checkpoints import open_pretrained, save_model
from support.command_line import UserError, option
from support.files import write_json
from support.gated import ATTENTIONS, calibrate_gate_biases, choose_attention
from support.held_out import HeldOut
from support.report import evaluate, missed_bound, result_line, summarise, table
from support.runs import Run, check_folder, code_of, resumed, signals_noted

CODE = code_of("model.py")  # as it was imported: it may be edited while a run trains


@dataclass
class TrainConfig:
    # data and files
    dataset: str = option("shakespeare_char", "a folder under data_dir")
    data_dir: str = option("data", "where the datasets are")
    out_dir: str = option("", "where to write; empty: out/<recipe>, or out/<dataset> if that is another")
    init_from: str = option("scratch", "scratch (pretrain first), or a dense model: gpt2, gpt2-xl, a path")
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
    gate_bias: float = option(5.0, "where gates' biases start; auto: so that edges are open", word="auto")
    distill: bool = option(False, "learn the dense model's predictions in the sparse phase, not the text")
    head_price: float = option(0.0, "of a head with open edges, besides theirs; see head_penalty", at_least=0)
    loss_tolerance: float = option(0.01, "bound = the dense model's loss + this, nats", at_least=0)
    loss_allowance: float = option(0.05, "what the bound has on top at first, nats; falls to 0", at_least=0)
    multiplier_max: float = option(20.0, "where the multiplier starts, and its maximum", above=0.001)
    multiplier_rate: float = option(0.01, "how far log(multiplier) moves per step at most", above=0)
    multiplier_scale: float = option(0.01, "violation of the bound that moves it that far, nats", above=0)
    # optimisation; the schedule runs anew in every phase
    pretrain_steps: int = option(2500, "steps of the dense phase", at_least=1)
    sparsify_steps: int = option(6000, "steps of the sparse phase, and of the control", at_least=1)
    control: bool = option(True, "also train the dense model for sparsify_steps more, to compare with")
    batch_size: int = option(24, "sequences per micro-step", at_least=1)
    gradient_accumulation_steps: int = option(1, "micro-steps per step, of all ranks together", at_least=1)
    learning_rate: float = option(3e-3, "of the weights in the dense phase", above=0)
    sparsify_learning_rate: float = option(3e-3, "the same in the sparse phase and the control", above=0)
    gate_learning_rate: float = option(3e-2, "of the gates' biases", above=0)
    min_lr: float = option(1.5e-4, "where the cosine decay of both ends", at_least=0)
    warmup_iters: int = option(100, "steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.1, "on matrices, in the dense phase only", at_least=0)
    beta1: float = option(0.9, "AdamW", at_least=0, below=1)
    beta2: float = option(0.99, "AdamW", at_least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient", above=0)
    # what to print and when
    eval_interval: int = option(500, "steps between evaluations; the run is saved as often", at_least=1)
    eval_iters: int = option(20, "batches per evaluation while training", at_least=1)
    log_interval: int = option(50, "steps between two lines of the log", at_least=1)
    # the machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    attention: str = option("auto", "fused is Triton, on CUDA; auto: if it works", choices=ATTENTIONS)
    dtype: str = option("float32", "of matrix products", choices=("float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the model; worth it on GPUs")
    activation_checkpointing: bool = option(False, "compute blocks twice instead of keeping them")
    seed: int = option(1337, "of everything random", at_least=0, below=2**62)

    def check(self):
        GPTConfig(n_head=self.n_head, n_embd=self.n_embd)  # raises if the heads do not divide the width
        for name in ("learning_rate", "sparsify_learning_rate"):
            if self.min_lr > getattr(self, name):
                raise UserError(f"--min_lr {self.min_lr} is above --{name} {getattr(self, name)}: lower it")
        n, size = self.gradient_accumulation_steps, ranks.world_size()
        if n % size:
            shared = f"--gradient_accumulation_steps {n} cannot be shared out over {size} processes"
            raise UserError(f"{shared}: give a multiple of {size}")


GPT2 = TrainConfig(
    dataset="openwebtext", init_from="gpt2", block_size=1024, batch_size=8, gradient_accumulation_steps=24,
    sparsify_steps=10_000, gate_bias="auto", sparsify_learning_rate=1e-4, gate_learning_rate=1e-2,
    min_lr=1e-5, beta2=0.95, dtype="bfloat16", compile=True,
)  # fmt: skip
LARGER = replace(GPT2, batch_size=4, gradient_accumulation_steps=48)
SHAKESPEARE = TrainConfig(
    dataset="shakespeare_char", loss_tolerance=0.005, loss_allowance=0.15, multiplier_max=50.0,
    pretrain_steps=4500, sparsify_steps=10_000, sparsify_learning_rate=1e-3, distill=True, control=False,
)  # fmt: skip
RECIPES = {
    "addition": TrainConfig(
        dataset="addition", n_embd=64, block_size=8, batch_size=128, loss_tolerance=0.002,
        multiplier_scale=0.002, pretrain_steps=1000, sparsify_steps=3500, control=False,
    ),  # fmt: skip
    "recall": TrainConfig(
        dataset="recall", n_embd=64, block_size=9, batch_size=128, multiplier_max=40.0,
        pretrain_steps=500, sparsify_steps=2000, control=False,
    ),  # fmt: skip
    "shakespeare_char": SHAKESPEARE,
    "shakespeare_8x8": replace(SHAKESPEARE, n_layer=8, n_head=8, head_price=0.2, multiplier_max=600.0),
    "novels_char": TrainConfig(
        dataset="novels_char", loss_tolerance=0.005, loss_allowance=0.15, multiplier_max=50.0,
        pretrain_steps=12_000, sparsify_steps=12_000, sparsify_learning_rate=1e-3,
    ),  # fmt: skip
    "shakespeare_char_gpu": TrainConfig(
        dataset="shakespeare_char", n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64,
        dropout=0.2, pretrain_steps=5000, sparsify_steps=10_000, learning_rate=1e-3,
        sparsify_learning_rate=1e-3, gate_learning_rate=1e-2, min_lr=1e-4, dtype="bfloat16", compile=True,
    ),  # fmt: skip
    "gpt2": GPT2,
    "gpt2-medium": replace(LARGER, init_from="gpt2-medium"),
    "gpt2-large": replace(LARGER, init_from="gpt2-large", activation_checkpointing=True),
    "gpt2-xl": replace(LARGER, init_from="gpt2-xl", activation_checkpointing=True),
}


# ------------------------------------------------------------------------------------------------------------
# The step


def training_step(
    model, optimizer, batches, bound, grad_clip, held_out_loss=0.0, autocast=nullcontext, head_price=0.0,
    teacher=None,
):  # fmt: skip
    """One step of post-training on all weights and gates; with bound=None, of plain training.

    batches: this rank's micro-steps, (x, y) each; bound: LossBound on held_out_loss, nats, of which this rank
    gives its part (HeldOut.loss); teacher: a model whose predictions take the place of y. Returns the mean
    loss over micro-steps and ranks, and the last micro-step's AttentionStats. Raises UserError, on all ranks
    and before anything is changed, if a loss or the gradient is not finite."""
    total = 0.0
    for number, (x, y) in enumerate(batches, start=1):
        with ranks.last_only(model, number == len(batches)):
            with autocast():
                if teacher is not None:
                    with evaluating(teacher):
                        y = teacher(x, y)[0].float().softmax(dim=-1)
                _, loss, stats = model(x, y, return_stats=True)  # model.train(): the gates are sampled
            cost = head_penalty(stats.penalty, head_price).mean()  # over layers and heads
            objective = loss if bound is None else bound.lagrangian(cost, loss)
            (objective / len(batches)).backward()
        total = total + loss.detach() / len(batches)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    total, held_out_loss, norm = ranks.mean(total, held_out_loss, norm)
    if not math.isfinite(total + held_out_loss + norm):
        wrong = f"the loss is {total}, held out {held_out_loss}, the norm of the gradient {norm}"
        remedy = "give a smaller --learning_rate or --sparsify_learning_rate, and another --out_dir"
        raise UserError(f"{wrong}: {remedy}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if bound is not None:
        bound.update(held_out_loss)  # not the loss above: with deterministic gates, on held-out data
    return total, stats


def loss_bound(held_out, config):
    """The LossBound of the sparse phase. It aims at a quarter of the tolerance: the rest is for chance, in
    the last steps and between the held-out data and the validation split."""
    aim = ranks.mean(held_out.dense.mean())[0] + config.loss_tolerance / 4
    print(f"held-out data: {len(held_out.dense):,} sequences; their loss is to end under {aim:.4f}")
    return LossBound(aim, config.multiplier_scale, config.multiplier_rate, largest=config.multiplier_max)


def allowance_at(step, steps, config):
    """What the loss may have on top of the bound, since a high learning rate raises it for a while: it falls
    from loss_allowance to 0, linearly, over the first 70 % of the steps."""
    return config.loss_allowance * max(0.0, 1 - step / (0.7 * steps))


def learning_rate_at(step, steps, config):
    """Linear warm-up times a cosine that falls from learning_rate to min_lr, reached after the last step."""
    warmup = min(1.0, (step + 1) / (config.warmup_iters + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (config.min_lr + cosine * (config.learning_rate - config.min_lr))


def make_optimizer(model, config, weight_decay):
    """AdamW in three groups: matrices (decayed), vectors, and the gates' biases with their own rate."""
    matrices, vectors, gates = [], [], []
    for name, p in model.named_parameters():
        group = gates if name.endswith("gate_bias") else matrices if p.dim() >= 2 else vectors
        group.append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_ratio": config.gate_learning_rate / config.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


# ------------------------------------------------------------------------------------------------------------
# The loop


def fit(run, phase, model, held_out=None, teacher=None):
    """Train model in a phase, from its first step or from where last.pt left it, and write <phase>.pt. With
    held_out, a HeldOut, under the bound on its loss; teacher: as in training_step. Returns the model, in eval
    mode, and how it was trained."""
    config = run.config
    steps, weight_decay = config.pretrain_steps, config.weight_decay
    if phase != "dense":
        steps, weight_decay = config.sparsify_steps, 0.0
        config = replace(config, learning_rate=config.sparsify_learning_rate)
    bound = None if held_out is None else loss_bound(held_out, config)
    optimizer = make_optimizer(model, config, weight_decay)
    generator = torch.Generator().manual_seed(config.seed + 1)  # of the batches
    torch.manual_seed(config.seed + 2 + ranks.rank())  # of the gates' noise and dropout
    first = run.begin(phase, steps, model, optimizer, generator, bound)
    model.activation_checkpointing = config.activation_checkpointing
    forward = ranks.replicated(torch.compile(model) if config.compile else model, run.device)
    model.train()
    for step in range(first, steps):
        lr = learning_rate_at(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        batches = run.batches(generator, config.gradient_accumulation_steps)
        held_out_loss = 0.0
        if bound is not None:
            bound.allowance = allowance_at(step, steps, config)
            held_out_loss = held_out.loss(model, step)
        loss, stats = training_step(
            forward, optimizer, batches, bound, config.grad_clip, held_out_loss, run.autocast,
            config.head_price, teacher,
        )  # fmt: skip
        run.after_step(step + 1, loss, stats, lr)  # logs, evaluates, saves, and stops if that is wanted
    trained = {**run.end(), "dataset": run.data.name, "seed": config.seed, "code": CODE}
    trained["block_size"] = config.block_size  # of the sequences; a model of init_from may take longer ones
    if bound is not None:
        trained["training_bound"] = held_out.dense.mean().item() + config.loss_tolerance
        trained["training_loss"] = held_out.losses(model, held_out.starts).mean().item()
    if ranks.is_first():
        save_model(model, run.folder / f"{phase}.pt", run.data.meta, trained)
    return model.eval(), trained


# ------------------------------------------------------------------------------------------------------------
# A run: dense, sparse, control


def dense_phase(run, initial):
    """The dense model, init_from's, the folder's own or a new one, and how it was trained."""
    config, path = run.config, run.folder / "dense.pt"
    if run.is_past("dense"):
        return load(path, run)
    if initial is not None:
        model = GPT.from_pretrained(initial, dropout=config.dropout).to(run.device)
        if ranks.is_first():
            save_model(model, path, run.data.meta, initial.trained_on)
            result = evaluate(model, run.data, config.batch_size, config.eval_iters)
            print(result_line(f"dense: {initial.name}, validation:", result), flush=True)
        return model, initial.trained_on
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "dropout", "bias")}
    model_config = GPTConfig(config.block_size, run.data.meta["vocab_size"], **shape)
    if path.is_file() and not run.saved:
        found = open_pretrained(path)
        wanted = {"steps": config.pretrain_steps, "seed": config.seed, "code": CODE}
        is_same = found.tokenizer == run.data.meta and GPTConfig(**found.model_config) == model_config
        if not is_same or any(found.trained_on.get(key) != value for key, value in wanted.items()):
            other = f"{path} is of other data, another model, steps or seed, or another model.py"
            raise UserError(f"{other}: delete it or give another --out_dir")
        print(f"dense: {path} is there: reused (delete it to train it again)")
        return load(found, run)
    torch.manual_seed(config.seed)
    model = GPT(model_config).to(run.device)
    return fit(run, "dense", model)


def sparse_phase(run, dense):
    """The dense model with gates, post-trained under the bound, and how it was trained."""
    config = run.config
    if run.is_past("sparse"):
        model, trained = load(run.folder / "sparse.pt", run)
        choose_attention(model, config.attention)
        return model, trained
    torch.manual_seed(config.seed)
    gate_bias = 5.0 if config.gate_bias == "auto" else config.gate_bias
    model = GPT(replace(dense.config, gate=config.gate, gate_bias=gate_bias)).to(run.device)
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the gates' biases
    if config.gate_bias == "auto":
        n = max(1, min(config.batch_size, 4096 // run.data.sequence_tokens))
        x, _ = run.data.batch("train", n, torch.Generator().manual_seed(config.seed))
        calibrate_gate_biases(model, x)
    print(f"gated attention: {choose_attention(model, config.attention)}")
    return fit(run, "sparse", model, HeldOut(run, dense), dense if config.distill else None)


def load(source, run):
    """The model that a phase wrote, at a path or opened, and how it was trained."""
    found = open_pretrained(source)
    return GPT.from_pretrained(found).to(run.device), found.trained_on


def train(config):
    """Run the phases of a recipe and write the files of out_dir. Returns the contents of summary.json; of
    several ranks only the first does, the others return {}. Raises UserError for bad settings or files;
    KeyboardInterrupt when the user stopped it and it was saved."""
    saved = initial = None
    config = replace(config, out_dir=config.out_dir or f"out/{config.dataset}")
    if config.resume:
        config, saved = resumed(config)
    device = ranks.find_device(config.device)
    torch.set_float32_matmul_precision("high")
    with ranks.joined(device), signals_noted() as stop:
        if config.init_from != "scratch" and not saved:
            with ranks.first_alone():  # what it downloads, the others find
                initial = open_pretrained(config.init_from)
            config = replace(config, **initial.dense_shape(config.block_size))
        command_line.check(config)
        if config.attention == "fused":  # before the dense phase: raises UserError where it does not work
            shape = {"n_layer": 1, "n_head": config.n_head, "n_embd": config.n_embd, "gate": config.gate}
            small = GPTConfig(block_size=1, vocab_size=1, **shape)
            choose_attention(GPT(small).to(device), config.attention)
        data = Dataset(config.dataset, config.block_size, config.data_dir, device)
        if config.distill and data.is_task:
            raise UserError(f"--distill is for running text, and {data.name} is a task: give --no-distill")
        if initial is not None:
            data.check_tokenizer(initial.tokenizer, config.init_from)
        if not saved:
            check_folder(config)
            ranks.wait()  # before the first one changes the folder
        run = Run(config, data, device, saved, stop)
        print(f"writing to {run.folder}", flush=True)
        models, phases = {}, {}
        models["dense"], phases["dense"] = dense_phase(run, initial)
        models["sparse"], phases["sparse"] = sparse_phase(run, models["dense"])
        if config.control:
            models["sparse"].cpu()  # out of the way
            model = copy.deepcopy(models["dense"])
            models["control"], phases["control"] = fit(run, "control", model)
        return finish(run, models, phases) if ranks.is_first() else {}


def finish(run, models, phases):
    """Measure all models on the validation split, write summary.json and the pictures, print the table."""
    print("measuring all models on the validation split", flush=True)
    size = run.config.batch_size
    results = {name: evaluate(model.to(run.device), run.data, size) for name, model in models.items()}
    summary = summarise(run.config, phases, results, run.device)
    write_json(summary, run.folder / "summary.json")
    drawn = run.draw(models["dense"], models["sparse"])
    cost = [(key, {name: f"{n:,}" for name, n in summary[key].items()}) for key in ("steps", "seconds")]
    print(table(results, summary["bound"], cost))
    print("\n".join(["", *missed_bound(summary), "pictures: " + "  ".join(map(str, drawn))]))
    return summary


def main(argv):
    name = "addition"
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    config = command_line.parse(recipe, argv, f"{__doc__}\nrecipe {name},")
    config.out_dir = config.out_dir or f"out/{name if config.dataset == recipe.dataset else config.dataset}"
    for field in ("n_layer", "n_head", "n_embd", "bias"):
        value = getattr(config, field)
        if config.init_from != "scratch" and value != getattr(recipe, field):
            raise UserError(f"--{field} is {value}, but --init_from decides it: leave it out")
    if config.resume and config != replace(recipe, resume=True, out_dir=config.out_dir):
        raise UserError("--resume goes on with the settings of the run: give no other option than --out_dir")
    train(config)


if __name__ == "__main__":
    command_line.run(main)
