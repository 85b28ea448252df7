"""Files that are there whole or not at all, why one could not be written, and what is in them by
its hash.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name beside it, then rename it into place."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def why_unwritable(error: BaseException) -> str | None:
    """Why a file could not be written; None if that is not what the error is about."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _UNWRITABLE else None
    text = str(error).partition("\n")[0]
    # safetensors and torch.save tell of the system's errors in their own.
    if "inline_container.cc" in text and "unexpected pos" in text:
        return "a file was cut short; is the disk full, or a limit reached?"
    return text if "(os error " in text or "PytorchStreamWriter" in text else None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content, read piece by piece: weights need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
