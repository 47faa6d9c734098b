"""
A dataset is a folder: train.bin and val.bin (uint16 tokens, memory-mapped), and meta.json.

meta.json holds vocab_size and tokenizer (and the characters where there are any). A toy task adds example_length and
answer_start: then the files are whole examples, one after the other, and only the answer is to be predicted.
"""

import json
from pathlib import Path

import numpy as np
import torch

from config import UserError

MAKE_COMMANDS = {"addition": "addition", "shakespeare_char": "shakespeare"}


class Dataset:
    """Batches (x, y) of data/<name>/, both (B, T) int64 on `device`: y are the tokens after x, -1 where a toy task asks for
    no prediction. Raises UserError if the files are missing, damaged or do not fit block_size."""

    def __init__(self, name, block_size, data_dir="data", device="cpu"):
        self.name, self.block_size, self.device = name, block_size, device
        self.meta = read_meta(Path(data_dir) / name)
        self.example_length = self.meta.get("example_length")  # None for running text
        self.answer_start = self.meta.get("answer_start")
        if self.is_task and block_size < self.example_length - 1:
            raise UserError(
                f"block_size {block_size} is too short for {name}, whose examples have {self.example_length} tokens: "
                f"it must be at least {self.example_length - 1}"
            )
        self.tokens = {split: self._open(Path(data_dir) / name / f"{split}.bin") for split in ("train", "val")}

    @property
    def is_task(self):
        return self.example_length is not None

    @property
    def sequence_tokens(self):
        """Inputs per sequence of a batch."""
        return self.example_length - 1 if self.is_task else self.block_size

    def fingerprint(self):
        """Plain values that tell one version of the data from another."""
        sizes = {split: len(tokens) for split, tokens in self.tokens.items()}
        return {"name": self.name, **sizes, "sha256": self.meta.get("sha256")}

    def check_tokenizer(self, theirs, path):
        """Raise UserError if theirs, the tokenizer's meta in the checkpoint at path, gives tokens another meaning."""
        if any(theirs.get(key) != self.meta.get(key) for key in ("tokenizer", "vocab_size", "characters")):
            raise UserError(
                f"{path} was trained on other tokens ({theirs['tokenizer']}, {theirs['vocab_size']} of them) than {self.name} "
                f"has ({self.meta['tokenizer']}, {self.meta['vocab_size']}): give the dataset that it was trained on"
            )

    def _open(self, path):
        size = path.stat().st_size
        length = self.example_length if self.is_task else self.block_size + 1
        if size % 2:
            raise UserError(f"{path} holds {size} bytes, half a uint16 token too many: make it again")
        if size < 2 * length:
            raise UserError(
                f"{path} holds {size // 2} tokens, and one sequence takes {length}: give more text or a smaller block_size"
            )
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        if self.is_task and len(tokens) % length:
            raise UserError(f"{path} holds {len(tokens)} tokens, no multiple of example_length {length}: make it again")
        if tokens.max() >= self.meta["vocab_size"]:
            raise UserError(
                f"{path} holds token {tokens.max()}, but meta.json says vocab_size {self.meta['vocab_size']}: make it again"
            )
        return tokens

    def batch(self, split, batch_size, generator):
        """Random sequences, drawn with replacement by a torch.Generator."""
        tokens = self.tokens[split]
        if self.is_task:
            starts = torch.randint(len(tokens) // self.example_length, (batch_size,), generator=generator)
            starts = starts * self.example_length
        else:
            starts = torch.randint(len(tokens) - self.block_size, (batch_size,), generator=generator)
        return self._cut(tokens, starts)

    def sequential(self, split, batch_size, n_batches=None):
        """The split from its beginning in sequences that do not overlap, up to n_batches; a rest shorter than one sequence
        is left out."""
        tokens = self.tokens[split]
        step = self.example_length if self.is_task else self.block_size
        last = len(tokens) - (self.example_length if self.is_task else self.block_size + 1)
        starts = torch.arange(0, last + 1, step).split(batch_size)
        for chunk in starts[:n_batches]:
            yield self._cut(tokens, chunk)

    def _cut(self, tokens, starts):
        length = self.example_length if self.is_task else self.block_size + 1
        rows = torch.from_numpy(tokens[starts[:, None].numpy() + np.arange(length)].astype(np.int64))  # (B, length)
        x, y = rows[:, :-1].clone(), rows[:, 1:].clone()
        if self.is_task:
            y[:, : self.answer_start - 1] = -1
        return x.to(self.device), y.to(self.device)


def read_meta(folder):
    """meta.json as a dict. Raises UserError that names the command which makes a missing dataset."""
    folder = Path(folder)
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            command = MAKE_COMMANDS.get(
                folder.name, f"text PATH --name={folder.name}` or `... examples FILE --name={folder.name}"
            )
            raise UserError(f"{folder / name} is missing: run `python data/prepare.py {command}`")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        numbers = [meta["vocab_size"]] + [meta[key] for key in ("example_length", "answer_start") if key in meta]
        if not isinstance(meta["tokenizer"], str) or not all(type(n) is int and 0 < n <= 65536 for n in numbers):
            raise ValueError("a value of the wrong kind")
        if ("example_length" in meta) != ("answer_start" in meta) or not meta.get("answer_start", 0) < meta.get(
            "example_length", 1
        ):
            raise ValueError("example_length and answer_start do not fit")
        if meta["tokenizer"] == "char" and len(meta["characters"]) != meta["vocab_size"]:
            raise ValueError("characters and vocab_size do not fit")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): make the dataset again")
    return meta
