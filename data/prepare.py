"""
Make a dataset: text or toy examples in, token files out (data/<name>/train.bin, val.bin, meta.json).

    python data/prepare.py addition                     all 10,000 problems dd+dd=ddd
    python data/prepare.py recall                       a letter's digit, c4a1d7b2a to 1
    python data/prepare.py shakespeare                  tiny Shakespeare by characters; downloads 1.1 MB
    python data/prepare.py text PATH... --name=NAME [--tokenizer=gpt2|char|byte]
        any UTF-8 files or folders; with gpt2 every file is a document, and every line {"text": ...}
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script that sees the project

from data import openwebtext
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from support import command_line
from support.command_line import UserError, arguments, option
from support.files import download, read_text, write_json

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BATCH = 500  # documents tokenised at once


@dataclass
class Options:
    data_dir: str = option("data", "where the dataset's folder goes")


@dataclass
class OpenWebText(Options):
    subsets: int = option(21, "how many of the 21 archives, 430 million tokens each", at_least=1, below=22)
    folder: str = option("", "local copies of the archives; empty: download them")
    val_fraction: float = option(0.0005, "of the documents, held out for validation", above=0, below=1)


@dataclass
class Examples(Options):
    paths: tuple = arguments("one file of examples", 1, 1)
    name: str = option("", "of the dataset")
    val_fraction: float = option(0.1, "held out of the examples; 0: nothing", at_least=0, below=1)

    def check(self):
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise UserError(f"--name is {self.name!r}: give one that can be a folder, such as --name=mytask")


@dataclass
class Text(Examples):
    paths: tuple = arguments("one or more files or folders", 1, 1_000_000)
    tokenizer: str = option("gpt2", "what a token is", choices=("gpt2", "char", "byte"))
    val_fraction: float = option(0.1, "part held out: of the documents, or the end", above=0, below=1)


# ------------------------------------------------------------------------------------------------------------
# Token files


def write_dataset(folder, pieces, meta, val_fraction=None):
    """Write train.bin, val.bin and meta.json, and return what meta.json holds: meta, the numbers of tokens,
    and a hash. pieces: an iterable of (split, uint16 tokens). val_fraction: where fewer than ten pieces are
    for validation, cut this part off the end of all tokens for it instead. Until all is written, and after
    any error, an older dataset of the same name stays as it was. Raises UserError."""
    folder, temporary = Path(folder), Path(f"{folder}.{os.getpid()}.tmp")
    train, val = temporary / "train.bin", temporary / "val.bin"
    n_pieces = Counter()
    try:
        temporary.mkdir(parents=True)
        with open(train, "wb") as train_file, open(val, "wb") as val_file:
            for split, tokens in pieces:
                (train_file if split == "train" else val_file).write(tokens)
                n_pieces[split] += 1
        if val_fraction is not None and n_pieces["val"] < 10:
            split_at_end(train, val, val_fraction)
        n_train, n_val = train.stat().st_size // 2, val.stat().st_size // 2
        if min(n_train, n_val) < 2:
            remedy = "give more text, or another --val_fraction"
            raise UserError(f"{n_train + n_val} tokens are too few to split: {remedy}")
        digest = hashlib.sha256(np.memmap(train, mode="r"))
        digest.update(np.memmap(val, mode="r"))
        meta = {**meta, "train_tokens": n_train, "val_tokens": n_val, "sha256": digest.hexdigest()}
        write_json(meta, temporary / "meta.json")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(temporary / name, folder / name)
        return meta
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error}): make room, or give another --data_dir")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def split_at_end(train, val, val_fraction):
    """Move tokens between two files, one behind the other, until the second holds val_fraction of all."""
    with open(train, "ab") as file:
        file.write(val.read_bytes())
    n_train = int(train.stat().st_size // 2 * (1 - val_fraction))
    np.fromfile(train, dtype=np.uint16, offset=2 * n_train).tofile(val)
    os.truncate(train, 2 * n_train)


# ------------------------------------------------------------------------------------------------------------
# Text


def prepare_text(paths, folder, tokenizer_name, val_fraction):
    """Tokenise files and folders, in the order given (folders: every file in them, by name), one file in
    memory at a time. Validation is the end of the text, or with gpt2 whole documents, where it gets ten or
    more. Returns the contents of meta.json. Raises UserError for what is no UTF-8 text."""
    files = [file for path in paths for file in files_of(Path(path))]
    if tokenizer_name == "gpt2":
        tokenizer, left_out = GPT2Tokenizer(), Counter()
        pieces = tokenised(file_documents(files, left_out), left_out, tokenizer, val_fraction)
    else:
        characters = set().union(*(set(read_text(file)) for file in files))
        char = tokenizer_name == "char"
        tokenizer = CharTokenizer("".join(sorted(characters))) if char else ByteTokenizer()
        pieces = (("train", tokenizer.encode(read_text(file))) for file in files)
    return write_dataset(folder, pieces, tokenizer.meta(), val_fraction)


def tokenised(documents, left_out, tokenizer, val_fraction):
    """(split, tokens) of texts, tokenised on all cores, each followed by end-of-text. A hash of its text says
    whether it is for validation: the same in any order and on any machine, and two copies never lie on both
    sides. Prints the numbers of documents and of those left out, by reason."""
    n_documents = 0
    with ThreadPoolExecutor() as pool:  # the tokenizer releases Python's lock
        while batch := list(itertools.islice(documents, BATCH)):
            n_documents += len(batch)
            for text, tokens in zip(batch, pool.map(tokenizer.encode, batch)):
                digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
                split = "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"
                yield split, np.append(tokens, np.uint16(tokenizer.end_of_text))
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items()) if n)
    print(f"{n_documents:,} documents" + (f" (left out: {reasons})" if reasons else ""), flush=True)


def file_documents(files, left_out):
    """The text of every file, and of every line {"text": ...} of a .jsonl file."""
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
        for file in files:
            if file.suffix != ".jsonl":
                yield read_text(file)
                bar.update(file.stat().st_size)
                continue
            with open(file, "rb") as lines:
                for line in lines:
                    bar.update(len(line))
                    try:
                        text = json.loads(line.decode("utf-8-sig"))["text"] if line.strip() else ""
                        if text.strip():
                            yield text
                        else:
                            left_out["empty"] += 1
                    except (ValueError, LookupError, TypeError, AttributeError):
                        left_out['without a "text"'] += 1


def files_of(path):
    """The file itself, or all files below a folder, by name; hidden and empty ones are left out."""
    if path.is_file():
        return [path]
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.stat().st_size and not hidden(f)]
    if not files:
        raise UserError(f"there is no file or folder with files {path}: check the path")
    return files


def prepare_openwebtext(subsets, source, folder, val_fraction):
    """Tokenise archives: those of the folder `source`, or downloaded ones. Every archive becomes a dataset
    of its own in <folder>.parts, which stays until all are done. Returns the contents of meta.json."""
    tokenizer, parts = GPT2Tokenizer(), Path(f"{folder}.parts")
    if source:
        archives = sorted(Path(source).glob("[!.]*.tar"))[:subsets]
    else:
        archives = [parts / name for name in openwebtext.ARCHIVES[:subsets]]
    if not archives:
        raise UserError(f"there is no folder {source} with archives *.tar: check the path")
    done = [parts / f"{archive.stem}-{val_fraction}" for archive in archives]
    for number, (archive, part) in enumerate(zip(archives, done), start=1):
        print(f"{archive.name}, {number} of {len(done)}{', is done' if part.is_dir() else ''}", flush=True)
        if part.is_dir():
            continue
        if not source:
            download(openwebtext.URL + archive.name, archive)
        left_out = Counter()
        documents = openwebtext.documents(archive, left_out)
        write_dataset(part, tokenised(documents, left_out, tokenizer, val_fraction), tokenizer.meta())
        if not source:
            archive.unlink()
    files = [(split, part / f"{split}.bin") for part in done for split in ("train", "val")]
    pieces = ((split, np.memmap(path, dtype=np.uint16, mode="r")) for split, path in files)
    meta = write_dataset(folder, pieces, tokenizer.meta())
    shutil.rmtree(parts)
    return meta


# ------------------------------------------------------------------------------------------------------------
# Toy tasks


def prepare_examples(pairs, folder, val_fraction, roles=(), shown=""):
    """Write a toy task. pairs: (prompt, answer) strings, every prompt of one length, every answer of one
    length. Shuffled, then split; with val_fraction 0 both splits hold all examples. roles: a name for every
    character of an example; shown: examples that pictures show."""
    tokenizer = CharTokenizer("".join(sorted(set("".join(prompt + answer for prompt, answer in pairs)))))
    examples = np.stack([tokenizer.encode(prompt + answer) for prompt, answer in pairs])  # (N, length)
    examples = np.random.default_rng(0).permutation(examples)
    n_val = round(len(examples) * val_fraction)
    task = {"example_length": examples.shape[1], "answer_start": len(pairs[0][0])}
    task |= {key: value for key, value in (("roles", roles), ("shown", shown)) if value}
    pieces = [("train", examples[n_val:]), ("val", examples[:n_val] if val_fraction else examples)]
    return write_dataset(folder, pieces, {**tokenizer.meta(), **task})


def recall_examples():
    """(prompt, answer) of 40,000 different prompts: two to four pairs of a letter and a digit, in random
    order, then one of the letters, whose digit is the answer. Dots in front make them all 9 long. (There are
    but 2,400 of two pairs; the rest is three and four, in about equal parts.)"""
    rng, examples = np.random.default_rng(0), {}
    while len(examples) < 40_000:
        n = rng.integers(2, 5)
        letters, digits, asked = rng.permutation(list("abcd"))[:n], rng.integers(0, 10, n), rng.integers(n)
        pairs = "".join(f"{letter}{digit}" for letter, digit in zip(letters, digits))
        examples[f"{pairs}{letters[asked]}".rjust(9, ".")] = str(digits[asked])
    return list(examples.items())


def read_examples(path):
    """(prompt, answer) of every line of a file, once each: repeated, it could lie on both sides of the split.
    Raises UserError with the number of the first bad line."""
    pairs = []
    for number, line in enumerate(read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n"), start=1):
        pairs.append(line.split("\t"))
        lengths, lengths_of_first = ([len(text) for text in pair] for pair in (pairs[-1], pairs[0]))
        if len(lengths) != 2 or 0 in lengths or lengths != lengths_of_first:
            wanted = "write a prompt, one tab, and an answer, both as long as those of line 1"
            raise UserError(f"{path} line {number} is {line[:40]!r}: {wanted}")
    return list(dict.fromkeys(map(tuple, pairs)))


COMMANDS = {
    "addition": Options, "recall": Options, "shakespeare": Options, "text": Text, "examples": Examples,
    "openwebtext": OpenWebText,
}  # fmt: skip


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return
    command, *argv = argv
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
    options = command_line.parse(COMMANDS[command](), argv, f"{__doc__}\n{command},")
    name = "shakespeare_char" if command == "shakespeare" else getattr(options, "name", command)
    folder = Path(options.data_dir) / name
    if command == "addition":  # the task is finite: both splits hold all of it
        pairs = [(f"{a:02d}+{b:02d}=", f"{a + b:03d}") for a in range(100) for b in range(100)]
        roles = "tens of a,ones of a,+,tens of b,ones of b,=,hundreds,tens,ones".split(",")
        meta = prepare_examples(pairs, folder, 0, roles, "53+21=07436+28=06443+59=102")
    elif command == "recall":
        roles = [f"{kind} {number}" for number in (1, 2, 3, 4) for kind in ("letter", "digit")]
        roles += ["question", "answer"]
        meta = prepare_examples(recall_examples(), folder, 0.1, roles, "c4a1d7b2a1")
    elif command == "examples":
        meta = prepare_examples(read_examples(options.paths[0]), folder, options.val_fraction)
    elif command == "text":
        meta = prepare_text(options.paths, folder, options.tokenizer, options.val_fraction)
    elif command == "openwebtext":
        meta = prepare_openwebtext(options.subsets, options.folder, folder, options.val_fraction)
    else:  # shakespeare
        text = folder.with_name("tinyshakespeare.txt")
        if not text.is_file():
            download(SHAKESPEARE, text)
        meta = prepare_text([text], folder, "char", 0.1)
    tokens = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"{folder}: {tokens}, vocabulary {meta['vocab_size']}")


if __name__ == "__main__":
    command_line.run(main)
