"""Datasets: what prepare.py writes, what Dataset reads, and what both say of bad files."""

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from config import UserError
from data import dataset, prepare
from data.dataset import Dataset
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, tokenizer_of


def tokens_of(folder):
    return np.concatenate([np.fromfile(folder / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")])


def text_dataset(tmp_path, text, **options):
    (tmp_path / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    folder = tmp_path / "data" / "mine"
    prepare.prepare_text([tmp_path / "text.txt"], folder, **{"tokenizer_name": "char", "val_fraction": 0.1, **options})
    return folder


def test_addition_holds_every_problem_once_per_split(tmp_path, program):
    code, out, _ = program(prepare.main, "addition", f"--data_dir={tmp_path}")
    assert code == 0 and "90,000 training" in out
    meta = json.loads((tmp_path / "addition" / "meta.json").read_text())
    tokenizer = tokenizer_of(meta)
    for split in ("train", "val"):
        lines = tokenizer.decode(np.fromfile(tmp_path / "addition" / f"{split}.bin", dtype=np.uint16))
        lines = [lines[i : i + 9] for i in range(0, len(lines), 9)]
        assert len(lines) == len(set(lines)) == 10_000
        assert all(int(line[:2]) + int(line[3:5]) == int(line[6:]) and line[2] + line[5] == "+=" for line in lines)


def test_only_the_answer_is_to_be_predicted(data_dir):
    data = Dataset("sums", 5, data_dir)
    x, y = data.batch("train", 50, torch.Generator().manual_seed(0))
    tokenizer = tokenizer_of(data.meta)
    for row_x, row_y in zip(x.tolist(), y.tolist()):
        text = tokenizer.decode(row_x)  # a+b=c of a+b=cc
        assert row_y[:3] == [-1, -1, -1]
        assert tokenizer.decode(row_y[3:]) == f"{int(text[0]) + int(text[2]):02d}"


def test_text_batches_are_shifted_by_one(tmp_path):
    folder = text_dataset(tmp_path, "the quick brown fox jumps over the lazy dog " * 20)
    data = Dataset("mine", 16, folder.parent)
    x, y = data.batch("train", 8, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    blocks = torch.cat([x for x, _ in data.sequential("val", 2)]).flatten()
    assert torch.equal(blocks, torch.from_numpy(data.tokens["val"][: len(blocks)].astype(np.int64)))
    assert len(data.tokens["val"]) - len(blocks) <= 16, "the whole split but for a rest must be seen"


def test_characters_come_back(tmp_path):
    text = "Grüße, 世界!\n" * 30
    folder = text_dataset(tmp_path, text)
    tokenizer = tokenizer_of(json.loads((folder / "meta.json").read_text()))
    assert tokenizer.decode(tokens_of(folder)) == text


def test_bytes_come_back(tmp_path):
    text = "Grüße, 世界!\n" * 30
    assert ByteTokenizer().decode(tokens_of(text_dataset(tmp_path, text, tokenizer_name="byte"))) == text


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_the_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    for text in ["a b  c\n\n d\t\te世界 fgh" * 5 + "end ", "   ", "oneword", " \n x"]:
        (tmp_path / "t").write_bytes(text.encode())
        with prepare.progress(None, "") as bar:
            assert "".join(prepare.chunks(tmp_path / "t", bar)) == text


def needs_gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: give it a folder with tiktoken's gpt2 files")


@pytest.mark.parametrize("chunk", [50, 1000])
def test_gpt2_tokens_do_not_depend_on_the_chunks(tmp_path, monkeypatch, real_text, chunk):
    needs_gpt2()
    text = real_text.read_text(encoding="utf-8")[:30_000] + "\n\n  a\n\n\n   b  's 've\t\tx"
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    folder = text_dataset(tmp_path, text, tokenizer_name="gpt2")
    tokenizer = GPT2Tokenizer()
    assert tokens_of(folder).tolist() == [*tokenizer.encode(text).tolist(), tokenizer.end_of_text]


def test_a_large_text_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 1 << 16)
    text = "all work and no play makes jack a dull boy\n" * 200_000  # 8.6 MB
    tracemalloc.start()
    (tmp_path / "text.txt").write_text(text)
    del text
    tracemalloc.reset_peak()
    prepare.prepare_text([tmp_path / "text.txt"], tmp_path / "data" / "mine", "byte", 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, f"{peak / 1e6:.1f} MB held for a text of 8.6 MB read in chunks of 0.07 MB"


def test_folders_are_read_in_order_and_split_at_the_end(tmp_path):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("b" * 50)
    (tmp_path / "texts" / "a.txt").write_text("a" * 40)
    (tmp_path / "texts" / "sub" / "c.txt").write_text("c" * 10)
    (tmp_path / "texts" / ".hidden").write_text("x")
    prepare.prepare_text([tmp_path / "texts"], tmp_path / "d", "char", 0.1)
    assert np.fromfile(tmp_path / "d" / "train.bin", dtype=np.uint16).tolist() == [0] * 40 + [1] * 50
    assert np.fromfile(tmp_path / "d" / "val.bin", dtype=np.uint16).tolist() == [2] * 10


def test_examples_of_ones_own(tmp_path, program):
    (tmp_path / "rows.tsv").write_text("".join(f"{a}{b}>\t{max(a, b)}{min(a, b)}\n" for a in range(10) for b in range(10)))
    code, _, _ = program(prepare.main, "examples", tmp_path / "rows.tsv", "--name=sort", f"--data_dir={tmp_path}")
    data = Dataset("sort", 4, tmp_path)
    assert code == 0 and data.meta["example_length"] == 5 and data.meta["answer_start"] == 3
    assert (len(data.tokens["train"]), len(data.tokens["val"])) == (450, 50)
    train, val = ({tuple(row) for row in data.tokens[s].reshape(-1, 5)} for s in ("train", "val"))
    assert len(train | val) == 100 and not train & val


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("1+1\t2\n1+2 3\n", "rows.tsv line 2 is '1+2 3': write a prompt, one tab, and an answer"),
        ("1+1\t2\n\n", "rows.tsv line 2 is '': write a prompt, one tab, and an answer"),
        ("1+1\t2\n1+2\t3\t4\n", "rows.tsv line 2 is '1+2\\t3\\t4': write a prompt, one tab, and an answer"),
        ("1+1\t2\n1+1\t2\n9+9\t18\n", "rows.tsv line 3 has 3 + 2 characters, line 1 has 3 + 1: pad them to one length"),
        ("", "rows.tsv is empty: write one prompt<TAB>answer line per example"),
        ("a\tb\n", "--val_fraction 0.1 of 1 examples leaves a split empty: give more examples, or 0"),
        (b"\xff\xfe", "rows.tsv is not UTF-8 text (near byte 0): convert it"),
    ],
)
def test_bad_examples(tmp_path, program, content, sentence):
    (tmp_path / "rows.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = program(prepare.main, "examples", tmp_path / "rows.tsv", "--name=x", f"--data_dir={tmp_path}")
    assert code == 2 and sentence in err and len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "text.txt is empty: leave it out"),
        (b"good \xff bad", "text.txt is not UTF-8 text (near byte 5): convert it or leave it out"),
        (b"half \xe4\xb8", "text.txt is not UTF-8 text"),
        (b"ab", "2 tokens are too few to split"),
        (None, "there is no file or folder"),
    ],
)
def test_bad_text_leaves_the_old_dataset_alone(tmp_path, program, content, sentence):
    folder = text_dataset(tmp_path, "good text " * 20)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if content is None:
        (tmp_path / "text.txt").unlink()
    else:
        (tmp_path / "text.txt").write_bytes(content)
    code, _, err = program(
        prepare.main, "text", tmp_path / "text.txt", "--name=mine", "--tokenizer=char", f"--data_dir={tmp_path / 'data'}"
    )
    assert code == 2 and sentence in err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"], "no temporary folder may stay behind"


def test_prepare_reports_all_problems_together(program):
    code, _, err = program(prepare.main, "text", "--tokenizer=words", "--val_fraction=2", "--nam=x")
    assert code == 2
    assert err.splitlines() == [
        "error: there is no option --nam: did you mean --name?",
        "error: give one or more files or folders: 0 were given",
        "error: --tokenizer is 'words': choose one of gpt2, char, byte",
        "error: --val_fraction is 2.0: give less than 1",
        "error: --name is '': give the dataset a name that can be a folder, such as --name=mytask",
    ]
    assert "there is no command 'adition': choose one of addition," in program(prepare.main, "adition")[2]
    assert "--name is '': give the dataset a name" in program(prepare.main, "text", "x")[2]


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"addition/meta.json is missing: run `python data/prepare.py addition`"):
        Dataset("addition", 8, tmp_path)
    with pytest.raises(UserError, match=r"run `python data/prepare.py shakespeare`"):
        Dataset("shakespeare_char", 8, tmp_path)


