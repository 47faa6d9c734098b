"""
Make a dataset: text or toy examples in, token files out (data/<name>/train.bin, val.bin, meta.json).

    python data/prepare.py addition                     all 10,000 problems dd+dd=ddd
    python data/prepare.py shakespeare [--file=PATH]    tiny Shakespeare by characters; else downloads 1.1 MB
    python data/prepare.py text PATH... --name=NAME [--tokenizer=gpt2|char|byte]
        any UTF-8 files or folders, streamed; with gpt2 every file is a document, and every line {"text": ...}
        of a .jsonl file
    python data/prepare.py openwebtext [--subsets=K] [--folder=PATH]
        GPT-2's kind of text; without --folder downloads 0.6 GB per subset; run again, it goes on after the
        last subset that is finished
    python data/prepare.py examples FILE --name=NAME    a toy task: one prompt<TAB>answer line per example
    python data/prepare.py COMMAND --help               the options of a command
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

from data import openwebtext
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from support import command_line
from support.command_line import UserError, arguments, option
from support.files import download

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BATCH = 500  # documents tokenised at once


@dataclass
class Addition:
    data_dir: str = option("data", "where the dataset's folder goes")


@dataclass
class Shakespeare(Addition):
    file: str = option("", "a local copy of the text; empty: download it")


@dataclass
class OpenWebText(Addition):
    subsets: int = option(21, "how many of the 21 archives, 430 million tokens each", at_least=1, below=22)
    folder: str = option("", "local copies of the archives; empty: download them")
    val_fraction: float = option(0.0005, "of the documents, held out for validation", above=0, below=1)


@dataclass
class Examples(Addition):
    paths: tuple = arguments("one file of examples", 1, 1)
    name: str = option("", "of the dataset")
    val_fraction: float = option(0.1, "held out of the examples; 0: nothing", at_least=0, below=1)

    def check(self):
        name = self.name
        if name in ("", ".", "..") or set(name) & set("/\\") or (Path(self.data_dir) / name).is_file():
            raise UserError(f"--name is {name!r}: give one that can be a folder, such as --name=mytask")


@dataclass
class Text(Examples):
    paths: tuple = arguments("one or more files or folders", 1, 1_000_000)
    tokenizer: str = option("gpt2", "what a token is", choices=("gpt2", "char", "byte"))
    val_fraction: float = option(0.1, "held out: of the documents, or of the end", above=0, below=1)


# ------------------------------------------------------------------------------------------------------------
# Token files


class TokenFiles:
    """train.bin and val.bin on their way: in a temporary folder beside the dataset, put in place by `finish`.
    Until then, and after any error, an older dataset of the same name stays as it was."""

    def __init__(self, folder):
        self.folder, self.temporary = Path(folder), Path(f"{folder}.{os.getpid()}.tmp")
        self.n_tokens = {"train": 0, "val": 0}

    def path(self, split):
        return self.temporary / f"{split}.bin"

    def __enter__(self):
        with self.writing():
            self.temporary.mkdir(parents=True)
            self.files = {split: open(self.path(split), "wb") for split in self.n_tokens}
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error.strerror}): make room, or give another --data_dir")

    def write(self, tokens, split="train"):
        """Append uint16 tokens."""
        with self.writing():
            self.files[split].write(tokens.tobytes())
        self.n_tokens[split] += len(tokens)

    def finish(self, meta, val_fraction=None):
        """Put the files in place. val_fraction: cut this part off the end of all tokens for validation,
        instead of what was written for it. Returns the contents of meta.json: meta, the numbers of tokens,
        and a hash."""
        with self.writing():
            for file in self.files.values():
                file.close()
            if val_fraction is not None:
                n = sum(self.n_tokens.values())
                n_train = int(n * (1 - val_fraction))
                with open(self.path("train"), "r+b") as train, open(self.path("val"), "r+b") as val:
                    train.seek(0, os.SEEK_END)
                    shutil.copyfileobj(val, train)
                    train.seek(2 * n_train)
                    val.seek(0)
                    shutil.copyfileobj(train, val)
                    train.truncate(2 * n_train)
                    val.truncate()
                self.n_tokens = {"train": n_train, "val": n - n_train}
            if min(self.n_tokens.values()) < 2:
                raise UserError(f"{sum(self.n_tokens.values())} tokens are too few to split: give more text")
            meta = {**meta, **{f"{split}_tokens": n for split, n in self.n_tokens.items()}}
            digest = hashlib.sha256()
            for split in self.n_tokens:
                with open(self.path(split), "rb") as file:
                    while data := file.read(1 << 20):
                        digest.update(data)
            meta["sha256"] = digest.hexdigest()
            (self.temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(self.temporary / name, self.folder / name)
        return meta


# ------------------------------------------------------------------------------------------------------------
# Text


def prepare_text(paths, folder, tokenizer_name, val_fraction):
    """Tokenise files and folders, in the order given (folders: every file in them, by name), one file in
    memory at a time. Validation is the end of the text, or with gpt2 whole documents, where it gets ten or
    more. Returns the contents of meta.json. Raises UserError for what is no UTF-8 text."""
    files = [file for path in paths for file in files_of(Path(path))]
    size = sum(file.stat().st_size for file in files)
    with TokenFiles(folder) as out, tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
        if tokenizer_name == "gpt2":
            tokenizer, left_out = GPT2Tokenizer(), Counter()
            n_val = write_documents(out, file_documents(files, left_out, bar), tokenizer, val_fraction, left_out)
            return out.finish(tokenizer.meta(), None if n_val >= 10 else val_fraction)
        tokenizer = ByteTokenizer()
        if tokenizer_name == "char":
            tokenizer = CharTokenizer("".join(sorted(set().union(*map(text_of, files)))))
        for file in files:
            out.write(tokenizer.encode(text_of(file)))
            bar.update(file.stat().st_size)
        return out.finish(tokenizer.meta(), val_fraction)


def write_documents(out, documents, tokenizer, val_fraction, left_out):
    """Tokenise texts on all cores into TokenFiles, each followed by end-of-text. A hash of its text says
    whether it is for validation: the same in any order and on any machine, and two copies never lie on both
    sides. Prints the numbers of documents and of those left out. Returns how many are for validation."""
    count = Counter()
    with ThreadPoolExecutor() as pool:  # the tokenizer releases Python's lock
        while batch := list(itertools.islice(documents, BATCH)):
            for text, tokens in zip(batch, pool.map(tokenizer.encode, batch)):
                digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
                split = "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"
                out.write(np.append(tokens, np.uint16(tokenizer.end_of_text)), split)
                count[split] += 1
    words = ", ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items()) if n)
    print(f"{sum(count.values()):,} documents" + (f" (left out: {words})" if words else ""), flush=True)
    return count["val"]


def file_documents(files, left_out, bar):
    """The text of every file, and of every line {"text": ...} of a .jsonl file."""
    for file in files:
        if file.suffix != ".jsonl":
            yield text_of(file)
            bar.update(file.stat().st_size)
            continue
        with open(file, "rb") as lines:
            for line in lines:
                bar.update(len(line))
                try:
                    text = json.loads(line.decode("utf-8"))["text"] if line.strip() else ""
                    if text.strip():
                        yield text
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    left_out['without a "text"'] += 1


def text_of(file):
    """The text of a file. Raises UserError if it is empty or not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (near byte {error.start}): convert it or leave it out")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): check its permissions or leave it out")
    if not text:
        raise UserError(f"{file} is empty: leave it out")
    return text


