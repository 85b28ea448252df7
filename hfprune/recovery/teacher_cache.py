"""A teacher's predictions on disk: computed once for a training set, read by every student.

A cache is found by what it was made of: the batches' tensors, the teacher's weights and config, and
how much of each distribution is kept. So it cannot serve another data set, another tokenizer or a
teacher that was trained on; those get a folder of their own beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError, RecipeError
from hfprune.recovery.losses import Counted, check_shapes

ROW = "teacher_row"
"""The key of a batch that says which rows of the training set it holds: int64, (batch,)."""

_VERSION = 2
_BATCH = 16
_META = "cache.json"

Batch = dict[str, Any]
Collate = Callable[[list[Any]], Batch]
Predict = Callable[[Batch], Tensor]
Count = Callable[[Batch], Counted]


class Numbered(Dataset):
    """A data set whose rows know their numbers, under `ROW`."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._rows[index], ROW: index}


def numbered(collate: Collate) -> Collate:
    """The collator, for rows of `Numbered` too: their numbers become a tensor of the batch."""

    def collate_numbered(rows: list[Any]) -> Batch:
        numbers = [row[ROW] for row in rows if ROW in row]
        batch = collate([{k: v for k, v in row.items() if k != ROW} for row in rows])
        if numbers:
            batch[ROW] = torch.tensor(numbers)
        return batch

    return collate_numbered


