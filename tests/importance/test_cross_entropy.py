"""The lean cross-entropy computes what torch computes, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune.importance.cross_entropy import cross_entropy
from hfprune.importance.lean import Lean

TARGET = torch.tensor([3, -100, 0, 6, -100])


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 30 * torch.randn(5, 7, generator=generator, dtype=dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_equal_those_of_torch(reduction: str) -> None:
    ours, theirs = logits().requires_grad_(), logits().requires_grad_()
    value = cross_entropy(ours, TARGET, reduction=reduction)
    expected = F.cross_entropy(theirs, TARGET, reduction=reduction)
    torch.testing.assert_close(value, expected)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, TARGET, reduction="sum"), logits().div(30).requires_grad_()
    )


def test_another_ignored_label() -> None:
    target = TARGET.clamp(min=0)
    torch.testing.assert_close(
        cross_entropy(logits(), target, ignore_index=0),
        F.cross_entropy(logits(), target, ignore_index=0),
    )


def test_no_label_at_all_is_not_a_number_as_in_torch() -> None:
    nothing = torch.full((5,), -100)
    assert cross_entropy(logits(), nothing).isnan()
    assert F.cross_entropy(logits(), nothing).isnan()


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.arange(1.0, 8.0).double()},
        {"label_smoothing": 0.1},
        {"reduction": "none"},
        {"size_average": False},
    ],
)
def test_what_is_not_plain_is_left_to_torch(options: dict) -> None:
    torch.testing.assert_close(
        cross_entropy(logits(), TARGET, **options), F.cross_entropy(logits(), TARGET, **options)
    )


class Largest(TorchDispatchMode):
    """Counts the results that are as large as the logits and share no memory with an argument."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numel:
            given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
            self.count += result.data_ptr() not in given
        return result


def test_nothing_is_as_large_as_the_logits_but_their_gradient() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=4000, num_attention_heads=1, num_key_value_heads=1, pad_token_id=0, **sizes
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().requires_grad_(True)
    model.lm_head.requires_grad_(False)
    ids = torch.randint(1, 4000, (2, 40))
    losses, counts = [], []
    for context in (torch.enable_grad(), Lean()):
        with context, Largest(80 * 4000) as largest:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append(loss.item())
        counts.append(largest.count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert counts[1] == 2 < counts[0]
