"""TextPruner 1.1 (Yang et al. 2022): scores by gradients of the loss, heads and neurons removed.

Its way to reduce a classifier without training: `pruning_method="iterative"`, heads and FFN at
once. "even" gives all layers the same widths, which is what it can save; "uneven" lets both differ.
The heads per layer are the whole number nearest to the share, as in its documentation; the FFN gets
what is left of the MACs.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig
from transformers import AutoModelForSequenceClassification

from competitors.exchange import Job, Widths, bert_widths

ITERATIONS = 4
METHODS = ["textpruner-uneven", "textpruner-even"]


def main() -> None:
    job = Job.load(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        job.go(TextPruner(job, folder), METHODS)


class TextPruner:
    """Prunes a fresh model each time; the scores of the dense one are kept in a folder."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.folder = job, folder
        self.batches = job.batches(job.calibration)

    def __call__(self, method: str, share: float) -> tuple[Any, Widths]:
        model = AutoModelForSequenceClassification.from_pretrained(
            self.job.dense, attn_implementation="eager"
        )
        config = model.config
        heads, neurons = targets(config, share, self.job.tokens)
        even = method == "textpruner-even"
        settings = TransformerPruningConfig(
            target_ffn_size=neurons,
            target_num_of_heads=heads,
            pruning_method="iterative",
            n_iters=ITERATIONS,
            ffn_even_masking=even,
            head_even_masking=even,
        )
        general = GeneralConfig(use_device="cpu", output_dir=f"{self.folder}/{method}")
        pruner = TransformerPruner(model, settings, general)
        pruner.prune(self.batches, save_model=False, rewrite_cache=False)
        return model.eval(), bert_widths(model, config.hidden_size // config.num_attention_heads)


def targets(config: Any, share: float, tokens: int) -> tuple[int, int]:
    """Heads and neurons of a layer that keep the share of MACs, or as little less as there is."""

    def macs(heads: int, neurons: int) -> int:
        head_size = config.hidden_size // config.num_attention_heads
        return Widths(config.hidden_size, head_size, [heads], [neurons]).macs(tokens)

    heads = round(share * config.num_attention_heads)
    left = share * macs(config.num_attention_heads, config.intermediate_size) - macs(heads, 0)
    return heads, int(left / macs(0, 1))


if __name__ == "__main__":
    main()
