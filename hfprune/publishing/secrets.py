"""Secrets do not get published: what looks like one is refused before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hfprune.errors import HfpruneError

_KEYS = re.compile(r"(^|_)(token|password|secret|api_?key|credentials?)$", re.IGNORECASE)
# A Hub token; a URL with a password.
_VALUES = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@")


def refuse_secrets(values: Any, where: str) -> None:
    """Look through plain values: strings for what looks like a secret, mappings for its names.

    Raises:
        HfpruneError: names the place, never the secret.
    """
    for place in _secrets(values, where):
        raise HfpruneError(
            f"{place} looks like a secret. Take it out: a token is given by `hf auth login` or"
            " HF_TOKEN, and never in a file that is kept or published."
        )


def _secrets(values: Any, where: str) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(value, str) and value and _KEYS.search(str(key)):
                yield f"{where}.{key}"
            yield from _secrets(value, f"{where}.{key}")
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _secrets(value, f"{where}[{index}]")
    elif isinstance(values, str) and _VALUES.search(values):
        yield where
