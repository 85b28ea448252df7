"""All of it in one call, wherever it is called."""

import pytest
import tiny
import torch

import hfprune
from hfprune.errors import HfpruneError


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny.model("vit", "AutoModelForImageClassification")


def images(count: int = 3) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=draw),
            "labels": torch.randint(2, (4,), generator=draw),
        }
        for _ in range(count)
    ]


def test_in_inference_mode_it_is_the_same_and_learns_after(model: torch.nn.Module) -> None:
    outside = hfprune.prune(model, images(), "params=60%")
    with torch.inference_mode():
        inside = hfprune.prune(model, images(), "params=60%")
    for one, other in zip(inside.parameters(), outside.parameters(), strict=True):
        assert one.equal(other)
    inside(**images(1)[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in inside.vit.layers.parameters())


def test_what_made_the_batches_is_left_alone(model: torch.nn.Module) -> None:
    """Its graph lasts for one backward pass, and there are two: of scoring and of compensation."""
    contrast = torch.ones((), requires_grad=True)
    made = [batch | {"pixel_values": batch["pixel_values"] * contrast} for batch in images()]
    hfprune.prune(model, made, "params=60%")
    assert contrast.grad is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": "mac=50%"}, "Unknown budget 'mac'"),
        ({"constraints": hfprune.Constraints(protect=("layer.0",))}, "Unknown name in protect"),
        ({"model": torch.nn.Linear(2, 2)}, "A Linear is not a transformers model"),
    ],
)
def test_what_cannot_be_is_named_before_any_work(
    model: torch.nn.Module, given: dict, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfprune.pruning.score", None)
    with pytest.raises(HfpruneError, match=says):
        hfprune.prune(**{"model": model, "batches": images(), "budget": "params=60%"} | given)


def test_latency_that_cannot_be_measured_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hfprune.pruning.score", None)
    with pytest.raises(HfpruneError, match="reads neither text nor images"):
        hfprune.prune(tiny.model("wav2vec2"), [], "latency=50%")
