"""Accuracy: the share of examples whose predicted class is the labelled one."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """`evaluate.load(folder).compute(predictions=..., references=...)` -> `{"accuracy": share}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of examples whose predicted class equals the label, from 0 to 1.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
