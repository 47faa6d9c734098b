"""A tokeniser that needs no vocabulary, and what it wrote."""

import numpy as np

from data.tokenizer import ByteTokenizer


class Letters(ByteTokenizer):
    """Bytes as tokens, and an end of text."""

    vocab_size, end_of_text = 257, 256


def split_texts(folder, split):
    """The documents of a split: every one ends with end-of-text."""
    tokens = np.fromfile(folder / f"{split}.bin", dtype=np.uint16)
    assert tokens[-1] == Letters.end_of_text
    ends = np.flatnonzero(tokens == Letters.end_of_text)
    return [bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(tokens, ends + 1)[:-1]]
