"""
A GPT, as GPT-2 and nanoGPT define it, whose attention may carry gates.

With gate="none" this is plain GPT-2 on PyTorch's fused attention. With a gate, every head gets a bias for its gates, with
gate_input="low_rank" also a query and a key for them, and calls gates.gated_attention instead. Nothing else differs, so the
weights of a dense model load into a gated one, which is how post-training begins.

Shapes: B batch, T positions, C width (n_embd), H heads, D = C / H, L layers, V vocabulary.
"""

import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import weights
from config import UserError
from gates import GATES, AttentionStats, attention_pattern, causal_mask, causal_scores, gated_attention

GATE_INPUTS = ("score", "low_rank")
ATTENTIONS = ("auto", "reference", "fused")


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as GPT-2 has it
    gate: str = "none"  # or a name in gates.GATES
    gate_bias: float = 5.0  # where every head's gate bias starts: large enough that all edges are open
    gate_input: str = "score"  # the gates see the attention score; "low_rank": a query and a key of their own
    gate_rank: int = 16  # dimensions of that query and key, per head

    def __post_init__(self):
        problems = head_problems(self.n_embd, self.n_head)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "gate_rank"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}: give a fraction from 0 up to, not including, 1")
        if self.gate != "none" and self.gate not in GATES:
            problems.append(f"gate is {self.gate!r}: choose one of none, {', '.join(GATES)}")
        if self.gate_input not in GATE_INPUTS:
            problems.append(f"gate_input is {self.gate_input!r}: choose one of {', '.join(GATE_INPUTS)}")
        if problems:
            raise UserError("\n".join(problems))


