"""OpenWebText's archives to token files: what comes out, what is left out, what an interrupted run keeps."""

import http.server
import io
import lzma
import tarfile
import threading
from functools import partial

import pytest

from data import openwebtext, prepare
from data.dataset import Dataset
from support.command_line import UserError
from tests.letters import Letters, split_texts


def tar(members):
    """A tar of (name, bytes); members without bytes are links to /etc/passwd."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content or b""))
    return file.getvalue()


def packed(texts):
    """A member of an archive: texts as documents."""
    return lzma.compress(tar([(f"{i:04d}.txt", text.encode("utf-8")) for i, text in enumerate(texts)]))


TEXTS = [[[f"document {a}.{m}.{d}, café " * (d + 1) for d in range(4)] for m in range(5)] for a in range(3)]


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(prepare, "GPT2Tokenizer", Letters)


@pytest.fixture
def folder(tmp_path):
    """A folder of three archives with five members of four documents each."""
    path = tmp_path / "archives"
    path.mkdir()
    for a, members in enumerate(TEXTS):
        members = [(f"openwebtext/{a}-{m}_data.xz", packed(texts)) for m, texts in enumerate(members)]
        (path / f"urlsf_subset{a:02d}.tar").write_bytes(tar(members))
    return path


def run(folder, out, subsets=21, val_fraction=0.3):
    return prepare.prepare_openwebtext(subsets, folder, out, val_fraction)


def texts_of(out):
    return sorted(split_texts(out, "train") + split_texts(out, "val"))


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_document_is_there_once_with_its_end(tmp_path, folder, capsys):
    meta = run(folder, tmp_path / "data" / "mine")
    assert texts_of(tmp_path / "data" / "mine") == sorted(t for a in TEXTS for m in a for t in m)
    assert "20 documents" in capsys.readouterr().out
    assert len(Dataset("mine", 16, tmp_path / "data").tokens["val"]) == meta["val_tokens"] > 100
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openwebtext, "PACKED", 2000)
    monkeypatch.setattr(openwebtext, "UNPACKED", 20_000)
    good = packed(["good", "also good"])
    inner = [("a.txt", b"\xff\xfe"), ("b.txt", b" \n"), (".c.txt", b"hidden"), ("./d.txt", b"good again")]
    inner += [("e.pdf", b"%PDF"), ("../../outside.txt", b"good too"), ("/outside.txt", b"and this")]
    # claims a dictionary of 256 MiB, which unpacking would have to hold
    large = lzma.compress(tar([("x.txt", b"x")]), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}])
    damaged = [good[:-20], good[:100] + bytes(4) + good[104:], lzma.compress(b"no tar"), large]
    damaged += [lzma.compress(tar([("x.txt", b"lost")])[:700]), lzma.compress(bytes(30_000))]
    outer = [("good.xz", good), ("inner.xz", lzma.compress(tar(inner))), ("large.xz", bytes(3000))]
    outer += [("link.xz", None), ("._good.xz", good), ("README", b"")]
    outer += [(f"{i}.xz", content) for i, content in enumerate(damaged)]
    (tmp_path / "x.tar").write_bytes(tar(outer))
    run(tmp_path, tmp_path / "deep" / "out", val_fraction=0.5)
    assert texts_of(tmp_path / "deep" / "out") == ["also good", "and this", "good", "good again", "good too"]
    reasons = "6 damaged, 1 empty, 2 hidden or no .txt file, 3 hidden or no .xz file, 1 not UTF-8"
    assert f"5 documents (left out: {reasons}, 1 too large)" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*outside*"))


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_archive_is_named_and_the_finished_ones_are_kept(tmp_path, folder, damage):
    run(folder, tmp_path / "whole")
    path = folder / "urlsf_subset02.tar"
    content = path.read_bytes()
    path.write_bytes(content[:2700] if damage == "cut" else b"hello")
    with pytest.raises(UserError, match=r"urlsf_subset02.tar is damaged or .* \(.*\): get it again"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.parts").iterdir())) == 2
    path.write_bytes(content)
    (folder / "urlsf_subset00.tar").write_bytes(b"not read again")
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_missing_archives_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder .* with archives .*: check the path"):
        run(tmp_path, tmp_path / "out")


def test_archives_are_downloaded_and_a_broken_download_is_noticed(tmp_path, folder, monkeypatch):
    broken = ["/urlsf_subset01.tar"]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, output):
            data = source.read()
            output.write(data[: len(data) // 2] if self.path in broken else data)

        def log_message(self, *words):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(openwebtext, "URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(UserError, match=r"cannot download .*subset01.tar \(.*ended early\): try again"):
            run(None, tmp_path / "out", subsets=3)
        broken.clear()
        run(None, tmp_path / "out", subsets=3)
        server.shutdown()
    run(folder, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
