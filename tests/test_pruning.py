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


LISTS = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "labels": [0]}


@pytest.fixture(scope="module")
def walked() -> tuple:
    """A classifier of texts, batches, its scores and a plan."""
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    batches = [tiny.batch(model, seed=n) | {"labels": torch.tensor([0, 1])} for n in range(3)]
    scores = hfprune.score(model, batches)
    return model, batches, scores, hfprune.plan(model, scores, "macs=50%")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, b, s, p: hfprune.preview(m, p, b[0]), "A batch is a str; give a list"),
        (lambda m, b, s, p: hfprune.preview(m, p, [LISTS]), "'input_ids' of a batch is a list"),
        (lambda m, b, s, p: hfprune.preview(m, p, None), "batches must be a list.*, not None"),
        (lambda m, b, s, p: hfprune.preview(m, "plan.json", b), "plan must be what .*'plan.json'"),
        (lambda m, b, s, p: hfprune.preview(m, p, b, "accuracy"), "judge must be a function"),
        (lambda m, b, s, p: hfprune.remove(m, p, compensate=True), "compensate on.*, not True"),
        (lambda m, b, s, p: hfprune.remove(m, None), "plan must be what hfprune.plan .*None"),
        (lambda m, b, s, p: hfprune.compensate(m, m, b, p), "kept must be the `keep` of a plan"),
        (lambda m, b, s, p: hfprune.score(m, b, criteria=5), "criteria must be one name or .* 5"),
        (lambda m, b, s, p: hfprune.score(m, None), "batches must be a list.*, not None"),
        (lambda m, b, s, p: hfprune.plan(m, None, "macs=50%"), "scores must be what hfprune.score"),
        (lambda m, b, s, p: hfprune.plan(m, s, "macs=50%", ["fisher"]), "Unknown criterion"),
        (lambda m, b, s, p: hfprune.plan(m, s, "macs=50%", constraints={}), "constraints must be"),
        (lambda m, b, s, p: hfprune.plan(m, s, "latency=50%", latency="l"), "latency must be a t"),
        (lambda m, b, s, p: hfprune.measure_latency(m, tokens=True), "tokens must be a .*True"),
        (lambda m, b, s, p: hfprune.score(m, b, seed="a"), "seed must be a whole number, not 'a'"),
        (lambda m, b, s, p: hfprune.publish(None, "a/b"), "source must be a model, or .*None"),
        (lambda m, b, s, p: hfprune.publish_family(None, "a/b"), "run must be the folder .*None"),
        (lambda m, b, s, p: hfprune.as_stock(None), "A NoneType is not a transformers model"),
        (lambda m, b, s, p: hfprune.plan_family(m, s, 5), "budgets must be one such as .* 5"),
        (lambda m, b, s, p: hfprune.prune(m, 5, "macs=50%"), "batches must be a list.*, not 5"),
        (lambda m, b, s, p: hfprune.prune(m, b, "macs=50%", constraints=5), "constraints must be"),
        (lambda m, b, s, p: hfprune.Constraints(protect=5), "protect must be a tuple of names"),
        (lambda m, b, s, p: hfprune.Constraints(tolerance="1%"), "tolerance must be a number"),
        (lambda m, b, s, p: hfprune.measure_latency(m, 1.5), "batch_size must be a whole number"),
        (lambda m, b, s, p: hfprune.Schedule(begin="0"), "begin must be a number, not '0'"),
        (lambda m, b, s, p: hfprune.GradualPruning("macs=50%", schedule=5), "schedule must be"),
        (lambda m, b, s, p: hfprune.DistillationArguments("o", task_weight="1"), "task_weight mus"),
        (lambda m, b, s, p: hfprune.from_pretrained(5), "model_id must be a folder or a Hub id"),
        (lambda m, b, s, p: hfprune.run({"model": "m"}), "recipe must be a file, or a Recipe"),
    ],
)
def test_what_is_of_no_use_is_named(call, says: str, walked: tuple) -> None:
    with pytest.raises(HfpruneError, match=says):
        call(*walked)