def files_of(path):
    """The file itself, or all files below a folder, by name, hidden ones left out."""
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and not hidden(f))
    if not files:
        raise UserError(f"there is no file or folder with files {path}: check the path")
    return files


def prepare_openwebtext(subsets, source, folder, val_fraction, tokenizer):
    """Tokenise archives: those of the folder `source`, or downloaded ones. Every archive becomes a dataset
    of its own in <folder>.parts, which stays until all are done. Returns the contents of meta.json."""
    parts = Path(f"{folder}.parts")
    names = openwebtext.ARCHIVES[:subsets]
    archives = openwebtext.local_archives(source, subsets) if source else [parts / name for name in names]
    done = [parts / f"{archive.stem}-{val_fraction}" for archive in archives]
    for number, (archive, part) in enumerate(zip(archives, done), start=1):
        print(f"{archive.name}, {number} of {len(done)}" + ", is done" * part.is_dir(), flush=True)
        if part.is_dir():
            continue
        if not source:
            download(openwebtext.URL + archive.name, archive)
        size, left_out = archive.stat().st_size, Counter()
        with TokenFiles(part) as out, tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            documents = openwebtext.documents(archive, left_out, bar)
            write_documents(out, documents, tokenizer, val_fraction, left_out)
            out.finish(tokenizer.meta())
        if not source:
            archive.unlink()
    with TokenFiles(folder) as out:
        for part, split in itertools.product(done, ("train", "val")):
            out.write(np.memmap(part / f"{split}.bin", dtype=np.uint16, mode="r"), split)
        meta = out.finish(tokenizer.meta())
    shutil.rmtree(parts)
    return meta


