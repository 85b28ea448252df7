"""Files and folders that are there whole or not at all, why one could not be written, and what is
in a file by its hash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_OF_READING_TOO = {errno.EACCES, errno.EPERM, errno.EIO}


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name beside it, then rename it into place.

    Raises:
        OSError: the path is a folder's, or the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within, a file is written under a temporary name beside it; it is renamed at the end, and
    removed if that is not reached.

    Raises:
        OSError: the path is a folder's.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file.")
    temporary = target.with_name(f"{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within, a new folder is written under a temporary name beside it; it is renamed at the end,
    and removed if that is not reached.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, no other process is in such a context of the same folder. The system forgets it with
    the process, however that ends; where it has no such locks, nothing is refused.

    Raises:
        BlockingIOError: another one is.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems lock no folders
            pass
        yield
    finally:
        os.close(held)


def why_unwritable(error: BaseException, folder: str | os.PathLike[str]) -> str | None:
    """Why a file in a folder could not be written; None if that is not what the error is about."""
    if isinstance(error, OSError):
        there = error.errno in _OF_READING_TOO and _in(folder, error)
        return error.strerror if there or error.errno in _OF_WRITING else None
    text = str(error).partition("\n")[0]
    # safetensors and torch.save tell of the system's errors in their own.
    if "inline_container.cc" in text and "unexpected pos" in text:
        return "a file was cut short; is the disk full, or a limit reached?"
    return text if "(os error " in text or "PytorchStreamWriter" in text else None


def _in(folder: str | os.PathLike[str], error: OSError) -> bool:
    """Whether an error is about a file in a folder, or does not say of which."""
    named = error.filename2 or error.filename  # of a copy, the second is written
    if not isinstance(named, str | os.PathLike):
        return True
    return Path(named).resolve().is_relative_to(Path(folder).resolve())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content, read piece by piece: weights need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
