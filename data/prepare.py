"""
Make a dataset: text or toy examples in, token files out (data/<name>/train.bin, val.bin, meta.json).

    python data/prepare.py addition                            all 10,000 problems dd+dd=ddd
    python data/prepare.py shakespeare [--file=PATH]           tiny Shakespeare by characters; downloads 1.1 MB without --file
    python data/prepare.py text PATH... --name=NAME [--tokenizer=gpt2|char|byte]
                                                               any UTF-8 files or folders, streamed; with gpt2 a .jsonl file
                                                               holds a document per line, {"text": ...}
    python data/prepare.py openwebtext [--subsets=K] [--folder=PATH]
                                                               GPT-2's kind of text, streamed; downloads 0.6 GB per subset
                                                               without --folder; an interrupted run goes on when run again
    python data/prepare.py examples FILE --name=NAME           a toy task: one prompt<TAB>answer line per example
    python data/prepare.py COMMAND --help                      the options of a command
"""

import codecs
import hashlib
import os
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this file sees the project, too

import config as command_line
from config import UserError, arguments, collected, option
from data import openwebtext
from data.documents import Document, Unit, as_they_are, cut, read_lines, split_of, text_of, tokenisers
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from data.writer import DatasetWriter

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CHUNK = 1 << 20  # bytes of text held at once
UNIT = 256 << 20  # bytes of text files that are finished together: what an interruption costs at most, but for a longer file
LINE = 64 << 20  # bytes of the longest line of .jsonl


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
    val_fraction: float = option(0.1, "held out for validation: the last part of the text, or documents", above=0, below=1)
    workers: int = option(0, "processes that tokenise, with gpt2; 0: one per core", at_least=0)
    data_dir: str = option("data", "where the dataset's folder goes")

    def problems(self):
        return name_problems(self.name, self.data_dir)


@dataclass
class OpenWebText:
    subsets: int = option(21, "how many of the 21 archives; each has about 430 million tokens", at_least=1, below=22)
    folder: str = option("", "local copies of the archives; empty: download them")
    val_fraction: float = option(0.0005, "of the documents, held out for validation", above=0, below=1)
    workers: int = option(0, "processes that tokenise; 0: one per core", at_least=0)
    data_dir: str = option("data", "where the dataset's folder goes")


@dataclass
class Examples:
    paths: tuple = arguments("one file of examples", 1, 1)
    name: str = option("", "of the dataset")
    val_fraction: float = option(0.1, "examples held out for validation; 0: both splits hold all", at_least=0, below=1)
    seed: int = option(0, "of the order of the examples", at_least=0)
    data_dir: str = option("data", "where the dataset's folder goes")

    def problems(self):
        return name_problems(self.name, self.data_dir)


COMMANDS = {
    "addition": Addition,
    "shakespeare": Shakespeare,
    "text": Text,
    "examples": Examples,
    "openwebtext": OpenWebText,
}


def name_problems(name, data_dir):
    if name and name not in (".", "..") and not set(name) & set("/\\"):
        if (Path(data_dir) / name).is_file():
            return [f"--name is {name!r}, and {Path(data_dir) / name} is a file: give another name"]
        return []
    return [f"--name is {name!r}: give the dataset a name that can be a folder, such as --name=mytask"]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def prepare_text(paths, folder, tokenizer_name, val_fraction, workers=1):
    """Tokenise files and folders, in the order given (folders: every file in them, by name), into train.bin and val.bin.
    Memory stays at a few chunks whatever the size of the text. With gpt2 every file is a document, and every line of a
    .jsonl file, and the split is by document where that puts ten or more into validation; else validation is the end of the
    text. Raises UserError for missing, empty or non-UTF-8 files."""
    files = [file for path in paths for file in files_of(Path(path))]
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: leave it out")
    total = sum(file.stat().st_size for file in files)
    if tokenizer_name == "gpt2":
        by_document = count_documents(files, total) * val_fraction >= 10
        settings = {"command": "text", "val_fraction": val_fraction, "by_document": by_document}
        units = file_units(files, val_fraction if by_document else None)
        return prepare_documents(units, folder, GPT2Tokenizer, settings, val_fraction, workers, by_document)
    tokenizer = ByteTokenizer()
    if tokenizer_name == "char":
        characters = set()
        with progress(total, "counting characters") as bar:
            for file in files:
                for chunk in chunks(file, bar):
                    characters |= set(chunk)
        tokenizer = CharTokenizer("".join(sorted(characters)))
    with DatasetWriter(folder) as writer:
        with progress(total, "tokenising") as bar:
            for file in files:
                for chunk in chunks(file, bar):
                    writer.write(tokenizer.encode(chunk))
        return writer.finish(tokenizer.meta(), int(writer.n_tokens * (1 - val_fraction)))