# ------------------------------------------------------------------------------------------------------------
# Toy tasks


def prepare_examples(pairs, folder, val_fraction):
    """Write a toy task. pairs: (prompt, answer) strings, every prompt of one length, every answer of one
    length. Shuffled, then split; with val_fraction 0 both splits hold all examples."""
    tokenizer = CharTokenizer("".join(sorted(set("".join(prompt + answer for prompt, answer in pairs)))))
    examples = np.stack([tokenizer.encode(prompt + answer) for prompt, answer in pairs])  # (N, length)
    examples = np.random.default_rng(0).permutation(examples)
    n, n_val = len(examples), round(len(examples) * val_fraction)
    if val_fraction and not 0 < n_val < n:
        raise UserError(f"--val_fraction {val_fraction} of {n} examples leaves a split empty: give another")
    with TokenFiles(folder) as out:
        out.write(examples[n_val:].ravel())
        out.write(examples[: n_val or n].ravel(), "val")
        task = {"example_length": examples.shape[1], "answer_start": len(pairs[0][0])}
        return out.finish({**tokenizer.meta(), **task})


def read_examples(path):
    """(prompt, answer) of every line of a file. Raises UserError with the number of the first bad line."""
    pairs = []
    for number, line in enumerate(text_of(Path(path)).splitlines(), start=1):
        pair = tuple(line.split("\t"))
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{path} line {number} is {line[:40]!r}: write a prompt, one tab, and an answer")
        pairs.append(pair)
        (a, b), (first_a, first_b) = map(len, pair), map(len, pairs[0])
        if (a, b) != (first_a, first_b):
            sizes = f"{a} + {b} characters, line 1 has {first_a} + {first_b}"
            raise UserError(f"{path} line {number} has {sizes}: pad them to one length")
    return pairs


COMMANDS = {  # name: (options, the dataset's folder if they do not name it)
    "addition": (Addition, "addition"),
    "shakespeare": (Shakespeare, "shakespeare_char"),
    "text": (Text, None),
    "examples": (Examples, None),
    "openwebtext": (OpenWebText, "openwebtext"),
}


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return
    command, *argv = argv
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
    defaults, name = COMMANDS[command]
    options = command_line.parse(defaults(), argv, f"{__doc__}\n{command},")
    data_dir = Path(options.data_dir)
    folder = data_dir / (name or options.name)
    if command == "addition":  # the task is finite: both splits hold all of it
        pairs = [(f"{a:02d}+{b:02d}=", f"{a + b:03d}") for a in range(100) for b in range(100)]
        meta = prepare_examples(pairs, folder, val_fraction=0)
    elif command == "examples":
        meta = prepare_examples(read_examples(options.paths[0]), folder, options.val_fraction)
    elif command == "text":
        meta = prepare_text(options.paths, folder, options.tokenizer, options.val_fraction)
    elif command == "openwebtext":
        tokenizer = GPT2Tokenizer()
        meta = prepare_openwebtext(options.subsets, options.folder, folder, options.val_fraction, tokenizer)
    else:
        text = Path(options.file or data_dir / "tinyshakespeare.txt")
        if not options.file and not text.is_file():
            download(SHAKESPEARE, text, SHAKESPEARE_SHA256)
        meta = prepare_text([text], folder, "char", 0.1)
    tokens = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"{folder}: {tokens}, vocabulary {meta['vocab_size']}")


if __name__ == "__main__":
    command_line.run(main)
