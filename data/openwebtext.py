"""
OpenWebText (Gokaslan and Cohen 2019): archives in, documents out.

An archive urlsf_subsetNN.tar holds members *.xz; each of them is an xz-compressed tar of documents *.txt.
Nothing is unpacked to disk, and names in an archive are looked at but never used as paths. What cannot be
read is left out and counted: a damaged, hidden or too large member, a document that is empty or not UTF-8.
"""

import io
import lzma
import tarfile

from tqdm import tqdm

from support.command_line import UserError

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/"
ARCHIVES = [f"urlsf_subset{i:02d}.tar" for i in range(21)]
PACKED, UNPACKED, MEMORY = 8 << 20, 32 << 20, 128 << 20  # bytes: of a member at most, and to unpack it
DAMAGE = (tarfile.TarError, lzma.LZMAError, EOFError, ValueError, OverflowError)


def documents(archive, left_out):
    """The texts of an archive, a path. left_out: a Counter of reasons. Raises UserError if it is damaged."""
    try:
        size = archive.stat().st_size
        with open(archive, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            for packed in members(file, ".xz", PACKED, left_out):
                bar.update(file.tell() - bar.n)
                try:
                    yield from texts_of(packed, left_out)
                except DAMAGE:
                    left_out["damaged"] += 1
    except (OSError, *DAMAGE) as error:
        raise UserError(f"{archive} is damaged or cannot be read ({error}): get it again")


def texts_of(packed, left_out):
    """The texts of a member, bytes; none if it is damaged anywhere."""
    unpacker = lzma.LZMADecompressor(memlimit=MEMORY)
    unpacked = unpacker.decompress(packed, max_length=UNPACKED)
    if not unpacker.eof:
        raise ValueError("too large, or cut short")
    texts = []
    for content in members(io.BytesIO(unpacked), ".txt", UNPACKED, left_out):
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:
            left_out["not UTF-8"] += 1
    left_out["empty"] += sum(not text.strip() for text in texts)
    return filter(str.strip, texts)


def members(file, ending, limit, left_out):
    """The contents of the members of a tar that have this ending and at most so many bytes."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep them all
            hidden = any(part.startswith(".") and part.strip(".") for part in member.name.split("/"))
            if hidden or not member.isreg() or not member.name.endswith(ending):
                left_out[f"hidden or no {ending} file"] += not member.isdir()
            elif member.size > limit:
                left_out["too large"] += 1
            else:
                yield tar.extractfile(member).read()
