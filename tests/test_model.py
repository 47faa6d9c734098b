"""The GPT against an independent forward pass in NumPy; generation; checkpoints."""

import math
import os
from dataclasses import asdict
from random import Random

import numpy as np
import pytest
import torch

from gates import HardConcrete
from model import GPT, GPTConfig, evaluating
from support.checkpoints import load_checkpoint, save_model
from support.command_line import UserError
from support.files import replacing

TINY = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8)


def tiny(seed=0, **overrides):
    """A small model whose weights, biases included, are far from zero, so that no term can hide."""
    model = GPT(GPTConfig(**{**TINY, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))  # gates' biases, too: some are closed
    return model.eval()


def numpy_forward(model, tokens):
    """GPT-2 as its paper's equations say, for one sequence: (T,) -> logits (T, V)."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    H = model.config.n_head

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    T, C = len(tokens), model.config.n_embd
    D = C // H
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(model.config.n_layer):
        qkv = linear(layer_norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        heads = []
        for h in range(H):
            q, k, v = (qkv[:, part * C + h * D : part * C + (h + 1) * D] for part in range(3))
            scores = q @ k.T / math.sqrt(D)
            out = np.zeros((T, D))
            for i in range(T):
                p = np.exp(scores[i, : i + 1] - scores[i, : i + 1].max())
                p /= p.sum()
                if f"h.{layer}.attn.gate_bias" in w:  # hard concrete, deterministic
                    log_alpha = scores[i, : i + 1] + w[f"h.{layer}.attn.gate_bias"][h]
                    z = np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1)
                    p = p * np.where(z > 0.5, z, 0)
                out[i] = p @ v[: i + 1]
            heads.append(out)
        x = x + linear(np.concatenate(heads, axis=1), f"h.{layer}.attn.c_proj")
        hidden = gelu(linear(layer_norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"))
        x = x + linear(hidden, f"h.{layer}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("gate", ["none", "hard_concrete"])
def test_logits_and_loss_equal_an_independent_numpy_forward_pass(gate):
    model = tiny(gate=gate).double()
    tokens, targets = np.array([3, 1, 12, 0, 7, 7]), np.array([-1, 12, 0, -1, 7, 2])
    logits, loss = model(torch.tensor(tokens)[None], torch.tensor(targets)[None])
    expected = numpy_forward(model, tokens)
    assert np.abs(logits[0].detach().numpy() - expected).max() < 1e-9
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    wanted = targets >= 0
    assert loss.item() == pytest.approx(-log_p[wanted, targets[wanted]].mean(), abs=1e-6)
    last, none = model(torch.tensor(tokens)[None])
    assert none is None and last.shape == (1, 1, 13) and torch.allclose(last[0, 0], logits[0, -1])
    n_open = model.attention(torch.tensor(tokens)[None]).edges.sum()
    assert n_open == 84 if gate == "none" else 0 < n_open < 84, "there must be open and closed gates"


def test_stats_have_a_row_per_layer_and_training_samples_the_gates():
    model, idx = tiny(gate="hard_concrete"), torch.randint(13, (4, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert all(figure.shape == (2, 2) for figure in model(idx, idx, return_stats=True)[2])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    stats = tiny()(idx, idx, return_stats=True)[2]
    assert (stats.hard_edges == 1).all() and (stats.mass_removed == 0).all()


def test_attention_record():
    model, idx = tiny(gate="hard_concrete"), torch.randint(13, (3, 6))
    model.train()
    record = model.attention(idx)
    assert model.training, "attention() must leave the mode as it was"
    assert record.pattern.shape == record.gate.shape == (2, 3, 2, 6, 6)
    assert torch.allclose(record.pattern.sum(-1), torch.ones(2, 3, 2, 6), atol=1e-6)
    assert (record.gate.triu(1) == 0).all()
    model.eval()
    stats = model(idx, idx, return_stats=True)[2]
    assert torch.allclose(record.edges.float().sum((1, 3, 4)) / (3 * 21), stats.hard_edges)
    # what the record says must be what the model does: rebuild layer 0's heads from it
    q, k, v = model.h[0].attn.qkv(model.h[0].ln_1(model.wte(idx) + model.wpe(torch.arange(6))))
    y = (record.pattern[0] * record.gate[0]) @ v
    rebuilt = model.h[0].attn.c_proj(y.transpose(1, 2).reshape(3, 6, 8))
    actual, _ = model.h[0].attn(model.h[0].ln_1(model.wte(idx) + model.wpe(torch.arange(6))))
    assert torch.allclose(rebuilt, actual, atol=1e-6)


@pytest.mark.parametrize("gate", ["none", "hard_concrete", "bernoulli"])
def test_generation_with_the_cache_equals_generation_without(gate):
    """Also past block_size, where the window slides."""
    model, idx = tiny(gate=gate), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with_cache = model.generate(idx, 12, temperature=0)
    for _ in range(12):
        logits = model(idx[:, -8:])[0][:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_cache, idx)
    cache = {}
    pieces = [model(piece, cache=cache)[0] for piece in idx[:, :8].split(3, dim=1)]  # several tokens at once
    assert torch.allclose(pieces[-1], model(idx[:, :8])[0], atol=1e-5)


def test_generation_samples_the_models_distribution():
    model, idx = tiny(), torch.tensor([[1, 2, 3]])
    torch.manual_seed(1)
    n = 20_000
    next_token = model.generate(idx.repeat(n, 1), 1, temperature=0.7)[:, -1]
    expected = (model(idx)[0][0, -1] / 0.7).softmax(-1)
    frequency = torch.bincount(next_token, minlength=13) / n
    assert (frequency - expected).abs().max() < 5 * math.sqrt(0.25 / n)
    assert torch.equal(model.generate(idx, 5, temperature=1e-40), model.generate(idx, 5, temperature=0))
    kept = set(expected.topk(3).indices.tolist())
    assert set(model.generate(idx.repeat(1000, 1), 1, top_k=3)[:, -1].tolist()) == kept


def test_evaluating_is_safe_against_exceptions():
    model = tiny(gate="hard_concrete").train()
    with pytest.raises(UserError, match="9 tokens do not fit block_size 8"):
        model.attention(torch.zeros(1, 9, dtype=torch.long))
    assert model.training and torch.is_grad_enabled()
    with evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "model.pt", tiny(1)
    save_model(old, path, {}, {})

    def breaks(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(UserError, match=r"cannot write .*model.pt \(No space left on device\)"):
        save_model(tiny(2), path, {}, {})
    assert all(torch.equal(p, old.state_dict()[name]) for name, p in load_checkpoint(path)["model"].items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"], "the temporary file must not stay behind"


def test_two_programs_that_save_at_once_do_not_meet(tmp_path, monkeypatch):
    with replacing(tmp_path / "x") as one:
        monkeypatch.setattr(os, "getpid", lambda: 7)
        with replacing(tmp_path / "x") as two:
            assert one != two
            two.write_text("two")
        one.write_text("one")
    assert (tmp_path / "x").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_foreign_checkpoints_are_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("hello")
    with pytest.raises(UserError, match="model.pt is damaged or incomplete .*: restore or delete it"):
        GPT.from_pretrained(path)
    for content, words in [
        ({"state_dict": {}}, "is no nanosparse model"),
        ({"format": "nanosparse model", "code": HardConcrete()}, "is damaged"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=words):
            GPT.from_pretrained(path)


@pytest.mark.parametrize("seed", range(20))
def test_an_altered_checkpoint_is_named_or_unharmed(tmp_path, seed):
    """A byte changed, or the end cut off: an error, or exactly what was saved (some bytes are padding)."""
    path, random, model = tmp_path / "model.pt", Random(seed), tiny()
    save_model(model, path, {}, {})
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    if seed % 4 == 0:
        content = content[:place]
    else:
        content[place] ^= random.randrange(1, 256)
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        assert "model.pt is" in str(error)
    else:
        assert seed % 4, "the end is gone"
        assert all(torch.equal(p, loaded["model"][name]) for name, p in model.state_dict().items())
        assert loaded["model_config"] == asdict(model.config)
