"""Losses that draw: what they mean over many seeds against enumeration; and that a draw is an
example's own.
"""

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from hfprune.errors import DataError
from hfprune.importance.gates import frozen, outlet_of
from hfprune.importance.losses import is_token_level, labels_loss, logits_loss, sampled_loss
from hfprune.importance.scoring import score
from hfprune.structure.anatomy import Anatomy

VOCABULARY, SEEDS = 6, 250


def make(head, family="bert", **settings):
    """A one-layer model with few classes, and three examples, two of them padded."""
    config = tiny.config(family)
    counts = ("num_hidden_layers", "num_layers", "num_decoder_layers")
    settings = {**{c: 1 for c in counts if hasattr(config, c)}, **settings}
    for name, value in {"vocab_size": VOCABULARY, **settings}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 * (parameter.dim() == 1), 0.3)
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 3:], mask[2, 4:] = 0, 0
    return model.double().eval(), {"input_ids": ids * mask, "attention_mask": mask}


def distributions(model, batch):
    """Log probabilities (examples, terms, classes) of what is predicted, and which terms count."""
    outputs = model(**{k: v for k, v in batch.items() if k not in ("labels", "start_positions")})
    if "start_logits" in outputs:
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        logits = logits.masked_fill(batch["attention_mask"][:, None] == 0, -1e9)
        return logits.log_softmax(-1), torch.ones(logits.shape[:2])
    logits = outputs.logits.log_softmax(-1)
    if logits.dim() == 2:
        return logits[:, None], torch.ones(len(logits), 1)
    if "decoder_input_ids" in batch:
        return logits, torch.ones(logits.shape[:2])
    if "CausalLM" in type(model).__name__:
        return logits[:, :-1], batch["attention_mask"][:, 1:]
    return logits, batch["attention_mask"]


def gated_terms(model, group, batch, terms):
    """(terms of the batch, one gate for every example, or for each of its tokens)."""
    gates = {}

    def scale(module, args):
        tokens = args[0].shape[1] if is_token_level(model, batch) else 1
        gates["all"] = torch.ones(len(args[0]), tokens, group.units, dtype=torch.float64)
        gates["all"].requires_grad_(True)
        return (args[0] * gates["all"].repeat_interleave(group.columns, dim=-1), *args[1:])

    hook = outlet_of(model, group).register_forward_pre_hook(scale)
    try:
        return terms(model, batch), gates["all"]
    finally:
        hook.remove()


def enumerated(model, batch, group):
    """(units,) the true Fisher: the mean over every label that the model might give."""
    (logs, counted), gates = gated_terms(model, group, batch, distributions)
    total = torch.zeros(group.units, dtype=torch.float64)
    for term in range(logs.shape[1]):
        for label in range(logs.shape[2]):
            chosen = logs[:, term, label] * counted[:, term]
            (slope,) = torch.autograd.grad(chosen.sum(), gates, retain_graph=True)
            chance = (logs[:, term, label].exp() * counted[:, term]).detach()
            total += (chance[:, None, None] * slope.square()).sum(dim=(0, 1))
    return total


def drawn(model, batch, group, draws=sampled_loss):
    """(seeds, units) the squared gate gradients of as many draws."""
    found = []
    for seed in range(SEEDS):
        loss, gates = gated_terms(model, group, batch, lambda m, b, s=seed: draws(m, b, s))
        found.append(torch.autograd.grad(loss, gates)[0].square().sum(dim=(0, 1)))
    return torch.stack(found)


def assert_mean(samples, expected):
    alive = expected > 0  # T5 has ReLU: some neurons never fire
    assert alive.any() and not samples[:, ~alive].any()
    samples, expected = samples[:, alive], expected[alive]
    error = samples.std(dim=0) / len(samples) ** 0.5
    assert ((samples.mean(dim=0) - expected) / error).abs().max() < 5
    assert (error / expected).max() < 0.25  # close enough to tell


