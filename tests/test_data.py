"""Datasets: what prepare.py writes, what Dataset reads, and what both say of bad files."""

import json

import numpy as np
import pytest
import torch

from data import dataset, prepare
from data.dataset import Dataset
from data.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_of
from support.command_line import UserError
from tests.letters import Letters, split_texts


def tokens_of(folder, *splits):
    return np.concatenate([np.fromfile(folder / f"{split}.bin", dtype=np.uint16) for split in splits])


def text_dataset(tmp_path, text, tokenizer="char", val_fraction=0.1):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare.prepare_text([tmp_path / "text.txt"], tmp_path / "data" / "mine", tokenizer, val_fraction)
    return tmp_path / "data" / "mine"


def folder_of(path, texts):
    """path, with texts written below it by name."""
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------
# Toy tasks


def test_addition_holds_every_problem_once_per_split(tmp_path, program):
    code, out, _ = program(prepare.main, "addition", f"--data_dir={tmp_path}")
    assert code == 0 and "90,000 training" in out
    tokenizer = tokenizer_of(dataset.read_meta(tmp_path / "addition"))
    for split in ("train", "val"):
        lines = tokenizer.decode(tokens_of(tmp_path / "addition", split))
        lines = [lines[i : i + 9] for i in range(0, len(lines), 9)]
        assert len(lines) == len(set(lines)) == 10_000
        assert all(line[2] + line[5] == "+=" for line in lines)
        assert all(int(line[:2]) + int(line[3:5]) == int(line[6:]) for line in lines)


def test_recall_asks_for_the_digit_after_the_letter(tmp_path, program):
    code, out, _ = program(prepare.main, "recall", f"--data_dir={tmp_path}")
    assert code == 0 and "360,000 training and 40,000 validation" in out
    tokenizer = tokenizer_of(dataset.read_meta(tmp_path / "recall"))
    lines = [tokenizer.decode(tokens_of(tmp_path / "recall", split)) for split in ("train", "val")]
    lines = [text[i : i + 10] for text in lines for i in range(0, len(text), 10)]
    assert len(set(lines)) == 40_000, "no prompt is in both splits"
    for line in lines:
        pairs = line[:8].lstrip(".")
        digit_of = dict(zip(pairs[::2], pairs[1::2]))
        assert 2 <= len(digit_of) == len(pairs) / 2 and digit_of[line[8]] == line[9]


