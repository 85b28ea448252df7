"""From files or a Hub dataset to rows, and from examples to batches: bucketed by length so that
padding is not computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune.errors import DataError, unknown
from hfprune.recipe import SPLITS, Data

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row]], "dict[str, torch.Tensor]"]
"""Makes one padded batch of some examples."""

_SAVED = "state.json"  # what `Dataset.save_to_disk` leaves in its folder
_SAVED_SPLITS = "dataset_dict.json"  # and `DatasetDict.save_to_disk`


def load_splits(data: Data) -> dict[str, Dataset]:
    """The three splits as they are on disk or on the Hub; see `load_named`."""
    return load_named(data, {split: getattr(data, split) for split in SPLITS})


def load_named(data: Data, names: Mapping[str, str], where: str = "data") -> dict[str, Dataset]:
    """Splits of the dataset, or files, by names of one's own.

    Args:
        data: says of which dataset, if any.
        names: {name: split or file}.
        where: part of the recipe that names them, for errors.

    Raises:
        DataError: one is empty, is no file of the kind that its name says, or is not in the
            dataset.
    """
    if data.dataset:
        loaded = {split: _from_hub(f"{where}.{split}", name, data) for split, name in names.items()}
    else:
        loaded = {split: _from_disk(f"{where}.{split}", name) for split, name in names.items()}
    for split, dataset in loaded.items():
        if not len(dataset):
            raise DataError(f"{where}.{split} ({names[split]}) has no examples.")
    return loaded


def _from_hub(field: str, name: str, data: Data) -> Dataset:
    """A split of the dataset."""
    from datasets import load_dataset

    try:
        return load_dataset(data.dataset, data.config, split=name, revision=data.revision)
    except ValueError as error:
        raise DataError(f"{field} ({name}) cannot be read of {data.dataset}: {error}") from error


def _from_disk(field: str, name: str) -> Dataset:
    """A data file, a folder that a dataset was saved to, or one of images in a folder per class."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if Path(name, _SAVED).is_file():
        return load_from_disk(name)
    if Path(name, _SAVED_SPLITS).is_file():
        splits = json.loads(Path(name, _SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
        raise DataError(
            f"{field} ({name}) holds several splits ({', '.join(splits)}): give the folder of one,"
            f" such as {Path(name, splits[0])}."
        )
    kinds = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
    folder, ending = Path(name).is_dir(), name.rsplit(".", 1)[-1]
    if not folder and ending not in kinds:
        raise DataError(unknown("kind of data file", ending, kinds))
    try:
        if folder:
            # Told which files, it does not look for splits in their names.
            files = {"train": f"{escape(name)}/**"}
            return load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
        # pandas would take words such as "null" and "NA" for missing; an empty cell is.
        words = {"keep_default_na": False, "na_values": [""]} if ending == "csv" else {}
        return load_dataset(kinds[ending], data_files=escape(name), split="train", **words)
    except (StopIteration, ValueError, DatasetsError, FileNotFoundError) as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        if not why or "corresponds to no data" in why:  # as `datasets` says it
            why = "it is empty"
        kind = "a folder of images" if folder else ending
        raise DataError(
            f"{field} ({name}) has no examples that can be read as {kind}: {why}"
        ) from error


def files_read(folder: Path) -> list[Path]:
    """The files of a folder of data that are read; `map` leaves others in a saved dataset's."""
    if not (folder / _SAVED).is_file():
        return [path for path in folder.rglob("*") if path.is_file()]
    state = json.loads((folder / _SAVED).read_text(encoding="utf-8"))
    names = [_SAVED, "dataset_info.json", *(file["filename"] for file in state["_data_files"])]
    return [folder / name for name in names]


def commit_of(dataset: Dataset) -> str | None:
    """The commit of the Hub dataset that was loaded, by which its cache is named; None for files,
    whose cache has a longer name.
    """
    for file in dataset.cache_files:
        if found := re.search(r"[/\\]([0-9a-f]{40})[/\\]", file["filename"]):
            return found[1]
    return None


def class_names(splits: Mapping[str, Dataset], column: str) -> list[str]:
    """What the classes of a column of labels, or of lists of them, are called; where the dataset
    does not say, as transformers calls them.

    Raises:
        DataError: the splits name other classes, whose numbers then mean other things.
    """
    named = {split: _names_in(dataset, column) for split, dataset in splits.items()}
    first, *others = named.items()
    for split, names in others:
        if names != first[1]:
            raise DataError(
                f"data.{split} has the classes {names or 'without names'}, and data.{first[0]}"
                f" {first[1] or 'without names'}; give every split examples of every class."
            )
    if first[1]:
        return list(first[1])
    most = max(_largest(label) for dataset in splits.values() for label in dataset[column])
    return [f"LABEL_{number}" for number in range(most + 1)]


def _names_in(dataset: Dataset, column: str) -> list[str] | None:
    """What a dataset itself calls the classes of a column."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    feature = getattr(feature, "feature", feature)  # of each in a list
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def untaught(splits: Mapping[str, Dataset], column: str) -> dict[str, list[int]]:
    """The numbers of the classes that a split has and "train" has not, by the splits with any."""
    seen = {split: _numbers_in(dataset, column) for split, dataset in splits.items()}
    new = {split: sorted(numbers - seen["train"]) for split, numbers in seen.items()}
    return {split: numbers for split, numbers in new.items() if numbers}


def _numbers_in(dataset: Dataset, column: str) -> set[int]:
    """The numbers of the classes that labels, or lists of them, are of."""
    labels = dataset[column]
    return {n for label in labels for n in ([label] if isinstance(label, int) else label)}


def check_other_classes(field: str, other: Dataset, own: Dataset, column: str, known: int) -> None:
    """Refuse other data whose labels mean other classes than those of a run's own.

    Args:
        field: of the recipe, which names the other data.
        other: that data.
        own: a split of the run's own.
        column: of the labels in both.
        known: how many classes the model knows.

    Raises:
        DataError: both name their classes, and differently; or there are more than the model knows.
    """
    names, right = _names_in(other, column), _names_in(own, column)
    if names and right and names != right:
        raise DataError(
            f"{field} has the classes {names}, and the run's own data {right}; give it examples of"
            " every class."
        )
    given = len(class_names({field: other}, column))
    if given > known:
        raise DataError(f"{field}: the labels are of {given} classes, and the model knows {known}.")


def check_classes(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse labels that mean other classes than a model's.

    Args:
        names: of the labels' classes, in the order of their numbers.
        known: names of the model's, likewise.

    Raises:
        DataError: more classes than the model has, or the same names in another order.
    """
    if len(names) > len(known):
        raise DataError(
            f"The labels are of {len(names)} classes, and the model knows {len(known)}: let it"
            " learn the task (`finetune`), or give a model that has."
        )
    given, own = ([name.lower() for name in which] for which in (names, known))
    if given != own and sorted(given) == sorted(own):
        raise DataError(
            f"The labels are numbered {', '.join(names)}, and the model's classes"
            f" {', '.join(known)}: renumber the labels, or let it learn the task"
            " (`finetune`)."
        )


def _largest(label: int | list[int]) -> int:
    return label if isinstance(label, int) else max(label, default=0)


def seen_among(rows: Dataset, taught: Dataset, columns: Sequence[str]) -> int:
    """How many rows have the same texts as one of those that teach; of blank texts none is."""
    known = set(_texts(taught, columns))
    return sum(text in known for text in _texts(rows, columns) if text.strip())


def _texts(dataset: Dataset, columns: Sequence[str]) -> Iterator[str]:
    """The texts of every row as one; words of a list apart, as those of several columns are."""
    for row in zip(*(dataset[column] for column in columns), strict=True):
        yield "\n".join(map(str, row))


def lengths_of(dataset: Dataset) -> list[int]:
    """The tokens of every example; images are all alike."""
    if "input_ids" not in dataset.column_names:
        return [1] * len(dataset)
    return [len(ids) for ids in dataset["input_ids"]]


class Batches(Sequence["dict[str, torch.Tensor]"]):
    """Padded batches of examples of like length; the same every time they are read.

    Args:
        dataset: examples, as a task makes them.
        collate: makes a batch of some of them.
        batch_size: examples per batch.
        limit: use the first so many examples only.

    Attributes:
        longest: the tokens of the longest example.
    """

    def __init__(
        self, dataset: Dataset, collate: Collate, batch_size: int, limit: int | None = None
    ) -> None:
        if limit is not None and limit < len(dataset):
            dataset = dataset.select(range(limit))
        self._dataset = dataset
        self._collate = collate
        lengths = lengths_of(dataset)
        self.longest = max(lengths, default=0)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._indices = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._collate(self.rows(index))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def rows(self, index: int) -> list[Row]:
        """The examples of a batch, with what the model is not called with."""
        return [self._dataset[i] for i in self._indices[index]]

    def with_rows(self) -> Iterator[tuple[dict[str, torch.Tensor], list[Row]]]:
        """Every batch and its examples."""
        for index in range(len(self)):
            rows = self.rows(index)
            yield self._collate(rows), rows
