"""Tasks: every pair of prompts is what the task says it is."""

import json
import random

import pytest
import torch

from data.dataset import Dataset
from data.prepare import main as prepare
from data.prepare import prepare_examples, prepare_text
from data.tasks import NAMES, Task, find, from_dataset, from_file, from_template, induction
from data.tokenizer import ByteTokenizer, tokenizer_of
from model import GPTConfig
from support.command_line import UserError


def texts(task, tokenizer):
    """(clean, corrupted, answer, wrong) as text, without what fills shorter prompts up."""
    for i, last in enumerate(task.positions[:, 0].tolist()):
        rows = [task.clean[i, : last + 1], task.corrupted[i, : last + 1], task.answers[i], task.wrong[i]]
        yield [tokenizer.decode(row.tolist()) for row in rows]


def test_a_datasets_examples_are_paired_with_others_whose_answers_differ_everywhere(tmp_path):
    pairs = [(f"{a}{b}>", "".join(sorted(f"{a}{b}"))) for a in range(10) for b in range(10)]
    prepare_examples(pairs, tmp_path / "sort", val_fraction=0)
    data = Dataset("sort", 8, tmp_path)
    task, decode = from_dataset(data, 80, seed=1), data.meta["characters"].__getitem__
    assert task.clean.shape == task.corrupted.shape == (80, 4) and task.positions[0].tolist() == [2, 3]
    for prompts, answers in ((task.clean, task.answers), (task.corrupted, task.wrong)):
        assert torch.equal(prompts[:, 3], answers[:, 0]), "the answer's first token is read, too"
        for prompt, answer in zip(prompts, answers):
            assert sorted(map(decode, prompt[:2])) == list(map(decode, answer)), "the answer is another's"
    assert (task.answers != task.wrong).float().mean() > 0.97  # an answer such as 55 has few partners
    assert len(set(map(tuple, task.clean[:, :2].tolist()))) == 80, "drawn without replacement"


def test_a_task_of_one_answer_still_pairs(tmp_path):
    prepare_examples([("a>", "x"), ("b>", "x")], tmp_path / "constant", val_fraction=0)
    task = from_dataset(Dataset("constant", 8, tmp_path), 10, seed=0)
    assert len(task.clean) == 2 and torch.equal(task.answers, task.wrong)


def test_running_texts_task_is_the_next_token(tmp_path):
    text = "".join(random.Random(0).choices("abcd", k=9000))
    (tmp_path / "text.txt").write_text(text)
    prepare_text([tmp_path / "text.txt"], tmp_path / "letters", "char", 0.1)
    data = Dataset("letters", 40, tmp_path)
    task = find("letters", "", GPTConfig(block_size=40, vocab_size=4), data.meta, 20, 0, tmp_path)
    assert task.clean.shape == (20, 32) and task.positions.tolist() == [[31]] * 20
    assert (task.answers != task.wrong).all()
    read = lambda *tokens: "".join(data.meta["characters"][t] for t in torch.cat(tokens).tolist())
    starts = []
    for clean, corrupted, answer, wrong in zip(task.clean, task.corrupted, task.answers, task.wrong):
        assert read(corrupted, wrong) in text[-900:], "the validation split"
        starts.append(text[-900:].index(read(clean, answer)))
    assert len(set(starts)) == 20 and all(start % 33 == 0 for start in starts), "no two overlap"
    config = GPTConfig(block_size=8, vocab_size=4)
    assert find("letters", "", config, data.meta, 5, 0, tmp_path).clean.shape == (5, 8)


def changed_places(task):
    """Where each pair of prompts differs, {place: number of pairs}; every pair in one token."""
    differ = task.clean != task.corrupted
    assert (differ.sum(dim=1) == 1).all() and task.aligned
    return dict(zip(*(values.tolist() for values in differ.nonzero()[:, 1].unique(return_counts=True))))


