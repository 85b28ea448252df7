"""Quality of what a model finds inside of texts: answers to questions, and named entities."""

from __future__ import annotations

import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfprune.errors import DataError
from hfprune.evaluation.evaluate import (
    Quality,
    check_logits,
    inference,
    labels_of,
    model_inputs,
    progress_bar,
    quality_of,
)
from hfprune.importance.batches import IGNORED

if TYPE_CHECKING:
    import torch

LONGEST = 30
"""Tokens of an answer at most, as everywhere on SQuAD."""

Span = tuple[int, int, str]
"""First word, first word after it, and type of an entity."""


class _Found(NamedTuple):
    """The best answer to a question so far, and the logit of having none."""

    logit: float
    text: str
    none: float


def evaluate_answers(
    model: torch.nn.Module,
    batches: Iterable[tuple[Mapping[str, torch.Tensor], Sequence[Mapping[str, Any]]]],
    *,
    progress: bool = True,
    seed: int = 0,
) -> Quality:
    """Score answers cut out of contexts, as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250):
    the F1 of their words, and beside it how many match exactly; the best of the right answers
    counts.

    The answer is the span of 30 tokens at most, in any window of the question's context, with the
    greatest sum of start and end logit. Where some question has no answer, "none" competes, by the
    logits of the windows' first tokens (Rajpurkar et al. 2018, arXiv:1806.03822).

    Args:
        model: Called with a batch's tensors; its output has `start_logits` and `end_logits`
            (batch, tokens).
        batches: A batch, padded on the right, and its windows: `question` is its number, `context`
            the text, `answers` the right ones, `offsets` where in the context each token begins and
            ends, negative outside of it.
        progress: Show a bar once it takes longer than two seconds.
        seed: Of the bootstrap, which draws questions.

    Raises:
        DataError: No questions, or logits that are not finite.
    """
    best: dict[int, _Found] = {}
    right: dict[int, Sequence[str]] = {}
    with inference(model) as device:
        for batch, windows in progress_bar(batches, "answers", progress):
            outputs = model(**model_inputs(batch, device))
            start, end = (outputs[f"{side}_logits"].float().cpu() for side in ("start", "end"))
            check_logits(start, end)
            for window, begins, ends in zip(windows, start.numpy(), end.numpy(), strict=True):
                number = window["question"]
                found = _best_span(window, begins, ends)
                before = best.get(number, found)
                larger = max(before, found, key=lambda f: f.logit)
                best[number] = larger._replace(none=min(before.none, found.none))
                right[number] = window["answers"]
    if not right:
        raise DataError("No questions to evaluate on: the batches are empty or already used up.")
    may_be_none = not all(right.values())
    numbers = sorted(right)
    texts = ["" if may_be_none and best[n].none > best[n].logit else best[n].text for n in numbers]
    pairs = [(text, right[n] or [""]) for text, n in zip(texts, numbers, strict=True)]
    exact = [max(float(_words(text) == _words(own)) for own in owns) for text, owns in pairs]
    shared = [max(word_f1(text, own) for own in owns) for text, owns in pairs]
    asked = [zlib.crc32(repr((n, list(right[n]))).encode()) for n in numbers]
    columns = {"f1": np.array(shared), "exact_match": np.array(exact), "question": np.array(asked)}
    return quality_of("answer_f1", columns, seed, beside=("exact_match",))


def _best_span(window: Mapping[str, Any], start: np.ndarray, end: np.ndarray) -> _Found:
    """The best answer in one window, logits (tokens,) each."""
    places = np.array(window["offsets"])
    none = float(start[0] + end[0])
    (inside,) = np.nonzero(places[:, 0] >= 0)
    if not len(inside):
        return _Found(-np.inf, "", none)
    sums = start[inside][:, None] + end[inside][None, :]
    lengths = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    sums[(lengths < 0) | (lengths >= LONGEST)] = -np.inf
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    begins, ends = places[inside[first], 0], places[inside[last], 1]
    return _Found(float(sums[first, last]), window["context"][begins:ends], none)


def _words(text: str) -> list[str]:
    """Words as SQuAD compares them: without case, punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def word_f1(given: str, right: str) -> float:
    """F1 of the words of two answers; 1 if neither has any."""
    ours, theirs = _words(given), _words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def evaluate_entities(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    progress: bool = True,
    seed: int = 0,
) -> Quality:
    """F1 of named entities, each right if its words and its type are, as at CoNLL-2003.

    Types are read from the names of the classes in the model's config: B-PER begins an entity,
    I-PER goes on with it, and any other name is a type whose neighbours are one entity; "O", or
    class 0 where classes have no names, is none.

    Args:
        model: Called with a batch's tensors; its output has `logits` (batch, tokens, classes).
        batches: Dicts of tensors; `labels` (batch, tokens) are class numbers, -100 where a token
            does not begin a word.
        progress: Show a bar once it takes longer than two seconds.
        seed: Of the bootstrap, which draws texts.

    Raises:
        DataError: No examples, no labels, no entity is right in any of them, or logits that are not
            finite.
    """
    names: Mapping[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    rows: list[tuple[int, int, int]] = []
    with inference(model) as device:
        for batch in progress_bar(batches, "entities", progress):
            labels = labels_of(batch)
            logits = model(**model_inputs(batch, device)).logits
            check_logits(logits)
            predicted = logits.argmax(-1).cpu()
            for given, label in zip(predicted, labels.cpu(), strict=True):
                counted = label != IGNORED
                found, right = (
                    entities([names[int(n)] for n in tags[counted]]) for tags in (given, label)
                )
                rows.append((len(found & right), len(found), len(right)))
    columns = dict(zip(("hits", "predicted", "labelled"), np.array(rows).T, strict=False))
    if not rows or not columns["labelled"].sum():
        raise DataError("No entities to evaluate on: the batches are empty, or name none.")
    return quality_of("entity_f1", columns, seed)


def entities(names: Sequence[str]) -> set[Span]:
    """The entities that a text's words make, each named by its class."""
    found: set[Span] = set()
    begun, kind = 0, ""
    for number, name in enumerate([*names, "O"]):
        mark, of = (name[0], name[2:]) if name[:2] in ("B-", "I-") else ("", name)
        of = "" if name in ("O", "LABEL_0") else of
        if kind and (of != kind or mark == "B"):
            found.add((begun, number, kind))
            kind = ""
        if of and not kind:
            begun, kind = number, of
    return found
