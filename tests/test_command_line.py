"""A dataclass as a command line: how values are written, and what is said of wrong ones."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from support.command_line import UserError, arguments, option, parse
from tests.conftest import ROOT


@dataclass
class Example:
    files: tuple = arguments("one or two files", 1, 2)
    steps: int = option(10, "how long", at_least=1)
    rate: float = option(0.5, "how fast", above=0, below=1)
    bias: float = option(5.0, "where to start", word="auto")
    kind: str = option("a", "which", choices=("a", "b"))
    quiet: bool = option(False, "say nothing")
    draw: bool = option(True, "make a picture")

    def check(self):
        if self.steps * self.rate > 100:
            raise UserError("steps times rate is over 100: lower one")


def test_reads_every_way_to_write_a_value():
    argv = ["x", "--steps=3", "--rate", "1e-2", "--kind=b", "--quiet", "--no-draw", "y", "--bias=auto"]
    assert parse(Example(), argv) == Example(("x", "y"), 3, 0.01, "auto", "b", True, False)
    assert parse(Example(), ["x", "--bias=-3"]).bias == -3.0
    assert parse(Example(), ["x", "--bias=0"]).bias == 0.0, "nanoGPT's --dropout=0 did not reach its field"


BAD = [
    (["--step=3"], "what is --step? Did you mean --steps?"),
    (["--zzzz"], "what is --zzzz? See --help"),
    (["--steps=many"], "--steps: invalid whole number value: 'many'"),
    (["--rate=fast"], "--rate: invalid number value: 'fast'"),
    (["--rate=nan"], "--rate: invalid number value: 'nan'"),
    (["--bias=automatic"], "--bias: invalid number value: 'automatic'"),
    (["--steps"], "--steps: a value is missing: write --name=value"),
    (["--steps=-3"], "--steps is -3: give at least 1"),
    (["--rate=0"], "--rate is 0.0: give more than 0"),
    (["--rate=1"], "--rate is 1.0: give less than 1"),
    (["--kind=c"], "--kind is 'c': choose one of a, b"),
    (["--no-draw=1"], "--draw/--no-draw: ignored explicit argument '1'"),
    (["--steps=500"], "steps times rate is over 100: lower one"),
    (["y", "z"], "give one or two files: 3 were given"),
]


@pytest.mark.parametrize("argv, sentence", BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_a_wrong_word_is_one_sentence(argv, sentence):
    with pytest.raises(UserError) as caught:
        parse(Example(), ["x", *argv])
    assert str(caught.value) == sentence


def test_help_names_every_option_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Example(), ["--help"], "What it is for.")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "What it is for." in text and "usage" not in text
    for words in (["--steps 10", "how long"], ["--quiet", "say nothing"], ["--no-draw", "make a picture"]):
        assert any(all(word in line for word in words) for line in text.splitlines())


def test_a_reader_that_goes_away_ends_a_program_quietly():
    main = "lambda argv: [print(n, flush=True) for n in range(10**6)]"
    code = f"from support.command_line import run; run({main})"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **streams) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
