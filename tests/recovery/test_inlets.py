"""Inlets are refitted to what the dense ones make of the dense stream."""

import copy

import pytest
import tiny
import torch
from test_compensation import assert_close_models, batches, uneven

from hfprune.recovery.compensation import compensate
from hfprune.recovery.inlets import _through, inlets_of, reading
from hfprune.recovery.layer_calls import layer_calls
from hfprune.recovery.least_squares import NormalEquations
from hfprune.recovery.rows import as_rows
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.slices import kept_rows, layer_of, slices
from hfprune.structure.surgery import copy_and_cut

LAYOUTS = [
    *("bert", "deberta-v2", "gpt2", "modernbert", "gpt_neox", "bloom", "falcon", "llama", "phi3"),
    *("mixtral", "t5", "bart", "vit"),
]


@pytest.mark.parametrize("family", LAYOUTS)
def test_inlets_and_the_rows_that_stay_of_them(family):
    """A cut model's inlets are just those rows: so surgery left them."""
    dense = tiny.model(family)
    keep = uneven(Anatomy.of(dense))
    pruned = copy_and_cut(dense, keep)
    for twin, group in zip(Anatomy.of(dense), Anatomy.of(pruned), strict=True):
        theirs, ours = inlets_of(dense, twin), inlets_of(pruned, group)
        rows = kept_rows(slices(dense, twin), keep[twin.name], twin.kv_of(keep[twin.name]))
        assert ours and ours.keys() == theirs.keys()
        for path, module in ours.items():
            expected = as_rows(theirs[path])[:, rows[theirs[path], 0]]
            torch.testing.assert_close(as_rows(module), expected, rtol=0, atol=0)


def test_moments_of_both_streams_are_those_of_the_regression():
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    ours, theirs, wanted, counts = normal(40, 6), normal(40, 6), normal(7, 4), normal(40).square()
    both, direct = NormalEquations.like(normal(13, 0)), NormalEquations.like(wanted)
    both.add(torch.cat([ours, theirs], dim=1), normal(40, 0), counts)
    targets = torch.cat([theirs, torch.ones(40, 1, dtype=torch.float64)], dim=1) @ wanted
    direct.add(ours, targets, counts)
    found = _through(both, wanted)
    torch.testing.assert_close(found.inputs, direct.inputs)
    torch.testing.assert_close(found.cross, direct.cross)
    assert (found.targets, found.count) == (pytest.approx(direct.targets), 40)


def classifier(family):
    return tiny.model(family, "AutoModelForSequenceClassification")


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "llama"])
def test_a_classifier_is_nearer_to_the_dense_one_with_them(family):
    dense = classifier(family)
    keep = uneven(Anatomy.of(dense))
    data, fresh = batches(dense, examples=68), batches(dense, 1, examples=80, seed=7)
    pruned = copy_and_cut(dense, keep)
    outlets_only = compensate(dense, copy.deepcopy(pruned), data)
    both = compensate(dense, copy.deepcopy(pruned), data, keep)

    def distance(model):
        with torch.no_grad():
            return sum(float((model(**b).logits - dense(**b).logits).square().sum()) for b in fresh)

    assert distance(both) < distance(outlets_only) < distance(pruned)


def moved(before, after):
    """Whether any inlet of each group is another."""
    found = []
    for group in Anatomy.of(before):
        inlets = [inlets_of(model, group).values() for model in (before, after)]
        found.append(any(not torch.equal(a.weight, b.weight) for a, b in zip(*inlets, strict=True)))
    return found


def test_what_comes_before_the_first_cut_stays_as_it_is():
    dense = classifier("bert")
    anatomy = Anatomy.of(dense)
    keep = {g.name: u for g, u in zip(anatomy, uneven(anatomy).values(), strict=True) if g.layer}
    cut = copy_and_cut(dense, keep)
    found = moved(cut, compensate(dense, copy.deepcopy(cut), batches(dense, count=20), keep))
    assert not any(found[:3])  # attention and FFN of layer 0, attention of layer 1
    assert any(found[3:])


def test_inlets_of_language_models_stay_as_they_are():
    dense = tiny.model("llama")
    keep = uneven(Anatomy.of(dense))
    cut = copy_and_cut(dense, keep)
    assert not any(moved(cut, compensate(dense, copy.deepcopy(cut), batches(dense), keep)))


def test_those_that_win_nothing_on_held_out_examples_stay_as_they_are(monkeypatch):
    """Here a refit that spoils them."""
    dense = classifier("bert")
    keep = uneven(Anatomy.of(dense))
    cut = copy_and_cut(dense, keep)

    def spoil(origin, group, calls, read, counts):
        for inlet in inlets_of(origin.pruned, group).values():
            inlet.weight.normal_()

    monkeypatch.setattr("hfprune.recovery.sweep.refit_inlets", spoil)
    assert not any(moved(cut, compensate(dense, copy.deepcopy(cut), batches(dense), keep)))


@pytest.mark.parametrize("tokens", [11, 7])  # other than the answers' 7, and as many
@torch.no_grad()
def test_keys_of_what_the_encoder_says_are_not_read_as_the_stream(tokens):
    model = tiny.model("t5")
    data = batches(model, 1, tokens)
    [call] = layer_calls(model, "decoder.block", data)
    group = next(g for g in Anatomy.of(model) if g.stack == 1 and g.part == 1)
    with reading(model, group, call) as found:
        call.run(layer_of(model, group), 0)
    assert [path.rpartition(".")[2] for paths in found for path in paths] == ["q"]


def test_inlets_of_one_input_are_read_together():
    model = tiny.model("bert")
    data = batches(model, count=1)
    with torch.no_grad():
        [call] = layer_calls(model, "encoder.layer", data)
        for group in list(Anatomy.of(model))[:2]:
            with reading(model, group, call) as found:
                call.run(layer_of(model, group), 0)
            [(paths, states)] = found.items()
            assert set(paths) == inlets_of(model, group).keys()
            assert len(states) == int(data[0]["attention_mask"].sum())


def test_an_error_leaves_inlets_as_they_were():
    dense = classifier("bert")
    keep = uneven(Anatomy.of(dense))
    pruned = copy_and_cut(dense, keep)
    before = copy.deepcopy(pruned)
    with torch.no_grad():
        dense.bert.encoder.layer[2].output.dense.weight[0] = torch.inf
    with pytest.raises(Exception, match=r"layer\.2\.output"):
        compensate(dense, pruned, batches(dense), keep)
    assert_close_models(pruned, before, rtol=0, atol=0)
