"""Compensation without data: the moments that scoring kept are least squares on its tokens."""

import copy
import dataclasses

import pytest
import tiny
import torch
from test_compensation import assert_close_models, batches, error, rows_of, uneven

from hfprune.errors import HfpruneError
from hfprune.importance.gates import outlet_of
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import score
from hfprune.planning.solve import plan
from hfprune.pruning import remove
from hfprune.recovery.compensation import compensate
from hfprune.recovery.least_squares import UNJUDGED
from hfprune.structure.anatomy import Anatomy, axis_of
from hfprune.structure.surgery import copy_and_cut


def labelled(model, count=6):
    data = batches(model, count, tokens=16, examples=20)
    return [
        batch | {"labels": batch.get("decoder_input_ids", batch["input_ids"])} for batch in data
    ]


def scored(model, count=6):
    return score(model, labelled(model, count), ["reconstruction"], moments=True)


def rows(outlet):
    """(columns, outputs)."""
    return outlet.weight if axis_of(outlet, 1) == 0 else outlet.weight.T


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@torch.no_grad()
def test_it_is_ridge_regression_on_the_tokens_of_the_moments(family):
    dense = tiny.model(family).double()
    anatomy = Anatomy.of(dense)
    keep = uneven(anatomy)
    draw = torch.Generator().manual_seed(0)
    tokens = {
        g.name: torch.randn(90, g.units * g.columns, generator=draw, dtype=torch.float64) + 1
        for g in anatomy
    }
    ones = torch.ones(90, 1, dtype=torch.float64)
    moments = {name: (one := torch.cat([x, ones], 1)).T @ one for name, x in tokens.items()}
    scores = Scores({}, anatomy.fingerprint, 1, (1.0,), {}, moments)
    pruned = compensate(dense, copy_and_cut(dense, keep), scores, keep)
    for group, left in zip(anatomy, Anatomy.of(pruned), strict=True):
        before, after, x = outlet_of(dense, group), outlet_of(pruned, left), tokens[group.name]
        stay = [
            c for u in keep[group.name] for c in range(u * group.columns, (u + 1) * group.columns)
        ]
        own, bias = x[:, stay], before.bias is not None
        pull = (UNJUDGED * own.square().sum(0).mean()).sqrt()
        wanted = x @ rows(before) + (before.bias if bias else 0.0)
        left_side = torch.cat([own, pull * torch.eye(len(stay), dtype=own.dtype)])
        right_side = torch.cat([wanted, pull * rows(before)[stay]])
        if bias:
            free = torch.cat([ones, ones.new_zeros(len(stay), 1)])
            left_side = torch.cat([left_side, free], dim=1)
        solution = torch.linalg.lstsq(left_side, right_side).solution
        torch.testing.assert_close(rows(after), solution[: len(stay)], rtol=1e-6, atol=1e-8)
        if bias:
            torch.testing.assert_close(after.bias, solution[-1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gemma3_text", "t5", "mixtral"])
def test_it_is_nearer_to_the_dense_model_than_no_compensation(family):
    dense = tiny.model(family, "AutoModelForMaskedLM" if family == "bert" else None)
    keep = uneven(Anatomy.of(dense))
    pruned = copy_and_cut(dense, keep)
    fresh = batches(dense, seed=7)
    before = error(pruned, dense, fresh)
    assert error(compensate(dense, pruned, scored(dense), keep), dense, fresh) < before


@torch.no_grad()
def test_a_neuron_that_is_a_copy_is_taken_over():
    dense = tiny.model("llama")
    for layer in dense.base_model.layers:
        for unit in range(4):  # 0...3 say what 4...7 say
            rows_of(layer.mlp.gate_proj, None, unit, unit + 4, 1)
            rows_of(layer.mlp.up_proj, None, unit, unit + 4, 1, scale=-2.0)
    keep = {g.name: range(4, g.units) for g in Anatomy.of(dense) if g.kind == "neuron"}
    fresh = batches(dense, seed=7)
    pruned = copy_and_cut(dense, keep)
    before = error(pruned, dense, fresh)
    assert (
        error(compensate(dense, pruned, scored(dense), keep), dense, fresh) < 0.05 * before
    )  # what the ridge leaves


def test_scores_that_were_read_back_refit_alike(tmp_path):
    dense = tiny.model("llama")
    scores = scored(dense)
    scores.save(tmp_path)
    made = plan(dense, scores, "params=70%")
    one, other = (remove(dense, made, compensate=s) for s in (scores, Scores.load(tmp_path)))
    assert_close_models(one, other, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close_models(one, remove(dense, made), rtol=0, atol=0)


def test_moments_are_there_when_asked_for_and_cost_no_other_score():
    dense = tiny.model("llama")
    without = score(dense, labelled(dense, 2), ["fisher"])
    scores = score(dense, labelled(dense, 2), ["fisher"], moments=True)
    assert not without.moments
    assert {name: m.shape for name, m in scores.moments.items()} == {
        g.name: (g.units * g.columns + 1,) * 2 for g in Anatomy.of(dense)
    }
    for name, values in scores.by("fisher").items():
        torch.testing.assert_close(values, without.by("fisher")[name], rtol=0, atol=0)


def test_layers_that_stay_are_refitted_where_others_went():
    dense = tiny.model("llama")
    keep = uneven(Anatomy.of(dense)) | {"layers": (0, 2)}
    pruned = copy_and_cut(dense, keep)
    before = copy.deepcopy(pruned)
    compensate(dense, pruned, scored(dense), keep)
    both = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    compensate(dense, both, scored(dense), uneven(Anatomy.of(dense)))
    last = [model.base_model.layers[-1].mlp.down_proj.weight for model in (pruned, both, before)]
    torch.testing.assert_close(last[0], last[1])
    assert not torch.allclose(last[0], last[2])


@pytest.mark.parametrize(
    ("change", "kept", "message"),
    [
        ({"moments": {}}, True, "hold no moments"),
        ({"fingerprint": "other"}, True, "another structure"),
        ({}, False, r"keeps \d of its \d+ .*kept=plan.keep"),
    ],
)
def test_scores_that_do_not_serve_are_refused_and_nothing_is_changed(change, kept, message):
    dense = tiny.model("bert", "AutoModelForMaskedLM")
    keep = uneven(Anatomy.of(dense))
    pruned = copy_and_cut(dense, keep)
    before = copy.deepcopy(pruned)
    scores = dataclasses.replace(scored(dense, 2), **change)
    with pytest.raises(HfpruneError, match=message):
        compensate(dense, pruned, scores, keep if kept else None)
    assert_close_models(pruned, before, rtol=0, atol=0)
