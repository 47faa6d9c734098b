"""
A dataset is a folder: train.bin and val.bin (uint16 tokens, memory-mapped), and meta.json.

meta.json holds vocab_size and tokenizer (and the characters where there are any). A toy task adds
example_length and answer_start: then the files are whole examples, one after the other, and only the answer
is to be predicted. It may add roles, a name for every position, and shown, the examples in a run's pictures.
"""

from pathlib import Path

import numpy as np
import torch

from support.command_line import UserError
from support.files import damage_named, read_json

EVALUATED = 1 << 20  # tokens of a split that `sequential` takes at most, evenly spread

MAKE_COMMANDS = {
    "addition": "addition",
    "recall": "recall",
    "shakespeare_char": "shakespeare",
    "novels_char": "text FOLDER_OF_NOVELS --name=novels_char --tokenizer=char",
    "openwebtext": "openwebtext",
}


class Dataset:
    """Batches (x, y) of data/<name>/, both (B, T) int64 on `device`: y are the tokens after x, -1 where a toy
    task asks for no prediction. Raises UserError for missing or damaged files, and a wrong block_size."""

    def __init__(self, name, block_size, data_dir="data", device="cpu"):
        self.name, self.block_size, self.device = name, block_size, device
        folder = Path(data_dir) / name
        self.meta = read_meta(folder)
        self.example_length = self.meta.get("example_length")  # None for running text
        self.answer_start = self.meta.get("answer_start")
        self.is_task = self.example_length is not None
        if self.is_task and block_size < self.example_length - 1:
            n = self.example_length
            raise UserError(f"block_size is {block_size}, {name} has examples of {n}: give at least {n - 1}")
        self.sequence_tokens = self.example_length - 1 if self.is_task else block_size  # inputs per sequence
        self.stride = self.example_length or block_size  # from one sequence of `sequential` to the next
        self.tokens = {split: self.open(folder / f"{split}.bin") for split in ("train", "val")}
        # a split is pieces of its file: where each starts, (n,) int64, and the length of all
        self.pieces = {split: (torch.zeros(1, dtype=torch.int64), len(t)) for split, t in self.tokens.items()}
        self.hold_out()

    def hold_out(self):
        """Split "held_out": a twentieth of a training text, at most 262,144 tokens, in pieces of about 1,024
        (16,384 for sequences of 512 and more), evenly spread, which "train" then lacks. Of a toy task, and of
        a very short text, it is all of "train"."""
        n_tokens = len(self.tokens["train"])
        n_held_out = min(n_tokens // 20, EVALUATED // 4)
        # the same text for most sequence lengths: a dense model goes on with shorter ones, too
        n_pieces = max(1, n_held_out // (16 * (64 if self.block_size < 512 else 1024) + 1))
        period, length = n_tokens // n_pieces, max(n_held_out // n_pieces, self.block_size + 1)
        self.tokens["held_out"], self.pieces["held_out"] = self.tokens["train"], self.pieces["train"]
        if not self.is_task and period > length + self.block_size:
            starts = torch.arange(n_pieces) * period
            self.pieces["train"] = starts, period - length
            self.pieces["held_out"] = starts + period - length, length

    def open(self, path):
        size = path.stat().st_size
        stated = self.meta.get(f"{path.stem}_tokens", size // 2)
        if size != 2 * stated or (self.is_task and stated % self.example_length):
            raise UserError(f"{path} does not hold the {stated} tokens of meta.json: make the dataset again")
        if stated <= self.sequence_tokens:
            n = self.sequence_tokens + 1
            raise UserError(f"{path} holds {stated} tokens, a sequence takes {n}: give a smaller block_size")
        return np.memmap(path, dtype=np.uint16, mode="r")

    def batch(self, split, batch_size, generator):
        """Random sequences, drawn with replacement by a torch.Generator."""
        return self.cut(split, self.draw(split, batch_size, generator))

    def draw(self, split, batch_size, generator):
        """Where the sequences of a random batch start, (batch_size,)."""
        pieces, length = self.pieces[split]
        n = length // self.example_length if self.is_task else length - self.block_size  # starts in a piece
        drawn = torch.randint(len(pieces) * n, (batch_size,), generator=generator)
        piece, within = drawn // n, drawn % n
        return pieces[piece] + within * (self.example_length or 1)

    def sequential(self, split, batch_size, n_batches=None):
        """The split from its beginning in sequences that do not overlap, up to n_batches; a rest shorter than
        a sequence is left out. Of more than EVALUATED tokens so many, in sequences evenly spread."""
        for chunk in self.starts(split).split(batch_size)[:n_batches]:
            yield self.cut(split, chunk)

    def starts(self, split, most=EVALUATED):
        """Where the sequences of `sequential` start, or of at most so many tokens of them: (N,) int64."""
        pieces, length = self.pieces[split]
        n = (length - self.sequence_tokens - 1) // self.stride + 1  # in a piece
        n_taken = min(len(pieces) * n, max(1, min(most, EVALUATED) // self.stride))
        taken = torch.arange(n_taken) * (len(pieces) * n) // n_taken
        piece, within = taken // n, taken % n
        return pieces[piece] + within * self.stride

    def part(self, split):
        """What `sequential` takes of a split, in words; "" if it is all."""
        pieces, length = self.pieces[split]
        taken, n_tokens = len(self.starts(split)) * self.stride, len(pieces) * length
        is_all = n_tokens - taken <= self.stride
        return "" if is_all else f"{taken:,} of the {n_tokens:,} tokens of {split}.bin, evenly spread"

    def cut(self, split, starts):
        """(x, y) of the sequences that start there. On CUDA the copy goes on in the background."""
        rows = self.tokens[split][starts[:, None].numpy() + np.arange(self.sequence_tokens + 1)]
        if rows.max() >= self.meta["vocab_size"]:
            wrong = f"{split}.bin of {self.name} holds token {rows.max()}"
            raise UserError(f"{wrong}, and vocab_size is {self.meta['vocab_size']}: make the dataset again")
        rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        x, y = rows[:, :-1].clone(), rows[:, 1:].clone()
        if self.is_task:
            y[:, : self.answer_start - 1] = -1
        if torch.device(self.device).type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def check_tokenizer(self, theirs, path):
        """Raise UserError if tokens mean something else in theirs, the tokenizer's meta of a checkpoint."""
        if any(theirs.get(key) != self.meta.get(key) for key in ("tokenizer", "vocab_size", "characters")):
            a, b = (f"({meta['tokenizer']}, vocabulary {meta['vocab_size']})" for meta in (theirs, self.meta))
            raise UserError(f"{path} knows other tokens {a} than {self.name} has {b}: give its own dataset")


def read_meta(folder):
    """meta.json as a dict. Raises UserError that names the command which makes a missing dataset."""
    folder = Path(folder)
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            own = f"text PATH --name={folder.name}` or `... examples FILE --name={folder.name}"
            command = MAKE_COMMANDS.get(folder.name, own)
            raise UserError(f"{folder / name} is missing: run `python data/prepare.py {command}`")
    with damage_named(folder / "meta.json", "make the dataset again"):
        meta = read_json(folder / "meta.json")
        n = len(meta["characters"]) if meta["tokenizer"] == "char" else meta["vocab_size"]
        if meta["tokenizer"] not in ("char", "byte", "gpt2") or not 0 < meta["vocab_size"] == n <= 65536:
            raise ValueError("no tokenizer of this project")
        return meta