def head_problems(n_embd, n_head):
    """A sentence if a width cannot be split into so many heads."""
    if n_embd < 1 or n_head < 1 or n_embd % n_head == 0:
        return []
    nearest = min((h for h in range(1, n_embd + 1) if n_embd % h == 0), key=lambda h: abs(h - n_head))
    multiple = n_head * max(1, n_embd // n_head)
    return [f"n_embd {n_embd} is not divisible by n_head {n_head}: give for instance n_head {nearest}, or n_embd {multiple}"]


class Attention(nn.Module):
    """Causal self-attention, dense or gated. (B, T, C) -> (B, T, C) and AttentionStats."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.gate, self.gate_qk = None, None
        self.attend = gated_attention  # or the fused one: GPT.use_attention
        if config.gate != "none":
            self.gate = GATES[config.gate]()
            self.gate_bias = nn.Parameter(torch.empty(config.n_head))
            if config.gate_input == "low_rank":  # the gates' own queries and keys in one
                self.gate_qk = nn.Linear(config.n_embd, 2 * config.n_head * config.gate_rank, bias=False)

    def qkv(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        return [t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v)]  # (B, H, T, D) each

    def gate_inputs(self, x):
        """What the gates see: their own queries and keys, (B, H, T, R) each; None, None where they see the scores."""
        if self.gate_qk is None:
            return None, None
        B, T, _ = x.shape
        return self.gate_qk(x).view(B, T, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        gate_q, gate_k = self.gate_inputs(x)
        if cache is not None:  # generation: x holds only new positions, the cache the keys and values of the old ones
            k, v, gate_k = cache.extend(self, k, v, gate_k)
        if self.gate is not None:  # no dropout on gated attention: the gates' noise takes its place
            attend = self.attend if cache is None else gated_attention
            y, stats = attend(q, k, v, self.gate_bias, self.gate, self.training, gate_q=gate_q, gate_k=gate_k)
        else:
            mask = None if T == k.size(2) else causal_mask(T, k.size(2), x.device)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
            stats = dense_stats(self.n_head, x.device)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y)), stats


def dense_stats(n_head, device):
    """AttentionStats of attention without gates: every edge is there."""
    one, zero = torch.ones(n_head, device=device), torch.zeros(n_head, device=device)
    return AttentionStats(penalty=one, expected_edges=one, hard_edges=one, empty_rows=zero, mass_removed=zero)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # GPT-2's GELU is the tanh one


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        y, stats = self.attn(self.ln_1(x), cache)
        x = x + y
        return x + self.mlp(self.ln_2(x)), stats


class AttentionRecord(NamedTuple):
    """What every head does with one batch; each (L, B, H, T, T), rows are queries, columns keys."""

    pattern: torch.Tensor  # softmax attention before the gates
    gate: torch.Tensor  # deterministic gates in [0, 1]; zero above the diagonal; one everywhere below if dense

    @property
    def edges(self):
        return self.gate > 0

    def first_sequence(self):
        """(effective weight = pattern * gate, edges) of the batch's first sequence, NumPy arrays (L, H, T, T), for plots."""
        return (self.pattern * self.gate)[:, 0].cpu().numpy(), self.edges[:, 0].cpu().numpy()


class KVCache:
    """Keys and values of the positions that generation has already seen, per attention layer."""

    def __init__(self):
        self.length, self._store = 0, {}

    def extend(self, layer, *new):
        """new: (B, H, T, ...) tensors of the new positions, or None -> the same of all positions."""
        if layer in self._store:
            new = [t if t is None else torch.cat([old, t], dim=2) for old, t in zip(self._store[layer], new)]
        self._store[layer] = new
        return new


class GPT(nn.Module):
    """Parameter names and shapes are those of GPT-2's checkpoints, but for linear weights, which are (out, in) here."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the read-out: the weights are tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.activation_checkpointing = False  # True: training computes every block twice and keeps only its input
        self._initialise(dict(self.named_parameters()))

    def _initialise(self, named):
        """GPT-2's: normal(0, 0.02), biases zero, and the layers that write to the residual stream scaled down by
        1 / sqrt(2 L), so that its variance does not grow with depth. named: {name: parameter} to initialise."""
        for name, p in named.items():
            if name.endswith("gate_bias"):
                nn.init.constant_(p, self.config.gate_bias)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("gate_qk.weight"):  # keys of zeros: all gates start at their bias, whatever the input
                queries, keys = p.chunk(2)
                nn.init.normal_(queries, std=self.config.n_embd**-0.5)
                nn.init.zeros_(keys)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def embed(self, idx, start=0):
        """Token plus position embeddings of idx (B, T), which begins at position `start`: (B, T, C)."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit the model's block_size {self.config.block_size}: shorten them")
        return self.wte(idx) + self.wpe(torch.arange(start, end, device=idx.device))

    def forward(self, idx, targets=None, return_stats=False, cache=None):
        """idx: (B, T) tokens; targets: (B, T) next tokens, -1 where none is to be predicted.

        With targets: logits (B, T, V) and the mean loss in nats per predicted token. Without: logits (B, 1, V) of the last
        position and None. With return_stats also AttentionStats stacked to (L, H). train() samples gates, eval() takes the
        deterministic ones. Raises UserError for more positions than block_size.
        """
        x = self.drop(self.embed(idx, 0 if cache is None else cache.length))  # (B, T, C)
        layer_stats = []
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x, stats = checkpoint(block, x, use_reentrant=False)  # with the same noise both times
            else:
                x, stats = block(x, cache)
            layer_stats.append(stats)
        if cache is not None:
            cache.length += idx.size(1)
        x = self.ln_f(x if targets is not None else x[:, -1:])
        logits = F.linear(x, self.wte.weight)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        if not return_stats:
            return logits, loss
        return logits, loss, AttentionStats(*(torch.stack(figures) for figures in zip(*layer_stats)))  # (L, H) each

    def use_attention(self, name, device):
        """From now on compute gated attention so: "reference" is gates.py, "fused" is kernels.py, "auto" the fused one where
        it works. device: where the model runs. Returns in words what was taken. Raises UserError where fused does not work."""
        problem = "" if name == "reference" else fused_problem(device, self)
        if name == "fused" and problem:
            raise UserError(f"--attention is fused, which {problem}: choose auto or reference")
        fused = name != "reference" and not problem
        if fused:
            import kernels  # here, since it imports Triton, which a CPU does without
        for block in self.h:
            block.attn.attend = kernels.gated_attention if fused else gated_attention
        return "fused" if fused else f"reference (fused {problem})" if problem else "reference"

    @torch.no_grad()
    def attention(self, idx):
        """AttentionRecord of tokens idx (B, T): patterns and deterministic gates of every layer and head."""
        was_training = self.training
        self.eval()
        x = self.embed(idx)
        patterns, gates = [], []
        for block in self.h:
            attn, h = block.attn, block.ln_1(x)
            q, k, _ = attn.qkv(h)
            if attn.gate is None:
                pattern = causal_scores(q, k).softmax(dim=-1)
                z = causal_mask(idx.size(1), idx.size(1), idx.device).to(pattern.dtype).expand_as(pattern)
            else:
                pattern, log_alpha = attention_pattern(q, k, attn.gate_bias, *attn.gate_inputs(h))
                z = attn.gate.deterministic(log_alpha)
            patterns.append(pattern)
            gates.append(z)
            x, _ = block(x)
        self.train(was_training)
        return AttentionRecord(torch.stack(patterns), torch.stack(gates))

    @torch.no_grad()
    def open_gates(self, idx, mass=0.999, log_alpha=5.0):
        """Set the gates' biases so that on tokens idx (B, T) the edges that hold `mass` of each head's attention weight have
        a logit of at least log_alpha. With gate_input="score" that takes more than a bias of 5 where the scores of a head
        are far below zero; with gates that see a query and a key of their own all biases are log_alpha."""
        was_training = self.training
        self.eval()
        x = self.embed(idx)
        for block in self.h:
            if self.config.gate_input == "score":
                q, k, _ = block.attn.qkv(block.ln_1(x))
                scores = causal_scores(q, k)
                pattern = scores.softmax(dim=-1).transpose(0, 1).flatten(1)  # (H, B T T)
                scores, order = scores.transpose(0, 1).flatten(1).sort(dim=1)  # forbidden pairs first, of weight zero
                below = pattern.gather(1, order).cumsum(dim=1)  # weight of the edges up to this score
                first = (below < (1 - mass) * below[:, -1:]).sum(dim=1, keepdim=True)
                block.attn.gate_bias.copy_(log_alpha - scores.gather(1, first)[:, 0])
            else:
                block.attn.gate_bias.fill_(log_alpha)
            x, _ = block(x)
        self.train(was_training)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx: (B, T) prompt -> (B, T + max_new_tokens). temperature 0 is greedy; top_k keeps the k likeliest tokens.

        Each step runs the model on the newest token only and takes the rest from a key/value cache. Past block_size the
        window slides by one, all positions change, and the cache is rebuilt."""
        was_training = self.training
        self.eval()
        cache, new = KVCache(), idx
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > self.config.block_size:
                cache, new = KVCache(), idx[:, -self.config.block_size :]
            logits = self(new, cache=cache)[0][:, -1]  # (B, V)
            new = pick_token(logits, temperature, top_k)
            idx = torch.cat([idx, new], dim=1)
        self.train(was_training)
        return idx

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """A trained model, in eval mode, on the CPU. source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), a
        folder in Hugging Face's GPT-2 layout, or the path of one of this project's checkpoints; overrides: GPTConfig fields,
        for instance gate="hard_concrete" to put gates on a dense model. Raises UserError if the source is missing, damaged
        or another model."""
        return cls.from_source(open_source(source), **overrides)

    @classmethod
    @torch.no_grad()
    def from_source(cls, source, **overrides):
        """As from_pretrained, from a Source."""
        try:
            with torch.device("meta"):  # shapes only: the weights are read straight into place
                model = cls(GPTConfig(**{**source.model_config, **overrides}))
        except TypeError as error:  # an unknown field
            raise UserError(f"{source.name} does not hold a model of this version: {error}")
        model.to_empty(device="cpu")
        waiting = dict(model.named_parameters())
        for name, tensor in source.tensors():
            if name not in waiting:
                if ".attn.gate_" in name and model.config.gate == "none":
                    continue  # gates may be left out
                raise UserError(f"{source.name} is not a checkpoint of this model: there is no place for its tensor {name}")
            p = waiting.pop(name)
            if getattr(tensor, "shape", None) != p.shape:
                found = tuple(getattr(tensor, "shape", ()))
                raise UserError(
                    f"{source.name} has a tensor {name} of shape {found}, the model needs {tuple(p.shape)}: give another"
                )
            p.copy_(tensor)
        new = {name: p for name, p in waiting.items() if ".attn.gate_" in name and source.model_config.get("gate") == "none"}
        if len(new) < len(waiting):
            missing = next(name for name in waiting if name not in new)
            raise UserError(f"{source.name} is not a checkpoint of this model: its tensor {missing} is missing")
        model._initialise(new)  # gates may be new
        return model.eval()

    def save_pretrained(self, folder):
        """Write the model in Hugging Face's GPT-2 layout. Gates go along as tensors and settings that only this project
        reads."""
        weights.write_folder(folder, asdict(self.config), self.named_parameters())
        if self.config.gate != "none":
            print(f"{folder}: other libraries will load the weights, but not the gates; GPT.from_pretrained here restores both")


def pick_token(logits, temperature, top_k):
    """logits: (B, V) -> (B, 1) tokens."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # no overflow, however small it is
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


