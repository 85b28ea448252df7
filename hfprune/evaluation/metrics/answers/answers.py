"""Answers: the mean over the questions of what each answer scores, by its words or as a whole."""

import datasets
import evaluate
import numpy as np


class Answers(evaluate.Metric):
    """`evaluate.load(folder, "f1" or "exact_match").compute(...)` -> `{"f1": mean}` or so.

    One row per question: what its answer scores by each, from 0 to 1, and as `question` a number
    that tells it from others.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "f1", "exact_match"):
            raise ValueError(f"Answers score by 'f1' or 'exact_match', not {self.config_name!r}.")
        return evaluate.MetricInfo(
            description="Mean F1 of the answers' words, or share that match, from 0 to 1.",
            citation="",
            features=datasets.Features(
                {
                    "f1": datasets.Value("float64"),
                    "exact_match": datasets.Value("float64"),
                    "question": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, f1: np.ndarray, exact_match: np.ndarray, question: np.ndarray
    ) -> dict[str, float]:
        if self.config_name == "exact_match":
            return {"exact_match": float(np.mean(exact_match))}
        return {"f1": float(np.mean(f1))}
