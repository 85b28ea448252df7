"""What is trained on in several tests of recovery, and a callback that steps in."""

import torch
from transformers import TrainerCallback

from tests import tiny


def examples(family, count=16):
    """Rows of equal length: a class each for bert, the next tokens for the others."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (7,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones(7, dtype=torch.long)}
        row["labels"] = torch.tensor(index % 2) if family == "bert" else ids.clone()
        rows.append(row)
    return rows


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class At(TrainerCallback):
    """Do something to the model when a step has ended."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)