def prepare_documents(units, folder, make_tokenizer, settings, val_fraction, workers, by_document=True):
    """Tokenise units of documents, each document followed by end-of-text, on so many processes (0: one per core). Goes on
    after the units that an interrupted run with the same settings finished. by_document: if not, all documents say train, and
    the last val_fraction of their tokens become the validation split. Returns the contents of meta.json."""
    tokenizer, began = make_tokenizer(), time.monotonic()
    size = sum(unit.size for unit in units)
    workers = 1 if 0 < size < 4 * CHUNK else workers or n_cores()  # for a small text, starting others would take longer
    with DatasetWriter(folder, settings, [unit.name for unit in units]) as writer:
        before, n_done = writer.n_tokens, len(writer.done)
        if n_done:
            print(f"going on after {n_done} of {len(units)} parts, {before:,} tokens", flush=True)
        done_size = sum(unit.size for unit in units[:n_done])
        with tokenisers(make_tokenizer, val_fraction, workers) as encode, progress(size or None, "", done_size) as bar:
            for i, unit in enumerate(units[n_done:], n_done + 1):
                bar.set_description(f"tokenising, part {i} of {len(units)}")
                for encoded in encode(unit.jobs(bar)):
                    for split, tokens in encoded.tokens.items():
                        writer.write(tokens, split)
                    writer.documents += encoded.documents
                    writer.left_out.update(encoded.left_out)
                    bar.set_postfix_str(f"{writer.n_tokens / 1e6:,.1f}M tokens", refresh=False)
                writer.save(unit.name)
        rate = (writer.n_tokens - before) / (time.monotonic() - began)
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(writer.left_out.items()))
        print(f"{writer.documents:,} documents" + (f" (left out: {left_out})" if left_out else ""), end=", ")
        print(f"{rate:,.0f} tokens/s with --workers={workers}", flush=True)
        return writer.finish(tokenizer.meta(), None if by_document else int(writer.n_tokens * (1 - val_fraction)))


def n_cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_documents(files, total):
    """How many documents files hold. Raises UserError for the first five that are no UTF-8 text, before hours of work."""
    n_documents, problems = 0, []
    with progress(total, "checking") as bar:
        for file in files:
            with collected(problems):
                if file.suffix == ".jsonl":
                    n_documents += sum(block.count(b"\n") + 1 for block in line_blocks(file, bar))
                else:
                    for _ in chunks(file, bar):
                        pass
                    n_documents += 1
            if len(problems) == 5:
                break
    if problems:
        raise UserError("\n".join(problems))
    return n_documents


def file_units(files, val_fraction):
    """Files as units of about UNIT bytes, each named by a hash of its files' paths, sizes and times. val_fraction: None if the
    split is not by document."""
    units, group, size = [], [], 0
    for i, file in enumerate(files, 1):
        group.append(file)
        size += file.stat().st_size
        if size >= UNIT or i == len(files):
            facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in group]
            name = hashlib.sha256(repr(facts).encode("utf-8", errors="backslashreplace")).hexdigest()[:16]
            units.append(Unit(name, size, partial(file_jobs, group, val_fraction)))
            group, size = [], 0
    return units


def file_jobs(files, val_fraction, bar):
    """Jobs of about CHUNK bytes: small files together, parts of large ones, lines of .jsonl."""
    documents, size = [], 0
    for file in files:
        if file.suffix == ".jsonl":
            yield as_they_are, documents
            documents, size = [], 0
            yield from ((partial(read_lines, split=None if val_fraction else "train"), raw) for raw in line_blocks(file, bar))
            continue
        for document in file_documents(file, val_fraction, bar):
            documents.append(document)
            size += len(document.text)
            if size >= CHUNK:
                yield as_they_are, documents
                documents, size = [], 0
    yield as_they_are, documents


def file_documents(file, val_fraction, bar):
    """A text file in parts; the first one decides the split of all."""
    split = None if val_fraction else "train"
    for text in chunks(file, bar):
        split = split or split_of(text, val_fraction)
        yield Document(text, split, ends=False)
    yield Document("", split)


def line_blocks(file, bar):
    """The bytes of a .jsonl file in blocks of whole lines. Raises UserError if the first line holds no text."""
    rest, first = b"", True
    with opened(file) as stream:
        while data := stream.read(CHUNK):
            bar.update(len(data))
            lines, newline, rest = (rest + data).rpartition(b"\n")
            if len(rest) > LINE:
                raise UserError(f'{file} holds a line of more than {LINE >> 20} MB: write one {{"text": ...}} per line')
            if newline:
                if first:
                    check_first_line(file, lines)
                    first = False
                yield lines
    if rest:
        if first:
            check_first_line(file, rest)
        yield rest


def check_first_line(file, raw):
    problem = text_of(raw.lstrip().split(b"\n", 1)[0])[1] if raw.strip() else None
    if problem and problem != "empty":
        raise UserError(f'the first line of {file} is {problem}: write one {{"text": ...}} per line')


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


@contextmanager
def opened(file):
    try:
        with open(file, "rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): check its permissions or leave it out")


def chunks(file, bar):
    """The text of a file in pieces of about CHUNK bytes, each cut before white space where there is some, so that the tokens
    are the same as if the file were encoded whole."""
    decode, rest, offset = codecs.getincrementaldecoder("utf-8")().decode, "", 0
    with opened(file) as stream:
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
            end = cut(text)
            if end > 0:
                yield text[:end]
            rest = text[end:]


def progress(total, label, done=0):
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=label, leave=False)


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
        return writer.finish({**tokenizer.meta(), **task}, train.size)


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
        meta = prepare_text(options.paths, folder, options.tokenizer, options.val_fraction, options.workers)
    elif command == "openwebtext":
        folder = data_dir / "openwebtext"
        units = openwebtext.archives(options.subsets, options.folder)
        settings = {"command": "openwebtext", "val_fraction": options.val_fraction}
        meta = prepare_documents(units, folder, GPT2Tokenizer, settings, options.val_fraction, options.workers)
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
