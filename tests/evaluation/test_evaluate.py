"""Quality against scikit-learn, torch and numbers worked out by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfprune.errors import DataError
from hfprune.evaluation.evaluate import (
    Quality,
    evaluate_classification,
    evaluate_perplexity,
    load_metric,
    paired_difference,
)


class Echo(torch.nn.Module):
    """A classifier of so many classes that predicts what its input says."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes = classes
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.dropout = torch.nn.Dropout(0.99)

    def forward(self, said):
        one_hot = torch.nn.functional.one_hot(said, self.classes).float()
        return SimpleNamespace(logits=self.scale * self.dropout(one_hot))


@pytest.fixture
def answers():
    """Predictions and labels of 60 examples; about two thirds agree."""
    generator = np.random.default_rng(7)
    labels = generator.integers(3, size=60)
    said = np.where(generator.random(60) < 0.6, labels, generator.integers(3, size=60))
    return torch.tensor(said), torch.tensor(labels)


def batches_of(said, labels, size=16):
    return [
        {"said": s, "labels": y} for s, y in zip(said.split(size), labels.split(size), strict=True)
    ]


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        ("accuracy", sklearn.metrics.accuracy_score),
        ("f1_macro", lambda y, p: sklearn.metrics.f1_score(y, p, average="macro")),
    ],
)
def test_value_is_scikit_learns_and_lies_in_its_interval(answers, metric, oracle):
    said, labels = answers
    quality = evaluate_classification(Echo(), batches_of(said, labels), metric, progress=False)
    assert quality.value == pytest.approx(oracle(labels, said))
    assert quality.low < quality.value < quality.high
    assert (quality.metric, quality.examples) == (metric, 60)


def test_binary_f1_counts_class_one_alone():
    said, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    batches = batches_of(said, labels)
    quality = evaluate_classification(Echo(2), batches, "f1_binary", progress=False)
    assert quality.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2 TP, 1 FP, 1 FN


def test_binary_f1_is_of_two_classes(answers):
    with pytest.raises(DataError, match=r"^The model knows 3 classes, and f1_binary is of two: ta"):
        evaluate_classification(Echo(), batches_of(*answers), "f1_binary", progress=False)


def test_value_does_not_depend_on_the_batch_size(answers):
    whole, single = (
        evaluate_classification(Echo(), batches_of(*answers, size=size), progress=False)
        for size in (60, 1)
    )
    assert whole == single


def test_interval_of_accuracy_is_about_the_normal_one():
    labels = torch.zeros(1000, dtype=torch.long)
    said = (torch.arange(1000) >= 800).long()
    quality = evaluate_classification(Echo(), batches_of(said, labels), progress=False)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert quality.value == 0.8
    assert quality.low == pytest.approx(0.8 - half, abs=0.004)
    assert quality.high == pytest.approx(0.8 + half, abs=0.004)


def test_examples_without_a_label_do_not_count(answers):
    said, labels = answers
    part = labels.clone()
    part[::3] = -100
    known = part != -100
    quality = evaluate_classification(Echo(), batches_of(said, part), progress=False)
    assert quality.value == pytest.approx(float((said == labels)[known].float().mean()))
    assert quality.examples == int(known.sum())


def test_modes_of_the_modules_come_back(answers):
    model = Echo().train()
    model.dropout.eval()
    evaluate_classification(model, batches_of(*answers), progress=False)
    assert model.training
    assert not model.dropout.training


def test_dropout_is_off_while_evaluating(answers):
    said, _ = answers
    model = Echo().train()
    assert evaluate_classification(model, batches_of(said, said), progress=False).value == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "No examples"),
        ([{"said": torch.tensor([0])}], "without labels: it has said"),
        ([{"said": torch.tensor([0]), "labels": torch.tensor([0.5])}], "float32"),
        ([{"said": torch.tensor([0, 1]), "labels": torch.tensor([[0], [1]])}], r"\(2, 1\)"),
        ([{"said": torch.tensor([0, 1]), "labels": torch.tensor([-1, -1])}], "from -1 to -1"),
        ([{"said": torch.tensor([0, 1]), "labels": torch.tensor([0, 9])}], "from 0 to 9"),
        ([{"said": torch.tensor([0]), "labels": torch.tensor([-100])}], "No examples"),
    ],
)
def test_examples_that_cannot_serve_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        evaluate_classification(Echo(), batches, progress=False)


