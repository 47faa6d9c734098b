"""GPT-2's weights in and out, against transformers where it is installed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from support.command_line import UserError
from tests.conftest import ROOT

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=8)


def random_model(config=TINY, seed=0):
    """A model whose parameters are all random, biases and LayerNorms, too."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p == 1).float())
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    random_model().save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def change_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")


# ------------------------------------------------------------------------------------------------------------
# The oracle


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "own read-out"])
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, transformers, layout):
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_layer=3, n_head=4, n_embd=32)
    config.tie_word_embeddings = layout != "own read-out"
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))  # biases and LayerNorms, too
    if layout == "bin":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # with lm_head.weight
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "sharded" else "1GB")
        assert len(list(tmp_path.glob("*.safetensors"))) == 1 or layout == "sharded"
    ours = GPT.from_pretrained(tmp_path)
    assert (ours.lm_head is None) == config.tie_word_embeddings
    idx = torch.randint(31, (3, 16))
    with torch.no_grad():
        wanted, logits = theirs(idx).logits, ours(idx, idx)[0]
    assert (logits - wanted).abs().max() < 1e-4 and wanted.std() > 0.5
    settings = dict(attention_mask=torch.ones(3, 4), max_new_tokens=12, do_sample=False, eos_token_id=None)
    text = theirs.generate(idx[:, :4], **settings)
    assert torch.equal(ours.generate(idx[:, :4], 12, temperature=0), text)


MEASURE = """
import sys
from model import GPT


def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])


before = peak()
model = GPT.from_pretrained(sys.argv[1])
print(peak() - before, sum(4 * p.numel() for p in model.parameters()))
"""


@pytest.mark.huge
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
@pytest.mark.parametrize("shape", [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)])
def test_the_true_shapes_agree_and_load_without_a_second_copy(tmp_path, transformers, shape):
    """gpt2 to gpt2-xl: up to 20 GB of memory and 6 GB of disk; the peak is read from Linux's /proc."""
    config = transformers.GPT2Config(**dict(zip(("n_layer", "n_head", "n_embd"), shape)))
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, tmp_path]
    peak, size = map(int, subprocess.check_output(command, text=True, cwd=ROOT).split())
    ours = GPT.from_pretrained(tmp_path)
    idx = torch.randint(50257, (1, 128))
    with torch.no_grad():
        difference = (theirs(idx).logits - ours(idx, idx)[0]).abs().max().item()
    settings = dict(attention_mask=torch.ones(1, 8), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(idx[:, :8], 8, temperature=0), theirs.generate(idx[:, :8], **settings))
    assert difference <= 1e-4 and peak <= size + 3.2 * 4 * ours.wte.weight.numel() + 5e7


def test_transformers_reads_what_we_write(tmp_path, transformers):
    for config in (TINY, replace(TINY, bias=False), replace(TINY, read_out="own")):
        ours = random_model(config)
        ours.save_pretrained(tmp_path)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        idx = torch.randint(31, (2, 16))
        with torch.no_grad():
            torch.testing.assert_close(theirs(idx).logits, ours(idx, idx)[0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Out and in again


def test_the_prefix_and_the_old_masks_do_not_matter(folder):
    def edit(tensors):
        for name in list(tensors):
            tensors["transformer." + name] = tensors.pop(name)
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    change_tensors(folder, edit)
    assert same_weights(GPT.from_pretrained(folder), random_model())


# ------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("h.1.mlp.c_fc.bias", None, "its tensor h.1.mlp.c_fc.bias is missing"),
        ("h.7.ln_1.bias", (8,), "there is no place for its tensor h.7.ln_1.bias"),
        ("h.0.ln_1.bias", (9,), r"h.0.ln_1.bias of shape \(9,\), the model needs \(8,\)"),
        ("h.0.mlp.c_fc.weight", (32, 8), r"h.0.mlp.c_fc.weight of shape \(8, 32\), .* \(32, 8\)"),
        ("lm_head.weight", (31, 8), "lm_head.weight of its own"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, name, shape, words):
    change_tensors(folder, lambda t: t.update({name: torch.ones(shape)}) if shape else t.pop(name))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(model_type="llama"), "model_type 'llama', GPT-2 has 'gpt2'"),
        (dict(activation_function="relu"), "activation_function 'relu', GPT-2 has 'gelu_new'"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06"),
        (dict(n_inner=99), "n_inner 99, GPT-2 has 32"),
        (dict(n_layer=0), "n_layer is 0: give at least 1"),
        (dict(n_head=3), "n_embd 8 is not divisible by n_head 3"),
        (dict(n_embd="eight"), "damaged"),
        (dict(nanosparse={"gate": "sigmoid"}), "gate is 'sigmoid'"),
        (dict(nanosparse={"read_out": "new"}), "read_out is 'new': choose one of tied, own, biased"),
        (dict(tie_word_embeddings=False), "its tensor lm_head.weight is missing"),
        (dict(nanosparse={"colour": 1}), "has a setting colour of another version"),
    ],
)
def test_a_configuration_of_another_model_is_explained(folder, fields, words):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(folder)


FILES = {"config.json": "missing", "model.safetensors": "has no weights"}


@pytest.mark.parametrize("file, missing", FILES.items())
def test_missing_and_damaged_files_are_named(folder, file, missing):
    path, content = folder / file, (folder / file).read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=missing):
        GPT.from_pretrained(folder)
    for damaged in (b"", content[: len(content) // 2], b"[1]"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file} is damaged"):
            GPT.from_pretrained(folder)


def test_pickled_code_and_missing_shards_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Path}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is damaged"):
        GPT.from_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../../model-00001-of-2.safetensors"}}))
    with pytest.raises(UserError, match=f"{folder}/model-00001-of-2.safetensors is missing"):
        GPT.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="index.json is damaged"):
        GPT.from_pretrained(folder)