def test_pieces_spread_over_a_text_are_held_out_of_training(tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(34_000))))
    prepare.prepare_text([tmp_path / "words.txt"], tmp_path / "text", "char", 0.1)
    data = Dataset("text", 16, tmp_path)
    whole = len(data.tokens["train"])
    offsets = torch.arange(17)  # of the tokens that a sequence takes, its targets counted in
    trained_on = (data.draw("train", 300_000, torch.Generator().manual_seed(0))[:, None] + offsets).unique()
    held_out = data.starts("held_out")[:, None] + offsets
    assert not torch.isin(held_out, trained_on).any()
    assert 0.93 * whole < len(trained_on) < 0.96 * whole and trained_on.max() < whole
    assert 0.94 < held_out[:, :16].unique().numel() / (whole / 20) <= 1, "all of it but for rests is measured"
    quarters = torch.bincount(held_out[:, 0] * 4 // whole)
    assert quarters.min() == quarters.max(), "every part of the text is held out alike"
    longer = Dataset("text", 64, tmp_path).pieces["held_out"]
    assert torch.equal(longer[0], data.pieces["held_out"][0]) and longer[1] == data.pieces["held_out"][1]
    (tmp_path / "short.txt").write_text("ab" * 40)
    prepare.prepare_text([tmp_path / "short.txt"], tmp_path / "short", "char", 0.5)
    data = Dataset("short", 30, tmp_path)
    assert torch.equal(data.starts("train"), data.starts("held_out")), "too short to hold anything out"


def test_only_the_answer_is_to_be_predicted(data_dir):
    data = Dataset("sums", 5, data_dir)
    x, y = data.batch("train", 50, torch.Generator().manual_seed(0))
    tokenizer = tokenizer_of(data.meta)
    for row_x, row_y in zip(x.tolist(), y.tolist()):
        text = tokenizer.decode(row_x)  # a+b=c of a+b=cc
        assert row_y[:3] == [-1, -1, -1]
        assert tokenizer.decode(row_y[3:]) == f"{int(text[0]) + int(text[2]):02d}"


def test_examples_of_ones_own(tmp_path, program):
    rows = [f"{a}{b}>\t{max(a, b)}{min(a, b)}\r\n" for a in range(10) for b in range(10)]
    (tmp_path / "rows").write_bytes("".join(rows + rows).encode("utf-8-sig"))  # twice, as Windows writes
    code, _, _ = program(prepare.main, "examples", tmp_path / "rows", "--name=sort", f"--data_dir={tmp_path}")
    data = Dataset("sort", 4, tmp_path)
    assert code == 0 and data.meta["example_length"] == 5 and data.meta["answer_start"] == 3
    assert (len(data.tokens["train"]), len(data.tokens["val"])) == (450, 50)
    train, val = ({tuple(row) for row in data.tokens[s].reshape(-1, 5)} for s in ("train", "val"))
    assert len(train | val) == 100 and not train & val
    assert data.meta["characters"] == "0123456789>"


# ------------------------------------------------------------------------------------------------------------
# Text


def test_text_batches_are_shifted_by_one(tmp_path):
    folder = text_dataset(tmp_path, "the quick brown fox jumps over the lazy dog " * 20)
    data = Dataset("mine", 16, folder.parent)
    x, y = data.batch("train", 8, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    blocks = torch.cat([x for x, _ in data.sequential("val", 2)]).flatten()
    assert torch.equal(blocks, torch.from_numpy(data.tokens["val"][: len(blocks)].astype(np.int64)))
    assert len(data.tokens["val"]) - len(blocks) <= 16, "the whole split but for a rest must be seen"


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_text_comes_back(tmp_path, tokenizer):
    text = "Grüße, 世界!\n" * 30
    folder = text_dataset(tmp_path, text, tokenizer)
    assert tokenizer_of(dataset.read_meta(folder)).decode(tokens_of(folder, "train", "val")) == text


def test_folders_are_read_in_order_and_split_at_the_end(tmp_path):
    texts = {"b.txt": "b" * 50, "a.txt": "a" * 40, "sub/c.txt": "c" * 10, ".hidden": "x"}
    prepare.prepare_text([folder_of(tmp_path / "in", texts)], tmp_path / "d", "char", 0.1)
    assert tokens_of(tmp_path / "d", "train").tolist() == [0] * 40 + [1] * 50
    assert tokens_of(tmp_path / "d", "val").tolist() == [2] * 10


def test_of_a_large_split_a_spread_part_is_taken(tmp_path, data_dir, monkeypatch):
    text = "".join(chr(97 + i % 26) for i in range(50_000))
    data = Dataset("mine", 64, text_dataset(tmp_path, text, val_fraction=0.5).parent)
    whole = torch.cat([x for x, _ in data.sequential("val", 7)])
    assert len(whole) == 24_999 // 64 and data.part("val") == ""
    monkeypatch.setattr(dataset, "EVALUATED", 6400)
    part = torch.cat([x for x, _ in data.sequential("val", 7)])
    assert torch.equal(part, whole[torch.arange(100) * 390 // 100])
    assert torch.equal(part[:14], torch.cat([x for x, _ in data.sequential("val", 7, 2)]))
    assert data.part("val") == "6,400 of the 25,000 tokens of val.bin, evenly spread"
    monkeypatch.setattr(dataset, "EVALUATED", 60)
    sums = Dataset("sums", 5, data_dir)
    examples = torch.from_numpy(sums.tokens["val"].astype(np.int64)).view(100, 6)
    assert torch.equal(torch.cat([x for x, _ in sums.sequential("val", 3)]), examples[::10, :5])


# ------------------------------------------------------------------------------------------------------------
# Documents


@pytest.fixture
def letters(monkeypatch):
    """What takes the GPT-2 tokenizer takes Letters instead."""
    monkeypatch.setattr(prepare, "GPT2Tokenizer", Letters)


def lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def test_few_documents_are_split_at_the_end_and_lines_without_a_text_are_counted(tmp_path, letters, capsys):
    bad = '\n{\n[1]\n{"text": 3}\n{"body": "x"}\n{"text": " "}'
    good = lines(["second", "half a pair \ud800"])
    texts = {"a.txt": "first " * 9, "b.jsonl": "\ufeff" + good + bad, "c.txt": "last " * 5, "empty.txt": ""}
    meta = prepare.prepare_text([folder_of(tmp_path / "in", texts)], tmp_path / "out", "gpt2", 0.25)
    tokens = tokens_of(tmp_path / "out", "train", "val")
    parts = bytes(np.where(tokens == Letters.end_of_text, 0, tokens).astype(np.uint8)).decode().split("\0")
    assert sorted(parts) == sorted(["", "first " * 9, "second", "half a pair ?", "last " * 5])
    assert capsys.readouterr().out == '4 documents (left out: 2 empty, 4 without a "text")\n'
    assert meta["val_tokens"] == len(tokens) - int(0.75 * len(tokens))


def test_many_documents_are_split_by_document(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 7)
    texts = [f"{i} some words é 世 😀 " * (3 + i) for i in range(60)]
    upper = [text.upper() for text in texts]
    files = {f"{i:02d}.txt": text for i, text in enumerate(texts)} | {"z.jsonl": "\n" + lines(upper)[:-1]}
    meta = prepare.prepare_text([folder_of(tmp_path / "in", files)], tmp_path / "out", "gpt2", 0.3)
    train, val = split_texts(tmp_path / "out", "train"), split_texts(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts + upper) and 20 < len(val) < 52
    assert meta["val_tokens"] == sum(len(text.encode()) + 1 for text in val)
    prepare.prepare_text([tmp_path / "in" / "z.jsonl"], tmp_path / "again", "gpt2", 0.3)
    assert set(split_texts(tmp_path / "again", "val")) == set(val) & set(upper), "not where a text stands"


def test_gpt2_tokens_are_tiktokens(tmp_path, real_text, gpt2):
    text = real_text.read_text(encoding="utf-8")[:30_000] + "\n\n  a\n\n\n   b  's 've\t\tx"
    tokens = tokens_of(text_dataset(tmp_path, text, "gpt2"), "train", "val")
    assert tokens.tolist() == [*gpt2._encoding.encode_ordinary(text), gpt2.end_of_text]


def test_gpt2_takes_any_text(gpt2):
    runs = [" " * 3000 + "b", "\n" * 2000 + "b", "\x1c" * 2000 + "y", " " * 1500 + "\x1d" + " " * 1500]
    for text in [*runs, *("a" + run for run in runs), "", "<|endoftext|>"]:
        assert gpt2.encode(text).tolist() == gpt2._encoding.encode_ordinary(text)
    text = "a" + " " * 1_000_000 + "b"
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode(gpt2.encode("half a pair \ud800")) == "half a pair ?"


# ------------------------------------------------------------------------------------------------------------
# Sentences

TEXT, ROWS = ["text", "--tokenizer=char"], ["examples"]
BAD = [
    (TEXT, b"", "in is empty: leave it out"),
    (TEXT, b"good \xff bad", "in position 5: invalid start byte): give a file of UTF-8 text"),
    (TEXT, b"ab", "2 tokens are too few to split: give more text, or another --val_fraction"),
    (TEXT, None, "there is no file or folder with files"),
    ([*TEXT, "--name=a/b"], b"x", "--name is 'a/b': give one that can be a folder"),
    (ROWS, b"1+1\t2\n1+2 3\n", "in line 2 is '1+2 3': write a prompt, one tab, and an answer, both"),
    (ROWS, b"\n", "in line 1 is '': write a prompt, one tab, and an answer"),
    (ROWS, b"1+1\t2\n9+9\t18\n", "in line 2 is '9+9\\t18': write a prompt, one tab, and an answer, both"),
    (ROWS, b"a\tb\n", "2 tokens are too few to split: give more text, or another --val_fraction"),
    (["adition"], b"x", "there is no command 'adition': choose one of addition,"),
]


@pytest.mark.parametrize("argv, content, sentence", BAD, ids=[sentence for *_, sentence in BAD])
def test_bad_input_is_one_sentence_and_loses_nothing(tmp_path, program, argv, content, sentence):
    folder = text_dataset(tmp_path, "good text " * 20)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if content is not None:
        (tmp_path / "in").write_bytes(content)
    where = [tmp_path / "in", "--name=mine", f"--data_dir={tmp_path}/data"]
    code, _, err = program(prepare.main, argv[0], *where, *argv[1:])
    assert code == 2 and sentence in err and err.count("error: ") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"], "no other folder may stay"


def test_a_path_that_cannot_be_written(tmp_path, program):
    (tmp_path / "file").write_text("some text")
    code, _, err = program(prepare.main, "addition", f"--data_dir={tmp_path / 'file'}")
    assert code == 2 and "cannot write" in err and len(err.splitlines()) == 1


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    commands = {"addition": "addition", "shakespeare_char": "shakespeare", "x": "text PATH --name=x"}
    for name, command in commands.items():
        with pytest.raises(UserError, match=f"{name}/meta.json is missing: run .*prepare.py {command}`"):
            Dataset(name, 8, tmp_path)


META = "meta.json is damaged or incomplete .*: make the dataset again"
DAMAGED = [
    ("val.bin", bytes(62), "val.bin does not hold the 50 tokens of meta.json: make the dataset again"),
    ("val.bin", bytes(101), "val.bin does not hold the 50 tokens of meta.json: make the dataset again"),
    ("val.bin", b"\xff\x00" * 50, "val.bin of mine holds token 255, and vocab_size is 12: make the dataset"),
    ("meta.json", b"{", META),
    ("meta.json", b'{"vocab_size": 9, "tokenizer": "char"}', META),
]


@pytest.mark.parametrize("file, content, sentence", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_dataset_is_one_sentence(tmp_path, file, content, sentence):
    folder = text_dataset(tmp_path, "some text of a few words " * 20)
    with pytest.raises(UserError, match="val.bin holds 50 tokens, a sequence takes 65: give a smaller"):
        Dataset("mine", 64, folder.parent)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        list(Dataset("mine", 7, folder.parent).sequential("val", 8))


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="the model does not know 'x', 'é': use only the characters 'abc'"):
        CharTokenizer("abc").encode("axé")
    assert ByteTokenizer().decode(ByteTokenizer().encode("axé")) == "axé"
