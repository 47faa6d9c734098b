"""
Make a dataset: text or toy examples in, token files out (data/<name>/train.bin, val.bin, meta.json).

    python data/prepare.py addition                            all 10,000 problems dd+dd=ddd
    python data/prepare.py shakespeare [--file=PATH]           tiny Shakespeare by characters; downloads 1.1 MB without --file
    python data/prepare.py text PATH... --name=NAME [--tokenizer=gpt2|char|byte]
                                                               any UTF-8 files or folders, streamed
    python data/prepare.py examples FILE --name=NAME           a toy task: one prompt<TAB>answer line per example
    python data/prepare.py COMMAND --help                      the options of a command
"""

import codecs
import hashlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this file sees the project, too

import config as command_line
from config import UserError, arguments, option
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CHUNK = 1 << 20  # bytes of text held at once


@dataclass
class Addition:
    data_dir: str = option("data", "where the dataset's folder goes")


@dataclass
class Shakespeare:
    file: str = option("", "a local copy of the text; empty: download it")
    data_dir: str = option("data", "where the dataset's folder goes")


@dataclass
class Text:
    paths: tuple = arguments("one or more files or folders", 1, 1_000_000)
    name: str = option("", "of the dataset")
    tokenizer: str = option("gpt2", "what a token is", choices=("gpt2", "char", "byte"))
    val_fraction: float = option(0.1, "the last part of the text, held out for validation", above=0, below=1)
    data_dir: str = option("data", "where the dataset's folder goes")

    def problems(self):
        return name_problems(self.name, self.data_dir)


@dataclass
class Examples:
    paths: tuple = arguments("one file of examples", 1, 1)
    name: str = option("", "of the dataset")
    val_fraction: float = option(0.1, "examples held out for validation; 0: both splits hold all", at_least=0, below=1)
    seed: int = option(0, "of the order of the examples", at_least=0)
    data_dir: str = option("data", "where the dataset's folder goes")

    def problems(self):
        return name_problems(self.name, self.data_dir)


COMMANDS = {"addition": Addition, "shakespeare": Shakespeare, "text": Text, "examples": Examples}


def name_problems(name, data_dir):
    if name and name not in (".", "..") and not set(name) & set("/\\"):
        if (Path(data_dir) / name).is_file():
            return [f"--name is {name!r}, and {Path(data_dir) / name} is a file: give another name"]
        return []
    return [f"--name is {name!r}: give the dataset a name that can be a folder, such as --name=mytask"]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def prepare_text(paths, folder, tokenizer_name, val_fraction):
    """Tokenise files and folders, in the order given (folders: every file in them, by name), into train.bin and val.bin.
    Memory stays at a few chunks whatever the size of the text. Raises UserError for missing, empty or non-UTF-8 files."""
    files = [file for path in paths for file in files_of(Path(path))]
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: leave it out")
    total = sum(file.stat().st_size for file in files)
    if tokenizer_name == "char":
        characters = set()
        with progress(total, "counting characters") as bar:
            for file in files:
                for chunk in chunks(file, bar):
                    characters |= set(chunk)
        tokenizer = CharTokenizer("".join(sorted(characters)))
    else:
        tokenizer = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}[tokenizer_name]()
    with DatasetWriter(folder) as writer:
        with progress(total, "tokenising") as bar:
            for file in files:
                for chunk in chunks(file, bar):
                    writer.write(tokenizer.encode(chunk))
                if tokenizer_name == "gpt2":
                    writer.write(np.array([tokenizer.end_of_text], dtype=np.uint16))
        return writer.finish(int(writer.n_tokens * (1 - val_fraction)), tokenizer.meta())


def files_of(path):
    """The file itself, or all files below a folder, by name, hidden ones left out."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}: check the path")
    files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts))
    if not files:
        raise UserError(f"the folder {path} holds no files: give another")
    return files


def chunks(file, bar):
    """The text of a file in pieces of about CHUNK bytes, each cut before white space. No GPT-2 token reaches from before
    a run of white space into it, so the tokens are the same as if the file were encoded whole (but where a whole piece has
    no white space at all: that is cut anywhere)."""
    decode, rest, offset = codecs.getincrementaldecoder("utf-8")().decode, "", 0
    try:
        stream = open(file, "rb")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): check its permissions or leave it out")
    with stream:
        while True:
            data = stream.read(CHUNK)
            try:
                text = rest + decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text (near byte {offset + error.start}): convert it or leave it out")
            offset += len(data)
            bar.update(len(data))
            if not data:
                if text:
                    yield text
                return
            cut = len(text.rstrip())  # before the white space at the end; if there is none, before the last one inside
            if cut == len(text):
                words = text.rsplit(None, 1)
                cut = len(text[: -len(words[1])].rstrip()) if len(words) == 2 else len(text)
            if cut > 0:
                yield text[:cut]
            rest = text[cut:]


def progress(total, label):
    return tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False)


def download(url, path, sha256):
    """Fetch a file with a progress bar, check it, and put it in place only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(temporary, "wb") as file:
            with progress(int(response.headers.get("Content-Length", 0)) or None, "downloading") as bar:
                while data := response.read(CHUNK):
                    file.write(data)
                    bar.update(len(data))
        if hashlib.sha256(temporary.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{url} is not the file it was: get tiny Shakespeare elsewhere and pass it with --file=PATH")
        os.replace(temporary, path)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url} ({reason}): get the file by other means and pass it with --file=PATH")
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Toy tasks


