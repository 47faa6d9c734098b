"""Files that are whole or not there: reading text, saving, downloading."""

import json
import os
import shutil
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from support.command_line import UserError


def read_text(path):
    """The text of a file, line ends as they are, a byte order mark left out. Raises UserError if it is empty
    or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): give a file of UTF-8 text")
    if not text:
        raise UserError(f"{path} is empty: leave it out")
    return text


def read_json(path):
    """The plain values of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def damage_named(path, remedy="get it again"):
    """Within it, any exception means that the file cannot be read: the libraries raise a dozen types."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}): {remedy}")


@contextmanager
def replacing(path):
    """Gives a temporary path beside `path`, and moves what was written there to `path` at the end: whoever
    interrupts it, path holds the old file or the new one. Raises UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two programs never share it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({reason}): free some space, or choose another folder")
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(content, path):
    """Write plain values as JSON. Raises UserError if path cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_folder(path):
    """Make a folder to write to, if it is not there, and return its Path. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another folder")
    return Path(path)


def download(url, path):
    """Fetch a file with a progress bar; path holds it only when it is whole. Raises UserError."""
    with replacing(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(temporary, "wb") as file:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(response, "read", total=size or None, leave=False) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
                if file.tell() < size:
                    raise OSError("the connection ended early")
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot download {url} ({reason}): try again, or give the path of a copy")
