"""What DeepSpeed's ZeRO may shard. Training with it is in test_sharding.py and test_scripts.py."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hfprune.errors import RecipeError
from hfprune.recovery.sharding import ShardableTrainer
from hfprune.recovery.zero import refuse_unflattened


@pytest.mark.parametrize(
    ("optimizer", "dtype", "message"),
    [
        (torch.optim.Adafactor, torch.float32, "the optimizer is Adafactor; only AdamW"),
        (torch.optim.AdamW, torch.bfloat16, "a weight is in torch.bfloat16; only torch.float32"),
        (torch.optim.AdamW, torch.float32, None),
    ],
)
def test_what_flat_vectors_would_change_is_refused(optimizer, dtype, message):
    made = optimizer(nn.Linear(3, 2, dtype=dtype).parameters())
    if message is None:
        refuse_unflattened(made)
        return
    with pytest.raises(RecipeError, match=message):
        refuse_unflattened(made)


@pytest.mark.slow  # DeepSpeed takes seconds to import
def test_settings_in_the_training_arguments_are_refused(tmp_path):
    pytest.importorskip("deepspeed")
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 2}}
    )
    with pytest.raises(RecipeError, match=r"come from the launcher.*deepspeed\.yaml"):
        ShardableTrainer(nn.Linear(3, 2), args)
