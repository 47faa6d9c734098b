"""
GPT-2's weights, in and out: the layout in which Hugging Face's transformers keeps them.

A folder with config.json and model.safetensors (or several files of these with an index, or pytorch_model.bin). Names are
GPT-2's, as they are here, some with the prefix `transformer.`; the matrices of the four linear layers of a block are stored
(in, out), transposed. Tensors are read one at a time, so that a model is in memory once while it loads.
"""

import json
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from config import UserError

GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community"
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")  # causal masks, saved by old versions
# What config.json must say, where it says it, for the model to be the one that model.py computes.
EXPECTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}


# ---------------------------------------------------------------------------------------------------------------------
# In


def download(name, hub=HUB):
    """Fetch config.json and model.safetensors of one of GPT2_MODELS into torch's cache, unless they are there. A file is put
    in place when it is whole and has the SHA-256 that the hub states. Returns the folder. Raises UserError."""
    folder = Path(torch.hub.get_dir()) / "nanosparse" / name
    for file in ("config.json", "model.safetensors"):
        if (folder / file).is_file():
            continue
        url = f"{hub}/{name}/resolve/main/{file}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(folder / file), hash_prefix=stated_sha256(url))
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            reason = getattr(error, "reason", error)
            raise UserError(
                f"cannot download {url} ({reason}): try again, or get config.json and model.safetensors by other means and "
                "give the path of their folder"
            )
    return folder


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the redirecting answer itself has the hash


def stated_sha256(url):
    """The SHA-256 that the hub states for a large file, in the header of its first answer; None if it states none."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        headers = urllib.request.build_opener(_Stay).open(request, timeout=30).headers
    except urllib.error.HTTPError as answer:
        if answer.code >= 400:
            raise
        headers = answer.headers
    tag = headers.get("X-Linked-ETag", "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


def read_config(folder):
    """The fields of GPTConfig that config.json gives, as a dict. Raises UserError if it is not GPT-2's."""
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = {ours: stored[theirs] for theirs, ours in SIZES.items()}
        if not all(type(value) is int and value > 0 for value in fields.values()):
            raise ValueError(f"one of {', '.join(SIZES)} is no positive whole number")
        extra = stored.get("nanosparse", {})
        if not isinstance(extra, dict):
            raise ValueError("its entry nanosparse holds no settings")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder with config.json and {FILES[0]} or {FILES[2]}")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no model's configuration ({type(error).__name__}: {error}): restore it")
    for key, values in EXPECTED.items():
        if stored.get(key, values[0]) not in values:
            raise UserError(f"{path} has {key} {stored[key]!r}, GPT-2 has {values[0]!r}: give a GPT-2 model")
    if stored.get("n_inner") not in (None, 4 * fields["n_embd"]):
        raise UserError(f"{path} has n_inner {stored['n_inner']}, here it is 4 * n_embd = {4 * fields['n_embd']}: no such MLP")
    return {**fields, "bias": True, "gate": "none", **extra}


def read_tensors(folder):
    """(name, tensor) of every parameter, one after the other, named and turned as model.py has them; a transposed one is a
    view. Raises UserError for missing or damaged files and for a read-out that is not tied to the embedding."""
    files, tied = files_of(Path(folder)), {}
    has_readout = any("lm_head.weight" in names for _, names in files)
    for path, names in files:
        for name, tensor in tensors_of(path, names):
            name = name.removeprefix("transformer.")
            if has_readout and name in ("wte.weight", "lm_head.weight"):
                tied[name] = tensor
            if name != "lm_head.weight" and not MASKS.match(name):
                yield name, tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if len(tied) == 2 and not torch.equal(*tied.values()):
        raise UserError(f"{folder} has a lm_head.weight of its own, GPT-2's is its embedding: give a model with tied weights")


def files_of(folder):
    """[(path, names of the tensors to take from it)]."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no weights: give a folder with {FILES[0]} or {FILES[2]}")
    if not found[0].name.endswith(".index.json"):
        with damage_named(found[0]):
            if found[0].suffix == ".bin":
                return [(found[0], list(load_bin(found[0])))]
            with safetensors.safe_open(found[0], "pt") as file:
                return [(found[0], list(file.keys()))]
    files = {}
    with damage_named(found[0]):
        for name, file in json.loads(found[0].read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(folder / Path(file).name, []).append(name)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing, and {found[0].name} names it: restore it")
    return list(files.items())


def tensors_of(path, names):
    """(name, tensor) of one file."""
    with damage_named(path):
        state = load_bin(path) if path.suffix == ".bin" else None
    for name in names:
        with damage_named(path):
            if state is not None:
                tensor = state[name]
            else:
                with safetensors.safe_open(path, "pt") as file:  # opened anew: what was mapped for the last tensor goes
                    tensor = file.get_tensor(name)
        yield name, tensor


def load_bin(path):
    mapped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not, and are read whole
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def damage_named(path):
    """Inside, any exception means that the file cannot be read: both libraries raise a dozen types."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}): get it again")


# ---------------------------------------------------------------------------------------------------------------------
# Out


def write_folder(folder, config, named_tensors):
    """Write config.json and model.safetensors. config: GPTConfig's fields as a dict; named_tensors: (name, tensor) as in
    model.py. Biases that the model does without are written as zeros. Raises UserError if the folder cannot be written."""
    folder, tensors = Path(folder), {}
    for name, tensor in named_tensors:
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    for name in [
        name for name in tensors if name.endswith(".weight") and ".gate_" not in name and name[:3] not in ("wte", "wpe")
    ]:
        size = tensors[name].shape[-1]  # as stored, the last dimension is the output
        tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(size))
    stored = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in EXPECTED.items()},
        **{theirs: config[ours] for theirs, ours in SIZES.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config["dropout"]),
    }
    if config["gate"] != "none":
        stored["nanosparse"] = {key: value for key, value in config.items() if key.startswith("gate")}
    temporary = folder / "model.safetensors.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets nobody else read its file
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write to {folder} ({error}): free some space, or choose another folder")
    finally:
        if folder.is_dir():
            temporary.unlink(missing_ok=True)
