r"""What scoring costs: processor time and FLOPs over those of a forward pass on the same batches,
and memory over that of a forward pass which keeps its activations.

    python benchmarks/scoring_cost.py .cache/minilm
    python benchmarks/scoring_cost.py .cache/gemma3-270m --gguf-file gemma-3-270m-q4_k_m.gguf \
        --examples 4 --batch-size 2 --tokens 256

The lower bound in time is about 2, a forward pass and a backward pass over activations, or what is
left of it without the rows that have no gradient; what it aims at is 2.3. Full weight gradients, as
Taylor scoring by weights needs them, stand beside it. Each takes turns with forward passes, batch
by batch, so that a busy machine slows both, and the ratios are medians of rounds. On a few of the
batches are counted FLOPs, which no busy machine blurs, as torch's own counter sees them (products
of matrices, not the inverses that rank units), and memory, what torch has allocated at most. It
prints a table and draws it in runs/benchmark-scoring-cost/.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from quality import ROOT
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import hfprune
from hfprune.importance.batches import Batch
from hfprune.importance.losses import labels_loss
from hfprune.structure.fitness import forget_gguf

RUNS = ROOT / "runs" / "benchmark-scoring-cost"
FORWARD, KEEPING = "forward", "forward, activations kept"
_FEW = 4
"""Batches on which memory is measured, because every allocation is noted down, and on which
FLOPs are counted.
"""
AIMS = {"time": 2.3, "memory": 1.3}
"""What scoring should cost at most, over a forward pass and over one that keeps its activations."""


def forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    """The lower bound is twice this."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def forward_keeping_activations(model: PreTrainedModel, batches: list[Batch]) -> None:
    """What training holds when its backward pass begins."""
    for batch in batches:
        loss = labels_loss(model, batch)
        del loss


def weight_gradients(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Scoring by weights: |w dL/dw| of every weight, summed over batches."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        labels_loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += (parameter.detach() * parameter.grad).abs_()
        model.zero_grad()


ONE_PASS = ["taylor", "fisher", "magnitude", "activation", "random"]
WAYS: dict[str, Callable[[PreTrainedModel, list[Batch]], object]] = {
    FORWARD: forward,
    KEEPING: forward_keeping_activations,
    "score, fisher": lambda m, b: hfprune.score(m, b, ["fisher"]),
    "score, five criteria": lambda m, b: hfprune.score(m, b, ONE_PASS),
    "score, sampled labels": lambda m, b: hfprune.score(m, b, ONE_PASS, loss="sampled"),
    "score, checkpointing": lambda m, b: hfprune.score(m, b, ONE_PASS, checkpointing=True),
    "score, reconstruction": lambda m, b: hfprune.score(m, b, ["reconstruction"]),
    "score, all six criteria": lambda m, b: hfprune.score(m, b, [*ONE_PASS, "reconstruction"]),
    "full weight gradients": weight_gradients,
}


def main() -> None:
    """Measure all ways, print their ratios and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/minilm")
    parser.add_argument("--gguf-file", help="a language model's weights in the model's folder")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], choices=list(WAYS)[2:], metavar="WAY")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, batches = load(arguments)
    ways = {name: way for name, way in WAYS.items() if name not in arguments.without}
    twin = copy.deepcopy(model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(model, Alternating(batches[:1], twin))  # warms up
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            alternating = Alternating(batches, twin)
            start = time.process_time()
            way(model, alternating)
            own = time.process_time() - start - alternating.seconds
            seconds[name].append(own)
            ratios[name].append(own / alternating.seconds)
    memory = {name: peak(way, model, batches[:_FEW]) for name, way in ways.items()}
    flops = {name: flops_of(way, model, batches[:_FEW]) for name, way in ways.items()}
    costs = {
        name: Cost(
            statistics.median(seconds[name]),
            statistics.median(ratios[name]),
            flops[name] / flops[FORWARD],
            memory[name] / 1e6,
            memory[name] / memory[KEEPING],
        )
        for name in ways
    }
    show(costs)
    figure = RUNS / f"{Path(arguments.model).name}-{arguments.examples}x{arguments.tokens}.png"
    draw(costs, figure)
    print(f"The figure is in {figure.relative_to(ROOT)}.")


class Alternating(list[Batch]):
    """Batches; before each is handed out, the model's twin makes a forward pass on it.

    It is a twin because a way may have put hooks on its model.

    Attributes:
        seconds: processor time of those forward passes.
    """

    def __init__(self, batches: list[Batch], twin: PreTrainedModel) -> None:
        super().__init__(batches)
        self._twin = twin
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            start = time.process_time()
            forward(self._twin, [batch])
            self.seconds += time.process_time() - start
            yield batch


@dataclass(frozen=True)
class Cost:
    """Of one way: processor seconds over all batches, and MB; each as it is and as a ratio, and
    the ratio of FLOPs.
    """

    seconds: float
    time: float
    flops: float
    megabytes: float
    memory: float


def show(costs: dict[str, Cost]) -> None:
    """Print a row per way."""
    over = f"over {FORWARD}"
    table = Table("what", "seconds", over, f"FLOPs {over}", "MB", f"over {KEEPING}")
    for name, cost in costs.items():
        table.add_row(
            name,
            f"{cost.seconds:.2f}",
            f"{cost.time:.2f}",
            f"{cost.flops:.2f}",
            f"{cost.megabytes:.0f}",
            f"{cost.memory:.2f}",
        )
    Console().print(table)


def draw(costs: dict[str, Cost], path: Path) -> None:
    """The ratios as bars, with what they should be at most."""
    import matplotlib.pyplot as plt

    names = list(costs)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axes, what, base in zip(panels, ("time", "memory"), (FORWARD, KEEPING), strict=True):
        bars = axes.barh(names, [getattr(cost, what) for cost in costs.values()])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(AIMS[what], color="gray", linestyle="--", linewidth=0.8)
        axes.margins(x=0.15)
        axes.set_xlabel(f"{what} over {base};\nat most {AIMS[what]} is the aim")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, list[Batch]]:
    """The model in float32, and batches of random tokens with labels."""
    torch.manual_seed(0)
    where = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    causal = bool(where)  # which are language models' only
    if not causal:
        made_for = AutoConfig.from_pretrained(arguments.model).architectures or [""]
        causal = made_for[0].endswith("ForCausalLM")
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = kind.from_pretrained(arguments.model, dtype=torch.float32, **where).eval()
    forget_gguf(model)
    shape = (arguments.batch_size, arguments.tokens)
    batches = []
    for _ in range(max(1, arguments.examples // arguments.batch_size)):
        ids = torch.randint(1000, model.config.vocab_size, shape)
        labels = ids if causal else torch.randint(2, shape[:1])
        mask = torch.ones_like(ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return model, batches


def flops_of(way: Callable[..., object], model: PreTrainedModel, batches: list[Batch]) -> int:
    """Floating-point operations of matrix products on the way."""
    with FlopCounterMode(display=False) as counter:
        way(model, batches)
    return counter.get_total_flops()


def peak(way: Callable[..., object], model: PreTrainedModel, batches: list[Batch]) -> int:
    """Bytes that torch holds at most while it goes that way, besides what it held before."""
    way(model, batches[:1])  # what is allocated once is not the way's own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        way(model, batches)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)))


if __name__ == "__main__":
    main()
