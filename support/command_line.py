"""
A dataclass is a command line: types, help and errors.

    @dataclass
    class Config:
        batch_size: int = option(12, "sequences per step", at_least=1)

    config = parse(Config(), ["--batch_size=64"], doc)

A field's type says how its value is read: int, float, str, bool (as --flag and --no-flag).
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys
import traceback
from functools import partial
from operator import ge, gt, lt

LIMITS = {"at_least": (ge, "at least"), "above": (gt, "more than"), "below": (lt, "less than")}


class UserError(ValueError):
    """Something that the user can put right. The message is one sentence: what, the value, what to do."""


def option(default, help, at_least=None, above=None, below=None, choices=None, word=None):
    """A dataclass field: its meaning in one line, the values it may take. word: one in place of a number."""
    limits = dict(help=help, at_least=at_least, above=above, below=below, choices=choices, word=word)
    return dataclasses.field(default=default, metadata=limits)


def arguments(help, at_least, at_most):
    """A field for the words of a command line that are no options: a tuple of strings."""
    return dataclasses.field(default=(), metadata=dict(help=help, count=(at_least, at_most)))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        message = message.replace("expected one argument", "a value is missing: write --name=value")
        raise UserError(message.removeprefix("argument "))


def parse(config, argv, doc=""):
    """A copy of config (a dataclass instance, the defaults) with argv's --name=value, --name value, --flag
    and --no-flag put in, checked. With --help or -h, print doc and every field instead, and end the program.
    Raises UserError at the first problem."""
    parser = Parser(
        usage=argparse.SUPPRESS, description=doc, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=120),
    )  # fmt: skip
    for field in dataclasses.fields(config):
        if "count" in field.metadata:
            parser.add_argument(field.name, nargs="*", help=argparse.SUPPRESS)
            continue
        default, choices = getattr(config, field.name), field.metadata["choices"]
        meaning = field.metadata["help"] + (f" (one of {', '.join(choices)})" if choices else "")
        if field.type is bool:
            meaning += f" (default: {'on' if default else 'off'})"
            how = {"action": argparse.BooleanOptionalAction, "help": meaning}
        else:
            how = {"type": reader(field), "metavar": default, "help": meaning}
        parser.add_argument(f"--{field.name}", default=default, **how)
    values, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        options = [f"--{f.name}" for f in dataclasses.fields(config) if "count" not in f.metadata]
        near = difflib.get_close_matches(name, options, n=1)
        raise UserError(f"what is {name}? " + (f"Did you mean {near[0]}?" if near else "See --help"))
    tuples = {name: tuple(value) for name, value in vars(values).items() if isinstance(value, list)}
    config = dataclasses.replace(config, **vars(values) | tuples)
    check(config)
    return config


def reader(field):
    """The function that turns an argument into a value of the field's type."""

    def read(text):
        if text == field.metadata["word"]:
            return text
        value = field.type(text)
        if field.type is float and not math.isfinite(value):
            raise ValueError
        return value

    read.__name__ = {int: "whole number", float: "number"}.get(field.type, "text")  # for argparse's sentence
    return read


def check(config):
    """Raise UserError for the first field outside its limits. Calls the dataclass's own `check`, too."""
    for field in dataclasses.fields(config):
        name, value, limits = f"--{field.name}", getattr(config, field.name), field.metadata
        if "count" in limits:
            if not limits["count"][0] <= len(value) <= limits["count"][1]:
                raise UserError(f"give {limits['help']}: {len(value)} were given")
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(f"{name} is {value!r}: choose one of {', '.join(limits['choices'])}")
        for limit, (holds, words) in LIMITS.items():
            is_free = limits[limit] is None or value == limits["word"]
            if not is_free and not holds(value, limits[limit]):
                raise UserError(f"{name} is {value}: give {words} {limits[limit]}")
    if hasattr(config, "check"):
        config.check()


def run(main):
    """Run a program's main(argv). A UserError ends it with its sentence on stderr and exit code 2, Ctrl-C
    with one line and exit code 130, both without a traceback. Under torchrun every rank but the first says
    which it is."""
    rank = os.environ.get("RANK", "0")
    who, code = "" if rank == "0" else f"rank {rank}: ", 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as a program that the signal SIGPIPE ended
    except KeyboardInterrupt as stop:
        print(f"{who}stopped{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:  # at once: ranks may wait for each other
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