def test_damaged_datasets_are_named(tmp_path):
    folder = text_dataset(tmp_path, "some text of a few words " * 20)
    with pytest.raises(
        UserError, match="val.bin holds 50 tokens, and one sequence takes 65: give more text or a smaller block_size"
    ):
        Dataset("mine", 64, folder.parent)
    val = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(val + b"x")
    with pytest.raises(UserError, match="val.bin holds 101 bytes, half a uint16 token too many"):
        Dataset("mine", 8, folder.parent)
    (folder / "val.bin").write_bytes(val)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": 3, "tokenizer": "byte"}))
    with pytest.raises(UserError, match=r"train.bin holds token \d+, but meta.json says vocab_size 3"):
        Dataset("mine", 8, folder.parent)
    for text in [
        "{",
        "[]",
        '{"vocab_size": "many", "tokenizer": "char"}',
        '{"vocab_size": 9}',
        '{"vocab_size": 0, "tokenizer": "byte"}',
        '{"vocab_size": 9, "tokenizer": "char"}',
    ]:
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json is damaged"):
            Dataset("mine", 8, folder.parent)


def variants_of(content, rng):
    """A file's content cut short, with bytes added, and with a bit changed."""
    yield from (b"", content + b"\0\0", content + content)
    for at in rng.integers(len(content), size=15):
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["sums", "mine"])
def test_altered_token_files_are_errors(tmp_path, data_dir, name):
    folder = text_dataset(tmp_path, "some text of a few words " * 20)
    if name == "sums":
        shutil.copytree(data_dir / "sums", folder.parent / "sums")
    for path in [folder.parent / name / f"{split}.bin" for split in ("train", "val")]:
        content = path.read_bytes()
        for variant in variants_of(content, np.random.default_rng(0)):
            path.write_bytes(variant)
            with pytest.raises(UserError, match=r"train.bin|val.bin") as raised:
                Dataset(name, 8, folder.parent)
            assert len(str(raised.value).splitlines()) == 1
        path.write_bytes(content)
    Dataset(name, 8, folder.parent)


