"""From rows to what a model is called with and judged by: one function per kind of task.

Each takes the splits as they were loaded, the model's tokenizer or image processor and the recipe's
`data`, and gives the splits as examples. Each raises DataError if a column is missing or holds what
the task cannot read. Splits are those of `data`, such as "train", or go by the whole name of
another field of the recipe, such as "measure.also.news".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfprune.errors import DataError, unknown
from hfprune.importance.batches import IGNORED
from hfprune.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BESIDE = ("question", "context", "answers", "offsets")
"""Columns of examples with which the model is not called."""

OUTSIDE = (-1, -1)
"""The place in the context of a token that is not in it."""

_SLACK = 2  # letters by which real data (SQuAD) are off

Splits = Mapping[str, "Dataset"]
Rows = dict[str, list[Any]]


def labelled(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Dataset]:
    """Texts, or pairs of them, of a class each: input_ids, attention_mask, ... and labels."""
    texts = ["text", "text_pair"] if data.text_pair else ["text"]
    _check_columns(splits, data, *texts, "label")
    _check_texts(splits, data, *texts)
    _check_classes(splits, data)

    def encode(rows: Rows) -> Rows:
        encoded = tokenizer(
            *(rows[getattr(data, t)] for t in texts), truncation=True, max_length=data.max_length
        )
        return {**encoded, "labels": rows[data.label]}

    return _mapped(splits, encode)


def blocks(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Dataset]:
    """Texts joined and cut into blocks of `max_length` tokens, each its own label.

    Raises:
        DataError: also where a split is shorter than one block.
    """
    _check_columns(splits, data, "text")
    _check_texts(splits, data, "text")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    size = data.max_length - len(begin)
    if size < 1:
        raise DataError(f"max_length {data.max_length} has no room for text after the first token.")

    def join(rows: Rows) -> Rows:
        pieces = tokenizer([text + "\n" for text in rows[data.text]], add_special_tokens=False)
        stream = [token for piece in pieces["input_ids"] for token in piece]
        cut = [begin + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        return {"input_ids": cut, "labels": cut, "attention_mask": [[1] * len(c) for c in cut]}

    made = {}
    for split, dataset in splits.items():
        made[split] = dataset.map(
            join, batched=True, batch_size=len(dataset), remove_columns=dataset.column_names
        )
        if not len(made[split]):
            raise DataError(
                f"{_field(split)} has fewer than {size} tokens: not one block of max_length."
            )
    return made


def rewritten(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Dataset]:
    """Texts and the texts to make of them; the first follow the prefix."""
    _check_columns(splits, data, "text", "label")
    _check_texts(splits, data, "text", "label")

    def encode(rows: Rows) -> Rows:
        sources = [data.prefix + text for text in rows[data.text]]
        encoded = tokenizer(sources, truncation=True, max_length=data.max_length)
        targets = tokenizer(
            text_target=rows[data.label], truncation=True, max_length=data.max_target_length
        )
        return {**encoded, "labels": targets["input_ids"]}

    return _mapped(splits, encode)


def tagged(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Dataset]:
    """Texts as lists of words with a class each, which the first token of the word is to be of."""
    _check_columns(splits, data, "text", "label")
    _check_is_fast(tokenizer)
    for split, dataset in splits.items():
        pairs = zip(dataset[data.text], dataset[data.label], strict=True)
        for row, (words, tags) in enumerate(pairs):
            lists = isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags)
            named = lists and all(isinstance(word, str) for word in words)
            if not named or not all(type(tag) is int and tag >= 0 for tag in tags):
                raise DataError(
                    f"{_field(split)}: {data.text!r} and {data.label!r} of example {row} must be"
                    " lists of equal length, of words and of the numbers of their classes, 0 or"
                    " more."
                )

    def encode(rows: Rows) -> Rows:
        encoded = tokenizer(
            rows[data.text], is_split_into_words=True, truncation=True, max_length=data.max_length
        )
        labels = []
        for row, tags in enumerate(rows[data.label]):
            words = encoded.word_ids(row)
            pairs = zip(words, [None, *words], strict=False)
            labels.append([IGNORED if n is None or n == before else tags[n] for n, before in pairs])
        return {**encoded, "labels": labels}

    return _mapped(splits, encode)


def answered(splits: Splits, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Dataset]:
    """Questions with a context that holds their answers, in the form of SQuAD: {"text": [...],
    "answer_start": [...]}, both empty where there is none.

    A context too long for one example becomes several windows that share `stride` tokens. The
    answer's place is its first and last token in the window, or the first of all (0) where the
    window does not hold it. What is needed to judge an answer is kept beside: the question's
    number, the context, the answers, and where in the context each token stands.
    """
    context = data.text_pair
    assert context is not None  # the task needs it
    _check_columns(splits, data, "text", "text_pair", "label")
    _check_texts(splits, data, "text", "text_pair")
    _check_is_fast(tokenizer)
    for split, dataset in splits.items():
        texts, labels = list(dataset[context]), list(dataset[data.label])
        for row, answers in enumerate(labels):
            if not _are_answers(answers):
                raise DataError(
                    f"{_field(split)}: the {data.label!r} of example {row} is {answers!r}; it must"
                    ' be of the form {"text": [...], "answer_start": [...]}, as many texts as'
                    " numbers of their first letters."
                )
        _warn_of_misplaced(split, context, texts, labels)
    tokenizer.padding_side = "right"  # places count from the left

    def encode(rows: Rows, numbers: list[int]) -> Rows:
        questions = [question.strip() for question in rows[data.text]]
        longest = max(map(len, tokenizer(questions, add_special_tokens=False)["input_ids"]))
        room = data.max_length - tokenizer.num_special_tokens_to_add(pair=True) - longest
        if room <= data.stride:
            raise DataError(
                f"With a question of {longest} tokens, max_length {data.max_length} leaves {room}"
                f" for its context, and windows share {data.stride}: give a greater max_length or a"
                " smaller stride."
            )
        encoded = tokenizer(
            questions,
            rows[context],
            truncation="only_second",
            max_length=data.max_length,
            stride=data.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        made: Rows = {name: [] for name in (*BESIDE, "start_positions", "end_positions")}
        places = encoded.pop("offset_mapping")
        for window, row in enumerate(encoded.pop("overflow_to_sample_mapping")):
            parts = encoded.sequence_ids(window)
            offsets = [
                tuple(place) if part == 1 else OUTSIDE
                for place, part in zip(places[window], parts, strict=True)
            ]
            start, end = _place(offsets, rows[data.label][row])
            values = (numbers[row], rows[context][row], rows[data.label][row]["text"])
            for name, value in zip(made, (*values, offsets, start, end), strict=True):
                made[name].append(value)
        return {**encoded, **made}

    return {
        split: dataset.map(
            encode, batched=True, with_indices=True, remove_columns=dataset.column_names
        )
        for split, dataset in splits.items()
    }


def _are_answers(answers: Any) -> bool:
    """Whether a label is the answers to a question, perhaps none."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        return False
    texts, starts = answers["text"] or [], answers["answer_start"] or []
    lists = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    return (
        lists
        and all(isinstance(text, str) for text in texts)
        and all(type(start) is int and start >= 0 for start in starts)
    )


