"""
OpenWebText (Gokaslan and Cohen 2019) as a stream: archives in, jobs for `documents.tokenisers` out.

An archive urlsf_subsetNN.tar holds members *.xz; each of them is an xz-compressed tar of documents *.txt. Nothing is
unpacked to disk: names in an archive are looked at, and never used as paths. What cannot be read is left out and counted: a
damaged, hidden or too large member, a document that is empty or not UTF-8. A damaged outer archive is an error, since
nothing after the damage can be trusted.
"""

import http.client
import io
import lzma
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

from config import UserError
from data.documents import Document, Unit

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/{}"
ARCHIVES = [f"urlsf_subset{i:02d}.tar" for i in range(21)]
PACKED, UNPACKED = 8 << 20, 32 << 20  # bytes of the largest member that is read; true ones have about 0.6 and 2 MB
ATTEMPTS = 5  # to get on with an interrupted download
DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError)


def archives(subsets, folder=""):
    """The first so many archives as units: downloaded, or those of a folder, by name. Raises UserError if it has none."""
    if not folder:
        return [Unit(name, 0, partial(downloaded, URL.format(name), subsets - i)) for i, name in enumerate(ARCHIVES[:subsets])]
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: check the path")
    files = sorted(file for file in Path(folder).glob("*.tar") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"the folder {folder} holds no archive *.tar: give another")
    return [Unit(file.name, file.stat().st_size, partial(local, file)) for file in files[:subsets]]


def local(path, bar):
    try:
        with open(path, "rb") as file:
            yield from archive_jobs(file, path, bar)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): check the file")


def downloaded(url, n_left, bar):
    """n_left: archives from this one on, for the progress bar: they are of about one size."""
    with Download(url) as source:
        bar.total = bar.n + source.size * n_left
        yield from archive_jobs(source, url, bar)


def archive_jobs(file, name, bar):
    """The jobs of one archive, an object with `read`. name: what errors call it."""
    stream = Stream(file, bar)
    left_out = Counter()
    try:
        for member, read in members(stream):
            reason = why_not(member, ".xz", PACKED)
            if reason:
                left_out[reason] += 1
            else:
                yield documents_of, read()
    except UserError:  # a download that failed, not a damaged archive
        raise
    except DAMAGE as error:
        raise UserError(f"{name} is damaged near byte {stream.position} ({error}): get it again")
    yield nothing_but, dict(left_out)


def nothing_but(left_out):
    return [], left_out


def documents_of(packed):
    """The reader of a member: (documents, left_out). A member that is damaged anywhere is left out whole."""
    documents, left_out = [], Counter()
    try:
        unpacked = lzma.open(io.BytesIO(packed)).read(UNPACKED + 1)
        if len(unpacked) > UNPACKED:
            return [], {"too large": 1}
        for member, read in members(Stream(io.BytesIO(unpacked))):
            reason, text = why_not(member, ".txt", UNPACKED), ""
            if not reason:
                try:
                    text = read().decode("utf-8")
                except UnicodeDecodeError:
                    reason = "not UTF-8"
            if not reason and not text.strip():
                reason = "empty"
            if reason:
                left_out[reason] += 1
            else:
                documents.append(Document(text))
    except DAMAGE:
        return [], {"damaged": 1}
    return documents, left_out


def why_not(member, ending, limit):
    """Why a member of an archive is not read; None: it is."""
    if any(part.startswith(".") and part.strip(".") for part in member.name.split("/")):
        return "hidden"
    if not member.isreg() or not member.name.endswith(ending):
        return f"no {ending} file"
    return "too large" if member.size > limit else None


def members(stream):
    """(member, function that reads it) of everything in a tar but its folders. tarfile takes the first header that it cannot
    read for the end; here the end is where two blocks of zeros and nothing else follow. Raises DAMAGE."""
    end = 0
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            end = member.offset_data + (member.size if member.isreg() else 0)
            if not member.isdir():
                yield member, lambda: archive.extractfile(member).read()
            archive.members = []  # tarfile would keep them all
    while stream.read(1 << 20):
        pass
    if stream.last > end or stream.position < end + 1024:
        raise tarfile.ReadError("it ends too early" if stream.last <= end else "what follows is no archive")


class Stream:
    """Bytes on their way from a file to tarfile: counts them, and remembers where the last one that is not zero was."""

    def __init__(self, file, bar=None):
        self._file, self._bar, self.position, self.last = file, bar, 0, 0

    def read(self, n):
        data = self._file.read(n)
        if self._bar is not None:
            self._bar.update(len(data))
        if stripped := len(data.rstrip(b"\0")):
            self.last = self.position + stripped
        self.position += len(data)
        return data


class Download:
    """A URL as an object with `read` that goes on where the connection broke. Raises UserError when that is no use."""

    def __init__(self, url):
        self.url, self.position, self.size, self._response, self._failures = url, 0, None, None, 0

    def __enter__(self):
        self._until_it_works(self._connect)
        return self

    def __exit__(self, *exception):
        if self._response is not None:
            self._response.close()

    def read(self, n):
        data = self._until_it_works(lambda: self._read(n))
        self.position += len(data)
        return data

    def _read(self, n):
        if self._response is None:
            self._connect()
        data = self._response.read(n)
        if not data and self.position < self.size:
            raise ConnectionError("the connection ended early")
        self._failures = 0
        return data

    def _connect(self):
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-"} if self.position else {})
        self._response = urllib.request.urlopen(request, timeout=30)
        length = self._response.headers.get("Content-Length", "")
        size = self.position + int(length) if length.isdecimal() else None
        if size is None or self.size not in (None, size) or (self.position and self._response.status != 206):
            raise UserError(f"{self.url} changed or cannot be read in parts: get the archives otherwise and pass --folder=PATH")
        self.size = size

    def _until_it_works(self, action):
        while True:
            try:
                return action()
            except (OSError, http.client.HTTPException) as error:
                self._response, self._failures = None, self._failures + 1
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
                if refused or self._failures == ATTEMPTS:
                    raise UserError(
                        f"cannot download {self.url} ({getattr(error, 'reason', None) or error}): try again later, or get the "
                        "archives by other means and pass --folder=PATH"
                    )
                time.sleep(2**self._failures)
