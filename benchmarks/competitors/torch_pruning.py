"""Torch-Pruning 1.6.1 (Fang et al. 2023), by its examples of transformers.

As its prune_hf_bert.py: whole heads, one ratio for all layers, `MagnitudeImportance(p=2)` or
`TaylorImportance` with the gradients of the loss summed over the calibration batches. "uniform"
prunes the residual stream, too, as prune_hf_bert.py does; "bottleneck", an option of its
prune_hf_vit.py, only heads and neurons. Its ratios say nothing of MACs: the heads kept are the
whole number nearest to the share (its root, where inputs shrink, too), and the ratio of all else is
searched until the MACs agree.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch_pruning as tp
from transformers import AutoModelForSequenceClassification

from competitors.exchange import Job, Widths, bert_widths

METHODS = [
    f"torch-pruning-{criterion}-{scope}"
    for criterion in ("taylor", "magnitude")
    for scope in ("bottleneck", "uniform")
]
STEPS = 12


def main() -> None:
    job = Job.load(sys.argv[1])
    job.go(TorchPruning(job), METHODS)


class TorchPruning:
    """A dense classifier with its gradients, and what is pruned from it."""

    def __init__(self, job: Job) -> None:
        self.tokens = job.tokens
        self.dense = AutoModelForSequenceClassification.from_pretrained(
            job.dense, attn_implementation="eager"
        ).eval()
        config = self.dense.config
        self.all_heads = config.num_attention_heads
        self.head_size = config.hidden_size // self.all_heads
        batches = job.batches(job.calibration)
        for batch in batches:
            self.dense(**batch).loss.backward()
        self.example = {k: v[:1] for k, v in batches[-1].items() if k != "labels"}

    def __call__(self, method: str, share: float) -> tuple[Any, Widths]:
        allowed = share * bert_widths(self.dense, self.head_size).macs(self.tokens)
        heads = share if method.endswith("bottleneck") else math.sqrt(share)
        head_ratio = 1 - round(heads * self.all_heads) / self.all_heads
        low, high = 0.0, 1.0
        best = None
        for _ in range(STEPS):
            ratio = (low + high) / 2
            model = self.pruned(method, ratio, head_ratio)
            widths = bert_widths(model, self.head_size)
            if widths.macs(self.tokens) > allowed:
                low = ratio
            else:
                high, best = ratio, (model, widths)
        assert best is not None  # almost everything removed fits
        return best

    def pruned(self, method: str, ratio: float, head_ratio: float) -> Any:
        model = copy.deepcopy(self.dense)
        for copied, parameter in zip(model.parameters(), self.dense.parameters(), strict=True):
            copied.grad = parameter.grad  # a copy has none
        layers = model.bert.encoder.layer
        attentions = [layer.attention.self for layer in layers]
        ignored = [model.bert.pooler, model.classifier]
        if method.endswith("bottleneck"):
            ignored += [layer.attention.output.dense for layer in layers]
            ignored += [layer.output.dense for layer in layers]
        pruner = tp.pruner.BasePruner(
            model,
            self.example,
            importance=tp.importance.TaylorImportance()
            if "taylor" in method
            else tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=ratio,
            num_heads={
                matrix: self.all_heads for a in attentions for matrix in (a.query, a.key, a.value)
            },
            out_channel_groups={},  # the default is one dict for all pruners
            prune_head_dims=False,
            prune_num_heads=True,
            head_pruning_ratio=head_ratio,
            output_transform=lambda out: out.logits.sum(),
            ignored_layers=ignored,
        )
        for group in pruner.step(interactive=True):
            group.prune()
        for attention in attentions:
            attention.num_attention_heads = pruner.num_heads[attention.query]
            attention.all_head_size = attention.query.out_features
        return model.requires_grad_(False)


if __name__ == "__main__":
    main()
