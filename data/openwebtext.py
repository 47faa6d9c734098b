"""
OpenWebText (Gokaslan and Cohen 2019): archives in, jobs for `documents.encoded` out.

An archive urlsf_subsetNN.tar holds members *.xz; each of them is an xz-compressed tar of documents *.txt.
Nothing is unpacked to disk, and names in an archive are looked at but never used as paths. What cannot be
read is left out and counted: a damaged, hidden or too large member, a document that is empty or not UTF-8.
"""

import io
import lzma
import tarfile
from collections import Counter
from pathlib import Path

from data.documents import read_texts
from support.command_line import UserError

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/"
ARCHIVES = [f"urlsf_subset{i:02d}.tar" for i in range(21)]
PACKED, UNPACKED, MEMORY = 8 << 20, 32 << 20, 128 << 20  # bytes: of a member at most, and to unpack it
DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError)


def local_archives(folder, n):
    """The first n archives of a folder, by name. Raises UserError if it has none."""
    found = [path for path in Path(folder).glob("*.tar") if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise UserError(f"there is no folder {folder} with archives *.tar: check the path")
    return sorted(found)[:n]


def jobs_of(archive, bar):
    """The jobs of an archive, a path; bar counts its bytes. Raises UserError if it is damaged."""
    left_out = Counter()
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if reason := reason_to_skip(member, ".xz", PACKED):
                    left_out[reason] += not member.isdir()
                else:
                    yield read_member, tar.extractfile(member).read()
                bar.update(member.offset_data + member.size - bar.n)
                tar.members = []  # tarfile would keep them all
    except (OSError, *DAMAGE) as error:
        raise UserError(f"{archive} is damaged or cannot be read ({error}): get it again")
    yield skipped, dict(left_out)


def skipped(left_out):
    return [], left_out


def read_member(packed):
    """The reader of a member, bytes. One that is damaged anywhere is left out whole."""
    texts, left_out = [], Counter()
    try:
        unpacker = lzma.LZMADecompressor(memlimit=MEMORY)
        unpacked = unpacker.decompress(packed, max_length=UNPACKED + 1)
        if len(unpacked) > UNPACKED:
            return skipped({"too large": 1})
        if not unpacker.eof:
            return skipped({"damaged": 1})
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
            for member in tar:
                reason, text = reason_to_skip(member, ".txt", UNPACKED), ""
                if not reason:
                    try:
                        text = tar.extractfile(member).read().decode("utf-8")
                        reason = None if text.strip() else "empty"
                    except UnicodeDecodeError:
                        reason = "not UTF-8"
                if reason is None:
                    texts.append(text)
                else:
                    left_out[reason] += not member.isdir()
    except DAMAGE:
        return skipped({"damaged": 1})
    return read_texts(texts)[0], dict(left_out)


def reason_to_skip(member, ending, limit):
    """Why a member of an archive is not read; None: it is."""
    if any(part.startswith(".") and part.strip(".") for part in member.name.split("/")):
        return "hidden"
    if not member.isreg() or not member.name.endswith(ending):
        return f"no {ending} file"
    return "too large" if member.size > limit else None
