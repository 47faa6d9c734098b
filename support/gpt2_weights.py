"""
GPT-2's weights, in and out: the layout in which Hugging Face's transformers keeps them.

A folder with config.json and model.safetensors (or pytorch_model.bin, or several of these with an index).
Names are GPT-2's, as they are here, some with the prefix `transformer.`; the matrices of the four linear
layers of a block are stored (in, out), transposed. Safetensors are read one at a time: the model is in memory
once while it loads.
"""

import re
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from support.command_line import UserError
from support.files import damage_named, make_folder, read_json, replacing, write_json

MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
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
}
SIZES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}  # theirs: ours
SIZES["n_positions"] = "block_size"
OWN = ("gate", "gate_bias", "read_out", "padding")  # what only we have: fields of GPTConfig


def read_settings(folder):
    """config.json of a folder as a dict. Raises UserError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder with config.json and {SAFETENSORS} or {BIN}")
    with damage_named(path):
        return dict(read_json(path))


def read_sizes(path, stored, sizes):
    """The fields of GPTConfig that config.json gives as whole numbers, and those that only we have. sizes:
    {theirs: ours}."""
    with damage_named(path):
        fields = {ours: int(stored[theirs]) for theirs, ours in sizes.items()}
        return fields, dict(stored.get("nanosparse", {}))


def check_settings(path, stored, expected):
    """Raise UserError if config.json says of a setting what is not in expected, {setting: values}."""
    for key, values in expected.items():
        if stored.get(key, values[0]) not in values:
            raise UserError(f"{path} has {key} {stored[key]!r}, GPT-2 has {values[0]!r}: give a GPT-2 model")


def read_config(folder, stored):
    """The fields of GPTConfig that config.json gives, as a dict. Raises UserError if it is not GPT-2's."""
    path = Path(folder) / "config.json"
    fields, own = read_sizes(path, stored, SIZES)
    check_settings(path, stored, {**EXPECTED, "n_inner": (4 * fields["n_embd"], None)})
    read_out = "tied" if stored.get("tie_word_embeddings", True) else "own"
    return {**fields, "bias": True, "gate": "none", "read_out": read_out, "padding": 0, **own}


def read_tensors(folder, tied):
    """(name, tensor) of every parameter, one after the other, named and turned as model.py has them. Raises
    UserError for missing or damaged files, and for a read-out that should be tied to the embedding and is
    not."""
    same = []
    for path in weight_files(Path(folder)):
        for name, tensor in stored_tensors(path):
            name = name.removeprefix("transformer.")
            if name in ("wte.weight", "lm_head.weight") and tied:
                same.append(tensor)
            if not (name == "lm_head.weight" and tied) and not MASKS.match(name):
                yield name, tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if len(same) == 2 and not torch.equal(*same):
        untied = f"{folder} has a lm_head.weight of its own, and config.json says that it is the embedding"
        raise UserError(f'{untied}: write "tie_word_embeddings": false there')


def weight_files(folder):
    """The paths of a model's weights: of one file, or of those that an index names."""
    names = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights: give a folder with {SAFETENSORS} or {BIN}")
    if found.suffix != ".json":
        return [found]
    with damage_named(found):
        parts = read_json(found)["weight_map"].values()
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


def with_biases(named_tensors):
    """{name: tensor} of a model, on the CPU; biases that it does without are zeros."""
    tensors = {}
    for name, tensor in named_tensors:
        tensors[name] = tensor.detach().cpu()
        if name.endswith(".weight") and name.split(".")[0] not in ("wte", "wpe", "lm_head"):
            bias = name.removesuffix("weight") + "bias"  # follows its weight, where there is one
            tensors[bias] = torch.zeros(len(tensor))
    return tensors


def write_folder(folder, config, named_tensors):
    """Write config.json and model.safetensors. config: GPTConfig's fields as a dict; named_tensors: (name,
    tensor) as in model.py. Biases that the model does without are written as zeros. Raises UserError."""
    folder, tensors = make_folder(folder), with_biases(named_tensors)
    tensors = {name: (t.t() if name.endswith(TRANSPOSED) else t).contiguous() for name, t in tensors.items()}
    stored = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in EXPECTED.items()},
        **{theirs: config[ours] for theirs, ours in SIZES.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config["dropout"]),
        "tie_word_embeddings": config["read_out"] == "tied",
    }
    lost = {"the gates": config["gate"] != "none", "the read-out's bias": config["read_out"] == "biased"}
    lost = " and ".join(what for what, is_there in lost.items() if is_there)
    if lost:
        print(f"{folder}: other libraries load it without {lost}; GPT.from_pretrained restores everything")
    if lost or config["padding"]:
        stored["nanosparse"] = {key: config[key] for key in OWN}
    with replacing(folder / SAFETENSORS) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(stored, folder / "config.json")
    shutil.copymode(folder / "config.json", folder / SAFETENSORS)  # safetensors hides its file from others
