"""Entities: the F1 of found against labelled entities, counted over all texts."""

import datasets
import evaluate
import numpy as np


class Entities(evaluate.Metric):
    """`evaluate.load(folder).compute(hits=..., predicted=..., labelled=...)` -> `{"f1": score}`.

    One row per text: entities found rightly, found, and labelled.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="2 hits / (predicted + labelled), from 0 to 1.",
            citation="",
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("hits", "predicted", "labelled")}
            ),
        )

    def _compute(
        self, hits: np.ndarray, predicted: np.ndarray, labelled: np.ndarray
    ) -> dict[str, float]:
        total = int(np.sum(predicted) + np.sum(labelled))
        return {"f1": 2 * int(np.sum(hits)) / total if total else 0.0}
