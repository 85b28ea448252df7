"""Files that are there whole or not at all, and what is in them by its hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name beside it, then rename it into place."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content, read piece by piece: weights need not fit into memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
