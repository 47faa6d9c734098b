"""
A dataset is a folder: train.bin and val.bin (uint16 tokens, memory-mapped), and meta.json.

meta.json holds vocab_size and tokenizer (and the characters where there are any). A toy task adds example_length and
answer_start: then the files are whole examples, one after the other, and only the answer is to be predicted.

Opening a dataset and evaluating on it take the same time however large it is: see CHECKED and EVALUATED.
"""

import json
from pathlib import Path

import numpy as np
import torch

from config import UserError
from data.writer import sha256_of

CHECKED = 1 << 24  # tokens of a file that are looked at on opening, evenly spread; the hash is checked if both splits have less
EVALUATED = 1 << 20  # tokens of a split that `sequential` takes at most, evenly spread

MAKE_COMMANDS = {"addition": "addition", "shakespeare_char": "shakespeare", "openwebtext": "openwebtext"}


class Dataset:
    """Batches (x, y) of data/<name>/, both (B, T) int64 on `device`: y are the tokens after x, -1 where a toy task asks for
    no prediction. Raises UserError if the files are missing, damaged or do not fit block_size."""

    def __init__(self, name, block_size, data_dir="data", device="cpu"):
        self.name, self.block_size, self.device = name, block_size, device
        self.meta = read_meta(Path(data_dir) / name)
        self.example_length = self.meta.get("example_length")  # None for running text
        self.answer_start = self.meta.get("answer_start")
        self._length = self.example_length or block_size + 1  # tokens per sequence, with the last target
        self._stride = self.example_length or block_size  # from one sequence to the next
        if self.is_task and block_size < self.example_length - 1:
            raise UserError(
                f"block_size {block_size} is too short for {name}, whose examples have {self.example_length} tokens: "
                f"it must be at least {self.example_length - 1}"
            )
        paths = [Path(data_dir) / name / f"{split}.bin" for split in ("train", "val")]
        self.tokens = {path.stem: self._open(path) for path in paths}
        small = sum(map(len, self.tokens.values())) <= CHECKED
        if small and self.meta.get("sha256") not in (None, sha256_of(*paths)):
            raise UserError(f"{paths[0]} or val.bin is not what meta.json has the sha256 of: make the dataset again")

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
        if size % 2:
            raise UserError(f"{path} holds {size} bytes, half a uint16 token too many: make it again")
        n, expected = size // 2, self.meta.get(f"{path.stem}_tokens")
        if expected not in (None, n):
            raise UserError(f"{path} holds {n} tokens, but meta.json says {expected}: make it again")
        if n < self._length:
            raise UserError(
                f"{path} holds {n} tokens, and one sequence takes {self._length}: give more text or a smaller block_size"
            )
        try:
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): check its permissions")
        if self.is_task and len(tokens) % self._length:
            raise UserError(f"{path} holds {len(tokens)} tokens, no multiple of example_length {self._length}: make it again")
        block = 1 << 16
        starts = np.linspace(0, max(0, len(tokens) - block), min(-(-len(tokens) // block), CHECKED // block), dtype=np.int64)
        self._check_range(path, max(tokens[start : start + block].max() for start in starts))
        return tokens

    def _check_range(self, path, largest):
        """Batches are checked, too: in a large file _open has not seen all tokens."""
        if largest >= self.meta["vocab_size"]:
            raise UserError(
                f"{path} holds token {largest}, but meta.json says vocab_size {self.meta['vocab_size']}: make it again"
            )

    def batch(self, split, batch_size, generator):
        """Random sequences, drawn with replacement by a torch.Generator."""
        return self.cut(split, self.draw(split, batch_size, generator))

    def draw(self, split, batch_size, generator):
        """Where the sequences of a random batch start, (batch_size,)."""
        n_tokens = len(self.tokens[split])
        if self.is_task:
            return self.example_length * torch.randint(n_tokens // self.example_length, (batch_size,), generator=generator)
        return torch.randint(n_tokens - self.block_size, (batch_size,), generator=generator)

    def sequential(self, split, batch_size, n_batches=None):
        """The split from its beginning in sequences that do not overlap, up to n_batches; a rest shorter than one sequence
        is left out. Of a split of more than EVALUATED tokens so many, in sequences evenly spread over it: always the same."""
        for chunk in self._starts(split).split(batch_size)[:n_batches]:
            yield self.cut(split, chunk)

    def part(self, split):
        """What `sequential` takes of a split, in words; "" if it is all."""
        starts, n_tokens = self._starts(split), len(self.tokens[split])
        is_all = n_tokens - len(starts) * self._stride <= self._stride
        return "" if is_all else f"{len(starts) * self._stride:,} of the {n_tokens:,} tokens of {split}.bin, evenly spread"

    def _starts(self, split):
        """Where the sequences of `sequential` start: (N,) int64."""
        n_sequences = (len(self.tokens[split]) - self._length) // self._stride + 1
        n_taken = min(n_sequences, max(1, EVALUATED // self._stride))
        return torch.arange(n_taken) * n_sequences // n_taken * self._stride

    def cut(self, split, starts):
        """(x, y) of the sequences that start there. On CUDA the copy goes on in the background."""
        tokens = self.tokens[split]
        rows = tokens[starts[:, None].numpy() + np.arange(self._length)]  # (B, length)
        self._check_range(tokens.filename, rows.max())
        rows = torch.from_numpy(rows.astype(np.int64))
        x, y = rows[:, :-1].clone(), rows[:, 1:].clone()
        if self.is_task:
            y[:, : self.answer_start - 1] = -1
        if torch.device(self.device).type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


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
        if not isinstance(meta, dict):
            raise ValueError("it is no object")
        numbers = [meta["vocab_size"]] + [meta[key] for key in ("example_length", "answer_start") if key in meta]
        if meta["tokenizer"] not in ("char", "byte", "gpt2") or not all(type(n) is int and 0 < n <= 65536 for n in numbers):
            raise ValueError("a value of the wrong kind")
        if ("example_length" in meta) != ("answer_start" in meta) or not meta.get("answer_start", 0) < meta.get(
            "example_length", 1
        ):
            raise ValueError("example_length and answer_start do not fit")
        if meta["tokenizer"] == "char" and not (
            isinstance(meta["characters"], str)
            and len(set(meta["characters"])) == len(meta["characters"]) == meta["vocab_size"]
        ):
            raise ValueError("characters and vocab_size do not fit")
        kinds = {"train_tokens": int, "val_tokens": int, "sha256": str}
        if not all(type(meta[key]) is kind for key, kind in kinds.items() if key in meta):
            raise ValueError("a value of the wrong kind")
    except OSError as error:
        raise UserError(f"cannot read {folder / 'meta.json'} ({error.strerror}): check its permissions")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): make the dataset again")
    return meta
