"""Text to tokens and back: characters, bytes, or GPT-2's byte-pair encoding."""

import re

import numpy as np

from support.command_line import UserError

LONG_WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]{1000,}")  # what GPT-2's pattern takes for white space


class CharTokenizer:
    """One token per character, numbered by its place in `characters`."""

    def __init__(self, characters):
        self.characters, self.vocab_size = characters, len(characters)
        self._token = {c: i for i, c in enumerate(characters)}

    def encode(self, text):
        unknown = sorted(set(text) - set(self._token))
        if unknown:
            which = ", ".join(map(repr, unknown[:5]))
            raise UserError(f"the model does not know {which}: use only the characters {self.characters!r}")
        return np.array([self._token[c] for c in text], dtype=np.uint16)

    def decode(self, tokens):
        return "".join(self.characters[t] for t in tokens)

    def meta(self):
        return {"tokenizer": "char", "vocab_size": self.vocab_size, "characters": self.characters}


class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size = 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens):
        return bytes(int(t) for t in tokens).decode("utf-8", errors="replace")

    def meta(self):
        return {"tokenizer": "byte", "vocab_size": self.vocab_size}


class GPT2Tokenizer:
    """tiktoken's "gpt2" encoding, which it downloads on first use; `end_of_text` separates documents."""

    def __init__(self):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # no network, or a damaged cache
            kind = type(error).__name__
            remedy = "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            raise UserError(f"tiktoken cannot get the GPT-2 vocabulary ({kind}): {remedy}")
        self.vocab_size, self.end_of_text = self._encoding.n_vocab, self._encoding.eot_token

    def encode(self, text):
        """uint16 tokens. A long run of white space is cut before its last character, where the encoding cuts
        it, too: tiktoken's search for that place overflows its stack."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair: "?"
        ends = [run.end() - 1 for run in LONG_WHITE_SPACE.finditer(text) if run.end() < len(text)]
        parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(parts).astype(np.uint16)

    def decode(self, tokens):
        return self._encoding.decode(list(tokens))

    def meta(self):
        return {"tokenizer": "gpt2", "vocab_size": self.vocab_size}


def tokenizer_of(meta):
    """The tokenizer that a dataset's meta.json, or a checkpoint's copy of it, describes."""
    kinds = {"char": lambda: CharTokenizer(meta["characters"]), "byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
    if meta.get("tokenizer") not in kinds:
        raise UserError(f"tokenizer is {meta.get('tokenizer')!r}: it must be one of {', '.join(kinds)}")
    return kinds[meta["tokenizer"]]()
