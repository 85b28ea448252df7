"""The lean linear layer's gradient is torch's, from the rows that are not zero."""

from contextlib import nullcontext

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hfprune.importance import gates
from hfprune.importance.linear import linear, rows_that_differ_from_zero
from hfprune.importance.scoring import score


def made(trained=()):
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (2, 6, 20), "weight": (9, 20), "bias": (9,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(
            name in ("input", *trained)
        )
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("copied", [2**24, 27, 1])
@pytest.mark.parametrize("read", [range(12), [0, 3, 4, 6, 7], []])
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",)])
def test_value_and_gradient_equal_those_of_torch(read, trained, copied, monkeypatch):
    monkeypatch.setattr("hfprune.importance.linear._COPIED", copied)
    found = []
    for function in (linear, F.linear):
        given = made(trained)
        value = function(**given)
        value.flatten(0, 1)[list(read)].square().sum().backward()
        found.append((value, *(tensor.grad for tensor in given.values())))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_gradients_of_both_orders_are_those_of_finite_differences():
    fixed = made()

    def loss(inputs):
        return linear(inputs, fixed["weight"], fixed["bias"])[:, 0].tanh().sum()

    assert torch.autograd.gradcheck(loss, fixed["input"])
    assert torch.autograd.gradgradcheck(loss, fixed["input"])


def test_what_comes_out_may_be_changed_in_place():
    for function in (linear, F.linear):
        given = made()
        value = function(**given)
        value[:, 2:] = 0
        value.square().sum().backward()
        assert given["input"].grad[:, :2].all() and not given["input"].grad[:, 2:].any()


def test_a_layer_without_outputs_has_a_gradient_of_zero():
    input = torch.ones(2, 3, 4, requires_grad=True)
    linear(input, torch.ones(0, 4)).sum().backward()
    assert input.grad.shape == input.shape and not input.grad.any()


def test_a_row_is_zero_only_if_it_is():
    rows = torch.zeros(5, 30)
    rows[1, 29], rows[2, 0], rows[4, 20] = 1e-40, -1.0, torch.nan
    assert rows_that_differ_from_zero(rows).tolist() == [1, 2, 4]
    assert rows_that_differ_from_zero(rows[:, :3]).tolist() == [2]


def multiplications(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("tokens_read", "most"), [(9, 2.5 / 3), (5, 1.7 / 3)])
def test_rows_that_nobody_reads_are_not_multiplied(tokens_read, most, monkeypatch):
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 1])}
    batch["attention_mask"][:, tokens_read:] = 0
    forward = multiplications(lambda: model(**batch))
    passes = []
    for _ in range(2):
        passes.append(multiplications(lambda: score(model, [batch], "fisher")) - forward)
        monkeypatch.setattr(gates, "Lean", nullcontext)
    lean, plain = passes
    assert lean < most * plain  # three layers, of which the last is read at one token
