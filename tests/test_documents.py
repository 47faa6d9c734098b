"""Folders of text and .jsonl files as documents: order, ends, split, and what is wrong with them."""

import json

import numpy as np
import pytest

from data import documents, prepare
from data.tokenizer import GPT2Tokenizer
from tests.letters import Letters, split_texts
from tests.test_data import needs_gpt2


@pytest.fixture
def letters(monkeypatch):
    """What takes the GPT-2 tokenizer takes Letters instead."""
    monkeypatch.setattr(prepare, "GPT2Tokenizer", Letters)


def lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def test_few_documents_are_split_at_the_end_of_the_text(tmp_path, letters):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("first " * 9)
    (tmp_path / "in" / "b.jsonl").write_text(lines(["second", "third"]))
    (tmp_path / "in" / "c.txt").write_text("fourth " * 5)
    meta = prepare.prepare_text([tmp_path / "in"], tmp_path / "out", "gpt2", 0.25)
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")])
    end = Letters.end_of_text
    parts = ["first " * 9, end, "second", end, "third", end, "fourth " * 5, end]
    assert tokens.tolist() == [t for part in parts for t in ([part] if part == end else part.encode())]
    assert meta["documents"] == 4 and meta["val_tokens"] == len(tokens) - int(0.75 * len(tokens))


def test_many_documents_are_split_by_document(tmp_path, letters):
    texts = [f"document {i} \u00e9 \u4e16 \U0001f600" for i in range(150)]
    (tmp_path / "in.jsonl").write_text("\n" + lines(texts) + lines(["no newline at the end"])[:-1])
    meta = prepare.prepare_text([tmp_path / "in.jsonl"], tmp_path / "out", "gpt2", 0.1)
    train, val = split_texts(tmp_path / "out", "train"), split_texts(tmp_path / "out", "val")
    assert sorted(train + val) == sorted([*texts, "no newline at the end"]) and meta["documents"] == 151
    assert val == [text for text in texts + ["no newline at the end"] if documents.split_of(text, 0.1) == "val"]
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:03d}.txt").write_text(text * 3)
    prepare.prepare_text([tmp_path / "folder"], tmp_path / "files", "gpt2", 0.1)
    train, val = split_texts(tmp_path / "files", "train"), split_texts(tmp_path / "files", "val")
    assert sorted(train + val) == sorted(text * 3 for text in texts) and 2 < len(val) < 40


def test_a_long_document_in_parts_stays_on_one_side(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 64)
    monkeypatch.setattr(documents, "PIECE", 50)
    texts = [f"{i} some words " * (20 + i) for i in range(60)]
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:02d}.txt").write_text(text)
    (tmp_path / "in" / "z.jsonl").write_text(lines(text.upper() for text in texts))
    prepare.prepare_text([tmp_path / "in"], tmp_path / "out", "gpt2", 0.3)
    train, val = split_texts(tmp_path / "out", "train"), split_texts(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts + [text.upper() for text in texts])
    assert min(sum(text.isupper() for text in val), sum(not text.isupper() for text in val)) > 3


def test_lines_without_a_text_are_left_out_and_counted(tmp_path, letters):
    bad = [b"{", b"[1]", b'{"text": 3}', b'{"body": "x"}', b'{"text": "\xff"}', b'{"text": " "}', b"[" * 100_000]
    good = lines(["one text", "another"]).encode() + b'{"text": "half a pair \\ud800"}\n'
    (tmp_path / "in.jsonl").write_bytes(good + b"\n".join(bad))
    found, left_out = documents.read_lines(good + b"\n".join(bad))
    assert [document.text for document in found] == ["one text", "another", "half a pair \ud800"]
    assert left_out == {"not JSON": 2, 'without a "text"': 3, "not UTF-8": 1, "empty": 1}
    assert documents.split_of(found[2].text, 0.999) == "val"


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", b'{"body": "x"}\n', 'the first line of {} is without a "text": write one {{"text": ...}} per line'),
        ("a.jsonl", b"plain text", 'the first line of {} is not JSON: write one {{"text": ...}} per line'),
        ("a.jsonl", b'{"text": "' + b"x" * 5000, 'a.jsonl holds a line of more than 0 MB: write one {{"text": ...}} per line'),
        ("a.txt", b"good \xff bad", "a.txt is not UTF-8 text (near byte 5): convert it or leave it out"),
        ("a.txt", b"", "a.txt is empty: leave it out"),
    ],
)
def test_bad_files_are_named_before_any_work(tmp_path, letters, program, monkeypatch, name, content, sentence):
    monkeypatch.setattr(prepare, "LINE", 1000)
    monkeypatch.setattr(prepare, "CHUNK", 500)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good text " * 100)
    code, _, err = program(
        prepare.main, "text", tmp_path / "good.txt", tmp_path / name, "--name=mine", f"--data_dir={tmp_path / 'data'}"
    )
    errors = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and sentence.format(tmp_path / name) in errors[0]
    assert not (tmp_path / "data").exists()


def test_an_interrupted_run_over_files_goes_on(tmp_path, letters, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "UNIT", 300)
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text {i} " * 20)
    whole = prepare.prepare_text([tmp_path / "in"], tmp_path / "whole", "gpt2", 0.2)
    jobs = prepare.file_jobs
    monkeypatch.setattr(prepare, "file_jobs", lambda files, *rest: 1 / 0 if files[0].name == "6.txt" else jobs(files, *rest))
    with pytest.raises(ZeroDivisionError):
        prepare.prepare_text([tmp_path / "in"], tmp_path / "out", "gpt2", 0.2)
    monkeypatch.setattr(prepare, "file_jobs", jobs)
    capsys.readouterr()
    assert prepare.prepare_text([tmp_path / "in"], tmp_path / "out", "gpt2", 0.2) == whole
    assert "going on after 2 of 3 parts" in capsys.readouterr().out


def test_gpt2_documents_from_the_command_line(tmp_path, program, real_text, monkeypatch):
    needs_gpt2()
    monkeypatch.setattr(documents, "PIECE", 90)
    text = real_text.read_text(encoding="utf-8")[:40_000]
    texts = [text[i : i + 200] for i in range(0, len(text), 200)]
    (tmp_path / "in.jsonl").write_text(lines(texts))
    code, out, _ = program(prepare.main, "text", tmp_path / "in.jsonl", "--name=mine", f"--data_dir={tmp_path}")
    assert code == 0 and out.startswith("200 documents, ") and "tokens/s" in out
    tokenizer = GPT2Tokenizer()
    train, val = (np.fromfile(tmp_path / "mine" / f"{split}.bin", dtype=np.uint16) for split in ("train", "val"))
    expected = {"train": [], "val": []}
    for one in texts:
        expected[documents.split_of(one, 0.1)] += [*tokenizer.encode(one).tolist(), tokenizer.end_of_text]
    assert {"train": train.tolist(), "val": val.tolist()} == expected


def test_gpt2_takes_any_run_of_white_space():
    needs_gpt2()
    tokenizer = GPT2Tokenizer()
    runs = [" " * 3000 + "b", "\n" * 2000 + "b", "\n" * 2000, "\x1c" * 2000 + "y", " " * 1500 + "\x1d" + " " * 1500]
    for text in [*runs, *("a" + run for run in runs)]:
        assert tokenizer.encode(text).tolist() == tokenizer._encoding.encode_ordinary(text)
    text = "a" + " " * 1_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