def _warn_of_misplaced(
    split: str, context: str, texts: list[str], labels: list[dict[str, Any]]
) -> None:
    """Warn of answers that do not stand where they say; a few of many thousand do no harm."""
    pairs = zip(texts, labels, strict=True)
    wrong = [n for n, (text, a) in enumerate(pairs) if a["text"] and not _stands_there(a, text)]
    if wrong:
        text, answers = texts[wrong[0]], labels[wrong[0]]
        begin = answers["answer_start"][0]
        logger.warning(
            "%s: %d of %d answers do not stand where `answer_start` says, counted in letters from"
            " 0, and teach other words. In example %d %.80r is at %d, where %r has %r.",
            _field(split),
            len(wrong),
            len(labels),
            wrong[0],
            answers["text"][0],
            begin,
            context,
            text[begin : begin + 40],
        )


def _stands_there(answers: Mapping[str, Any], context: str) -> bool:
    """Whether the first answer, which is the one to learn, stands where it says, or as good as."""
    text, begin = answers["text"][0], answers["answer_start"][0]
    around = context[max(0, begin - _SLACK) : begin + len(text) + _SLACK]
    return text.strip() in around


def _place(offsets: list[tuple[int, int]], answers: Mapping[str, Any]) -> tuple[int, int]:
    """The first and last token of the first answer; (0, 0) where it is not wholly among them."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [n for n, place in enumerate(offsets) if place != OUTSIDE]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    touched = [n for n in inside if offsets[n][0] < end and offsets[n][1] > begin]
    return (touched[0], touched[-1]) if touched else (0, 0)


def pictures(splits: Splits, processor: BaseImageProcessor, data: Data) -> dict[str, Dataset]:
    """Images of a class each: pixel_values and labels, made when they are asked for: what a
    processor makes of an image is much larger than its file.
    """
    import datasets

    _check_columns(splits, data, "image", "label")
    _check_classes(splits, data)

    def encode(rows: Rows) -> Rows:
        images = [image.convert("RGB") for image in rows[data.image]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": rows[data.label]}

    return {
        split: dataset.select_columns([data.image, data.label])
        .cast_column(data.image, datasets.Image())
        .with_transform(encode)
        for split, dataset in splits.items()
    }


def _mapped(splits: Splits, encode: Any) -> dict[str, Dataset]:
    return {
        split: dataset.map(encode, batched=True, remove_columns=dataset.column_names)
        for split, dataset in splits.items()
    }


def _field(split: str) -> str:
    """The field of the recipe that names a split's file."""
    return split if "." in split else f"data.{split}"


def _check_columns(splits: Splits, data: Data, *settings: str) -> None:
    for split, dataset in splits.items():
        for setting in settings:
            column, there = getattr(data, setting), dataset.column_names
            if column not in there:
                raise DataError(
                    f"{_field(split)}: {unknown('column', column, there)} Name it in"
                    f" `data.{setting}`."
                )


def _check_texts(splits: Splits, data: Data, *settings: str) -> None:
    for split, dataset in splits.items():
        for column in (getattr(data, setting) for setting in settings):
            for row, text in enumerate(dataset[column]):
                if not isinstance(text, str):
                    raise DataError(
                        f"{_field(split)}: the {column!r} of example {row} is {text!r}; it must be"
                        " a text."
                    )


def _check_classes(splits: Splits, data: Data) -> None:
    for split, dataset in splits.items():
        for row, label in enumerate(dataset[data.label]):
            if type(label) is not int or label < 0:
                raise DataError(
                    f"{_field(split)}: the {data.label!r} of example {row} is {label!r}; it must be"
                    " the number of a class, 0 or more."
                )


def _check_is_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell where a token comes from; this task needs a"
            " model with a fast tokenizer (tokenizer.json)."
        )
