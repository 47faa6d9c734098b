"""A dataclass as a command line: values in, sentences out."""

from dataclasses import dataclass

import pytest

from config import UserError, arguments, help_text, option, parse


@dataclass
class Example:
    files: tuple = arguments("one or two files", 1, 2)
    steps: int = option(10, "how long", at_least=1)
    rate: float = option(0.5, "how fast", above=0, below=1)
    kind: str = option("a", "which", choices=("a", "b"))
    quiet: bool = option(False, "say nothing")
    draw: bool = option(True, "make a picture")

    def problems(self):
        return ["steps times rate is over 100: lower one"] if self.steps * self.rate > 100 else []


def errors(*argv):
    with pytest.raises(UserError) as caught:
        parse(Example(), argv)
    return str(caught.value).splitlines()


def test_reads_every_way_to_write_a_value():
    got = parse(Example(), ["x", "--steps=3", "--rate", "1e-2", "--kind=b", "--quiet", "--no-draw", "y"])
    assert got == Example(("x", "y"), 3, 0.01, "b", True, False)
    assert parse(Example(), ["x", "--no_draw", "--quiet=false"]) == Example(("x",), draw=False)
    assert parse(Example(), ["x", "--rate", "0.25"]).rate == 0.25


def test_zero_reaches_its_field():
    """nanoGPT's --dropout=0 did not."""

    @dataclass
    class WithZero:
        dropout: float = option(0.1, "", at_least=0)

    assert parse(WithZero(), ["--dropout=0"]).dropout == 0.0


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--step=3"], "there is no option --step: did you mean --steps?"),
        (["--zzzz"], "there is no option --zzzz: see --help"),
        (["--steps=many"], "--steps is 'many': give a whole number"),
        (["--steps=1.5"], "--steps is '1.5': give a whole number"),
        (["--rate=fast"], "--rate is 'fast': give a number"),
        (["--quiet=perhaps"], "--quiet is 'perhaps': give true or false"),
        (["--steps"], "--steps needs a value: write --steps=VALUE"),
        (["--steps", "--quiet"], "--steps needs a value: write --steps=VALUE"),
        (["--steps=0"], "--steps is 0: give at least 1"),
        (["--steps=-3"], "--steps is -3: give at least 1"),
        (["--rate=0"], "--rate is 0.0: give more than 0"),
        (["--rate=1"], "--rate is 1.0: give less than 1"),
        (["--rate=nan"], "--rate is 'nan': give a number"),
        (["--rate=inf"], "--rate is 'inf': give a number"),
        (["--kind=c"], "--kind is 'c': choose one of a, b"),
        (["--no-draw=1"], "--no-draw takes no value: write --no-draw or --draw"),
        (["--steps=500"], "steps times rate is over 100: lower one"),
    ],
)
def test_a_wrong_word_is_one_sentence(argv, sentence):
    assert sentence in errors("x", *argv)


def test_all_problems_are_reported_together():
    found = errors("--steps=0", "--rate=fast", "--knd=a", "--kind=c")
    assert found == [
        "--rate is 'fast': give a number",
        "there is no option --knd: did you mean --kind?",
        "give one or two files: 0 were given",
        "--steps is 0: give at least 1",
        "--kind is 'c': choose one of a, b",
    ]


def test_help_names_every_option_with_its_default_and_meaning():
    text = help_text(Example())
    for words in (["--steps=10", "how long"], ["--quiet", "say nothing [no]"], ["--no-draw", "make a picture [yes]"]):
        assert any(all(word in line for word in words) for line in text.splitlines())
