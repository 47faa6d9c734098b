"""
A GPT, as GPT-2 and nanoGPT define it, whose attention may carry gates.

With gate="none" this is plain GPT-2 on PyTorch's own attention. With a gate, every head gets a bias for its
gates and calls gates.gated_attention instead. Nothing else differs, so the weights of a dense model load
into a gated one: that is how post-training begins.

Shapes: B batch, T positions, C width (n_embd), H heads, D = C / H, L layers, V vocabulary.
"""

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gates import GATES, AttentionStats, attention_pattern, causal_scores, gated_attention
from support import gpt2_weights, lens_weights
from support.checkpoints import fill, open_pretrained
from support.command_line import UserError


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2
    gate: str = "none"  # or a name in gates.GATES
    gate_bias: float = 5.0  # where every head's gate bias starts: large, so that edges start open
    read_out: str = "tied"  # to the token embedding, as in GPT-2; "own": other weights; "biased": and a bias
    padding: int = 0  # tokens at the end of the vocabulary that mean nothing, and are never generated

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one")
        for name, choices in (("gate", ("none", *GATES)), ("read_out", ("tied", "own", "biased"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.padding < self.vocab_size:
            raise UserError(f"padding is {self.padding}: give at least 0, below vocab_size {self.vocab_size}")


class Attention(nn.Module):
    """Causal self-attention, dense or gated. (B, T, C) -> (B, T, C) and AttentionStats."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.gate = None
        self.attend = gated_attention  # or the fused one: support.gated.choose_attention
        if config.gate != "none":
            self.gate = GATES[config.gate]()
            self.gate_bias = nn.Parameter(torch.empty(config.n_head))

    def qkv(self, x):
        B, T, C = x.shape
        split = (B, T, self.n_head, C // self.n_head)
        return [t.view(split).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2)]  # (B, H, T, D) each

    def pattern_and_gate(self, q, k):
        """The softmax, and the deterministic gates (ones if dense): (B, H, T, T), zero for later keys."""
        if self.gate is None:
            pattern = causal_scores(q, k).softmax(dim=-1)
            return pattern, torch.ones_like(pattern).tril()
        pattern, log_alpha = attention_pattern(q, k, self.gate_bias)
        return pattern, self.gate.deterministic(log_alpha)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        if cache is not None:  # generation: {this module: (keys, values) of the positions before x}
            if self in cache:
                past_k, past_v = cache[self]
                k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            cache[self] = k, v
        if self.gate is not None:  # no dropout on gated attention: the gates' noise takes its place
            attend = self.attend if cache is None else gated_attention
            y, stats = attend(q, k, v, self.gate_bias, self.gate, self.training)
        else:
            dropout = self.dropout if self.training else 0.0
            past = k.size(2) - T
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past else None
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not past)
            one, zero = torch.ones(self.n_head, device=x.device), torch.zeros(self.n_head, device=x.device)
            stats = AttentionStats(one, one, one, zero, zero)  # every edge is there
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y)), stats


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # GPT-2's GELU is tanh's


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

    pattern: torch.Tensor  # the softmax, before the gates
    gate: torch.Tensor  # deterministic, in [0, 1]; zero where the key is later; else one if dense

    @property
    def edges(self):
        return self.gate > 0


@contextmanager
def evaluating(model):
    """Within it: no gradients, no dropout, deterministic gates. Afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class GPT(nn.Module):
    """Parameters have the names and shapes of GPT-2's checkpoints, but linear weights are (out, in), as in
    PyTorch."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the read-out, where that is tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = None
        if config.read_out != "tied":
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.read_out == "biased")
        self.activation_checkpointing = False  # True: compute every block twice instead of keeping it
        self.initialise(dict(self.named_parameters()))

    def initialise(self, parameters):
        """Normal with standard deviation 1 / sqrt(C), biases zero, and, as in GPT-2, layers that write to the
        residual stream scaled down by 1 / sqrt(2 L). GPT-2's 0.02 is too small for a narrow model: all its
        scores start near zero, and heads take thousands of steps to find what to read."""
        std = 1 / math.sqrt(self.config.n_embd)
        for name, p in parameters.items():
            if name.endswith("gate_bias"):
                nn.init.constant_(p, self.config.gate_bias)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def embed(self, idx, start=0):
        """Token plus position embeddings of idx (B, T), which begins at position `start`: (B, T, C)."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit block_size {self.config.block_size}: shorten them")
        return self.wte(idx) + self.wpe(torch.arange(start, end, device=idx.device))

    def read_out(self, x):
        """The residual stream (..., C) -> logits (..., V)."""
        x = self.ln_f(x)
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)

    def forward(self, idx, targets=None, return_stats=False, cache=None):
        """idx: (B, T) tokens; targets: (B, T) next tokens, -1 where none is to be predicted, or their
        probabilities, (B, T, V); cache: a dict, empty at first, that keeps the keys and values of all tokens
        so far, which come before idx.

        With targets: logits (B, T, V) and the mean loss in nats per predicted token. Without: logits (B, 1,
        V) of the last position, and None. With return_stats also AttentionStats stacked to (L, H). train()
        samples gates, eval() takes the deterministic ones. Raises UserError for more positions than
        block_size."""
        start = next(iter(cache.values()))[0].size(2) if cache else 0
        x = self.drop(self.embed(idx, start))  # (B, T, C)
        layer_stats = []
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x, stats = checkpoint(block, x, use_reentrant=False)  # with the same noise both times
            else:
                x, stats = block(x, cache)
            layer_stats.append(stats)
        logits = self.read_out(x if targets is not None else x[:, -1:])
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1), ignore_index=-1)
        if not return_stats:
            return logits, loss
        return logits, loss, AttentionStats(*map(torch.stack, zip(*layer_stats)))  # (L, H) each

    def attention(self, idx):
        """AttentionRecord of tokens idx (B, T): every layer's and head's pattern and deterministic gates."""
        layers = []
        with evaluating(self):
            x = self.embed(idx)
            for block in self.h:
                q, k, _ = block.attn.qkv(block.ln_1(x))
                layers.append(block.attn.pattern_and_gate(q, k))
                x, _ = block(x)
        return AttentionRecord(*map(torch.stack, zip(*layers)))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx: (B, T) prompt -> (B, T + max_new_tokens). temperature 0 is greedy; top_k: keep so many
        likeliest.

        A step runs the model on the newest token and takes the rest from a key/value cache. Past block_size
        the window slides by one, all positions change, and the cache is built anew."""
        cache, new = {}, idx
        n_tokens = self.config.vocab_size - self.config.padding
        with evaluating(self):
            for _ in range(max_new_tokens):
                if idx.size(1) > self.config.block_size:
                    cache, new = {}, idx[:, -self.config.block_size :]
                logits = self(new, cache=cache)[0][:, -1, :n_tokens].float()  # (B, V)
                if temperature == 0:
                    new = logits.argmax(dim=-1, keepdim=True)
                else:
                    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature  # no overflow
                    if top_k:
                        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                        logits = logits.masked_fill(logits < smallest, float("-inf"))
                    new = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
                idx = torch.cat([idx, new], dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """A trained model, in eval mode, on the CPU. source: one of support.checkpoints.MODELS, such as gpt2
        (downloaded once), a folder in Hugging Face's GPT-2 layout or with a TransformerLens state dict, or
        the path of one of this project's checkpoints; overrides: GPTConfig fields, for instance
        gate="hard_concrete" to put gates on a dense model. Raises UserError if the source is missing, damaged
        or another model."""
        source = open_pretrained(source)
        unknown = source.model_config.keys() - GPTConfig.__dataclass_fields__
        if unknown:
            raise UserError(f"{source.name} has a setting {min(unknown)} of another version: train it anew")
        with torch.device("meta"):  # shapes only: the weights are read straight into place
            model = cls(GPTConfig(**{**source.model_config, **overrides}))
        model.to_empty(device="cpu")
        new_gates = fill(model, source)
        model.initialise(new_gates)
        return model.eval()

    def save_pretrained(self, folder, layout="huggingface"):
        """Write the model as Hugging Face's GPT-2 or, with layout="transformer_lens", as a HookedTransformer;
        gates go along as tensors or settings of our own. Raises UserError."""
        layouts = {"huggingface": gpt2_weights, "transformer_lens": lens_weights}
        if layout not in layouts:
            raise UserError(f"layout is {layout!r}: choose one of {', '.join(layouts)}")
        layouts[layout].write_folder(folder, asdict(self.config), self.named_parameters())
