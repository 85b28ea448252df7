"""What scoring costs: seconds of `hfprune.score` over seconds of a forward pass on the same
batches.

    python benchmarks/scoring_cost.py [MODEL]

The limit is about 2: a forward and a backward pass over activations. Full weight gradients, as
    Taylor scoring by weights
needs them, stand beside it. The three take turns, so that a noisy machine slows them all; the
ratios are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import hfprune


def main() -> None:
    """Time the three and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/minilm")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    batches = [
        {
            "input_ids": torch.randint(1000, model.config.vocab_size, (32, arguments.tokens)),
            "attention_mask": torch.ones(32, arguments.tokens, dtype=torch.long),
            "labels": torch.randint(2, (32,)),
        }
        for _ in range(max(1, arguments.examples // 32))
    ]
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, batches),
        "hfprune.score, all criteria": lambda: hfprune.score(model, batches),
        "forward and full weight gradients": lambda: weight_gradients(model, batches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    table = Table("what", "median seconds", "over forward")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["forward"], strict=True)]
        table.add_row(name, f"{statistics.median(values):.2f}", f"{statistics.median(ratios):.2f}")
    Console().print(table)


@torch.no_grad()
def forward(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    """A forward pass over the batches: the lower bound is twice this."""
    for batch in batches:
        model(**batch)


def weight_gradients(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    """What scoring by weight gradients costs: they are computed for every weight."""
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()


if __name__ == "__main__":
    main()
