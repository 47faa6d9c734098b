"""
Trained models on disk: this project's checkpoints, and the weights of every kind that from_pretrained takes.

A checkpoint holds tensors and plain values only, and is loaded without running code (weights_only=True).
"""

import dataclasses
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from support import gpt2_weights, lens_weights
from support.command_line import UserError
from support.files import damage_named, read_json, replacing
from support.files import download as fetch

HUB = "https://huggingface.co"
MODELS = {name: (f"openai-community/{name}", gpt2_weights.SAFETENSORS) for name in gpt2_weights.MODELS}
MODELS |= {name: (name, lens_weights.WEIGHTS) for name in lens_weights.MODELS}  # (repository, its weights)
MODEL, RUN = "nanosparse model", "nanosparse run"  # the formats: a finished model; last.pt, to resume from


class Pretrained(NamedTuple):
    """A trained model on disk: what is known of it, and its weights."""

    name: str
    model_config: dict  # fields of GPTConfig
    tokenizer: dict  # as in a dataset's meta.json
    trained_on: dict  # what save_model was given
    tensors: Callable  # () -> (name, tensor) one after the other
    parts: Callable = lambda name, p: {name: p}  # a parameter of the model -> {stored name: part as stored}

    def dense_shape(self, block_size):
        """The fields of a training configuration that a dense model decides. Raises UserError for gates."""
        shape = {key: self.model_config[key] for key in ("n_layer", "n_head", "n_embd", "bias")}
        longest = self.model_config["block_size"]
        if self.model_config["gate"] != "none":
            raise UserError(f"--init_from {self.name} has gates already: give a dense model, as dense.pt")
        if block_size < longest:
            longer = f"{self.name} reads up to {longest} tokens"
            print(f"note: {longer}, sequences have {block_size} (--block_size)")
        return shape | {"block_size": min(block_size, longest)}


def open_pretrained(source):
    """The Pretrained of what GPT.from_pretrained accepts. Raises UserError."""
    if isinstance(source, Pretrained):
        return source
    folder = Path(source)
    if str(source) in MODELS and not folder.exists():
        folder = download(str(source))
    if (folder / "sparse.pt").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is a run: give one of its models, such as {folder / 'sparse.pt'}")
    if not folder.is_dir():
        saved = load_checkpoint(source)
        known = (saved["model_config"], saved["tokenizer"], saved["trained_on"])
        return Pretrained(str(source), *known, lambda: saved["model"].items())
    settings = gpt2_weights.read_settings(folder)
    if "d_vocab" in settings:
        config, tensors = lens_weights.read_folder(folder, settings)
        parts = partial(lens_weights.parts, n_head=config["n_head"])
        return Pretrained(str(source), config, tokens_of(folder, config), {}, tensors, parts)
    config = gpt2_weights.read_config(folder, settings)
    tensors = partial(gpt2_weights.read_tensors, folder, config["read_out"] == "tied")
    return Pretrained(str(source), config, tokens_of(folder, config), {}, tensors)


def check_comparable(a, b, keys=("n_layer", "n_head")):
    """Raise UserError if two Pretrained models differ in their tokens, or in these keys of their shape."""
    if any(a.tokenizer.get(key) != b.tokenizer.get(key) for key in ("tokenizer", "vocab_size", "characters")):
        raise UserError(f"{a.name} and {b.name} know different tokens: compare models of one dataset")
    for key in keys:
        if a.model_config[key] != b.model_config[key]:
            sizes = f"{a.name} has {key} {a.model_config[key]}, {b.name} has {b.model_config[key]}"
            raise UserError(f"{sizes}: compare models of one shape")


def tokens_of(folder, config):
    """What the tokens of a folder's model mean: a dataset's meta.json beside it, else GPT-2's tokens if they
    are as many. Sets the padding in config, GPTConfig's fields, after meta.json."""
    path, n_tokens = folder / "meta.json", config["vocab_size"] - config["padding"]
    if not path.is_file():
        return {"tokenizer": "gpt2" if n_tokens == 50257 else "unknown", "vocab_size": n_tokens}
    with damage_named(path):
        meta = read_json(path)
        config["padding"] = config["vocab_size"] - meta["vocab_size"]
    return meta


def download(name):
    """Fetch one of MODELS into PyTorch's cache, unless it is there. Returns the folder. Raises UserError."""
    folder, (repository, weights) = Path(torch.hub.get_dir()) / "nanosparse" / name, MODELS[name]
    for file in ("config.json", weights):
        if not (folder / file).is_file():
            fetch(f"{HUB}/{repository}/resolve/main/{file}", folder / file)
    return folder


@torch.no_grad()
def fill(model, pretrained):
    """Copy a Pretrained's tensors into a model; either may lack the other's gates. Returns {name: parameter}
    of the gates that were not copied. Raises UserError for another tensor that is missing or does not fit."""
    waiting = {}
    for name, p in model.named_parameters():
        waiting |= pretrained.parts(name, p)
    for name, tensor in pretrained.tensors():
        if name.endswith("gate_bias") and model.config.gate == "none":
            continue
        if name not in waiting:
            raise UserError(f"{pretrained.name} holds another model: there is no place for its tensor {name}")
        p = waiting.pop(name)
        if tensor.shape != p.shape:
            sizes = f"of shape {tuple(tensor.shape)}, the model needs {tuple(p.shape)}"
            raise UserError(f"{pretrained.name} has a tensor {name} {sizes}: give another")
        p.copy_(tensor)
    for name in waiting:
        if pretrained.model_config["gate"] != "none" or not name.endswith("gate_bias"):
            raise UserError(f"{pretrained.name} is incomplete: its tensor {name} is missing")
    return waiting


def save_model(model, path, tokenizer, trained_on):
    """Write a finished model. tokenizer: the dataset's meta.json; trained_on: plain values about the run."""
    saved = {"model_config": dataclasses.asdict(model.config), "model": model.state_dict()}
    save_checkpoint({"format": MODEL, **saved, "tokenizer": tokenizer, "trained_on": trained_on}, path)


def save_checkpoint(content, path):
    """Write a dict of tensors and plain values with a `format`. Raises UserError if it cannot be written."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load_checkpoint(path, format=MODEL):
    """A dict that save_checkpoint wrote, on the CPU. Raises UserError for a file that is not one of these."""
    path = Path(path)
    if not path.is_file():
        names = ", ".join(MODELS)
        raise UserError(f"there is no checkpoint {path}: train it with train.py, or give one of {names}")
    with damage_named(path, "restore or delete it"):
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums that torch.save writes
                raise ValueError("a checksum does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or content.get("format") != format:
        raise UserError(f"{path} is no {format}: give a file that train.py wrote, such as sparse.pt")
    return content
