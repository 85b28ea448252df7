"""Perplexity: the exponential of the mean negative log-likelihood of a predicted token."""

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """One row per sequence; feed it with `add_batch(nll=..., tokens=...)`, end with `compute()`.

    `nll` is the negative log-likelihood in nats summed over a sequence's predicted tokens and
    `tokens` is how many those are, so that long sequences weigh as much as they should.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp(sum of negative log-likelihoods / number of predicted tokens), >= 1.",
            citation="",
            features=datasets.Features(
                {"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.sum(nll) / np.sum(tokens)))}
