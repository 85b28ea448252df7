"""From files or a Hub dataset to batches: tokenised once, bucketed by length so that padding is not
computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfprune.errors import DataError, unknown
from hfprune.recipe import SPLITS, Data

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_texts(data: Data) -> dict[str, Dataset]:
    """The three splits as they are on disk or on the Hub.

    Raises:
        DataError: a split is empty, or is no file of the kind that its name says.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    names = {split: getattr(data, split) for split in SPLITS}
    if data.dataset:
        loaded = {
            split: load_dataset(data.dataset, data.config, split=name, revision=data.revision)
            for split, name in names.items()
        }
    else:
        kinds = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
        loaded = {}
        for split, name in names.items():
            ending = name.rsplit(".", 1)[-1]
            if ending not in kinds:
                raise DataError(unknown("kind of data file", ending, kinds))
            try:
                loaded[split] = load_dataset(kinds[ending], data_files=name, split="train")
            except (StopIteration, ValueError, DatasetsError) as error:
                why = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
                raise DataError(
                    f"data.{split} ({name}) has no examples that can be read as {ending}: {why}"
                ) from error
    for split, dataset in loaded.items():
        if not len(dataset):
            raise DataError(f"data.{split} ({names[split]}) has no examples.")
    return loaded


def commit_of(dataset: Dataset) -> str | None:
    """The commit of the Hub dataset that was loaded, by which its cache is named; None for files,
    whose cache has a longer name.
    """
    for file in dataset.cache_files:
        if found := re.search(r"[/\\]([0-9a-f]{40})[/\\]", file["filename"]):
            return found[1]
    return None


def labelled(
    texts: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, data: Data
) -> dict[str, Dataset]:
    """Tokenised examples for classification: input_ids, attention_mask, ... and labels.

    Raises:
        DataError: a column is missing, or a label is not a class number.
    """
    columns = [data.text] + ([data.text_pair] if data.text_pair else [])
    for split, dataset in texts.items():
        for column in (*columns, data.label):
            if column not in dataset.column_names:
                raise DataError(
                    f"data.{split}: {unknown('column', column, dataset.column_names)} Name it in"
                    " `data`."
                )
        for row, label in enumerate(dataset[data.label]):
            if type(label) is not int or label < 0:
                raise DataError(
                    f"data.{split}: the {data.label!r} of example {row} is {label!r}; it must be"
                    " the number of a class, 0 or more."
                )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            *(rows[c] for c in columns), truncation=True, max_length=data.max_length
        )
        return {**encoded, "labels": rows[data.label]}

    return {
        split: dataset.map(encode, batched=True, remove_columns=dataset.column_names)
        for split, dataset in texts.items()
    }


def blocks(
    texts: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, data: Data
) -> dict[str, Dataset]:
    """Texts joined and cut into blocks of `max_length` tokens, each its own label.

    Raises:
        DataError: a column is missing, or a split is shorter than one block.
    """
    for split, dataset in texts.items():
        if data.text not in dataset.column_names:
            raise DataError(
                f"data.{split}: {unknown('column', data.text, dataset.column_names)} Name it in"
                " `data`."
            )
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    size = data.max_length - len(begin)

    def join(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pieces = tokenizer([text + "\n" for text in rows[data.text]], add_special_tokens=False)
        stream = [token for piece in pieces["input_ids"] for token in piece]
        cut = [begin + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        return {"input_ids": cut, "labels": cut, "attention_mask": [[1] * len(c) for c in cut]}

    made = {}
    for split, dataset in texts.items():
        made[split] = dataset.map(
            join, batched=True, batch_size=len(dataset), remove_columns=dataset.column_names
        )
        if not len(made[split]):
            raise DataError(
                f"data.{split} has fewer than {size} tokens: not one block of max_length."
            )
    return made


class Batches(Sequence["dict[str, torch.Tensor]"]):
    """Padded batches of examples of like length; the same every time they are read.

    Args:
        dataset: with input_ids and whatever else the model is called with.
        tokenizer: pads.
        batch_size: examples per batch.
        limit: use the first so many examples only.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        limit: int | None = None,
    ) -> None:
        from transformers import DataCollatorWithPadding

        if limit is not None and limit < len(dataset):
            dataset = dataset.select(range(limit))
        self._dataset = dataset
        self._collate = DataCollatorWithPadding(tokenizer)
        lengths = [len(ids) for ids in dataset["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._indices = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        rows = [self._dataset[i] for i in self._indices[index]]
        return dict(self._collate(rows))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))