class Source(NamedTuple):
    """A trained model: what is known of it, and a way to its weights."""

    name: str
    model_config: dict  # fields of GPTConfig
    tokenizer: dict  # as in a dataset's meta.json
    trained_on: dict  # what checkpoint_of was given
    tensors: Callable  # () -> (name, tensor) one after the other


def open_source(source):
    """The Source of what GPT.from_pretrained accepts. Raises UserError."""
    if str(source) in weights.GPT2_MODELS and not Path(source).exists():
        folder = weights.download(str(source))
    elif Path(source).is_dir():
        folder = Path(source)
    else:
        return source_of(load_checkpoint(source), source)
    config = weights.read_config(folder)
    tokenizer = {"tokenizer": "gpt2" if config["vocab_size"] == 50257 else "unknown", "vocab_size": config["vocab_size"]}
    return Source(str(source), config, tokenizer, {}, lambda: weights.read_tensors(folder))


def source_of(checkpoint, path="the checkpoint"):
    """The Source of what load_checkpoint returned."""
    fields = (checkpoint[key] for key in ("model_config", "tokenizer", "trained_on"))
    return Source(str(path), *fields, lambda: checkpoint["model"].items())


CHECKPOINT_KEYS = {
    "nanosparse model": {"model_config", "model", "tokenizer", "trained_on"},
    "nanosparse run": {"run", "phase", "settings", "step", "seconds", "recent", "state", "noise", "noise_cuda"},
}


