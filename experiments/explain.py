"""
The addition model of `make demo` as a program: which edges are open, and what the model answers.

    python experiments/explain.py out/addition/sparse.pt

`program` was written by hand from the model's cards (python sample.py out/addition/sparse.pt --heads) and
from the table of its exceptions, and is held against all 10,000 problems. Another seed is another program.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

from data.dataset import Dataset
from model import GPT
from readings import Edge, open_edges
from support import command_line
from support.command_line import arguments, option


@dataclass
class ExplainConfig:
    checkpoint: tuple = arguments("one checkpoint, such as out/addition/sparse.pt", 1, 1)
    data_dir: str = option("data", "where the datasets are")


def program(a1, a0, b1, b0):
    """The problem a1 a0 + b1 b0 by its digits -> (set of open edges, answer)."""
    edges = set()
    for place, tens in ((0, a1), (3, b1)):  # "=" (5) and the hundreds (6) read both tens, by one head or two
        edges |= {Edge(0, 0, 5, place)} if tens >= 3 else set()
        edges |= {Edge(0, 3, 5, place)} if tens < 5 else set()
        edges |= {Edge(0, 2, 6, place)} if tens in (1, 2, 3, 4, 7, 8, 9) else set()
        edges |= {Edge(0, 3, 6, place)} if tens in (0, 1, 5, 6) else set()
    for place, ones in ((1, a0), (4, b0)):  # the tens (7) read both ones
        edges |= {Edge(0, 1, 7, place)} if ones in (0, 1) else set()
        edges |= {Edge(0, 2, 7, place)} if ones in (1, 2, 3, 4, 7, 8, 9) else set()
        edges |= {Edge(0, 3, 7, place)} if ones in (0, 1, 5, 6) else set()
    carry = a0 + b0 >= 10
    # the last digit (4) guesses the carry, and reads the other one where that is wrong
    guess_is_wrong = carry != (b0 >= 5)
    if (guess_is_wrong and not (carry and a0 < 8)) or (a0, b0) in ((0, 1), (0, 4), (8, 5), (9, 6)):
        edges.add(Edge(0, 0, 4, 1))
    if guess_is_wrong and carry and b0 in (3, 4):
        edges.add(Edge(0, 2, 4, 1))
    if carry:  # layer 1: the hundreds (6) read whether there is one; "=" does where that may decide
        edges.add(Edge(1, 2, 6, 4))
    if carry and a1 + b1 in (9, 10):
        edges.add(Edge(1, 2, 5, 4))
    hundreds = a1 + b1 + (Edge(1, 2, 5, 4) in edges) >= 10  # what the open edges tell each position
    tens = (a1 + b1 + (Edge(1, 2, 6, 4) in edges)) % 10
    return edges, 100 * hundreds + 10 * tens + (a0 + b0) % 10


def main(argv):
    config = command_line.parse(ExplainConfig(), argv, __doc__)
    model, data = GPT.from_pretrained(config.checkpoint[0]), Dataset("addition", 8, config.data_dir)
    idx = torch.cat([x for x, _ in data.sequential("val", 1000)])  # (10000, 8): dd+dd=dd
    start = data.answer_start
    digits = idx - data.meta["characters"].index("0")
    answers = torch.cat([model.generate(x[:, :start], 3, temperature=0)[:, start:] for x in idx.split(1000)])
    answers = (answers - data.meta["characters"].index("0")) @ torch.tensor([100, 10, 1])
    found = [set() for _ in idx]
    for layer, head, problem, query, key in open_edges(model, idx).nonzero().tolist():
        found[problem].add(Edge(layer, head, query, key))
    predicted = [program(*row) for row in digits[:, [0, 1, 3, 4]].tolist()]
    both = sum(len(edges & real) for (edges, _), real in zip(predicted, found))
    either = sum(len(edges | real) for (edges, _), real in zip(predicted, found))
    exact = sum(edges == real for (edges, _), real in zip(predicted, found))
    right = sum(answer == real for (_, answer), real in zip(predicted, answers.tolist()))
    print(f"edges: {both:,} predicted rightly of {either:,} open or predicted ({both / either:.1%})")
    print(f"problems in which all edges are predicted: {exact:,} of {len(idx):,}")
    print(f"answers of the model that are predicted: {right:,} of {len(idx):,}")


if __name__ == "__main__":
    command_line.run(main)
