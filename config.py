"""
A dataclass is a command line: types, help and errors.

    @dataclass
    class Config:
        batch_size: int = option(12, "sequences per step", at_least=1)

    config = parse(Config(), ["--batch_size=64"])

A field's type says how to read its value: int, float, str, bool (as --flag and --no-flag). All problems of a command
line are found before any is reported, one sentence each.
"""

import dataclasses
import difflib
import math
import os
import sys
import traceback
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user can put right. The message is one sentence per line: what, the value, what to do."""


def option(default, help, at_least=None, above=None, below=None, choices=None, word=None):
    """A dataclass field with one line of meaning and the values it may take. word: a value that is none of its type."""
    limits = dict(help=help, at_least=at_least, above=above, below=below, choices=choices, word=word)
    return dataclasses.field(default=default, metadata=limits)


def arguments(help, at_least, at_most):
    """A field for the words of a command line that are no options; its value is a tuple of so many strings."""
    return dataclasses.field(default=(), metadata=dict(help=help, count=(at_least, at_most)))


def parse(config, argv, problems=()):
    """A copy of config (a dataclass instance, the defaults) with argv's --name=value, --name value, --flag and --no-flag
    put in. If the dataclass has a method `problems() -> list of sentences`, that is asked, too: for combinations of fields.
    problems: what the caller found wrong on the same command line already. Raises UserError with everything that is wrong.
    """
    fields = {f.name: f for f in dataclasses.fields(config) if "count" not in f.metadata}
    values, problems, words, others = {}, list(problems), list(argv), []
    while words:
        try:
            if words[0].startswith("--"):
                read_option(words, fields, values)
            else:
                others.append(words.pop(0))
        except UserError as problem:
            problems.append(str(problem))
    takes_others = [f.name for f in dataclasses.fields(config) if "count" in f.metadata]
    if takes_others:
        values[takes_others[0]] = tuple(others)
    else:
        problems += [f"what is {word!r}? Options are written --name=value" for word in others]
    config = dataclasses.replace(config, **values)
    problems += check(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def parse_or_help(config, argv, doc):
    """As parse. With --help or -h among argv, print doc and every field instead, and end the program."""
    if "--help" in argv or "-h" in argv:
        print(f"{doc}\nfields:\n{help_text(config)}")
        sys.exit(0)
    return parse(config, argv)


def read_option(words, fields, values):
    """Take one option off the front of words and put its value into values. Raises UserError."""
    word = words.pop(0)
    name, equals, text = word[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and is_flag(fields.get(name[3:])):
        if equals:
            raise UserError(f"{word.split('=')[0]} takes no value: write {word.split('=')[0]} or --{name[3:]}")
        values[name[3:]] = False
    elif name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        raise UserError(f"there is no option --{name}: " + (f"did you mean --{near[0]}?" if near else "see --help"))
    elif is_flag(fields[name]) and not equals:
        values[name] = True
    else:
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: write --{name}=VALUE")
            text = words.pop(0)
        values[name] = convert(fields[name], text)


def is_flag(field):
    return field is not None and field.type in (bool, "bool")


def convert(field, text):
    """text as a value of the field's type. Raises UserError."""
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    word = field.metadata.get("word")
    if text == word is not None:
        return word
    try:
        return {"str": str, "int": int, "float": finite, "bool": {"true": True, "false": False}.__getitem__}[kind](text)
    except (KeyError, ValueError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise UserError(f"--{field.name} is {text!r}: give {wanted}" + (f", or {word}" if word else ""))


def finite(text):
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def check(config):
    """Sentences for every field outside its limits, then the dataclass's own `problems()`; [] if there are none."""
    problems = []
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
        if m.get("word") == value is not None:
            continue
        if "count" in m and not m["count"][0] <= len(value) <= m["count"][1]:
            problems.append(f"give {m['help']}: {len(value)} were given")
        if m.get("choices") is not None and value not in m["choices"]:
            problems.append(f"--{f.name} is {value!r}: choose one of {', '.join(m['choices'])}")
        if m.get("at_least") is not None and not value >= m["at_least"]:
            problems.append(f"--{f.name} is {value}: give at least {m['at_least']}")
        if m.get("above") is not None and not value > m["above"]:
            problems.append(f"--{f.name} is {value}: give more than {m['above']}")
        if m.get("below") is not None and not value < m["below"]:
            problems.append(f"--{f.name} is {value}: give less than {m['below']}")
    return problems + (config.problems() if hasattr(config, "problems") else [])


def help_text(config):
    """Every field with its default and its one line of meaning."""
    lines = []
    for f in dataclasses.fields(config):
        value, meaning = getattr(config, f.name), f.metadata.get("help", "")
        if "count" in f.metadata:
            continue
        if f.metadata.get("choices"):
            meaning += f" (one of {', '.join(f.metadata['choices'])})"
        if is_flag(f):
            lines.append(f"  {f'--{f.name}, --no-{f.name}':<36} {meaning} [{'yes' if value else 'no'}]")
        else:
            lines.append(f"  {f'--{f.name}={value}':<36} {meaning}")
    return "\n".join(lines)


@contextmanager
def collected(problems):
    """Inside, a UserError ends the block and its sentences go to the list `problems` instead."""
    try:
        yield
    except UserError as error:
        problems += str(error).splitlines()


def run(main):
    """Run a program's main(argv). A UserError ends it with its sentences on stderr and exit code 2, Ctrl-C with one line and
    exit code 130, both without a traceback. Under torchrun every rank but the first says which it is."""
    rank = os.environ.get("RANK", "0")
    who = "" if rank == "0" else f"rank {rank}: "
    try:
        main(sys.argv[1:])
        if under_torchrun():
            leave(0)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{who}error: {line}", file=sys.stderr)
        leave(2)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        print(f"{who}stopped{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        leave(130)
    except Exception:
        if not under_torchrun():
            raise
        traceback.print_exc()
        leave(1)


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave(code):
    """End the program. Under torchrun at once: closing the connection would wait for ranks that wait for this one, and
    PyTorch's threads do not always survive the end of the interpreter."""
    if under_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