@pytest.mark.parametrize("name", ["sums", "mine"])
def test_altered_descriptions_are_errors_or_harmless(tmp_path, data_dir, name):
    """meta.json with bits changed may say something else that is right, such as another character: then batches must come."""
    folder = text_dataset(tmp_path, "some text of a few words " * 20)
    if name == "sums":
        shutil.copytree(data_dir / "sums", folder.parent / "sums")
    path = folder.parent / name / "meta.json"
    content = path.read_bytes()
    meta, values = json.loads(content), [None, -1, 0, 1.5, True, "x", [], {}, 10**9, [[1]], float("nan")]
    wrong = [json.dumps({**meta, key: value}) for key in meta for value in values]
    wrong += [json.dumps({k: v for k, v in meta.items() if k != key}) for key in ("vocab_size", "tokenizer", "characters")]
    wrong += ["[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "null", "7", "\ufeff" + content.decode()]
    for text in wrong:
        path.write_text(text)
        with pytest.raises(UserError) as raised:
            Dataset(name, 8, folder.parent)
        assert len(str(raised.value).splitlines()) == 1
    n_errors = 0
    for variant in variants_of(content, np.random.default_rng(1)):
        path.write_bytes(variant)
        try:
            data = Dataset(name, 8, folder.parent)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            n_errors += 1
            continue
        assert data.batch("train", 4, torch.Generator().manual_seed(0))[0].shape[0] == 4
    assert n_errors >= 18, "whatever is cut short or has bytes added is an error"


def test_a_token_out_of_range_is_found_in_its_batch(tmp_path, monkeypatch):
    """Opening a large file looks at a part of it."""
    folder = text_dataset(tmp_path, "abcd" * 400_000, tokenizer_name="byte")
    monkeypatch.setattr(dataset, "CHECKED", 1 << 18)
    Dataset("mine", 64, folder.parent)
    tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r+")
    tokens[100_000] = 256
    tokens.flush()
    data = Dataset("mine", 64, folder.parent)
    with pytest.raises(UserError, match="train.bin holds token 256, but meta.json says vocab_size 256: make it again"):
        for _ in data.sequential("train", 100):
            pass
    monkeypatch.undo()
    with pytest.raises(UserError, match="train.bin holds token 256"):
        Dataset("mine", 64, folder.parent)


def test_of_a_large_split_a_spread_part_is_taken(tmp_path, data_dir, monkeypatch):
    folder = text_dataset(tmp_path, "".join(chr(97 + i % 26) for i in range(50_000)), val_fraction=0.5)
    data, sums = Dataset("mine", 64, folder.parent), Dataset("sums", 5, data_dir)
    whole = torch.cat([x for x, _ in data.sequential("val", 7)])
    assert len(whole) == 24_999 // 64 and data.part("val") == "" and sums.part("val") == ""
    monkeypatch.setattr(dataset, "EVALUATED", 6400)
    part = torch.cat([x for x, _ in data.sequential("val", 7)])
    assert torch.equal(part, whole[torch.arange(100) * 390 // 100])
    assert torch.equal(part[:14], torch.cat([x for x, _ in data.sequential("val", 7, 2)]))
    assert data.part("val") == "6,400 of the 25,000 tokens of val.bin, evenly spread"
    monkeypatch.setattr(dataset, "EVALUATED", 60)
    assert sums.part("val") == "60 of the 600 tokens of val.bin, evenly spread"
    examples = torch.from_numpy(sums.tokens["val"].astype(np.int64)).view(100, 6)
    assert torch.equal(torch.cat([x for x, _ in sums.sequential("val", 3)]), examples[::10, :5])


def test_paths_that_cannot_be_written_or_read(tmp_path, program):
    (tmp_path / "file").write_text("some text")
    cases = [
        (["addition", f"--data_dir={tmp_path / 'file'}"], "cannot write to"),
        (["text", tmp_path / "file", "--name=file", f"--data_dir={tmp_path}"], "is a file: give another name"),
    ]
    for argv, sentence in cases:
        code, _, err = program(prepare.main, *argv)
        assert code == 2 and sentence in err and len(err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "some text"


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match="the model does not know 'x', 'é': use only the characters 'abc'"):
        CharTokenizer("abc").encode("axé")