def test_logits_that_are_not_numbers_are_refused(answers):
    model = Echo()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN"):
        evaluate_classification(model, batches_of(*answers), progress=False)


def test_unknown_metric_names_the_nearest(answers):
    with pytest.raises(DataError, match="Did you mean 'accuracy'"):
        evaluate_classification(Echo(), batches_of(*answers), "acuracy", progress=False)


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def sequences():
    """Six sequences of 12 tokens, right-padded to lengths from 12 down to 2."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (6, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([[12], [9], [7], [5], [3], [2]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_perplexity_is_the_exponential_of_the_models_own_loss(language_model, sequences):
    with torch.no_grad():
        loss = language_model(**sequences).loss
    halves = [{k: v[part] for k, v in sequences.items()} for part in (slice(0, 2), slice(2, 6))]
    quality = evaluate_perplexity(language_model, halves, progress=False)
    assert quality.value == pytest.approx(loss.exp().item(), rel=1e-5)
    assert quality.low <= quality.value <= quality.high
    assert quality.examples == 6
    assert quality.per_example["tokens"].tolist() == [11, 8, 6, 4, 2, 1]


def test_sequences_that_predict_nothing_are_left_out(language_model, sequences):
    silent = {k: v[:1] for k, v in sequences.items()}
    silent["labels"] = torch.full_like(silent["labels"], -100)
    with_silent = evaluate_perplexity(language_model, [silent, sequences], progress=False)
    assert with_silent == evaluate_perplexity(language_model, [sequences], progress=False)
    with pytest.raises(DataError, match="No token to predict"):
        evaluate_perplexity(language_model, [silent], progress=False)


def test_a_perplexity_that_overflows_is_refused(language_model, sequences):
    class Wild(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = language_model

        def forward(self, **inputs):
            return SimpleNamespace(logits=1e5 * self.inner(**inputs).logits)

    with pytest.raises(DataError, match=r"on a sequence is [\d,]+ nats a token, and above 710 a"):
        evaluate_perplexity(Wild(), [sequences], progress=False)


def test_perplexity_module_is_fed_batch_by_batch():
    metric = load_metric("perplexity")
    metric.add_batch(nll=[2.0, 4.0], tokens=[1, 2])
    metric.add_batch(nll=[6.0], tokens=[3])
    assert metric.compute() == {"perplexity": pytest.approx(math.exp(12 / 6))}


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_binary"])
def test_modules_compute_as_any_evaluate_metric(metric):
    result = load_metric(metric).compute(predictions=[0, 1, 1, 0], references=[0, 1, 1, 0])
    assert list(result.values()) == [1.0]


def test_json_round_trip_leaves_out_the_examples(answers):
    quality = evaluate_classification(Echo(), batches_of(*answers), progress=False)
    again = Quality.from_dict(json.loads(json.dumps(quality.to_dict())))
    assert again == quality
    assert again.per_example is None
    with pytest.raises(DataError, match="read back"):
        paired_difference(quality, again)


def test_paired_interval_is_narrower_than_the_two_intervals(answers):
    said, labels = answers
    other = said.clone()
    other[:2] = (labels[:2] + 1) % 3  # the second run also fails on the first two examples
    first, second = (
        evaluate_classification(Echo(), batches_of(run, labels), progress=False)
        for run in (said, other)
    )
    difference = paired_difference(first, second)
    right = (said == labels).float().mean(), (other == labels).float().mean()
    assert difference.value == pytest.approx((right[1] - right[0]).item())
    assert difference.low <= difference.value <= difference.high <= 0
    assert difference.high - difference.low < (first.high - first.low) / 2


def test_runs_that_do_not_pair_are_refused(answers):
    said, labels = answers
    first = evaluate_classification(Echo(), batches_of(said, labels), progress=False)
    shuffled = evaluate_classification(
        Echo(), batches_of(said.flip(0), labels.flip(0)), progress=False
    )
    with pytest.raises(DataError, match="different examples"):
        paired_difference(first, shuffled)
    with pytest.raises(DataError, match="one metric"):
        paired_difference(first, replace(first, metric="f1_macro"))
