"""
Documents to tokens on all cores, in bounded memory. What comes out does not depend on the number of threads.

A job is (reader, raw): reader(raw) returns (documents, {reason: how many were left out}), and runs in the
thread that tokenises. Unpacking and tokenising both release Python's lock.
"""

import hashlib
import json
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

PIECE = 1 << 20  # characters tokenised at once


class Document(NamedTuple):
    """A document, or a part of a long one. A hash of its beginning says whether it is for training or for
    validation: the same in any order and on any machine, and two copies never lie on both sides."""

    text: str
    beginning: str
    ends: bool  # end-of-text follows


def read_texts(texts):
    """The reader of whole documents."""
    return [Document(text, text, True) for text in texts], {}


def read_parts(parts):
    """The reader of what is a list of Documents already."""
    return parts, {}


def read_lines(raw):
    """The reader of .jsonl, bytes: one object with a `text` per line."""
    texts, left_out = [], Counter()
    for line in raw.split(b"\n"):
        try:
            text = json.loads(line.decode("utf-8"))["text"] if line.strip() else ""
            texts += [text] if text.strip() else []
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            left_out['without a "text"'] += 1
    return read_texts(texts)[0], dict(left_out)


def cut(text):
    """Where to cut a text that goes on: before the white space at its end; if there is none, before the last
    one inside. No GPT-2 token reaches from before white space into it, so the parts' tokens are the
    whole's."""
    end = len(text.rstrip())
    if end < len(text):
        return end
    words = text.rsplit(None, 1)
    return len(text[: -len(words[1])].rstrip()) if len(words) == 2 else len(text)


def encode(job, tokenizer, val_fraction):
    """({split: uint16 tokens}, {split: documents}, left_out) of a job; end-of-text follows every document."""
    reader, raw = job
    documents, left_out = reader(raw)
    tokens, count = {"train": [np.zeros(0, np.uint16)], "val": [np.zeros(0, np.uint16)]}, Counter()
    for text, beginning, ends in documents:
        digest = hashlib.sha256(beginning.encode("utf-8", errors="surrogatepass")).digest()
        split = "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"
        count[split] += ends
        while text:  # in pieces: a long text needs little memory while it is tokenised
            end = len(text) if len(text) <= PIECE else cut(text[:PIECE]) or PIECE
            tokens[split].append(tokenizer.encode(text[:end]))
            text = text[end:]
        if ends:
            tokens[split].append(np.array([tokenizer.end_of_text], dtype=np.uint16))
    return {split: np.concatenate(parts) for split, parts in tokens.items()}, count, left_out


def encoded(jobs, tokenizer, val_fraction):
    """What `encode` returns of every job, in order. Two jobs per core are read ahead, no more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(encode, job, tokenizer, val_fraction))
                if len(waiting) > 2 * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
