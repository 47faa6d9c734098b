"""
Documents to tokens on all cores, in bounded memory. What comes out does not depend on the number of processes.

A job is (reader, raw): `reader(raw)` returns (documents, left_out), a list of `Document` and {reason: how many}, and runs in
the process that tokenises, so that unpacking is shared out, too. A tokeniser gives back `Encoded`, in the order of the jobs.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from config import UserError

PIECE = 1 << 20  # characters tokenised at once


class Unit(NamedTuple):
    """What is either finished or to be done again after an interruption: an archive, or some files."""

    name: str
    size: int  # bytes; 0: not known yet
    jobs: Callable  # takes a progress bar that counts bytes, returns an iterator of jobs


class Document(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    split: str | None = None  # train or val; None: found from the text by split_of
    ends: bool = True  # end-of-text follows


class Encoded(NamedTuple):
    tokens: dict  # {split: uint16 array}
    documents: int
    left_out: dict  # {reason: how many}


def split_of(text, val_fraction):
    """train or val for a document, by a hash of its text: the same in any order and on any machine, and two copies of a
    document never lie on both sides."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def cut(text):
    """Where to cut a text that goes on: before the white space at its end; if there is none, before the last one inside.
    No GPT-2 token reaches from before a run of white space into it, so both parts' tokens are those of the whole."""
    end = len(text.rstrip())
    if end < len(text):
        return end
    words = text.rsplit(None, 1)
    return len(text[: -len(words[1])].rstrip()) if len(words) == 2 else len(text)


def as_they_are(documents):
    """The reader of a job that holds its documents already."""
    return documents, {}


def read_lines(raw, split=None):
    """The reader of .jsonl: one object with a `text` per line."""
    documents, left_out = [], Counter()
    for line in raw.split(b"\n"):
        if line.strip():
            text, problem = text_of(line)
            if problem:
                left_out[problem] += 1
            else:
                documents.append(Document(text, split))
    return documents, left_out


def text_of(line):
    """(text, None) of a line of .jsonl, or (None, why there is none)."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        return None, 'without a "text"'
    return (value["text"], None) if value["text"].strip() else (None, "empty")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@contextmanager
def tokenisers(make_tokenizer, val_fraction, workers):
    """Gives a function from an iterable of jobs to an iterator over their Encoded, in order, on so many processes (1: this
    one). It reads two jobs per process ahead, no more. Raises UserError if a process dies."""
    if workers == 1:
        tokenizer = make_tokenizer()
        yield lambda jobs: (encode(job, tokenizer, val_fraction) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # the same on every system, and nothing of this process is copied
    pool = ProcessPoolExecutor(workers, spawn, initializer=start, initargs=(make_tokenizer, val_fraction))
    try:
        yield lambda jobs: in_order(pool, jobs, 2 * workers)
    except BrokenProcessPool:
        raise UserError("a process that tokenises died (is memory short?): try again with fewer --workers")
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool, jobs, ahead):
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(encode_here, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def start(make_tokenizer, val_fraction):
    """Runs first in every process of the pool."""
    global here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process: it ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    here = make_tokenizer(), val_fraction


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_here(job):
    return encode(job, *here)


def encode(job, tokenizer, val_fraction):
    """The tokens of a job's documents, each followed by end-of-text."""
    reader, raw = job
    documents, left_out = reader(raw)
    tokens = {"train": [], "val": []}
    for document in documents:
        part = tokens[document.split or split_of(document.text, val_fraction)]
        part += [tokenizer.encode(piece) for piece in pieces(document.text)]
        if document.ends:
            part.append(np.array([tokenizer.end_of_text], dtype=np.uint16))
    tokens = {split: np.concatenate([np.zeros(0, np.uint16), *parts]) for split, parts in tokens.items()}
    return Encoded(tokens, sum(document.ends for document in documents), dict(left_out))


def pieces(text):
    """A text in pieces of at most PIECE characters, so that a long one needs little memory while it is tokenised."""
    while len(text) > PIECE:
        end = cut(text[:PIECE]) or PIECE
        yield text[:end]
        text = text[end:]
    yield text
