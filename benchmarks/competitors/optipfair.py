"""optipfair 0.4.2 (Martra 2025): the FFN neurons of gated layers by maximum absolute weight (MAW).

It narrows the FFN of every layer alike and leaves attention alone. "optipfair-maw" reads the
weights only; "optipfair-maw-data" gives it the calibration blocks, too, its own way of using
activations. The answer to each width is a stock checkpoint, which `language.py` judges.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optipfair import prune_model
from transformers import AutoModelForCausalLM

METHODS = {"optipfair-maw": False, "optipfair-maw-data": True}
BATCH = 4


def main() -> None:
    """Write the checkpoints that are missing of those that the job asks for."""
    job = json.loads(Path(sys.argv[1]).read_text())
    blocks = torch.tensor(job["calibration"]).split(BATCH)
    for method, reads_data in METHODS.items():
        for budget, share in job["removed"].items():
            final = Path(job["output"], f"{method}-{budget}")
            if final.is_dir():
                continue
            model = AutoModelForCausalLM.from_pretrained(job["dense"], dtype=torch.float32).eval()
            data = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in blocks]
            pruned = prune_model(
                model,
                pruning_type="MLP_GLU",
                neuron_selection_method="MAW",
                pruning_percentage=100 * share,
                dataloader=data if reads_data else None,
                show_progress=False,
            )
            pruned.save_pretrained(f"{final}.tmp")
            Path(f"{final}.tmp").rename(final)
            print(f"{final.name}: {pruned.config.intermediate_size} neurons a layer", flush=True)


if __name__ == "__main__":
    main()
