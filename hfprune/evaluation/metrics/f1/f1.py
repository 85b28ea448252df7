"""F1: the harmonic mean of precision and recall, of class 1 or averaged over the classes."""

import datasets
import evaluate
import numpy as np
import sklearn.metrics


class F1(evaluate.Metric):
    """`evaluate.load(folder, "macro" or "binary").compute(...)` -> `{"f1": score}`.

    `macro` (the default) gives every class the same weight; `binary` is the F1 of class 1 alone.
    A class that is neither predicted nor labelled correctly even once counts as 0.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "macro", "binary"):
            raise ValueError(f"F1 is 'macro' or 'binary', not {self.config_name!r}.")
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall, from 0 to 1 (scikit-learn).",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        average = "binary" if self.config_name == "binary" else "macro"
        score = sklearn.metrics.f1_score(references, predictions, average=average, zero_division=0)
        return {"f1": float(score)}
