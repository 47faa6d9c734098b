"""
Tasks: pairs of prompts, clean and corrupted, whose answers differ.

A dataset gives them as it is (`from_dataset`): a toy task's examples, or pieces of running text, whose task
is the next token. Narrow tasks are pairs that differ in one token, made from a dataset's validation split:

    carry         "57+68=1" -> "2", not "1" as after "57+61=1": does the ones' sum carry into the tens?
    last_digit    "57+68=12" -> "5", not "4" as after "57+67=12": which digit, where the carry stays?
    sentence      "... the man, " -> "h", not "H" as after "... the man. ": a capital after a full stop?
    speaker       "... the man,\nT" -> "h", not "H" as after "... the man\n\nT": a name after a blank line?

Others are made from templates, or from random tokens, for any model whose tokenizer has the words as single
tokens, such as GPT-2:

    ioi           "When Mary and John went to the store, John gave a drink to" -> " Mary", not " John"
    greater_than  "The war lasted from the year 1743 to the year 17" -> any of 44 .. 99, not less
    induction     random tokens, of which a piece comes again: what followed it the first time?

(Wang et al. 2022; Hanna et al. 2023; Olsson et al. 2022)
`from_file` reads one's own from JSON lines.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.dataset import MAKE_COMMANDS, Dataset
from data.tokenizer import tokenizer_of
from support.command_line import UserError
from support.files import read_text


class Task(NamedTuple):
    """N pairs of prompts of T tokens, each with K answers of one token."""

    clean: torch.Tensor  # (N, T)
    corrupted: torch.Tensor  # (N, T)
    positions: torch.Tensor  # (N, K): the answer is the token that follows the one at this position
    answers: torch.Tensor  # (N, K)
    wrong: torch.Tensor  # (N, K): the answer that the corrupted prompt suggests, or a natural mistake

    @property
    def aligned(self):
        """Whether all prompts have one length, and so a position one meaning."""
        return bool((self.positions == self.positions[0]).all())

    def to(self, device):
        return Task(*(field.to(device) for field in self))

    def halves(self):
        """Every other example, and those between, two Tasks; a single example is both."""
        parts = slice(0, None, 2), slice(1, None, 2) if len(self.clean) > 1 else slice(None)
        return [Task(*(field[part] for field in self)) for part in parts]


def check_name(name, data_dir):
    """Raise UserError for a task that is neither one of these nor a dataset."""
    known, folder = ["induction", *NARROW, *TEMPLATES, *MAKE_COMMANDS], Path(data_dir) / name
    if name not in known and not (folder / "meta.json").is_file():
        known = ", ".join(known)
        raise UserError(f"there is no task {name!r}: choose one of {known}, or make a dataset {folder} of it")


def find(name, file, model_config, meta, n, seed, data_dir="data", aligned=False, dataset=None):
    """n examples of a task by its name, or all of a file, for a model of that GPTConfig whose tokenizer meta
    describes. n=0: 4,000 of a toy task's dataset, 1,000 of running text or of a narrow task, else 400.
    aligned: the prompts must have one length; dataset: what a narrow task is made from, unless from its home.
    Raises UserError for a task that does not fit."""
    block_size = model_config.block_size
    if file:
        task = from_file(file, tokenizer_of(meta))
    elif name == "induction":
        task = induction(model_config.vocab_size - model_config.padding, block_size, n or 400, seed)
    elif name in NARROW:
        task = narrow(name, Dataset(dataset or home(name), block_size, data_dir), meta, n or 1000, seed)
    elif name in TEMPLATES:
        task = from_template(name, tokenizer_of(meta), n or 400, seed)
    else:
        data = Dataset(name, block_size, data_dir)
        data.check_tokenizer(meta, "the model")
        task = from_dataset(data, n or (4000 if data.is_task else 1000), seed)
    T = task.clean.size(1)
    if T > block_size:
        raise UserError(f"{name} has prompts of {T} tokens, the model sees {block_size}: give another model")
    if aligned and not task.aligned:
        wants = "--positions and --ablation=mean need prompts of one length"
        raise UserError(f"{wants}, and those of {name} differ: leave them out")
    return task


# ------------------------------------------------------------------------------------------------------------
# From a dataset


def from_dataset(data, n, seed, length=32):
    """n examples, drawn without replacement from the validation split (or all there are), each paired with
    another whose answer differs in every token, or in as many as a hundred draws can find. data: a Dataset.
    An example of running text is a piece of it, which overlaps no other: `length` tokens (or the block size,
    if less) and the one that follows, the answer."""
    tokens = data.tokens["val"]
    length = data.example_length or min(length, data.block_size) + 1
    start = data.answer_start or length - 1
    rows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    clean = rows[torch.randperm(len(rows), generator=generator)[:n]]
    corrupted = clean.clone()
    for _ in range(100):
        other = rows[torch.randint(len(rows), (len(clean),), generator=generator)]
        differ = [(r[:, start:] != clean[:, start:]).sum(dim=1) for r in (other, corrupted)]
        corrupted = torch.where((differ[0] > differ[1])[:, None], other, corrupted)
    positions = torch.arange(start - 1, length - 1).expand(len(clean), -1)
    return Task(clean[:, :-1], corrupted[:, :-1], positions, clean[:, start:], corrupted[:, start:])


# ------------------------------------------------------------------------------------------------------------
# Narrow tasks: pairs that differ in one token

BEFORE = 28  # characters of a prompt before the pattern
CHANGED_TOKEN = {  # roles of a toy task's tokens: the one that is changed, the one that is to be predicted
    "carry": ("addition", "ones of b", "tens"),
    "last_digit": ("addition", "ones of b", "ones"),
}
CHANGED_CHARACTER = {  # a pattern, (changed character) and (answer); what the first is changed into
    "sentence": ("shakespeare_char", r"[a-z](,) ([a-z])", "."),
    "speaker": ("shakespeare_char", r"[a-z](,)\n[A-Z]([a-z])", "\n"),
}
NARROW = CHANGED_TOKEN | CHANGED_CHARACTER  # the first entry is the dataset whose models know the task


def home(name):
    """The dataset that a task is made from where nothing else is said: of most tasks, their own name."""
    return NARROW[name][0] if name in NARROW else name


def narrow(name, data, meta, n, seed):
    """n examples of a task of NARROW, drawn without replacement from a Dataset's validation split, or all
    there are. Raises UserError where there are none."""
    data.check_tokenizer(meta, "the model")
    rng, (_, *how) = np.random.default_rng(seed), NARROW[name]
    examples = (changed_token if name in CHANGED_TOKEN else changed_character)(data, rng, *how)
    if not examples:
        raise UserError(f"{data.name} has no prompts for the task {name}: give models of {home(name)}")
    return stacked([examples[i] for i in rng.permutation(len(examples))[:n]])


def changed_token(data, rng, changed, answer):
    """Examples of a toy task, each with another that before the answer differs in one token, `changed`, and
    whose answer is different. The ones of b change the tens only by the carry; the hundreds stay, as they
    are in the prompt, and so does the carry where the tens are."""
    roles = data.meta.get("roles", [])
    if changed not in roles or answer not in roles:
        return []
    at, end = roles.index(changed), roles.index(answer)
    rows = data.tokens["val"].reshape(-1, data.example_length)[:, : end + 1].tolist()
    alike = defaultdict(list)
    for row in rows:
        alike[tuple(row[:at] + row[at + 1 : end])].append(row)
    examples = []
    for group in alike.values():
        for a in group:
            if others := [b for b in group if a[end] != b[end]]:
                b = others[rng.integers(len(others))]
                examples.append((a[:end], b[:end], a[end], b[end]))
    return examples


def changed_character(data, rng, pattern, other):
    """Pieces of running text, none overlapping another, that end in a pattern; its first group is replaced,
    and after that the answer, a small letter, would be a capital."""
    if data.meta["tokenizer"] != "char":
        return []
    tokenizer, examples = tokenizer_of(data.meta), []
    for match in re.finditer(f"(?s).{{{BEFORE}}}{pattern}", tokenizer.decode(data.tokens["val"])):
        at, end = match.start(1) - match.start(), match.start(2) - match.start()
        clean, answer = match[0][:end], match[2]
        texts = clean, clean[:at] + other + clean[at + 1 :], answer, answer.upper()
        if set("".join(texts)) <= set(data.meta["characters"]):
            clean, corrupted, answer, wrong = (tokenizer.encode(text).tolist() for text in texts)
            examples.append((clean, corrupted, answer[0], wrong[0]))
    return examples


# ------------------------------------------------------------------------------------------------------------
# From templates

NAMES = (
    "John James Robert Michael David William Richard Joseph Thomas Charles Paul Mark George Steven Kevin "
    "Peter Mary Linda Jennifer Elizabeth Susan Jessica Sarah Karen Nancy Lisa Anna Laura Emily Alice Rachel "
    "Kate"
).split()
PLACES = "store park school office station hospital restaurant garden beach library market house".split()
THINGS = "book drink ring ball key letter card pen gift hat coat flower".split()
EVENTS = "war siege strike trial voyage plague famine project festival rebellion journey expedition".split()
IOI_FRAMES = [
    "When{0} and{1} went to the{place},{2} gave a{thing} to",
    "Then,{0} and{1} were at the{place}, and{2} handed a{thing} to",
    "After{0} and{1} had left the{place},{2} wanted to give a{thing} to",
]


def ioi(tokenizer, rng):
    """Indirect object identification, ABBA and BABA. The corrupted prompt has three other names."""
    names = [f" {name}" for name in NAMES]
    receiver, giver, *others = rng.choice(names, 5, replace=False)
    frame, place, thing = rng.choice(IOI_FRAMES), f" {rng.choice(PLACES)}", f" {rng.choice(THINGS)}"
    first, second = (receiver, giver) if rng.random() < 0.5 else (giver, receiver)
    clean = frame.format(first, second, giver, place=place, thing=thing)
    return clean, frame.format(*others, place=place, thing=thing), receiver, giver


def greater_than(tokenizer, rng):
    """A later year of the same century. The corrupted prompt begins early: the wrong year is right there. As
    any later year is right, `scores` is to be read by the preference, not by the accuracy."""
    century = rng.integers(11, 20)
    has_two_tokens = lambda year: len(tokenizer.encode(f" {century}{year:02d}")) == 2  # century and rest
    years = [year for year in range(2, 100) if has_two_tokens(year)]
    drawn = sorted(rng.choice(years, 4, replace=False)) if len(years) >= 4 else [0] * 4  # 0: drawn again
    early, wrong, start, answer = drawn
    frame = f"The {rng.choice(EVENTS)} lasted from the year {century}{{:02d}} to the year {century}"
    return frame.format(start), frame.format(early), f"{answer:02d}", f"{wrong:02d}"


TEMPLATES = {"ioi": ioi, "greater_than": greater_than}


def from_template(name, tokenizer, n, seed):
    """n examples of a task of TEMPLATES. An example whose answer is not one token, or whose prompts differ
    in length, is drawn again. Raises UserError where this tokenizer has too few."""
    rng, examples = np.random.default_rng(seed), []
    for _ in range(10_000 + 10 * n):
        texts = TEMPLATES[name](tokenizer, rng)
        clean, corrupted, answer, wrong = (tokenizer.encode(text).tolist() for text in texts)
        if len(clean) == len(corrupted) and len(answer) == len(wrong) == 1 and answer != wrong:
            examples.append((clean, corrupted, answer[0], wrong[0]))
        if len(examples) == n:
            return stacked(examples)
    raise UserError(f"{name}: its answers are no single tokens here: give a model with GPT-2's")


def stacked(examples):
    """(clean, corrupted, answer, wrong) tokens -> Task. Short prompts are filled up at their unseen end."""
    T = max(len(clean) for clean, *_ in examples)
    clean, corrupted = (torch.tensor([e[i] + [0] * (T - len(e[i])) for e in examples]) for i in (0, 1))
    positions = torch.tensor([[len(e[0]) - 1] for e in examples])
    answers, wrong = (torch.tensor([[e[i]] for e in examples]) for i in (2, 3))
    return Task(clean, corrupted, positions, answers, wrong)


def induction(vocab_size, block_size, n, seed):
    """Different random tokens, then a piece of them again; the answer is what followed the piece. The
    corrupted prompt has random tokens of its own, none of which comes again; the wrong answer is another
    token of the clean prompt. Raises UserError where the vocabulary or the context is too small."""
    T = min(16, block_size)
    if T < 6 or vocab_size < T + 1:
        known = f"here are {block_size} and {vocab_size}: give another model"
        raise UserError(f"induction takes 6 tokens of context and {T + 1} different ones, {known}")
    piece = T // 4
    first = T - piece
    rng, examples = np.random.default_rng(seed), []
    for _ in range(n):
        tokens, corrupted = (rng.choice(vocab_size, T, replace=False).tolist() for _ in range(2))
        start = rng.integers(0, first - piece)
        answer = tokens[start + piece]
        wrong = rng.choice([t for t in tokens[:first] if t != answer])
        examples.append((tokens[:first] + tokens[start : start + piece], corrupted, answer, wrong))
    return stacked(examples)


# ------------------------------------------------------------------------------------------------------------
# From a file

KEYS = ["clean", "corrupted", "answer", "wrong_answer"]


def from_file(path, tokenizer):
    """One example per line, a JSON object of texts by KEYS. Raises UserError that names the bad line."""
    examples = []
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
            clean, corrupted, answer, wrong = (tokenizer.encode("" + record[key]).tolist() for key in KEYS)
            lengths = [len(tokens) for tokens in (clean, corrupted, answer, wrong)]
            if not clean or lengths != [len(clean)] * 2 + [1, 1]:
                raise ValueError(f"the texts have {lengths} tokens")
        except (ValueError, KeyError, TypeError) as error:
            wanted = "give clean and corrupted, equally long, answer and wrong_answer, one token each"
            raise UserError(f"{path} line {number}: {error!s:.80}: {wanted}")
        examples.append((clean, corrupted, answer[0], wrong[0]))
    return stacked(examples)