def checkpoint_of(model, tokenizer, trained_on):
    """What a finished model's file holds: tensors and plain values only. tokenizer: the dataset's meta.json;
    trained_on: plain values that identify the run."""
    return {
        "format": "nanosparse model",
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer,
        "trained_on": trained_on,
    }


def save_checkpoint(checkpoint, path):
    """Write to a temporary file beside path, then rename: whoever interrupts it, path holds the old or the new.
    Raises UserError if it cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free some space, or choose another folder")
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, format="nanosparse model"):
    """A dict that save_checkpoint wrote, on the CPU. Never unpickles code. Raises UserError if it is none of this format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}: train one with `python train.py`, check the path, or name one of "
            f"{', '.join(weights.GPT2_MODELS)}"
        )
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums that torch.save writes
                raise ValueError("a checksum does not fit")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise UserError(f"{path} is damaged or no PyTorch checkpoint ({type(error).__name__}): restore it, or delete it")
    if (
        not isinstance(checkpoint, dict)
        or checkpoint.get("format") != format
        or not CHECKPOINT_KEYS[format] <= checkpoint.keys()
    ):
        raise UserError(f"{path} is no {format}: give a file that train.py wrote, such as dense.pt or sparse.pt")
    return checkpoint


def find_device(name):
    """auto -> the best device that this machine has; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fused_problem(device, model=None):
    """Why fused attention does not work on this device and, if given, for this model; empty if it does."""
    if not str(device).startswith("cuda"):
        return f"needs a CUDA device, and this is {device}"
    if find_spec("triton") is None:
        return "needs the package triton, and it is not installed"
    if model is None:
        return ""
    import kernels

    gate, head = model.h[0].attn.gate, model.wte.weight.new_empty(1, 1, 1, model.config.n_embd // model.config.n_head)
    return kernels.unknown(head.to(device), gate) or kernels.disagreement(gate, device)


def device_problems(name):
    """Sentences that say why this device cannot be used; [] if it can."""
    if name in ("auto", "cpu") or (name == "mps" and torch.backends.mps.is_available()):
        return []
    if name == "cuda" or name.startswith("cuda:") and name[5:].isdigit():
        n = torch.cuda.device_count()
        if int(name[5:] or 0) < n:
            return []
        return [f"--device is {name}, but PyTorch sees {n} CUDA devices here: choose auto or cpu"]
    return [
        f"--device is {name!r}: choose auto, cpu, cuda, cuda:N" + ("; there is no mps here" if name == "mps" else " or mps")
    ]
