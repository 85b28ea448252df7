"""Latency tables: what they say between what was measured, and plans by tables made up here, which
no machine's noise disturbs.
"""

import dataclasses
import json
import time
import warnings

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_solve import scored

from hfprune.errors import BudgetError, HfpruneError, UnsupportedModelError
from hfprune.planning.constraints import Constraints
from hfprune.planning.latency import Curve, LatencyTable, _machine, measure_latency
from hfprune.planning.plan import PruningPlan
from hfprune.planning.solve import plan
from hfprune.pruning import remove
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import group_macs

TOKENS = 9


def table(model, heads=1e-3, neurons=2e-3, steps=(0.0, 0.5, 0.75, 1.0)):
    """A made-up table: the seconds of whole groups, and how they rise with the share kept."""
    anatomy = Anatomy.of(model)
    shares = tuple(np.linspace(0, 1, len(steps)).tolist())
    return LatencyTable(
        anatomy.fingerprint,
        _machine(model),
        1,
        TOKENS,
        5e-4,
        {f"{s.name}.{n}": 1e-4 for s in anatomy.stacks for n in range(s.units)},
        {
            g.name: Curve(
                shares, tuple((heads if g.kind == "head" else neurons) * x for x in steps)
            )
            for g in anatomy
        },
    )


SHARES = st.fractions(0, 1, max_denominator=10**9).map(float)  # of MACs, which are counted


@given(
    st.lists(SHARES, min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    SHARES,
    SHARES,
)
def test_a_curve_goes_through_what_was_measured_and_never_falls(inner, rises, one, other):
    shares = (0.0, *sorted(inner), 1.0)
    seconds = tuple(np.cumsum([0.0, *rises[: len(shares) - 1]]).tolist())
    curve = Curve(shares, seconds)
    assert curve.at(0.0) == pytest.approx(seconds[sum(s == 0 for s in shares) - 1])
    assert curve.at(1.0) == pytest.approx(seconds[-1])
    low, high = sorted((one, other))
    assert curve.at(low) <= curve.at(high) + 1e-12


def test_the_time_of_a_selection_is_the_sum_of_its_parts():
    model = tiny.model("llama")
    anatomy, made = Anatomy.of(model), table(tiny.model("llama"))
    assert made.of_all(anatomy, {}) == 500_000 + 3 * (100_000 + 1_000_000 + 2_000_000)
    assert made.of_all(anatomy, {"layers": (0, 2)}) == 500_000 + 2 * 3_100_000
    half = {"layers.1.mlp.down_proj": tuple(range(12))}  # on the line from a third to two thirds
    expected = 2_000_000 * (0.5 + 0.25 * (1 / 2 - 1 / 3) / (1 / 3))
    assert made.of_all(anatomy, half) == 500_000 + 3 * 3_100_000 - 2_000_000 + round(expected)
    heads = anatomy["layers.0.self_attn"]
    share = group_macs(heads, 2, 1, TOKENS) / group_macs(heads, 4, 2, TOKENS)
    assert made.of_group(heads, 2, 1) == round(
        1e6 * np.interp(share, [0, 1 / 3, 2 / 3, 1], [0, 0.5, 0.75, 1])
    )


def test_it_comes_back_from_json(tmp_path):
    made = table(tiny.model("bert"))
    made.save(tmp_path / "new" / "table.json")
    assert LatencyTable.load(tmp_path / "new" / "table.json") == made
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["table.json"]
    (tmp_path / "bad.json").write_text("[1]")
    for wrong in ("bad.json", "none.json"):
        with pytest.raises(HfpruneError, match=f"{wrong} is not a latency table"):
            LatencyTable.load(tmp_path / wrong)


@pytest.mark.parametrize("budget", ["latency=60%", "latency=60%@1x9", "latency=5.88ms"])
def test_a_plan_meets_a_latency_by_the_table(budget):
    model = tiny.model("bert")
    made_by = table(model)
    made = plan(model, scored(model), budget, latency=made_by)
    (spent,) = made.spending
    assert spent.dense == 9_800_000
    assert spent.kept == made_by.of_all(made.anatomy, made.keep)
    assert 0.99 * 5_880_000 <= spent.kept <= 5_880_000
    assert "9.8 ms -> 5.8" in made.explain()
    assert PruningPlan.from_dict(made.to_dict()) == made


def test_what_takes_no_time_stays():
    model = tiny.model("bert")
    loose = Constraints(tolerance=0.2)
    for free in ("heads", "neurons"):
        rest = {"heads": 3e-3, "neurons": 3e-3} | {free: 0.0}
        made = plan(
            model, scored(model), "latency=60%", constraints=loose, latency=table(model, **rest)
        )
        for group in made.anatomy:
            whole = len(made.keep[group.name]) == group.units
            assert whole or f"{group.kind}s" != free
        assert made.keep != made.anatomy.everything


def test_latency_beside_other_limits():
    model = tiny.model("bert")
    made = plan(model, scored(model), "latency=60%, params=70%", latency=table(model))
    used = [own.kept / own.dense for own in made.spending]
    assert used[0] <= 0.6 and used[1] <= 0.7 and (used[0] > 0.594 or used[1] > 0.693)


def test_a_latency_that_the_rest_of_the_model_exceeds_names_the_nearest():
    model = tiny.model("bert")
    with pytest.raises(BudgetError, match=r"the least is latency=[\d.]+ms@1x9"):
        plan(model, scored(model), "latency=0.4ms@1x9", latency=table(model))


def test_a_table_of_another_machine_is_named_and_of_another_model_refused():
    model = tiny.model("bert")
    there = table(model)
    there.machine.update(processor="Abacus 2000", dtype="float8")
    named = r"processor 'Abacus 2000', here .*dtype 'float8', here 'float32'"
    with pytest.warns(UserWarning, match=named):
        made = plan(model, scored(model), "latency=60%", latency=there)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.keep == plan(model, scored(model), "latency=60%", latency=table(model)).keep
    other = tiny.model("llama")
    with pytest.raises(HfpruneError, match="a model of another structure"):
        plan(other, scored(other), "latency=60%", latency=table(model))
    with pytest.raises(HfpruneError, match=r"batches of 4x32, .*table for 1x9"):
        plan(model, scored(model), "latency=60%@4x32", latency=table(model))


def test_how_many_threads_plan_does_not_matter():
    model = tiny.model("bert")
    for_many = table(model)
    for_many.machine["threads"] = torch.get_num_threads() + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(model, scored(model), "latency=60%", latency=for_many)


@pytest.mark.parametrize("family", ["llama", "vit", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_measured_table_has_every_part_and_leaves_the_model_as_it_was(family):
    model = tiny.model(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = measure_latency(model, 2, TOKENS, repeats=2)
    anatomy = Anatomy.of(model)
    assert measured.groups.keys() == anatomy.everything.keys()
    assert len(measured.layers) == sum(s.units for s in anatomy.stacks)
    for curve in measured.groups.values():
        assert curve.shares[0] == curve.seconds[0] == 0 and curve.shares[-1] == 1
        assert list(curve.shares) == sorted(curve.shares)
        assert list(curve.seconds) == sorted(curve.seconds)
    assert measured.machine["threads"] == torch.get_num_threads() and model.training
    assert type(model) is type(tiny.model(family))
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    measured.check_fits(model, 2, TOKENS)
    # Layers that are built alike share what was measured; t5's first has a bias table.
    same = {measured.groups[g.name] for g in anatomy if g.kind == "neuron" and g.layer > 0}
    assert len(same) == len(anatomy.stacks)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("granitemoe", None),  # its forward does not name use_cache
        ("gpt2", "AutoModelForQuestionAnswering"),
        ("bart", "AutoModelForSequenceClassification"),  # reads the text's end
        ("t5", "AutoModelForSequenceClassification"),
    ],
)
def test_classifiers_and_what_caches_unasked_are_measured(family, head):
    model = tiny.model(family, head)
    caches = model.config.use_cache
    measured = measure_latency(model, 2, TOKENS, repeats=1)
    assert measured.groups.keys() == Anatomy.of(model).everything.keys()
    assert model.config.use_cache is caches


def test_images_need_not_be_square():
    config = tiny.config("vit")
    config.image_size = (16, 8)
    model = transformers.ViTForImageClassification(config).eval()
    assert measure_latency(model, repeats=1).layers


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "vivit", "siglip2", "internvl"])
def test_what_does_not_run_on_what_can_be_made_up_is_refused(family):
    with pytest.raises(UnsupportedModelError, match=r"does not run on (input_ids|pixel_values) \("):
        measure_latency(tiny.model(family), tokens=TOKENS, repeats=1)