class TeacherCache:
    """The logits of a teacher for every prediction of a training set that the loss counts.

    Whole logits are what the teacher would give again, bit for bit. Of the best `top_k` of a
    vocabulary, the rest of the mass is spread evenly over the other entries, so that the
    probabilities kept are the teacher's own at temperature 1; with `top_k` of the whole vocabulary
    nothing is lost. Disk: 6 bytes x top_k per counted token in bfloat16.

    Args:
        folder: where caches lie, one folder each.
        top_k: logits kept per token; None for all. Of one prediction per example all are kept.

    Raises:
        RecipeError: top_k is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], top_k: int | None = None) -> None:
        if top_k is not None and top_k < 1:
            raise RecipeError(f"top_k is {top_k}; give 1 or more, or None for all logits.")
        self._folder = Path(folder)
        self._top_k = top_k
        self._parts: list[Any] = []
        self._offsets: list[Tensor] = []
        self._per_part = 0

    def prepare(
        self,
        teacher: PreTrainedModel,
        rows: Numbered,
        collate: Collate,
        predict: Predict,
        *,
        count: Count,
        accelerator: Accelerator,
        per_part: int = 1024,
    ) -> None:
        """Find the cache of this teacher and training set, or make it; each process its share.

        An interrupted making goes on with the parts that are there.

        Args:
            teacher: in eval mode.
            rows: the training set.
            collate: makes a batch of rows.
            predict: a batch -> the teacher's logits on it.
            count: what counts in a batch.
            accelerator: of the run.
            per_part: rows in a file.

        Raises:
            RecipeError: the data set or the collator gives another batch for the same rows.
        """
        first = range(min(_BATCH, len(rows)))
        if _digest(_batches(rows, collate, first)) != _digest(_batches(rows, collate, first)):
            raise RecipeError(
                "The data set or its collator draws anew for every batch (random masking or"
                " augmentation): the teacher's outputs cannot be cached. Draw once, before"
                " training, or train without a cache."
            )
        made_of = [_VERSION, self._top_k, per_part, _of_teacher(teacher)]
        made_of.append(_digest(_batches(rows, collate)))
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]
        path = self._folder / key
        if not (path / _META).is_file():
            accelerator.wait_for_everyone()  # all have looked before the first writes
            self._fill(path, rows, collate, predict, count, accelerator, per_part)
        self._open(path)

    def logits(self, rows: Tensor, predictions: Tensor) -> Tensor:
        """The teacher's logits on a batch, on the mask's device; 0 where nothing counts.

        Args:
            rows: which rows of the training set the batch holds.
            predictions: `Counted.predictions` of the batch.

        Returns:
            (*predictions.shape, classes), in the teacher's dtype.

        Raises:
            DataError: the batch counts other predictions than those that were cached.
        """
        counts = predictions.flatten(1).sum(1) if predictions.dim() > 1 else predictions.long()
        found = [self._of_row(row) for row in rows.tolist()]
        for row, count, values in zip(rows.tolist(), counts.tolist(), found, strict=True):
            if count != len(values):
                raise DataError(
                    f"The batch counts {count} predictions of row {row}, the teacher's cache holds"
                    f" {len(values)}: rows must be collated alike whatever batch they are in."
                )
        values = torch.cat(found).to(predictions.device)
        logits = values.new_zeros(*predictions.shape, values.shape[-1])
        logits[predictions] = values
        return logits

    def _of_row(self, row: int) -> Tensor:
        """(predictions of a row, classes)."""
        part, offsets = self._parts[row // self._per_part], self._offsets[row // self._per_part]
        begin, end = offsets[row % self._per_part : row % self._per_part + 2].tolist()
        values: Tensor = part.get_slice("values")[begin:end]
        if "indices" not in part.keys():  # noqa: SIM118 - a safetensors file, not a dict
            return values
        indices = part.get_slice("indices")[begin:end]
        tail = part.get_slice("tail")[begin:end]
        whole = tail.unsqueeze(1).repeat(1, int(part.metadata()["classes"]))
        return whole.scatter(1, indices.long(), values.to(whole.dtype))

    def _open(self, path: Path) -> None:
        meta = json.loads((path / _META).read_text())
        self._per_part = meta["per_part"]
        files = [path / _part(number) for number in range(meta["parts"])]
        self._parts = [safe_open(file, "pt") for file in files]
        self._offsets = [part.get_tensor("offsets") for part in self._parts]

    def _fill(
        self,
        path: Path,
        rows: Numbered,
        collate: Collate,
        predict: Predict,
        count: Count,
        accelerator: Accelerator,
        per_part: int,
    ) -> None:
        parts = math.ceil(len(rows) / per_part)
        making = path.with_name(f"{path.name}.tmp")
        making.mkdir(parents=True, exist_ok=True)
        own = range(accelerator.process_index, parts, accelerator.num_processes)
        for number in tqdm(own, "caching the teacher", delay=2, leave=False):
            file = making / _part(number)
            if file.exists():
                continue
            numbers = range(number * per_part, min((number + 1) * per_part, len(rows)))
            found, counts = [], []
            for batch in _batches(rows, collate, numbers):
                here = {
                    name: value.to(accelerator.device) if torch.is_tensor(value) else value
                    for name, value in batch.items()
                    if name != ROW
                }
                predictions = count(here).predictions
                logits = predict(here)
                check_shapes("logits", logits, logits, predictions, trailing=1)
                found.append(logits[predictions].cpu())
                counts += predictions.reshape(len(predictions), -1).sum(1).tolist()
            tensors = self._kept(torch.cat(found), per_token=predictions.dim() > 1)
            tensors["offsets"] = torch.tensor([0, *counts]).cumsum(0)
            partial = file.with_suffix(".partial")
            save_file(tensors, partial, {"classes": str(found[0].shape[-1])})
            os.replace(partial, file)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not path.exists():
            (making / _META).write_text(json.dumps({"parts": parts, "per_part": per_part}) + "\n")
            making.rename(path)
        accelerator.wait_for_everyone()

    def _kept(self, logits: Tensor, per_token: bool) -> dict[str, Tensor]:
        """What is stored of logits (predictions, classes)."""
        classes = logits.shape[-1]
        if not per_token or self._top_k is None or self._top_k >= classes:
            return {"values": logits.contiguous()}
        values, indices = logits.topk(self._top_k)
        rest = logits.float().scatter(1, indices, -math.inf).logsumexp(1)
        tail = rest - math.log(classes - self._top_k)
        return {"values": values, "indices": indices.to(torch.int32), "tail": tail}


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _batches(
    rows: Numbered, collate: Collate, numbers: Sequence[int] | None = None
) -> Iterator[Batch]:
    """The rows of the given numbers, all by default, in order and in batches of one size."""
    numbers = range(len(rows)) if numbers is None else numbers
    for start in range(0, len(numbers), _BATCH):
        yield collate([rows[n] for n in numbers[start : start + _BATCH]])


def _of_teacher(teacher: PreTrainedModel) -> str:
    """Hash of a model's config and weights."""
    found = hashlib.sha256(type(teacher).__name__.encode())
    config = teacher.config.to_dict()
    config.pop("_name_or_path", None)  # where it was loaded from does not matter
    config.pop("use_cache", None)
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in teacher.state_dict().items():
        _add(found, name, parameter)
    return found.hexdigest()


def _digest(batches: Iterable[Batch]) -> str:
    """Hash of the tensors of batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            if torch.is_tensor(batch[name]):
                _add(found, name, batch[name])
    return found.hexdigest()


def _add(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
