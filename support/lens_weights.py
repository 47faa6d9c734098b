"""
TransformerLens's weights, in and out: the state dict of a HookedTransformer.

A folder with config.json, the fields of HookedTransformerConfig, and final.pth. The paper's authors publish
theirs so; what they call use_sparse_attn is the Bernoulli gate with a bias of zero. Each of their tensors is
a part of one of our parameters, seen in another shape: matrices are (in, out), and heads have an axis.
"""

import math
import re
import zipfile
from functools import partial

import torch

from support.command_line import UserError
from support.files import damage_named, make_folder, replacing, write_json
from support.gpt2_weights import OWN, check_settings, read_sizes, with_biases

NAMES = ("SparseGPT2", "ShortSparseGPT2", "SparseGPT2Finetuned", "SparseTinystories", "DenseTinystories")
MODELS = tuple(f"ansonisl/{name}" for name in NAMES)  # the authors'
WEIGHTS = "final.pth"
GPT2_TOKENIZERS = re.compile(r"(.*/)?(gpt2|gpt-neo-|TinyStories-)[^/]*$")  # 50,257 tokens, GPT-2's
PARAMETER = re.compile(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)$")
MODULES = {  # ours: theirs, {} is W or b
    "wte": "embed.{}_E", "wpe": "pos_embed.{}_pos", "ln_1": "ln1.{}", "attn.c_proj": "attn.{}_O",
    "ln_2": "ln2.{}", "mlp.c_fc": "mlp.{}_in", "mlp.c_proj": "mlp.{}_out",
    "ln_f": "ln_final.{}", "lm_head": "unembed.{}_U",
}  # fmt: skip
SIZES = {"d_vocab": "vocab_size", "n_layers": "n_layer", "d_model": "n_embd", "n_ctx": "block_size"}
# What config.json must say, where it says it; what it says of shapes, the tensors show.
EXPECTED = {
    "act_fn": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "normalization_type": ("LN", "LNPre"),
    "eps": (1e-5,),
    "positional_embedding_type": ("standard",),
    "attention_dir": ("causal",),
    "use_attn_scale": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_local_attn": (False,),
    "parallel_attn_mlp": (False,),
    "attn_scores_soft_cap": (-1.0,),
    "output_logits_soft_cap": (-1.0,),
}


def parts(name, p, n_head):
    """{their name: their tensor} of a parameter p of ours: views of p. Gates keep their names."""
    if name.endswith("gate_bias"):
        return {name: p}
    layer, module, kind = PARAMETER.match(name).groups()
    prefix, letter = "" if layer is None else f"blocks.{layer}.", "W" if kind == "weight" else "b"
    if p.dim() == 2 and module not in ("wte", "wpe"):
        p = p.t()
    if module == "attn.c_attn":  # (C, 3 H D) and (3 H D) -> three times (H, C, D) and (H, D)
        qkv = p.unflatten(-1, (3, n_head, -1)).unbind(-3)
        return {f"{prefix}attn.{letter}_{which}": t.movedim(-2, 0) for which, t in zip("QKV", qkv)}
    if module == "attn.c_proj" and kind == "weight":
        p = p.unflatten(0, (n_head, -1))  # (H, D, C)
    theirs = MODULES[module].format(letter)
    return {prefix + (theirs.lower() if module.startswith("ln") else theirs): p}