def test_what_cannot_be_measured_is_refused():
    sound = tiny.model("wav2vec2")
    with pytest.raises(UnsupportedModelError, match="reads neither text nor images"):
        measure_latency(sound)
    with pytest.raises(HfpruneError, match="128 tokens are more than the model's 64 positions"):
        measure_latency(tiny.model("bert"))


@pytest.mark.slow
def test_what_the_table_says_is_about_what_a_pruned_model_takes():
    """Within a factor of three on any machine, busy ones too; on a quiet one, about a tenth."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, vocab_size=100,
                   intermediate_size=1536)
    ).eval()  # fmt: skip
    measured = measure_latency(model, 4, 64)
    made = plan(model, scored(model), "macs=50%, latency=100%@4x64", latency=measured)
    ids = torch.full((4, 64), 3)
    both = {"dense": model, "kept": remove(model, made).eval()}
    runs = {name: [] for name in both}
    with torch.inference_mode():
        for _ in range(20):
            for name, each in both.items():
                start = time.perf_counter()
                each(ids)
                runs[name].append(time.perf_counter() - start)
    said = dataclasses.asdict(made.spending[1])
    for name, seconds in runs.items():
        assert 1 / 3 < said[name] / 1e9 / np.median(seconds) < 3, name


@pytest.mark.parametrize(
    "given", [{"repeats": 0}, {"batch_size": 0}, {"tokens": 0}, {"threads": -1}]
)
def test_numbers_below_one(given):
    ((name, number),) = given.items()
    with pytest.raises(HfpruneError, match=f"{name} must be 1 or more, not {number}"):
        measure_latency(tiny.model("bert"), **{"tokens": 8} | given)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v.update(machine=[1]),
        lambda v: next(iter(v["groups"].values())).update(seconds=[0.0]),
        lambda v: next(iter(v["groups"].values()))["seconds"].reverse(),
        lambda v: v["groups"].update(another={"shares": [0, 1], "seconds": [0, float("nan")]}),
    ],
)
def test_a_table_that_somebody_changed_is_refused(spoil, tmp_path):
    table(tiny.model("bert")).save(tmp_path / "table.json")
    values = json.loads((tmp_path / "table.json").read_text())
    spoil(values)
    (tmp_path / "table.json").write_text(json.dumps(values))
    with pytest.raises(HfpruneError, match="not a latency table"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_without_all_groups_is_of_another_model():
    model = tiny.model("bert")
    whole = table(model)
    partial = dataclasses.replace(whole, groups={})
    with pytest.raises(HfpruneError, match="another structure"):
        plan(model, scored(model), "latency=60%", latency=partial)
