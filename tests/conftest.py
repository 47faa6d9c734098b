import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # then Triton interprets, which it must know before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

from data.prepare import prepare_examples
from data.tokenizer import GPT2Tokenizer
from support import command_line

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder with a small task, `sums`: d+d=dd, all 100 problems in both splits."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(f"{a}+{b}=", f"{a + b:02d}") for a in range(10) for b in range(10)]
    prepare_examples(pairs, folder / "sums", val_fraction=0)
    return folder


@pytest.fixture
def program(monkeypatch, capsys):
    """Run a program's main as its command line would, in this process -> (exit code, stdout, stderr)."""

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        code = 0
        try:
            command_line.run(main)
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def real_text():
    """The path of a real text file, from NANOSPARSE_TEXT."""
    path = os.environ.get("NANOSPARSE_TEXT")
    if not path:
        pytest.skip("NANOSPARSE_TEXT is not set: give it the path of a text file, such as tiny Shakespeare")
    return Path(path)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, from the folder TIKTOKEN_CACHE_DIR."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: give it the folder of GPT-2's vocabulary")
    return GPT2Tokenizer()