CASES = {
    "classes": ("AutoModelForSequenceClassification", "bert", {"num_labels": 3}),
    "causal": ("AutoModelForCausalLM", "llama", {}),
    "masked": ("AutoModelForMaskedLM", "bert", {}),
    "tokens": ("AutoModelForTokenClassification", "bert", {"num_labels": 3}),
    "spans": ("AutoModelForQuestionAnswering", "bert", {"num_labels": 2}),
    "sequences": ("AutoModelForSeq2SeqLM", "t5", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_sampled_labels_have_the_true_fisher_for_their_mean(case):
    head, family, settings = CASES[case]
    model, batch = make(head, family, **settings)
    if case == "sequences":
        batch["decoder_input_ids"] = torch.tensor([[1, 3, 4], [1, 5, 3], [1, 4, 4]])
    group = Anatomy.of(model).groups[-1]
    with frozen(model):
        assert_mean(drawn(model, batch, group), enumerated(model, batch, group))


def test_sampled_values_have_the_true_fisher_for_their_mean():
    model, batch = make("AutoModelForSequenceClassification", num_labels=1)
    group = Anatomy.of(model).groups[-1]
    with frozen(model):
        values, gates = gated_terms(model, group, batch, lambda m, b: m(**b).logits)
        (slope,) = torch.autograd.grad(values.sum(), gates)
        assert_mean(drawn(model, batch, group), slope.square().sum(dim=(0, 1)))


def test_several_labels_are_drawn_each_from_its_own_chance():
    settings = {"num_labels": 2, "problem_type": "multi_label_classification"}
    model, batch = make("AutoModelForSequenceClassification", **settings)
    group = Anatomy.of(model).groups[-1]
    with frozen(model):
        logits, gates = gated_terms(model, group, batch, lambda m, b: m(**b).logits)
        total = torch.zeros(group.units, dtype=torch.float64)
        for label in range(2):
            (slope,) = torch.autograd.grad(logits[:, label].sum(), gates, retain_graph=True)
            chance = logits[:, label].detach().sigmoid()
            variance = (chance * (1 - chance))[:, None, None]  # of the gradient of its loss
            total += (variance * slope.square()).sum(dim=(0, 1))
        assert_mean(drawn(model, batch, group), total)


@pytest.mark.parametrize("case", ["classes", "spans", "tokens"])
def test_projections_have_the_change_of_the_centred_logits_for_their_mean(case):
    head, family, settings = CASES[case]
    model, batch = make(head, family, **settings)
    mask = batch["attention_mask"].bool()

    def centred(model, batch):  # a list of (real tokens, or ends of a span; classes)
        outputs = model(**batch)
        if case == "spans":
            both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
            found = [ends[:, real] for ends, real in zip(both, mask, strict=True)]
        else:
            found = [outputs.logits if case == "classes" else outputs.logits[mask]]
        return torch.cat([(own - own.mean(-1, keepdim=True)).flatten() for own in found])

    group = Anatomy.of(model).groups[-1]
    with frozen(model):
        logits, gates = gated_terms(model, group, batch, centred)
        expected = torch.zeros(group.units, dtype=torch.float64)
        for one in logits:
            (slope,) = torch.autograd.grad(one, gates, retain_graph=True)
            expected += slope.square().sum(dim=(0, 1))
        assert_mean(drawn(model, batch, group, logits_loss), expected)


HEADS = CASES | {
    "values": ("AutoModelForSequenceClassification", "bert", {"num_labels": 1}),
    "labels": (
        "AutoModelForSequenceClassification",
        "bert",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
}


@pytest.mark.parametrize("loss", ["sampled", "logits"])
@pytest.mark.parametrize("case", HEADS)
def test_a_draw_depends_on_the_example_and_the_seed_alone(case, loss):
    head, family, settings = HEADS[case]
    model, batch = make(head, family, **settings)
    lengths = dict.fromkeys(batch, batch["attention_mask"].sum(dim=1).tolist())
    if case == "sequences":
        batch["labels"] = torch.tensor([[3, 4, 5], [5, -100, -100], [4, 4, -100]])
        lengths["labels"] = [3, 1, 2]
    whole = score(model, [batch], ["fisher"], loss, seed=3).by("fisher")
    for order in ((0, 1, 2), (2, 0, 1)):  # alone, without padding, in any order
        bare = [{k: v[i : i + 1, : lengths[k][i]] for k, v in batch.items()} for i in order]
        parts = score(model, bare, ["fisher"], loss, seed=3).by("fisher")
        for name, values in whole.items():
            # transformers' llama rounds to single precision inside
            torch.testing.assert_close(parts[name], values, rtol=1e-4, atol=1e-9)
    if (case, loss) == ("values", "logits"):
        return  # along a line there is one direction
    other = score(model, [batch], ["fisher"], loss, seed=4).by("fisher")
    assert not any(other[name].allclose(values) for name, values in whole.items())


@pytest.mark.parametrize("loss", ["labels", "sampled", "logits"])
def test_padding_on_the_left_predicts_nothing(loss):
    model = tiny.model("llama")
    ids = torch.randint(3, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    starts = (0, 2, 3)
    mask = (torch.arange(5) >= torch.tensor(starts)[:, None]).long()
    batch = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": ids.where(mask.bool(), -100),
    }
    bare = [{k: v[i : i + 1, start:] for k, v in batch.items()} for i, start in enumerate(starts)]
    found, expected = (score(model, b, ["fisher"], loss).by("fisher") for b in ([batch], bare))
    for group, values in expected.items():
        torch.testing.assert_close(found[group], values, rtol=1e-4, atol=1e-9)


def test_given_labels_say_which_tokens_count():
    model, batch = make("AutoModelForMaskedLM")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[1, 2] = 4  # whichever class it names
    surprises = -model(**batch).logits[1, 2].log_softmax(-1)  # of every class, at that token
    for seed in range(5):
        assert sampled_loss(model, batch | {"labels": labels}, seed).isclose(surprises).any()


def test_labels_become_the_decoders_inputs():
    model, batch = make("AutoModelForSeq2SeqLM", "t5")
    labels = torch.tensor([[3, 4, 5], [5, 3, 4], [4, 4, 3]])
    shifted = torch.tensor([[1, 3, 4], [1, 5, 3], [1, 4, 4]])
    group = Anatomy.of(model).groups[-1]
    with frozen(model):
        expected = enumerated(model, batch | {"decoder_input_ids": shifted}, group)
        assert_mean(drawn(model, batch | {"labels": labels}, group), expected)


def test_a_models_own_loss_is_summed():
    model, batch = make("AutoModelForSequenceClassification", num_labels=3)
    labels = torch.tensor([0, 2, 1])
    expected = F.cross_entropy(model(**batch).logits, labels, reduction="sum")
    assert labels_loss(model, batch | {"labels": labels}).isclose(expected)


@pytest.mark.parametrize("padding", [0, -100])
def test_a_discriminator_has_no_loss_of_padding_whatever_its_label(padding):
    model, batch = make("AutoModelForPreTraining", "electra")
    real = batch["attention_mask"].bool()
    labels = (batch["input_ids"] % 2).where(real, padding)
    logits = model.float()(**batch).logits
    expected = F.binary_cross_entropy_with_logits(
        logits[real], labels[real].to(logits), reduction="sum"
    )
    assert labels_loss(model, batch | {"labels": labels}).isclose(expected)


@pytest.mark.parametrize("more", [0, 1])
def test_an_example_without_a_label_has_no_loss(more):
    model, batch = make("AutoModelForSequenceClassification", num_labels=3)
    labels = torch.tensor([0, -100, 1])
    expected = F.cross_entropy(model(**batch).logits, labels, reduction="sum")
    labels = labels.reshape(3, *[1] * more)
    assert labels_loss(model, batch | {"labels": labels}).isclose(expected)


def test_a_value_may_be_that_of_no_class():
    model, batch = make("AutoModelForSequenceClassification", num_labels=1)
    labels = torch.tensor([0.0, -100.0, 1.0], dtype=torch.float64)
    expected = (model(**batch).logits[:, 0] - labels).square().sum()
    assert labels_loss(model, batch | {"labels": labels}).isclose(expected)


def test_a_sum_may_be_larger_than_half_precision_holds():
    model, batch = make("AutoModelForSequenceClassification", num_labels=1)
    batch["labels"] = torch.full((3,), 200.0, dtype=torch.float16)
    own = model.half()(**batch).loss
    assert labels_loss(model, batch) == 3 * own.float() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("loss", [sampled_loss, logits_loss])
def test_a_model_without_a_head(loss):
    model, batch = make("AutoModel")
    with pytest.raises(DataError, match=r"BertModel returns no logits; .* loss=f"):
        loss(model, batch)
