"""What the models of a run are found to be worth and to cost, for its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from hfprune.data import Batches
from hfprune.evaluation.evaluate import Difference, Quality, paired_difference
from hfprune.evaluation.hardware import machine
from hfprune.evaluation.measure import measure_side_by_side
from hfprune.planning.plan import PruningPlan
from hfprune.pruning import masked
from hfprune.publishing.report import CurvePoint, Judged, Report, Variant, weights_of
from hfprune.publishing.units import Pruning
from hfprune.structure.cost import Tokens, counted_macs, tokens_in

if TYPE_CHECKING:
    from hfprune.steps import Steps


class Findings:
    """What is found when the walk is done.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.recipe = steps.recipe

    def report(self) -> Report:
        """Quality and cost of every variant, side by side."""
        steps = self.steps
        start = time.perf_counter()
        models = {name: steps.model(name) for name in steps.variants}
        steps.check_also(models["dense"])
        plan, scores = steps.plan, steps.scores
        compared = steps.curve_plans(models["dense"], scores)
        quality = {name: self._judge(model) for name, model in models.items()}
        also = {name: self._judge_also(model) for name, model in models.items()}
        sizes = self.recipe.measure.batch_sizes
        sample = steps.splits["test"].shuffle(seed=self.recipe.seed)
        timed = {size: Batches(sample, steps.collate, size, size)[0] for size in sizes}
        measured = measure_side_by_side(
            models,
            timed,
            folders={name: steps.folder / name for name in steps.variants},
            lengths=self.recipe.measure.lengths,
            repeats=self.recipe.measure.repeats,
            threads=self.recipe.measure.threads or None,
        )
        tokens = plan.tokens
        one = self._one_of(tokens)
        seconds = {name: entry["seconds"] for name, entry in steps.done.items()}
        return Report(
            variants=tuple(
                Variant(
                    name=name,
                    quality=quality[name],
                    difference=self._difference(name, quality["dense"], quality[name]),
                    params=sum(p.numel() for p in models[name].parameters()),
                    macs=counted_macs(models[name], one),
                    measured=measured[name],
                    weights=weights_of(steps.folder / name),
                    also={
                        kind: Judged(found, self._difference(name, also["dense"][kind], found))
                        for kind, found in also[name].items()
                    },
                )
                for name in steps.variants
            ),
            tokens=tokens,
            machine=machine(),
            seconds=seconds | {"report.json": round(time.perf_counter() - start, 1)},
            pruning=Pruning.of(plan, scores),
            recipe=self.recipe.to_dict(),
            energy=steps.energy,
            seen=steps.seen,
            carbon_intensity=self.recipe.measure.carbon_intensity,
            curve=self._curve(quality, models["dense"], compared),
        )

    def _judge(self, model: PreTrainedModel) -> Quality:
        """The quality of a model on the test split."""
        return self.steps.task.judge(model, self.steps.test, self.recipe.seed)

    def _judge_also(self, model: PreTrainedModel) -> dict[str, Quality]:
        """The quality of a model on data of other kinds."""
        return {
            kind: self.steps.task.judge(model, batches, self.recipe.seed)
            for kind, batches in self.steps.also.items()
        }

    def _difference(self, name: str, dense: Quality, found: Quality) -> Difference | None:
        """Of a variant to the dense model on the same examples; None for the dense model."""
        return None if name == "dense" else paired_difference(dense, found, seed=self.recipe.seed)

    def _curve(
        self,
        quality: Mapping[str, Quality],
        dense: PreTrainedModel,
        compared: Sequence[PruningPlan],
    ) -> tuple[CurvePoint, ...]:
        """Quality over the share of the MACs that stays: after every round, where there are
        several, and of the plans that the recipe asks to compare.
        """
        found: list[tuple[str, float, Quality]] = []
        if len(self.steps.rounds) > 1:
            found += [
                ("recovered", self.steps.plan_of(r).macs_share, quality[r.path(r.result)])
                for r in self.steps.rounds
            ]
        for made in compared:
            with masked(dense, made):
                found.append((made.criterion, made.macs_share, self._judge(dense)))
        if found:
            found.insert(0, ("dense", 1.0, quality["dense"]))
        return tuple(
            CurvePoint(share, q.value, q.low, q.high, series) for series, share, q in found
        )

    def _one_of(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """One example of so many tokens, whose MACs are counted."""
        probe = self.steps.probe()
        if self.steps.task.reads != "text":
            return {name: tensor[:1] for name, tensor in probe.items()}
        filler = self.steps.processor.pad_token_id or 0
        one = {"input_ids": torch.full((1, tokens_in(tokens, 0)), filler)}
        if (end := self.steps.processor.eos_token_id) is not None:
            one["input_ids"][:, -1] = end  # where encoder-decoders classify a text
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        if "decoder_input_ids" in probe:
            one["decoder_input_ids"] = torch.full((1, tokens_in(tokens, 1)), filler)
        return one
