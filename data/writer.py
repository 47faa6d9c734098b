"""
Token files on their way: how prepare.py writes a dataset's folder, and goes on after an interruption.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from config import UserError


class DatasetWriter:
    """Collects tokens in a temporary folder beside the dataset; `finish` puts the finished files in place. Until then, and
    after any error, an older dataset of the same name stays as it was.

    With settings (plain values) and the names of the units that are to be written, `save` records each finished unit in the
    temporary folder's progress.json: what comes after an interruption then goes on from there. `done` are the names of the
    finished ones. Raises UserError if the folder holds an interrupted run of other settings or units."""

    def __init__(self, folder, settings=None, units=()):
        self.folder, self.temporary, self.progress = Path(folder), Path(f"{folder}.tmp"), Path(f"{folder}.tmp/progress.json")
        self.settings, self.units, self.done = settings, list(units), []
        self.tokens, self.documents, self.left_out = {"train": 0, "val": 0}, 0, Counter()

    @property
    def n_tokens(self):
        return sum(self.tokens.values())

    def __enter__(self):
        with self._writing():
            if self.progress.is_file():
                self._go_on()
            else:
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir(parents=True)
            self._files = {split: open(self.temporary / f"{split}.bin", "ab") for split in self.tokens}
        return self

    def __exit__(self, kind, error, traceback):
        for file in self._files.values():
            with suppress(OSError):  # a full disk has been reported
                file.close()
        if error is None or not self.done:
            shutil.rmtree(self.temporary, ignore_errors=True)
        elif isinstance(error, (UserError, KeyboardInterrupt)):
            kept = f"{len(self.done)} of {len(self.units)} parts are kept: run the same command again to go on"
            raise type(error)("\n".join(filter(None, [str(error), kept])))

    def _go_on(self):
        """Take up what progress.json describes."""
        try:
            state = json.loads(self.progress.read_text(encoding="utf-8"))
            self.done, self.tokens, self.documents = list(state["done"]), dict(state["tokens"]), int(state["documents"])
            self.left_out = Counter({str(reason): int(n) for reason, n in state["left_out"].items()})
            if set(self.tokens) != {"train", "val"} or not all(type(n) is int and n >= 0 for n in self.tokens.values()):
                raise ValueError("tokens of another kind")
            for split, n in self.tokens.items():
                if (self.temporary / f"{split}.bin").stat().st_size < 2 * n:
                    raise ValueError(f"{split}.bin is too short")
            settings = state["settings"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.done = []
            raise UserError(f"{self.progress} is damaged ({error}): delete {self.temporary} to start over")
        if settings != self.settings or self.done != self.units[: len(self.done)]:
            raise UserError(
                f"{self.temporary} holds an interrupted run with other options or text: repeat its command to finish it, or "
                "delete the folder"
            )
        for split, n in self.tokens.items():
            os.truncate(self.temporary / f"{split}.bin", 2 * n)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.temporary} ({error.strerror}): make room or choose another --data_dir")

    def write(self, tokens, split="train"):
        """Append uint16 tokens."""
        with self._writing():
            self._files[split].write(tokens.tobytes())
        self.tokens[split] += len(tokens)

    def save(self, unit):
        """Record that a unit is finished."""
        self.done.append(unit)
        state = {key: getattr(self, key) for key in ("settings", "done", "tokens", "documents", "left_out")}
        with self._writing():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            temporary = self.progress.with_suffix(".new")
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self.progress)

    def finish(self, meta, n_train=None):
        """Put the files in place. n_train: so many tokens of what was written for training stay there, the others go to
        val.bin; None: they were written there. Returns the contents of meta.json: meta, the numbers of tokens (and of
        documents, and of what was left out), and the hash of train.bin and val.bin together."""
        is_split = n_train is None
        if not is_split:
            self.tokens = {"train": n_train, "val": self.n_tokens - n_train}
        n_train, n_val = self.tokens["train"], self.tokens["val"]
        if n_train < 2 or n_val < 2:
            self.done = []  # more or other text is another run: nothing here is worth keeping
            raise UserError(
                f"{self.n_tokens} tokens are too few to split into {n_train} for training and {n_val}: give more text"
            )
        with self._writing():
            for file in self._files.values():
                file.close()
            train, val = self.temporary / "train.bin", self.temporary / "val.bin"
            digest = sha256_of(train, val)
            if not is_split:
                with open(train, "rb") as source, open(val, "wb") as target:
                    source.seek(2 * n_train)
                    shutil.copyfileobj(source, target)
                os.truncate(train, 2 * n_train)
            meta = {**meta, "train_tokens": n_train, "val_tokens": n_val, "sha256": digest}
            if self.units:
                meta |= {"documents": self.documents, "left_out": dict(self.left_out)}
            (self.temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(self.temporary / name, self.folder / name)
        return meta


def sha256_of(*paths):
    """The hash of files, one after the other, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()
