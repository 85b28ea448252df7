"""The files by which `benchmarks/compare.py` and a competitor in its own environment meet.

A job is a JSON file: a stock checkpoint, sentences as token ids, and the shares of MACs to keep.
The answer to each method and share is a JSON file: the widths that are left, and the logits of the
test sentences. Widths are counted and logits are judged by `compare.py`, for all alike. This module
is read in both environments and needs Python and torch only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

BATCH = 32


@dataclass(frozen=True)
class Widths:
    """What is left of a BERT encoder.

    Attributes:
        hidden: width of the residual stream.
        head_size: columns of one head.
        heads: heads of each layer.
        neurons: FFN neurons of each layer.
    """

    hidden: int
    head_size: int
    heads: list[int]
    neurons: list[int]

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of the layers for one sentence of `tokens` tokens."""
        per_head = self.head_size * (4 * self.hidden * tokens + 2 * tokens**2)
        return sum(self.heads) * per_head + sum(self.neurons) * 2 * self.hidden * tokens

    def params(self) -> int:
        """Weights and biases of the layers."""
        per_head = self.head_size * (4 * self.hidden + 3)
        per_layer = 6 * self.hidden  # two biases, two normalizations
        return (
            sum(self.heads) * per_head
            + sum(self.neurons) * (2 * self.hidden + 1)
            + len(self.heads) * per_layer
        )


@dataclass(frozen=True)
class Job:
    """What a competitor is asked for.

    Attributes:
        dense: folder of the checkpoint.
        calibration: JSONL of {"input_ids", "label"}.
        test: JSONL of {"input_ids"}.
        tokens: length of the sentence whose MACs are counted.
        shares: of the encoder's MACs, to be kept.
        output: folder of the answers.
        source: folder of the competitor's code, if it is no package.
    """

    dense: str
    calibration: str
    test: str
    tokens: int
    shares: list[float]
    output: str
    source: str = ""

    @classmethod
    def load(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    def answer(self, method: str, share: float) -> Path:
        """The file of an answer; it is there if and only if it is whole."""
        return Path(self.output) / f"{method}-{share * 100:g}%.json"

    def batches(self, path: str) -> list[dict[str, torch.Tensor]]:
        """Padded batches in the order of the file, with `labels` where it has them."""
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [_padded(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]

    def go(self, prune: Callable[[str, float], tuple[Any, Widths]], methods: Sequence[str]) -> None:
        """Write the answers that are missing; `prune(method, share)` gives a model to call with a
        batch, and its widths.
        """
        for method, share in self._missing(methods):
            model, widths = prune(method, share)
            with torch.no_grad():
                logits = [row for batch in self.batches(self.test) for row in model(**batch).logits]
            answer = {"widths": asdict(widths), "logits": torch.stack(logits).tolist()}
            final = self.answer(method, share)
            temporary = final.with_suffix(".tmp")
            temporary.write_text(json.dumps(answer) + "\n")
            temporary.replace(final)
            print(f"{final.stem}: {widths.heads} heads, {widths.neurons} neurons", flush=True)

    def _missing(self, methods: Sequence[str]) -> Iterator[tuple[str, float]]:
        for method in methods:
            for share in self.shares:
                if not self.answer(method, share).is_file():
                    yield method, share


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    missing = [length - len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [0] * n for row, n in zip(rows, missing, strict=True)]
    mask = [[1] * (length - n) + [0] * n for n in missing]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows])
    return batch


def bert_widths(model: Any, head_size: int) -> Widths:
    """Widths of a pruned transformers BERT, read off its matrices, as modules may not know."""
    layers = model.bert.encoder.layer
    queries = [layer.attention.self.query.weight for layer in layers]
    return Widths(
        hidden=queries[0].shape[1],
        head_size=head_size,
        heads=[query.shape[0] // head_size for query in queries],
        neurons=[layer.intermediate.dense.weight.shape[0] for layer in layers],
    )
