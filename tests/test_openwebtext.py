"""OpenWebText's archives to token files: what comes out, what is left out, what ends a run, and what is kept then."""

import errno
import http.server
import io
import json
import lzma
import os
import random
import tarfile
import threading

import pytest

from config import UserError
from data import documents, openwebtext, prepare
from data.dataset import Dataset
from data.writer import DatasetWriter, sha256_of
from tests.letters import Letters, Mortal, split_texts


def tar(members):
    """A tar of (name, bytes), or TarInfo objects."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            if info is not member:
                info.size = len(member[1])
            archive.addfile(info, None if info is member else io.BytesIO(member[1]))
    return file.getvalue()


def packed(texts):
    """A member of an archive: texts as documents."""
    return lzma.compress(tar([(f"{i:04d}.txt", text.encode("utf-8")) for i, text in enumerate(texts)]))


TEXTS = [[[f"document {a}.{m}.{d}, café " * (d + 1) for d in range(4)] for m in range(5)] for a in range(3)]


@pytest.fixture
def folder(tmp_path):
    """A folder of three archives with five members of four documents each."""
    path = tmp_path / "archives"
    path.mkdir()
    for a, members in enumerate(TEXTS):
        members = [(f"openwebtext/urlsf_subset{a:02d}-{m}_data.xz", packed(texts)) for m, texts in enumerate(members)]
        (path / f"urlsf_subset{a:02d}.tar").write_bytes(tar(members))
    return path


def run(folder, out, subsets=21, workers=1, val_fraction=0.3, make_tokenizer=Letters):
    units = openwebtext.archives(subsets, str(folder) if folder else "")
    return prepare.prepare_documents(units, out, make_tokenizer, {"val_fraction": val_fraction}, val_fraction, workers)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_document_is_there_once_with_its_end(tmp_path, folder):
    out = tmp_path / "data" / "mine"
    meta = run(folder, out)
    train, val = split_texts(out, "train"), split_texts(out, "val")
    assert sorted(train + val) == sorted(text for archive in TEXTS for member in archive for text in member)
    assert val and all(documents.split_of(text, 0.3) == "val" for text in val)
    assert not any(documents.split_of(text, 0.3) == "val" for text in train)
    assert meta["documents"] == 60 and meta["left_out"] == {}
    assert meta["sha256"] == sha256_of(out / "train.bin", out / "val.bin")
    assert len(Dataset("mine", 16, tmp_path / "data").tokens["val"]) == meta["val_tokens"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]


def test_the_number_of_processes_changes_nothing(tmp_path, folder, monkeypatch):
    run(folder, tmp_path / "one")
    monkeypatch.setattr(prepare, "CHUNK", 0)  # no text is too small for two
    run(folder, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_split_is_as_large_as_asked():
    held_out = sum(documents.split_of(f"text {i}", 0.2) == "val" for i in range(5000))
    assert abs(held_out / 5000 - 0.2) < 0.03  # 5 standard deviations


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(openwebtext, "PACKED", 2000)
    monkeypatch.setattr(openwebtext, "UNPACKED", 20_000)
    good, link = packed(["good", "also good"]), tarfile.TarInfo("link.xz")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("openwebtext")
    folder.type = tarfile.DIRTYPE
    inner = [
        ("a.txt", b"\xff\xfe"),
        ("b.txt", b" \n"),
        (".c.txt", b"hidden"),
        ("./d.txt", b"good again"),
        ("e.pdf", b"%PDF"),
        ("../../outside.txt", b"good too"),
        ("/outside.txt", b"and this"),
    ]
    outer = [
        folder,
        ("1.xz", good),
        ("2.xz", good[:-20]),
        ("3.xz", good[:100] + b"\0\0\0\0" + good[104:]),
        ("4.xz", lzma.compress(b"no tar at all")),
        ("5.xz", lzma.compress(tar([("x.txt", b"lost")])[:700])),
        ("6.xz", lzma.compress(b"\0" * 30_000)),
        ("7.xz", bytes(3000)),
        ("._1.xz", good),
        ("README", b"hello"),
        link,
        ("8.xz", lzma.compress(tar(inner))),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(tar(outer))
    meta = run(tmp_path / "in", tmp_path / "deep" / "out", val_fraction=0.5)
    texts = split_texts(tmp_path / "deep" / "out", "train") + split_texts(tmp_path / "deep" / "out", "val")
    assert sorted(texts) == sorted(["good", "also good", "good again", "good too", "and this"])
    assert meta["left_out"] == {
        "damaged": 4,
        "too large": 2,
        "hidden": 2,
        "no .xz file": 2,
        "not UTF-8": 1,
        "empty": 1,
        "no .txt file": 1,
    }
    assert not list(tmp_path.rglob("*outside*"))


def test_an_archive_of_nothing_says_what_was_left_out(tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(tar([("1.xz", b"no xz"), ("2.xz", packed([" "]))]))
    with pytest.raises(UserError, match="0 tokens are too few to split into 0 for training and 0: give more text$"):
        run(tmp_path, tmp_path / "out")
    assert "0 documents (left out: 1 damaged, 1 empty)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_altered_archives_end_in_a_sentence_or_in_fewer_documents(tmp_path, folder):
    """60 archives with a byte changed, and 40 cut short: no text comes out that was not put in."""
    whole = (folder / "urlsf_subset00.tar").read_bytes()
    known, numbers, errors, losses = {text for member in TEXTS[0] for text in member}, random.Random(0), 0, 0
    end = len(whole.rstrip(b"\0"))
    variants = [whole[: numbers.randrange(end + 500)] for _ in range(40)]
    for _ in range(60):
        at = numbers.randrange(end)
        variants.append(whole[:at] + bytes([whole[at] ^ (1 << numbers.randrange(8))]) + whole[at + 1 :])
    for path in folder.iterdir():
        path.unlink()
    for variant in variants:
        (folder / "a.tar").write_bytes(variant)
        try:
            meta = run(folder, tmp_path / "out", val_fraction=0.5)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and ("damaged near byte" in str(error) or "too few" in str(error))
            errors += 1
            continue
        texts = {*split_texts(tmp_path / "out", "train"), *split_texts(tmp_path / "out", "val")}
        assert texts <= known and len(variant) == len(whole)
        assert texts == known or meta["left_out"]
        losses += texts < known
    assert errors > 40 and losses > 10


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("archive, job", [(0, 3), (1, 0), (1, 4), (2, 2)])
def test_an_interrupted_run_goes_on(tmp_path, folder, monkeypatch, capsys, archive, job, stop):
    run(folder, tmp_path / "whole")
    out, jobs = tmp_path / "out", openwebtext.archive_jobs

    def some_jobs(file, name, bar):
        for i, one in enumerate(jobs(file, name, bar)):
            if str(archive) + ".tar" in str(name) and i == job:
                raise stop
            yield one

    monkeypatch.setattr(openwebtext, "archive_jobs", some_jobs)
    with pytest.raises(stop) as raised:
        run(folder, out)
    assert not out.exists()
    if archive == 0:
        assert not (tmp_path / "out.tmp").exists()
    else:
        assert json.loads((tmp_path / "out.tmp" / "progress.json").read_text())["documents"] == 20 * archive
        if stop is KeyboardInterrupt:
            assert f"{archive} of 3 parts are kept: run the same command again" in str(raised.value)
    monkeypatch.setattr(openwebtext, "archive_jobs", jobs)
    capsys.readouterr()
    run(folder, out)
    assert (f"going on after {archive} of 3 parts" in capsys.readouterr().out) == (archive > 0)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "out.tmp").exists()


@pytest.fixture
def interrupted(tmp_path, folder):
    """The folder out of a run that ended after one of three archives."""
    good = (folder / "urlsf_subset01.tar").read_bytes()
    (folder / "urlsf_subset01.tar").write_bytes(good[:2000])
    with pytest.raises(UserError, match="urlsf_subset01.tar is damaged near byte 2000 .*\n1 of 3 parts are kept"):
        run(folder, tmp_path / "out")
    (folder / "urlsf_subset01.tar").write_bytes(good)
    return tmp_path / "out"


def test_enough_of_an_interrupted_run_is_a_dataset(folder, interrupted):
    meta = run(folder, interrupted, subsets=1)
    assert meta["documents"] == 20


def test_what_a_killed_process_wrote_after_its_record_is_dropped(tmp_path, folder, interrupted):
    for split in ("train", "val"):
        with open(tmp_path / "out.tmp" / f"{split}.bin", "ab") as file:
            file.write(b"\x01\x02\x03" * 1000)
    (tmp_path / "out.tmp" / "progress.new").write_text("{")
    run(folder, interrupted)
    run(folder, tmp_path / "whole")
    assert contents(interrupted) == contents(tmp_path / "whole")


def test_an_interrupted_run_is_not_deleted_by_another(tmp_path, folder, interrupted):
    before = contents(tmp_path / "out.tmp")
    with pytest.raises(UserError, match="holds an interrupted run with other options or text: repeat its command"):
        run(folder, interrupted, val_fraction=0.2)
    (folder / "urlsf_subset00.tar").rename(folder / "x.tar")
    with pytest.raises(UserError, match="holds an interrupted run with other options or text"):
        run(folder, interrupted)
    (tmp_path / "t.txt").write_text("some text " * 50)
    with pytest.raises(UserError, match="holds an interrupted run with other options or text"):
        prepare.prepare_text([tmp_path / "t.txt"], interrupted, "char", 0.1)
    assert contents(tmp_path / "out.tmp") == before


def test_a_damaged_record_of_progress_is_named(tmp_path, folder, interrupted):
    path = tmp_path / "out.tmp" / "progress.json"
    state = json.loads(path.read_text())
    variants = ["", "{", "[]", "null", "[" * 100_000, path.read_text()[:-10], "\0\0"]
    variants += [json.dumps({k: v for k, v in state.items() if k != key}) for key in state]
    variants += [
        json.dumps({**state, key: value}) for key in state for value in (None, 7) if key != "documents" or value is None
    ]
    variants += [
        json.dumps({**state, "tokens": tokens}) for tokens in ({"train": 1}, {"train": -1, "val": 0}, {"a": 1, "b": 2})
    ]
    variants += [json.dumps({**state, "tokens": {"train": 10**6, "val": 1}}), json.dumps({**state, "left_out": {"a": "b"}})]
    for text in variants:
        path.write_text(text)
        with pytest.raises(UserError, match="progress.json is damaged|holds an interrupted run") as raised:
            run(folder, interrupted)
        assert len(str(raised.value).splitlines()) == 1
    path.write_text(json.dumps(state))
    (tmp_path / "out.tmp" / "val.bin").unlink()
    with pytest.raises(UserError, match="progress.json is damaged"):
        run(folder, interrupted)


def test_a_full_disk_keeps_what_is_finished(tmp_path, folder, monkeypatch):
    write = DatasetWriter.write

    def full(self, tokens, split="train"):
        if self.done:
            self._files["train"] = Full()
        write(self, tokens, split)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DatasetWriter, "write", full)
    with pytest.raises(UserError, match=r"cannot write to .*\(No space left on device\): make room .*\n1 of 3 parts are kept"):
        run(folder, tmp_path / "out")
    monkeypatch.setattr(DatasetWriter, "write", write)
    assert run(folder, tmp_path / "out")["documents"] == 60


def test_a_process_that_dies_is_a_sentence(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 0)
    (folder / "urlsf_subset01.tar").write_bytes(tar([("1.xz", packed(["fine", "please die", "fine"]))]))
    with pytest.raises(UserError, match="a process that tokenises died .*\n1 of 3 parts are kept"):
        run(folder, tmp_path / "out", workers=2, make_tokenizer=Mortal)


def test_missing_archives(tmp_path, program):
    (tmp_path / "empty").mkdir()
    for folder, sentence in [("empty", "holds no archive *.tar: give another"), ("nowhere", "there is no folder")]:
        code, _, err = program(prepare.main, "openwebtext", f"--folder={tmp_path / folder}", f"--data_dir={tmp_path / 'd'}")
        assert code == 2 and sentence in err and len(err.splitlines()) == 1
    assert "--subsets is 22: give less than 22" in program(prepare.main, "openwebtext", "--subsets=22")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def server(folder, monkeypatch):
    """A web server on this machine with the archives. `.plan`: what it does to the next requests: a number of bytes after which
    it breaks off, or a status; then it serves whole parts. `.asked`: the Range of every request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            server.asked.append(begin)
            plan = server.plan.pop(0) if server.plan else None
            data = (folder / self.path[1:]).read_bytes()
            if plan and plan >= 400:
                self.send_error(plan)
                return
            if plan == 200:
                begin, plan = 0, None
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            self.wfile.write(data[begin : None if plan is None else begin + plan])

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.asked = [], []
    monkeypatch.setattr(openwebtext, "URL", f"http://127.0.0.1:{server.server_port}/{{}}")
    monkeypatch.setattr(openwebtext.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_download_goes_on_where_it_broke(tmp_path, folder, server):
    run(folder, tmp_path / "local")
    server.plan = [100, 150, 503, 0, 399]
    run(None, tmp_path / "loaded", subsets=3)
    assert server.asked == [0, 100, 250, 250, 250, 649, 0, 0]
    assert contents(tmp_path / "loaded") == contents(tmp_path / "local")


@pytest.mark.parametrize(
    "plan, sentence, n_asked",
    [
        ([404], r"cannot download [^ ]*/urlsf_subset01.tar \(Not Found\): try again later, or get the archives by other", 1),
        ([503] * 9, r"cannot download [^ ]*/urlsf_subset01.tar \(Service Unavailable\)", 5),
        ([100] + [0] * 9, r"cannot download [^ ]*/urlsf_subset01.tar \(the connection ended early\)", 5),
        ([100, 200], r"http[^ ]*/urlsf_subset01.tar changed or cannot be read in parts", 2),
    ],
)
def test_a_failed_download_keeps_the_finished_archives(tmp_path, server, plan, sentence, n_asked):
    server.plan = [None, *plan]
    with pytest.raises(UserError, match=f"^{sentence}.*\n1 of 3 parts are kept: run the same command again"):
        run(None, tmp_path / "out", subsets=3)
    assert len(server.asked) == 1 + n_asked
    server.plan = []
    assert run(None, tmp_path / "out", subsets=3)["documents"] == 60
    assert len(server.asked) == 1 + n_asked + 2, "the finished archive must not be loaded again"
