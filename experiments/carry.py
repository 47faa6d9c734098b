"""
Which position reads which for the carry? Over models of two-digit addition: the (layer, query, key), of any
head above layer 0, whose frequency of being open differs most between problems with a carry and without.

    python experiments/carry.py out/seeds/*/sparse.pt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

from data.dataset import Dataset
from model import GPT
from support import command_line
from support.checkpoints import open_pretrained
from support.command_line import UserError, arguments, option


@dataclass
class CarryConfig:
    models: tuple = arguments("one or more sparse models of the recipe addition", 1, 1000)
    data_dir: str = option("data", "where the datasets are")


def carry_edge(model, idx, carry):
    """(layer, query, key, how often it is open with a carry, and without), any head. idx: (N, T) problems;
    carry: (N,) bool."""
    edges = model.attention(idx).edges.any(dim=2)[1:]  # layers from 1 on: (L - 1, N, query, key)
    with_carry, without = (edges[:, rows].float().mean(dim=1) for rows in (carry, ~carry))
    difference = with_carry - without
    layer, query, key = (difference == difference.max()).nonzero()[0].tolist()
    at = (layer, query, key)
    return layer + 1, query, key, with_carry[at].item(), without[at].item()


def main(argv):
    config = command_line.parse(CarryConfig(), argv, __doc__)
    data = Dataset("addition", block_size=8, data_dir=config.data_dir)
    idx = torch.cat([x for x, _ in data.sequential("val", 1000)])  # all problems: dd+dd=dd
    digit = idx - data.meta["characters"].index("0")
    carry, found = digit[:, 1] + digit[:, 4] >= 10, 0
    for path in config.models:
        source = open_pretrained(path)
        data.check_tokenizer(source.tokenizer, path)
        if source.model_config["n_layer"] < 2 or source.model_config["gate"] == "none":
            raise UserError(f"{path} is dense or has one layer only: give a sparse model of two or more")
        layer, query, key, often, seldom = carry_edge(GPT.from_pretrained(source), idx, carry)
        found += often > 0.9 and seldom < 0.1
        print(f"{path}: layer {layer}, {query} reads {key}: {often:.1%} with a carry, {seldom:.1%} without")
    print(f"in {found} of {len(config.models)} an edge is open in over 90 % with a carry, under 10 % without")


if __name__ == "__main__":
    command_line.run(main)
