"""
auto-circuit's half of peer.py, which runs it in the environment that has auto-circuit:

    out/peer/env/bin/python experiments/peer_scores.py out/peer STEPS SEED

Reads pairs.pt and the folders dense and sparse there, and writes scores.pt: of every task and model, {way:
({edge: score}, CPU seconds)}.
"""

import importlib
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

import torch

torch.optim.adam = importlib.import_module("torch.optim.adam")  # auto-circuit asks for it by this name

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos import subnetwork_probing
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import batch_src_ablations
from auto_circuit.utils.graph_utils import patchable_model
from transformer_lens import HookedTransformer, HookedTransformerConfig

from model import GPT
from support.files import read_json
from support.lens_weights import add_gates

BATCH = 25  # examples per step


def patchable(folder):
    """The model of a folder in TransformerLens's layout, with its gates, as auto-circuit wants it."""
    config = read_json(folder / "config.json") | {
        "use_attn_result": True, "use_hook_mlp_in": True, "use_split_qkv_input": True
    }  # fmt: skip
    config.pop("nanosparse", None)
    theirs = HookedTransformer(HookedTransformerConfig(**config))
    theirs.load_state_dict(torch.load(folder / "final.pth"))
    add_gates(theirs, GPT.from_pretrained(folder).requires_grad_(False), is_permanent=True)
    theirs.eval().requires_grad_(False)
    return patchable_model(theirs, factorized=True, separate_qkv=True, slice_output="last_seq")


def searches(model, examples, steps):
    """{way: () -> scores}, with the options of auto-circuit's recipes, but for the steps and the price of all
    edges: 0.1 as in circuit probing, for with 0.5 the KL of its circuits stays over 0.01. Subnetwork probing
    closes edges with the mean over the corrupted prompts; `paired` gives each prompt its own instead."""
    own = lambda *args, **_: batch_src_ablations(*args, AblationType.RESAMPLE, "corrupt")
    paired = mock.patch.object(subnetwork_probing, "batch_src_ablations", own)
    how = {"epochs": max(1, steps // len(examples)), "regularize_lambda": 0.1, "tree_optimisation": True}
    probing = partial(subnetwork_probing.subnetwork_probing_prune_scores, model, examples, None, **how)
    return {
        "attribution": lambda: mask_gradient_prune_scores(model, examples, None, "logit", "avg_diff", 0.0),
        "subnetwork probing": probing,
        "subnetwork probing, paired": paired(probing),
    }


def main(folder, steps, seed):
    found = {}
    for task, (*prompts, answers, wrong) in torch.load(folder / "pairs.pt").items():
        pairs = PromptDataset(*prompts, answers, wrong)
        examples = PromptDataLoader(pairs, seq_len=None, diverge_idx=0, batch_size=BATCH)
        for name in ("dense", "sparse"):
            model = patchable(folder / name)
            found[task, name] = {}
            for way, search in searches(model, examples, steps).items():
                torch.manual_seed(seed)
                started = time.process_time()
                result = search()
                seconds = time.process_time() - started
                scores = {edge.name: edge.prune_score(result).abs().item() for edge in model.edges}
                found[task, name][way] = scores, seconds
    torch.save(found, folder / "scores.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
