"""The errors of hfprune: each message says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HfpruneError(Exception):
    """Base of every error that hfprune raises on purpose."""


class UnsupportedModelError(HfpruneError):
    """The model's family has no row in the table, or its state forbids surgery."""


class BudgetError(HfpruneError, ValueError):
    """A budget cannot be read, or no structure meets it."""


class RecipeError(HfpruneError, ValueError):
    """A recipe names an unknown key, holds a value of the wrong type, or asks the impossible."""


class DataError(HfpruneError, ValueError):
    """The examples given cannot serve: none at all, no labels, or a loss that is not a number."""


class CheckpointError(HfpruneError):
    """A pruned checkpoint is damaged, hostile, from a newer version, or did not come back equal."""


class PublishError(HfpruneError):
    """A model cannot be published, or what was published did not come back equal."""


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """Sentence for an unknown name: what was given, the nearest name, and all that are allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {given!r}.{hint} Available: {', '.join(names)}."


def expect(value: object, kinds: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Refuse an argument of another type, before something deep inside fails on it.

    Args:
        value: what was given.
        kinds: the types that are allowed.
        name: of the argument.
        wanted: what is allowed, in words.

    Raises:
        HfpruneError: says all three.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):  # a bool is an int, and means none
        kind = type(value).__name__
        raise HfpruneError(f"{name} must be {wanted}, not {value!r:.80} ({kind}).")
