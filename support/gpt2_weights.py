"""
GPT-2's weights, in and out: the layout in which Hugging Face's transformers keeps them.

A folder with config.json and model.safetensors (or pytorch_model.bin, or several of these with an index).
Names are GPT-2's, as they are here, some with the prefix `transformer.`; the matrices of the four linear
layers of a block are stored (in, out), transposed. Safetensors are read one at a time: the model is in memory
once while it loads.
"""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from support.command_line import UserError
from support.files import download as fetch
from support.files import make_folder, replacing, write_json

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = "https://huggingface.co/openai-community"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
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
SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}  # theirs: ours
SIZES["n_positions"] = "block_size"


def download(name):
    """Fetch one of MODELS into PyTorch's cache, unless it is there. Returns the folder. Raises UserError."""
    folder = Path(torch.hub.get_dir()) / "nanosparse" / name
    for file in ("config.json", SAFETENSORS):
        if not (folder / file).is_file():
            fetch(f"{HUB}/{name}/resolve/main/{file}", folder / file)
    return folder


def read_config(folder):
    """The fields of GPTConfig that config.json gives, as a dict. Raises UserError if it is not GPT-2's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder with config.json and {SAFETENSORS} or {BIN}")
    with damage_named(path):
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = {ours: int(stored[theirs]) for theirs, ours in SIZES.items()}
        gates = dict(stored.get("nanosparse", {}))
    for key, values in {**EXPECTED, "n_inner": (4 * fields["n_embd"], None)}.items():
        if stored.get(key, values[0]) not in values:
            raise UserError(f"{path} has {key} {stored[key]!r}, GPT-2 has {values[0]!r}: give a GPT-2 model")
    return {**fields, "bias": True, "gate": "none", **gates}


def read_tensors(folder):
    """(name, tensor) of every parameter, one after the other, named and turned as model.py has them. Raises
    UserError for missing or damaged files, and for a read-out that is not tied to the embedding."""
    tied = []
    for path in weight_files(Path(folder)):
        for name, tensor in stored_tensors(path):
            name = name.removeprefix("transformer.")
            if name in ("wte.weight", "lm_head.weight"):
                tied.append(tensor)
            if name != "lm_head.weight" and not MASKS.match(name):
                yield name, tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if len(tied) == 2 and not torch.equal(*tied):
        raise UserError(f"{folder} has a lm_head.weight of its own: give a model with tied weights")


def weight_files(folder):
    """The paths of a model's weights: of one file, or of those that an index names."""
    names = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights: give a folder with {SAFETENSORS} or {BIN}")
    if found.suffix != ".json":
        return [found]
    with damage_named(found):
        parts = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / Path(name).name for name in dict.fromkeys(parts)]


def stored_tensors(path):
    """(name, tensor) of one file, as they are stored."""
    if not path.is_file():
        raise UserError(f"{path} is missing, and the index of the weights names it: restore it")
    with damage_named(path):
        if path.suffix == ".bin":
            yield from torch.load(path, map_location="cpu", weights_only=True).items()
            return
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:
            with safetensors.safe_open(path, "pt") as file:  # anew: what was read before leaves the memory
                yield name, file.get_tensor(name)


@contextmanager
def damage_named(path):
    """Within it, any exception means that the file cannot be read: the libraries raise a dozen types."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}): get it again")


def write_folder(folder, config, named_tensors):
    """Write config.json and model.safetensors. config: GPTConfig's fields as a dict; named_tensors: (name,
    tensor) as in model.py. Biases that the model does without are written as zeros. Raises UserError."""
    folder, tensors = make_folder(folder), {}
    for name, tensor in named_tensors:
        tensor = tensor.detach().cpu()
        tensors[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
        if name.endswith(".weight") and name[:3] not in ("wte", "wpe"):
            bias = name.removesuffix("weight") + "bias"  # follows its weight, where there is one
            tensors[bias] = torch.zeros(tensors[name].shape[-1])  # of the output, as stored
    stored = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in EXPECTED.items()},
        **{theirs: config[ours] for theirs, ours in SIZES.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config["dropout"]),
    }
    if config["gate"] != "none":
        stored["nanosparse"] = {key: value for key, value in config.items() if key.startswith("gate")}
        print(f"{folder}: other libraries load it without the gates; GPT.from_pretrained restores both")
    with replacing(folder / SAFETENSORS) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(stored, folder / "config.json")
    shutil.copymode(folder / "config.json", folder / SAFETENSORS)  # safetensors hides its file from others
