"""Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", by their own code.

Their repository (no package, no licence to copy it) is imported from the job's `source`. As their
main.py: batches of 32, Fisher information of the masks, search for the MACs, rearrangement, mask
tuning towards the model at the square root of the share. Masks only: the widths are those of what
is not masked. Their code asks for a CUDA device and cupy's LSMR; here the device is the CPU, and
LSMR is scipy's, from which cupy's was made, in float64.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import numpy
import scipy.sparse.linalg
import torch
from transformers import AutoModelForSequenceClassification

from competitors.exchange import Job, Widths


def main() -> None:
    job = Job.load(sys.argv[1])
    sys.path.insert(0, job.source)
    stay_on_cpu()
    model = AutoModelForSequenceClassification.from_pretrained(
        job.dense, attn_implementation="eager"
    ).eval()
    job.go(Kwon(job, model), ["kwon"])


class Kwon:
    """Their main.py, after the model is loaded."""

    def __init__(self, job: Job, model: Any) -> None:
        from prune.fisher import collect_mask_grads

        self.tokens, self.model, self.config = job.tokens, model.requires_grad_(False), model.config
        self.batches = job.batches(job.calibration)
        layers = self.config.num_hidden_layers
        self.grads = collect_mask_grads(
            model,
            torch.ones(layers, self.config.num_attention_heads),
            torch.ones(layers, self.config.intermediate_size),
            self.batches,
        )

    def __call__(self, method: str, share: float) -> tuple[Any, Widths]:
        from prune.rearrange import rearrange_mask
        from prune.rescale import rescale_mask
        from prune.search import search_mac
        from utils.schedule import get_pruning_schedule

        (teacher, *_) = get_pruning_schedule(target=share, num_iter=2)
        teacher_masks = search_mac(self.config, *self.grads, self.tokens, teacher)
        masks = search_mac(self.config, *self.grads, self.tokens, share)
        masks = [rearrange_mask(m, g) for m, g in zip(masks, self.grads, strict=True)]
        heads, neurons = rescale_mask(
            self.model,
            self.config,
            *teacher_masks,
            *masks,
            self.batches,
            classification_task=True,
        )
        head_size = self.config.hidden_size // self.config.num_attention_heads
        kept = [(mask != 0).sum(dim=1).tolist() for mask in masks]
        return self._masked(heads, neurons), Widths(self.config.hidden_size, head_size, *kept)

    def _masked(self, heads: torch.Tensor, neurons: torch.Tensor) -> Any:
        from utils.arch import MaskNeurons

        def call(**batch: torch.Tensor) -> Any:
            with MaskNeurons(self.model, neurons):
                return self.model(head_mask=heads, **batch)

        return call


def stay_on_cpu() -> None:
    """Stand in for CUDA and cupy."""
    to = torch.Tensor.to

    def to_host(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return tensor if args and args[0] == "cuda" else to(tensor, *args, **options)

    torch.Tensor.to = to_host  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = torch.Tensor.cpu  # type: ignore[method-assign,assignment]
    cupy, solvers = ModuleType("cupy"), ModuleType("cupyx.scipy.sparse.linalg")
    cupy.asarray = partial(numpy.asarray, dtype=numpy.float64)  # type: ignore[attr-defined]
    cupy.asnumpy = numpy.asarray  # type: ignore[attr-defined]
    solvers.lsmr = scipy.sparse.linalg.lsmr  # type: ignore[attr-defined]
    parts = solvers.__name__.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    sys.modules |= {name: ModuleType(name) for name in parents}
    sys.modules |= {"cupy": cupy, solvers.__name__: solvers}


if __name__ == "__main__":
    main()
