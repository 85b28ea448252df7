"""Which example, and which of its tokens, a gradient belongs to: by gates of one at a time."""

import pytest
import tiny
import torch
from test_scoring import assert_same
from torch.utils.data import DataLoader, IterableDataset

from hfprune.errors import DataError
from hfprune.importance.gates import frozen, gated
from hfprune.importance.scoring import score
from hfprune.importance.sparsity import linear_layers, sparsify
from hfprune.structure.anatomy import Anatomy

CLOSE = {"rtol": 1e-6, "atol": 1e-12}


def example(batch, index):
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


def slopes_of_examples(model, batch, loss):
    """{group: (examples, units)} of the gates' gradients, each example by itself."""
    found = {}
    for group in Anatomy.of(model):
        rows = []
        for index in range(len(batch["input_ids"])):
            gate = torch.ones(group.units, dtype=torch.float64, requires_grad=True)
            with frozen(model), gated(model, {group.name: gate}):
                rows += torch.autograd.grad(loss(model, example(batch, index)), gate)
        found[group.name] = torch.stack(rows)
    return found


def choices():
    """Two questions of three answers each, of which the model sees six texts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 3, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, 1, 5:] = 0
    batch["labels"] = torch.tensor([0, 2])
    model = tiny.model("bert", "AutoModelForMultipleChoice", dtype=torch.float64)
    return model, batch, lambda m, b: m(**b).loss * len(b["labels"])


def crops():
    """Two images of two crops each, with a loss of one term for each example."""
    model = tiny.model("llava_next", dtype=torch.float64)
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 2])}

    def loss(model, batch):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return model(**inputs).logits.logsumexp(-1).sum()

    return model, batch, loss


@pytest.mark.parametrize("made", [choices, crops])
def test_rows_of_one_example_are_scored_together(made):
    model, batch, loss = made()
    scores = score(model, [batch], ["taylor", "fisher"], loss)
    for name, slope in slopes_of_examples(model, batch, loss).items():
        torch.testing.assert_close(scores.by("taylor")[name], slope.abs().mean(0), **CLOSE)
        expected = slope.square().mean(0) / 2
        torch.testing.assert_close(scores.by("fisher")[name], expected, **CLOSE)
    assert scores.examples == 2


def test_padding_of_choices_does_not_count():
    model, batch, _ = choices()
    assert score(model, [batch], ["fisher"]).tokens == ((19 + 21) / 2,)


@pytest.mark.parametrize("loss", ["labels", "sampled", "logits"])
def test_patches_of_all_images_in_one_sequence(loss):
    model = tiny.model("qwen2_vl", dtype=torch.float64)
    batch = tiny.batch(model)
    batch["labels"] = batch["input_ids"].clone()
    half = len(batch["pixel_values"]) // 2
    patches = {"pixel_values": batch["pixel_values"].split(half)}
    parts = [
        {n: patches[n][i] if n in patches else t[i : i + 1] for n, t in batch.items()}
        for i in range(2)
    ]
    whole, apart = (score(model, b, ["taylor", "fisher"], loss) for b in ([batch], parts))
    assert_same(whole, apart, rtol=1e-4, atol=1e-9)  # transformers' loss rounds to single


def test_images_of_unlike_sizes_are_refused():
    model = tiny.model("qwen2_vl")
    batch = tiny.batch(model)
    batch["labels"] = batch["input_ids"].clone()
    token, text = model.config.image_token_id, 5
    first = (batch["input_ids"][0] == token).nonzero()[0]
    batch["input_ids"][0, first] = text  # as if the other's image were larger
    with pytest.raises((DataError, ValueError), match="image"):
        score(model, [batch], ["taylor"])
    ids = torch.tensor([[3, *[token] * 4, 5, 6], [3, 4, 5, 6, 7, 8, 9]])
    one_image = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).long(),
        "pixel_values": batch["pixel_values"][:16],
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "labels": ids.clone(),
    }
    with pytest.raises(DataError, match=r"unlike numbers of image tokens, .* batches of one"):
        score(model, [one_image], ["taylor"])


def test_tokens_before_examples_are_refused():
    model = tiny.model("mlcd_vision_model")

    def size(model, batch):
        return model(**batch).pooler_output.square().sum()

    pair = tiny.batch(model)
    with pytest.raises(DataError, match="tokens before examples"):
        score(model, [pair], ["fisher"], size)
    assert score(model, [example(pair, i) for i in range(2)], ["fisher"], size).examples == 2


def test_a_classifiers_labels_may_have_a_dimension_more():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 1])}
    expected = score(model, [batch], ["fisher", "taylor"])
    found = score(model, [batch | {"labels": batch["labels"][:, None]}], ["fisher", "taylor"])
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_ctc_loss_does_not_depend_on_batches(reduction):
    model = tiny.model("wav2vec2", "AutoModelForCTC", dtype=torch.float64)
    model.config.ctc_loss_reduction = reduction
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_values": torch.randn(4, 200, generator=generator, dtype=torch.float64),
        "labels": torch.randint(3, tiny.VOCABULARY, (4, 3), generator=generator),
    }
    whole = score(model, [batch], ["fisher", "taylor"])
    parts = [example(batch, index) for index in range(4)]
    assert_same(score(model, parts, ["fisher", "taylor"]), whole, rtol=1e-6, atol=1e-12)


def test_each_tower_has_a_padding_of_its_own():
    def matches(model, batch):
        return model(**batch).logits_per_image.diagonal().sum()

    model = tiny.model("clip")  # texts as long as an image has patches
    batch = tiny.batch(model, tokens=17)
    batch["attention_mask"][1, 6:] = 0
    assert score(model, [batch], ["fisher"], matches).tokens == (11.5, 17)

    def size(model, batch):
        return model(**batch).pooler_output.square().sum()

    for family, loss in (("siglip2", matches), ("siglip2_vision_model", size)):
        model = tiny.model(family)
        batch = tiny.batch(model) | {"spatial_shapes": torch.tensor([[2, 4], [2, 4]])}
        batch["pixel_attention_mask"] = batch["pixel_attention_mask"].clone()
        batch["pixel_attention_mask"][:, 8:] = 0
        padded = score(model, [batch], ["activation"], loss)
        bare = batch | {n: batch[n][:, :8] for n in ("pixel_values", "pixel_attention_mask")}
        assert_same(padded, score(model, [bare], ["activation"], loss), rtol=1e-5, atol=1e-9)


def test_padding_of_sound_is_that_of_its_features():
    model = tiny.model("wav2vec2", "AutoModelForAudioClassification")
    sound = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[:, 100:] = 0
    batch = {"input_values": sound, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    whole, half = (
        {n: t[:, :w] if t.dim() > 1 else t for n, t in batch.items()} for w in (200, 100)
    )
    tokens = [score(model, [b], ["fisher"]).tokens for b in (whole, half)]
    assert (
        tokens[0]
        == tokens[1]
        != score(model, [whole | {"attention_mask": torch.ones_like(mask)}], ["fisher"]).tokens
    )


@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "deepseek_v3", "llama"])
def test_padding_does_not_count_for_wanda_whatever_shape_a_layer_reads(family):
    ids = torch.randint(3, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(9) < 5).long()[None]}
    bare = {name: tensor[:, :5] for name, tensor in padded.items()}
    one, other = (
        sparsify(tiny.model(family), criterion="wanda", scope="row", batches=[b]).masks
        for b in (padded, bare)
    )
    for path in linear_layers(tiny.model(family)):
        assert (one[path] == other[path]).float().mean() > 0.99, path  # of equals in rounding


class Stream(IterableDataset):
    def __init__(self, batch):
        self.rows = [{n: t[i] for n, t in batch.items()} for i in range(2)]

    def __iter__(self):
        return iter(self.rows)


def classifier():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    return model, tiny.batch(model) | {"labels": torch.tensor([0, 1])}


def test_a_loader_of_a_stream_has_no_length():
    model, batch = classifier()
    found = score(model, DataLoader(Stream(batch), batch_size=2), ["fisher", "reconstruction"])
    assert_same(found, score(model, iter([batch]), ["fisher", "reconstruction"]), rtol=0, atol=0)


def test_nothing_flows_into_what_a_batch_was_computed_from():
    model, batch = classifier()
    expected = score(model, [batch], ["fisher", "taylor"])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    embeddings.retain_grad()
    for _ in range(2):  # a graph that was walked through once is gone
        found = score(model, [{"inputs_embeds": embeddings} | batch], ["fisher", "taylor"])
        assert_same(found, expected, rtol=0, atol=0)
    assert embeddings.grad is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda batch: batch, "batch 0 is a str; give a list"),
        (lambda batch: [tuple(batch.values())], "batch 0 is a tuple; give a list"),
        (
            lambda batch: [batch, batch | {"text": ["a", "b"]}],
            "'text' of calibration batch 1 is",
        ),
        (
            lambda batch: [batch, {n: t[0] for n, t in batch.items()}],
            r"'input_ids' of calibration batch 1 has the shape \(9,\), as if of one example",
        ),
        (
            lambda batch: [batch | {"labels": batch["labels"][0]}],
            r"'labels' .* has the shape \(\),",
        ),
        (lambda batch: [batch, {}], "batch 1 has no examples"),
        (lambda batch: [{n: t[:0] for n, t in batch.items()}], "batch 0 has no examples"),
    ],
)
def test_what_is_no_batch_is_named(spoil, says):
    model, batch = classifier()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for run in (
        lambda batches: score(model, batches, ["fisher"]),
        lambda batches: sparsify(model, 0.5, criterion="wanda", batches=batches),
        lambda batches: sparsify(model, 0.5, criterion="taylor", batches=batches),
    ):
        with pytest.raises(DataError, match=says):
            run(spoil(batch))
    assert all(p.equal(before[n]) for n, p in model.state_dict().items())
