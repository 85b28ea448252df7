"""What a plan would leave is what removal leaves."""

import dataclasses

import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification

import hfprune
from hfprune.errors import HfpruneError
from hfprune.evaluation.evaluate import Quality, evaluate_classification, evaluate_perplexity


def classifier(**sizes: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=64, initializer_range=1.0, **config)
    ).eval()


def labelled(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(50, (8, 9), generator=draw),
            "labels": torch.randint(2, (8,), generator=draw),
        }
        for _ in range(count)
    ]


def test_a_classifier_s_accuracy_is_that_after_removal() -> None:
    model, held_out = classifier(), labelled(12, seed=1)
    made = hfprune.plan(model, hfprune.score(model, labelled(4, seed=0)), "macs=40%")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = hfprune.preview(model, made, held_out)
    assert found == evaluate_classification(hfprune.remove(model, made), held_out)
    assert found.value != evaluate_classification(model, held_out).value
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_language_model_s_perplexity_is_that_after_removal() -> None:
    model = tiny.model("llama")
    batch = tiny.batch(model)
    batches = [batch | {"labels": batch["input_ids"]}]
    made = hfprune.plan(model, hfprune.score(model, batches), "params=60%")
    expected = evaluate_perplexity(hfprune.remove(model, made), batches)
    assert hfprune.preview(model, made, batches).value == pytest.approx(expected.value, rel=1e-4)


def test_a_judge_of_one_s_own() -> None:
    model, batches = classifier(), labelled(4, seed=0)
    made = hfprune.plan(model, hfprune.score(model, batches), "macs=40%")

    def f1(model: torch.nn.Module, batches: list) -> Quality:
        return evaluate_classification(model, batches, "f1_macro")

    assert hfprune.preview(model, made, batches, f1).metric == "f1_macro"


def test_who_is_judged_in_no_known_way_is_named() -> None:
    model = tiny.model("bert")
    batch = tiny.batch(model)
    batches = [batch | {"labels": batch["input_ids"]}]
    made = hfprune.plan(model, hfprune.score(model, batches), "macs=60%")
    with pytest.raises(HfpruneError, match=r"a BertForMaskedLM judged\? .*judge="):
        hfprune.preview(model, made, batches)


def test_another_model_s_plan() -> None:
    model, batches = classifier(), labelled(4, seed=0)
    made = hfprune.plan(model, hfprune.score(model, batches), "macs=40%")
    with pytest.raises(HfpruneError):
        hfprune.preview(classifier(num_hidden_layers=3), made, batches)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_labels_become_the_decoder_s_inputs(family: str) -> None:
    model = tiny.model(family)
    given = tiny.batch(model)
    batches = [{"input_ids": given["input_ids"], "labels": given["input_ids"].flip(1)}]
    made = hfprune.plan(model, hfprune.score(model, batches), "params=70%")
    expected = evaluate_perplexity(hfprune.remove(model, made), batches)
    loss = hfprune.remove(model, made)(**batches[0]).loss
    assert expected.value == pytest.approx(loss.exp().item(), rel=1e-4)
    assert hfprune.preview(model, made, batches).value == pytest.approx(expected.value, rel=1e-4)


def test_a_selection_that_cannot_be_is_not_previewed() -> None:
    model, batches = classifier(), labelled(4, seed=0)
    made = hfprune.plan(model, hfprune.score(model, batches), "macs=40%")
    name = next(iter(made.anatomy)).name
    for units in ((0, 0), (999,)):
        wrong = dataclasses.replace(made, keep={**made.keep, name: units})
        with pytest.raises(HfpruneError, match="must be distinct"), hfprune.masked(model, wrong):
            pass