def prepare_examples(pairs, folder, val_fraction, seed=0):
    """Write a toy task. pairs: (prompt, answer) strings, every prompt of one length, every answer of one length. Shuffled
    by seed, then split; with val_fraction 0 both splits hold all examples."""
    tokenizer = CharTokenizer("".join(sorted(set("".join(prompt + answer for prompt, answer in pairs)))))
    examples = np.stack([tokenizer.encode(prompt + answer) for prompt, answer in pairs])  # (N, example_length)
    examples = np.random.default_rng(seed).permutation(examples)
    n_val = round(len(examples) * val_fraction)
    if val_fraction and not 0 < n_val < len(examples):
        raise UserError(
            f"--val_fraction {val_fraction} of {len(examples)} examples leaves a split empty: give more examples, or 0"
        )
    train, val = (examples[n_val:], examples[:n_val]) if val_fraction else (examples, examples)
    task = {"example_length": examples.shape[1], "answer_start": len(pairs[0][0])}
    with DatasetWriter(folder) as writer:
        writer.write(train.ravel())
        writer.write(val.ravel())
        return writer.finish(train.size, {**tokenizer.meta(), **task})


def read_examples(path):
    """(prompt, answer) of every line of a file. Raises UserError with the number of the first line that does not fit."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (near byte {error.start}): convert it")
    if not lines:
        raise UserError(f"{path} is empty: write one prompt<TAB>answer line per example")
    pairs = []
    for number, line in enumerate(lines, start=1):
        pair = line.split("\t")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{path} line {number} is {line[:40]!r}: write a prompt, one tab, and an answer")
        pairs.append(tuple(pair))
        lengths, first = [len(part) for part in pair], [len(part) for part in pairs[0]]
        if lengths != first:
            raise UserError(
                f"{path} line {number} has {lengths[0]} + {lengths[1]} characters, line 1 has {first[0]} + {first[1]}: "
                "pad them to one length"
            )
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Token files


class DatasetWriter:
    """Collects tokens in a temporary file beside the dataset; `finish` splits it and puts the finished files in place.
    Until then, and after any error, an older dataset of the same name stays as it was."""

    def __init__(self, folder):
        self.folder, self.temporary = Path(folder), Path(f"{folder}.tmp")
        self.n_tokens, self._digest = 0, hashlib.sha256()

    def __enter__(self):
        try:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.temporary} ({error.strerror}): choose another --data_dir")
        self._file = open(self.temporary / "train.bin", "wb")
        return self

    def __exit__(self, *exception):
        self._file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write(self, tokens):
        """Append uint16 tokens."""
        self._file.write(tokens.tobytes())
        self._digest.update(tokens.tobytes())
        self.n_tokens += len(tokens)

    def finish(self, n_train, meta):
        """The first n_train tokens become train.bin, the others val.bin. Returns the contents of meta.json."""
        self._file.close()
        n_val = self.n_tokens - n_train
        if n_train < 2 or n_val < 2:
            raise UserError(
                f"{self.n_tokens} tokens are too few to split into {n_train} for training and {n_val}: give more text"
            )
        with open(self.temporary / "train.bin", "r+b") as train, open(self.temporary / "val.bin", "wb") as val:
            train.seek(2 * n_train)
            shutil.copyfileobj(train, val)
            train.truncate(2 * n_train)
        meta = {**meta, "train_tokens": n_train, "val_tokens": n_val, "sha256": self._digest.hexdigest()}
        (self.temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(self.temporary / name, self.folder / name)
        return meta


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return
    command, *argv = argv
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\noptions of {command}:\n{command_line.help_text(COMMANDS[command]())}")
        return
    options = command_line.parse(COMMANDS[command](), argv)
    data_dir = Path(options.data_dir)
    if command == "addition":
        folder = data_dir / "addition"
        pairs = [(f"{a:02d}+{b:02d}=", f"{a + b:03d}") for a in range(100) for b in range(100)]
        meta = prepare_examples(pairs, folder, val_fraction=0)  # the task is finite: both splits hold all of it
    elif command == "examples":
        folder = data_dir / options.name
        meta = prepare_examples(read_examples(options.paths[0]), folder, options.val_fraction, options.seed)
    elif command == "text":
        folder = data_dir / options.name
        meta = prepare_text(options.paths, folder, options.tokenizer, options.val_fraction)
    else:
        folder = data_dir / "shakespeare_char"
        source = Path(options.file) if options.file else data_dir / "tinyshakespeare.txt"
        if not options.file and not source.is_file():
            download(SHAKESPEARE_URL, source, SHAKESPEARE_SHA256)
        meta = prepare_text([source], folder, "char", 0.1)
    tokens = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"{folder}: {tokens}, vocabulary {meta['vocab_size']}")


if __name__ == "__main__":
    command_line.run(main)
