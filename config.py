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
import sys


class UserError(ValueError):
    """Something that the user can put right. The message is one sentence per line: what, the value, what to do."""


def option(default, help, at_least=None, above=None, below=None, choices=None):
    """A dataclass field with one line of meaning and the values it may take."""
    limits = dict(help=help, at_least=at_least, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


def arguments(help, at_least, at_most):
    """A field for the words of a command line that are no options; its value is a tuple of so many strings."""
    return dataclasses.field(default=(), metadata=dict(help=help, count=(at_least, at_most)))


def parse(config, argv, problems=()):
    """A copy of config (a dataclass instance, the defaults) with argv's --name=value, --name value, --flag and --no-flag
    put in. If the dataclass has a method `problems() -> list of sentences`, combinations of fields are checked too.
    problems: what the caller found wrong on the same command line already. Raises UserError with everything that is wrong.
    """
    fields = {f.name: f for f in dataclasses.fields(config) if "count" not in f.metadata}
    others = [f.name for f in dataclasses.fields(config) if "count" in f.metadata]
    values, problems, words = {name: () for name in others}, list(problems), list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if others:
                values[others[0]] += (word,)
            else:
                problems.append(f"what is {word!r}? Options are written --name=value")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in fields and fields.get(name.removeprefix("no_"), None) and fields[name[3:]].type in (bool, "bool"):
            values[name[3:]] = False
            if equals:
                problems.append(f"{word.partition('=')[0]} takes no value: write {word.partition('=')[0]} or --{name[3:]}")
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            problems.append(f"there is no option --{name}: " + (f"did you mean --{near[0]}?" if near else "see --help"))
            continue
        if fields[name].type in (bool, "bool"):
            values[name] = value if equals else True
        elif equals:
            values[name] = value
        elif words and not words[0].startswith("--"):
            values[name] = words.pop(0)
        else:
            problems.append(f"--{name} needs a value: write --{name}=VALUE")
            continue
        values[name], problem = convert(fields[name], values[name])
        if problem:
            problems.append(problem)
            del values[name]
    config = dataclasses.replace(config, **values)
    problems += [p for p in check(config) if p not in problems]
    if problems:
        raise UserError("\n".join(problems))
    return config


def convert(field, value):
    """(value in the field's type, None), or (None, the sentence that says why not)."""
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    if isinstance(value, bool) or kind == "str":
        return value, None
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()], None
        return {"int": int, "float": float}[kind](value), None
    except (KeyError, ValueError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        return None, f"--{field.name} is {value!r}: give {wanted}"


def check(config):
    """Sentences for every field outside its limits, then for impossible combinations."""
    problems = []
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
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
    if not problems and hasattr(config, "problems"):
        problems += config.problems()
    return problems


def help_text(config):
    """Every field with its default and its one line of meaning."""
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if "count" in f.metadata:
            continue
        flag = f"--{f.name}" if isinstance(value, bool) else f"--{f.name}={value}"
        if value is True:
            flag = f"--no-{f.name}"
        lines.append(f"  {flag:<36} {f.metadata.get('help', '')}")
    return "\n".join(lines)


def run(main):
    """Run a program's main(argv). A UserError ends it with its sentences on stderr and exit code 2, without a traceback."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