@pytest.mark.parametrize("name, length", [("carry", 7), ("last_digit", 8)])
def test_another_ones_digit_flips_the_carry_or_leaves_it(tmp_path, name, length):
    prepare(["addition", f"--data_dir={tmp_path}"])
    data = Dataset("addition", 8, tmp_path)
    task = find(name, "", GPTConfig(block_size=8, vocab_size=12), data.meta, 300, 1, tmp_path)
    assert changed_places(task) == {4: 300} and task.clean.shape == (300, length)
    assert len({tuple(prompt) for prompt in task.clean.tolist()}) == 300, "drawn without replacement"
    for clean, corrupted, answer, wrong in texts(task, tokenizer_of(data.meta)):
        (a, b), (c, d) = ([int(text[:2]), int(text[3:5])] for text in (clean, corrupted))
        assert clean + answer == f"{a:02d}+{b:02d}={a + b:03d}"[: length + 1] and a == c
        assert corrupted + wrong == f"{c:02d}+{d:02d}={c + d:03d}"[: length + 1] and answer != wrong
        carries = [(a % 10 + ones % 10) // 10 for ones in (b, d)]
        assert (carries[0] != carries[1]) == (name == "carry")


SPEECH = "MARY:\nOh {0}d, he said to {0}m,\nThat no man {0}g. The end, {0}k, is.\n\n"
PLAY = "".join(map(SPEECH.format, "aeiou" * 90))


@pytest.mark.parametrize("name, ends", [("sentence", (", ", ". ")), ("speaker", (",\nT", "\n\nT"))])
def test_one_character_decides_between_a_small_letter_and_a_capital(tmp_path, name, ends):
    capitals = "".join(map(chr, range(65, 91))).replace("E", "")  # pairs that need the E are left out
    (tmp_path / "play.txt").write_text(PLAY + capitals)
    prepare_text([tmp_path / "play.txt"], tmp_path / "play", "char", 0.5)
    data = Dataset("play", 64, tmp_path)
    task = find(name, "", GPTConfig(block_size=64), data.meta, 0, 0, tmp_path, dataset="play")
    assert list(changed_places(task)) == [29] and len(task.clean) > 50
    tokenizer = tokenizer_of(data.meta)
    text = tokenizer.decode(data.tokens["val"])
    for clean, corrupted, answer, wrong in texts(task, tokenizer):
        assert clean + answer in text and answer.upper() == wrong != answer
        assert (clean[29:], corrupted[29:]) == ends


def test_halves_share_no_example():
    task = induction(vocab_size=40, block_size=64, n=5, seed=0)
    first, second = task.halves()
    assert torch.equal(first.clean, task.clean[[0, 2, 4]]) and torch.equal(second.wrong, task.wrong[[1, 3]])
    one = Task(*(field[:1] for field in task[:5]))
    assert all(torch.equal(half.clean, one.clean) for half in one.halves())


def test_ioi_asks_for_the_name_that_comes_once_in_both_orders(gpt2):
    orders = set()
    for clean, corrupted, answer, wrong in texts(from_template("ioi", gpt2, 100, seed=0), gpt2):
        assert clean.count(answer) == 1 and clean.count(wrong) == 2 and answer[0] == " "
        orders.add(clean.index(answer) < clean.index(wrong))
        names = [name for name in NAMES if f" {name}" in corrupted]
        assert len(names) == 3 and f" {names[0]}" not in (answer, wrong)
        assert clean.split()[-1] == corrupted.split()[-1] == "to"
    assert orders == {True, False}, "both ABBA and BABA"


def test_greater_than_has_a_right_and_a_wrong_year_and_a_prompt_where_both_are_right(gpt2):
    for clean, corrupted, answer, wrong in texts(from_template("greater_than", gpt2, 100, seed=0), gpt2):
        start, other = (int(text.split("the year ")[1][2:4]) for text in (clean, corrupted))
        assert other < int(wrong) < start < int(answer) and len(answer) == len(wrong) == 2
        assert clean[-2:] == clean.split("the year ")[1][:2]


def test_templates_come_from_their_seed_in_any_number(gpt2):
    one, two, three = (from_template("ioi", gpt2, 40, seed) for seed in (3, 3, 4))
    assert len(one.clean) == 40
    assert torch.equal(one.clean, two.clean) and not torch.equal(one.clean, three.clean)
    last, last_corrupted = (tokens.gather(1, one.positions) for tokens in (one.clean, one.corrupted))
    assert torch.equal(last, last_corrupted), "lengths differ within a pair"


def test_templates_need_single_tokens():
    with pytest.raises(UserError, match="ioi: its answers are no single tokens here"):
        from_template("ioi", ByteTokenizer(), 1, seed=0)


def test_induction_repeats_a_piece_and_asks_what_followed_it():
    task = induction(vocab_size=40, block_size=64, n=50, seed=0)
    assert task.clean.shape == (50, 16) and task.aligned
    rows = (field.tolist() for field in (task.clean, task.corrupted, task.answers, task.wrong))
    for clean, corrupted, [answer], [wrong] in zip(*rows):
        first = clean.index(clean[12])
        assert clean[first : first + 4] == clean[12:]
        assert clean[first + 4] == answer != wrong and wrong in clean
        assert len(set(corrupted)) == 16 and len(set(clean[:12])) == 12
    sentence = "takes 6 tokens of context and 9 different ones, here are 8 and 5: give another model"
    with pytest.raises(UserError, match=sentence):
        induction(vocab_size=5, block_size=8, n=1, seed=0)


LINES = [
    {"clean": "ab", "corrupted": "cd", "answer": "x", "wrong_answer": "y"},
    {"clean": "abc", "corrupted": "cde", "answer": "z", "wrong_answer": "x"},
]


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_file_of_ones_own_examples(tmp_path):
    task = from_file(write(tmp_path / "own.jsonl", LINES), ByteTokenizer())
    assert [list(map(chr, answers)) for answers in task.answers] == [["x"], ["z"]]
    assert chr(task.wrong[0]) == "y" and chr(task.wrong[1]) == "x"
    assert task.positions.tolist() == [[1], [2]] and not task.aligned
    assert bytes(task.clean[1].tolist()) == b"abc" and bytes(task.corrupted[0, :2].tolist()) == b"cd"


WANTED = ": give clean and corrupted, equally long, answer and wrong_answer, one token each"
BAD = [
    (['{"clean": "ab"'], "line 1: Expecting"),
    ([LINES[0], {"clean": "ab", "answer": "x"}], "line 2: 'corrupted'" + WANTED),
    ([{**LINES[0], "corrupted": "cde"}], "line 1: the texts have [2, 3, 1, 1] tokens" + WANTED),
    ([{**LINES[1], "answer": "xy"}], "line 1: the texts have [3, 3, 2, 1] tokens" + WANTED),
    ([LINES[0] | {"answer": 3}], "line 1"),
    (["7"], "line 1"),
    ([{"clean": "a", "corrupted": "b", "answer": "x"}], "line 1: 'wrong_answer'" + WANTED),
    ([], "own.jsonl is empty: leave it out"),
]


@pytest.mark.parametrize("lines, sentence", BAD, ids=[sentence for _, sentence in BAD])
def test_a_bad_file_is_one_sentence(tmp_path, lines, sentence):
    with pytest.raises(UserError) as error:
        from_file(write(tmp_path / "own.jsonl", lines), ByteTokenizer())
    assert sentence in str(error.value) and len(str(error.value).splitlines()) == 1


REFUSED = [
    ("addition", "", {}, "run `python data/prepare.py addition`"),
    ("speaker", "", {}, "run `python data/prepare.py shakespeare`"),
    ("mine", "own.jsonl", {}, "need prompts of one length, and those of mine differ: leave them out"),
    ("mine", "own.jsonl", {"block_size": 2}, "mine has prompts of 3 tokens, the model sees 2: give another"),
]


@pytest.mark.parametrize("name, file, config, sentence", REFUSED)
def test_a_task_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch, name, file, config, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", LINES)
    with pytest.raises(UserError, match=sentence):
        find(name, file, GPTConfig(**config), {"tokenizer": "byte"}, 0, 0, aligned=True)


@pytest.mark.parametrize("name, home", [("carry", "addition"), ("speaker", "shakespeare_char")])
def test_a_narrow_task_of_another_dataset_is_one_sentence(data_dir, name, home):
    meta, config = Dataset("sums", 8, data_dir).meta, GPTConfig(block_size=8, vocab_size=12)
    with pytest.raises(UserError, match=f"sums has no prompts for the task {name}: give models of {home}$"):
        find(name, "", config, meta, 0, 0, data_dir, dataset="sums")