def read_folder(folder, stored):
    """(GPTConfig's fields as a dict, () -> (name, tensor) one after the other, by their names). stored:
    config.json. Raises UserError for files that are missing or damaged, and for another kind of model."""
    path = folder / "config.json"
    config, own = read_sizes(path, stored, SIZES | {"d_head": "n_head"})
    D, C = config["n_head"], config["n_embd"]
    if D < 1 or C % D:
        raise UserError(f"{path} has d_head {D}, which does not divide d_model {C}: give a GPT-2 model")
    config["n_head"] = C // D
    shaped = {"n_heads": (C // D, -1), "d_mlp": (4 * C, None), "attn_scale": (-1.0, math.sqrt(D))}
    check_settings(path, stored, EXPECTED | shaped)
    config |= {"bias": True, "gate": "none", "padding": 0}
    if GPT2_TOKENIZERS.match(stored.get("tokenizer_name") or ""):
        config["padding"] = max(0, config["vocab_size"] - 50257)
    if stored.get("use_sparse_attn"):
        config |= {"gate": "bernoulli", "gate_bias": 0.0}
    shape = config["n_layer"], config["n_head"]
    with damage_named(path):
        gate_biases = torch.tensor(own.pop("gate_biases", [[0.0] * shape[1]] * shape[0])).view(shape)
    config |= own
    state = read_state(folder)
    config["read_out"] = read_out_of(state)
    return config, partial(tensors, state, config, stored.get("normalization_type") == "LNPre", gate_biases)


def read_state(folder):
    """The state dict of a folder. Raises UserError."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder with config.json and {WEIGHTS}")
    with damage_named(path):
        state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if any(not isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError
    return state


def read_out_of(state):
    """GPTConfig.read_out of a state dict."""
    if "unembed.b_U" in state and state["unembed.b_U"].any():
        return "biased"
    has_both = {"embed.W_E", "unembed.W_U"} <= state.keys()
    return "tied" if has_both and torch.equal(state["embed.W_E"].t(), state["unembed.W_U"]) else "own"


def tensors(state, config, is_folded, gate_biases):
    """(their name, tensor) of every parameter that the model has. is_folded: the LayerNorms' weights are in
    the layers that follow; gate_biases: (L, H)."""
    absent = {"tied": ("unembed.W_U", "unembed.b_U"), "own": ("unembed.b_U",)}.get(config["read_out"], ())
    for name, tensor in state.items():
        if name not in absent and not name.endswith((".mask", ".IGNORE")):
            yield name, tensor
    layers = range(config["n_layer"])
    if is_folded:
        for name in [f"blocks.{layer}.ln{n}" for layer in layers for n in (1, 2)] + ["ln_final"]:
            yield f"{name}.w", torch.ones(config["n_embd"])
            yield f"{name}.b", torch.zeros(config["n_embd"])
    if config["gate"] != "none":
        for layer in layers:
            yield f"h.{layer}.attn.gate_bias", gate_biases[layer]


def write_folder(folder, config, named_tensors):
    """Write config.json and final.pth. config: GPTConfig's fields as a dict; named_tensors: (name, tensor) as
    in model.py. Biases that the model does without are written as zeros. Raises UserError."""
    folder, ours, T = make_folder(folder), with_biases(named_tensors), config["block_size"]
    ours.setdefault("lm_head.weight", ours["wte.weight"])
    ours.setdefault("lm_head.bias", torch.zeros(config["vocab_size"]))
    gate_biases = [tensor.tolist() for name, tensor in ours.items() if name.endswith("gate_bias")]
    state, mask, never = {}, torch.ones(T, T, dtype=torch.bool).tril(), torch.tensor(-math.inf)
    for name, p in ours.items():
        if not name.endswith("gate_bias"):
            for theirs, tensor in parts(name, p, config["n_head"]).items():
                state[theirs] = tensor.clone(memory_format=torch.contiguous_format)
    for layer in range(config["n_layer"]):
        state |= {f"blocks.{layer}.attn.mask": mask, f"blocks.{layer}.attn.IGNORE": never}
    C, H = config["n_embd"], config["n_head"]
    stored = {theirs: config[ours] for theirs, ours in SIZES.items()}
    stored |= {"n_heads": H, "d_head": C // H, "d_mlp": 4 * C}
    stored |= {key: values[0] for key, values in EXPECTED.items()}
    if gate_biases or config["padding"]:
        own = {key: config[key] for key in OWN if key != "read_out"}  # which the tensors show
        stored["nanosparse"] = own | ({"gate_biases": gate_biases} if gate_biases else {})
    if gate_biases:
        print(f"{folder}: TransformerLens loads it without the gates; docs/lens.md has hooks for them")
    with replacing(folder / WEIGHTS) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
    write_json(stored, folder / "config.json")


def add_gates(theirs, ours, is_permanent=False):
    """Apply the gates of ours, a GPT, in the same model of TransformerLens, by hooks: cache["pattern", layer]
    is then the pattern times the gate. is_permanent: its reset_hooks leaves them."""
    scores = {}

    def keep(x, hook):
        scores[hook.layer()] = x  # (B, H, T, T)

    def apply(pattern, hook):
        attn = ours.h[hook.layer()].attn
        return pattern * attn.gate.deterministic(scores[hook.layer()] + attn.gate_bias[:, None, None])

    for block in theirs.blocks if ours.config.gate != "none" else []:
        block.attn.hook_attn_scores.add_hook(keep, is_permanent=is_permanent)
        block.attn.hook_pattern.add_hook(apply, is_permanent=is_permanent)
