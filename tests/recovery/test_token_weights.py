"""Tokens count by what autograd says the answer owes them."""

import pytest
import tiny
import torch

from hfprune.importance.losses import logits_loss
from hfprune.recovery.token_weights import token_weights


def padded(model, count=3):
    batch = tiny.batch(model)
    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 3:] = 0
    return [batch] * count


def test_a_classifiers_tokens_count_by_their_squared_gradient():
    model = tiny.model("bert", "AutoModelForSequenceClassification").double()
    batch = padded(model)[0]
    name, seen = "encoder.layer.1.output.dense", []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    hook = model.bert.get_submodule(name).register_forward_hook(keep)
    logits_loss(model, batch).backward()
    hook.remove()
    expected = []
    for gradient, mask in zip(seen[0].grad, batch["attention_mask"].bool(), strict=True):
        squares = gradient[mask].square().sum(dim=1)
        expected.append(0.1 + 0.9 * squares / squares.mean())
    for weights in token_weights(model, [batch, batch]):
        torch.testing.assert_close(weights[name].double(), torch.cat(expected), rtol=1e-5, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_of_the_last_layer_the_first_token_is_read():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    batch = padded(model)[0]
    counts = token_weights(model, [batch])[0]["encoder.layer.2.output.dense"]
    lengths = batch["attention_mask"].sum(dim=1)
    first = torch.tensor([0, int(lengths[0])])
    others = torch.ones(len(counts), dtype=torch.bool).index_fill(0, first, False)
    assert counts[others].tolist() == pytest.approx([0.1] * int(others.sum()))
    torch.testing.assert_close(counts[first], 0.1 + 0.9 * lengths.float())


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", None), ("t5", None), ("bert", "AutoModelForTokenClassification"), ("bert", None)],
)
def test_where_all_tokens_answer_or_none_do_they_count_alike(family, head):
    model = tiny.model(family, head) if head or family != "bert" else tiny.model("bert").base_model
    assert token_weights(model, [tiny.batch(model)] * 2) == [{}, {}]


def test_an_example_that_moves_nothing_says_nothing_of_its_tokens():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    with torch.no_grad():
        model.classifier.weight.zero_()
    for counts in token_weights(model, padded(model, 1))[0].values():
        assert counts.tolist() == [1.0] * len(counts)


def test_images_count_too():
    model = tiny.model("vit", "AutoModelForImageClassification")
    [weights] = token_weights(model, [tiny.batch(model)])
    assert len(weights) == 6
    assert all(w.mean() == pytest.approx(1.0) for w in weights.values())
