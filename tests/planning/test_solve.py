"""The planner against brute force, and its plans against the real pruned models."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hfprune.errors import BudgetError, HfpruneError
from hfprune.importance.scores import Scores
from hfprune.planning import knapsack
from hfprune.planning.budget import Budget, Limit
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.planning.resources import meter
from hfprune.planning.solve import plan, solve
from hfprune.pruning import masked, remove
from hfprune.structure.anatomy import Anatomy, Block, Group
from hfprune.structure.cost import counted_macs, layers_macs, layers_params
from hfprune.structure.surgery import copy_and_cut

TOKENS = 9


def share_of(resource, share):
    return Budget((Limit(resource, share),))


def solved(anatomy, importance, budget, constraints):
    meters = [meter(limit, None, anatomy, TOKENS) for limit in budget.limits]
    return solve(
        anatomy,
        importance,
        budget,
        meters,
        criterion="x",
        constraints=constraints,
        tokens=TOKENS,
    )


def little_anatomy(heads_per_kv):
    """Two layers of four heads and three neurons, with costs that differ."""
    common = {"stack": 0, "shared_params": 3, "fixed_params": 8}
    groups = []
    for layer in range(2):
        sizes = {"columns": 2, "unit_weights": 11 + layer, "unit_params": 13, "kv_weights": 10}
        where = {"layer": layer, "part": 0, "outlet": f"{layer}.o"}
        sizes |= {"kv_params": 12, "units": 4, "heads_per_kv": heads_per_kv}
        groups.append(Group(name=f"{layer}.attn", kind="head", **where, **sizes, **common))
        sizes = {"columns": 1, "unit_weights": 17, "unit_params": 19 + layer, "units": 3}
        sizes |= {"kv_weights": 0, "kv_params": 0, "heads_per_kv": 1}
        groups.append(Group(name=f"{layer}.ffn", kind="neuron", **where, **sizes, **common))
    return Anatomy("little", tuple(groups), (Block("layers", "layer", 0, -1, (5, 5)),), 100)


def subsets(group, least):
    """Every choice of units that surgery takes: equally many heads per kept KV group."""
    for count in range(least, group.units + 1):
        for units in itertools.combinations(range(group.units), count):
            per_kv = {
                sum(u // group.heads_per_kv == kv for u in units) for kv in group.kv_of(units)
            }
            if len(per_kv) <= 1:
                yield units


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["macs", "params"]),
    st.floats(0.3, 0.95),
    st.integers(0, 1),
    st.integers(0, 2**31),
)
def test_solve_is_the_best_of_all_selections(heads_per_kv, resource, share, least, seed):
    anatomy = little_anatomy(heads_per_kv)
    generator = torch.Generator().manual_seed(seed)
    importance = {
        g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in anatomy
    }

    def cost(keep):
        macs = resource == "macs"
        return layers_macs(anatomy, TOKENS, keep) if macs else layers_params(anatomy, keep)

    budget = share_of(resource, share)
    limit = int(share * cost(anatomy.everything) + 0.5)
    # Per group the best kept importance at each cost; then all combinations of those.
    offers = []
    for group in anatomy:
        best = {}
        for units in subsets(group, least):
            price = cost(anatomy.everything | {group.name: units})
            value = float(importance[group.name][list(units)].sum())
            best[price] = max(best.get(price, (0.0, ())), (value, units))
        offers.append(list(best.values()))
    values = [
        sum(value for value, _ in combination)
        for combination in itertools.product(*offers)
        if cost({g.name: u for g, (_, u) in zip(anatomy, combination, strict=True)}) <= limit
    ]
    constraints = Constraints(min_heads=least, min_neurons=least, tolerance=1.0)
    if not values:
        with pytest.raises(BudgetError):
            solved(anatomy, importance, budget, constraints)
        return
    made = solved(anatomy, importance, budget, constraints)
    assert cost(made.keep) <= limit
    for group in anatomy:
        assert made.keep[group.name] in set(subsets(group, least))
        lost = 1 - importance[group.name][list(made.keep[group.name])].sum() / (
            importance[group.name].sum()
        )
        assert made.lost[group.name] == pytest.approx(float(lost), abs=1e-9)
    assert kept(made, importance) == pytest.approx(max(values))
    assert made.gap == 0


def kept(made, importance):
    return sum(float(importance[name][list(units)].sum()) for name, units in made.keep.items())


def scored(model, seed=0, skew=2):
    """Scores of a model as if it had been scored: random, skewed as importance is."""
    anatomy = Anatomy.of(model)
    generator = torch.Generator().manual_seed(seed)
    importance = {
        g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) ** skew
        for g in (*anatomy, *anatomy.experts)
    }
    tokens = (float(TOKENS),) * len(anatomy.stacks)
    return Scores({"reconstruction": importance}, anatomy.fingerprint, 4, tokens, {})


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("resource", ["macs", "params"])
def test_a_larger_budget_never_keeps_less(family, resource):
    model = tiny.model(family)
    scores = scored(model)
    shares = (0.3, 0.35, 0.5, 0.51, 0.52, 0.7, 0.9, 1.0)
    any_slack = Constraints(min_heads=0, min_neurons=0, tolerance=1.0)
    made = [plan(model, scores, share_of(resource, s), constraints=any_slack) for s in shares]
    values = [kept(p, scores.by("reconstruction")) for p in made]
    assert values == sorted(values)
    assert values[0] < 0.9 * values[-1]
    assert made[-1].keep == Anatomy.of(model).everything


def layer_macs(model):
    """MACs of the layers of one real forward pass over an example, counted by torch."""
    ids = torch.arange(3, 3 + TOKENS)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counts = {
        name.split(".", 1)[1]: sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if "." in name
    }
    names = {module: name for name, module in model.named_modules()}
    stack = model.base_model.get_submodule(STACKS[model.config.model_type])
    return sum(counts.get(names[layer], 0) for layer in stack)


STACKS = {"bert": "encoder.layer", "llama": "layers", "gpt2": "h"}


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_budget_is_met_by_the_real_model(family, share):
    model = tiny.model(family)
    stack = STACKS[family]

    def params(model):
        return sum(p.numel() for p in model.base_model.get_submodule(stack).parameters())

    for resource, count in (("macs", layer_macs), ("params", params)):
        made = plan(model, scored(model), share_of(resource, share))
        real = count(copy_and_cut(model, made.keep)) / count(model)
        assert share * 0.99 <= real <= share * 1.0001
        assert real == pytest.approx(getattr(made, f"{resource}_share"), rel=1e-9)


@pytest.mark.parametrize("budget", ["macs=50%, params=60%", "macs=60%, params=51%"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_of_several_limits_none_is_exceeded_and_one_is_met(budget, family):
    model = tiny.model(family)
    made = plan(model, scored(model), budget, constraints=Constraints(tolerance=0.02))
    assert made == plan(
        model, scored(model), budget.split(","), constraints=Constraints(tolerance=0.02)
    )
    shares = [made.macs_share, made.params_share]
    limits = [limit.amount for limit in made.budget.limits]
    used = [share / limit for share, limit in zip(shares, limits, strict=True)]
    assert max(used) <= 1.0001 and max(used) >= 0.98
    for limit, own, share in zip(made.budget.limits, made.spending, shares, strict=True):
        assert own.kept / own.dense == pytest.approx(share)
        assert f"{limit}: " in made.explain()
    alone = [plan(model, scored(model), limit, constraints=Constraints(tolerance=0.02))
             for limit in budget.split(", ")]  # fmt: skip
    importance = scored(model).by("reconstruction")
    assert kept(made, importance) <= min(kept(one, importance) for one in alone) + 1e-9


@settings(max_examples=15)
@given(st.sampled_from([1, 2]), st.floats(0.4, 0.9), st.floats(0.4, 0.9), st.integers(0, 2**31))
def test_under_two_limits_it_is_the_best_of_all_selections(heads_per_kv, macs, params, seed):
    anatomy = little_anatomy(heads_per_kv)
    generator = torch.Generator().manual_seed(seed)
    importance = {
        g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in anatomy
    }
    whole = anatomy.everything
    costs = (lambda keep: layers_macs(anatomy, TOKENS, keep)), (lambda k: layers_params(anatomy, k))
    limits = [int(s * c(whole) + 0.5) for s, c in zip((macs, params), costs, strict=True)]
    # What a group saves does not depend on the others: per group the best at each pair of costs.
    offers = []
    for group in anatomy:
        best = {}
        for units in subsets(group, 1):
            saved = tuple(c(whole) - c(whole | {group.name: units}) for c in costs)
            value = float(importance[group.name][list(units)].sum())
            best[saved] = max(best.get(saved, 0.0), value)
        offers.append(list(best.items()))
    values = [
        sum(value for _, value in combination)
        for combination in itertools.product(*offers)
        if all(
            c(whole) - sum(saved[n] for saved, _ in combination) <= limits[n]
            for n, c in enumerate(costs)
        )
    ]
    budget = Budget((Limit("macs", macs), Limit("params", params)))
    if not values:
        with pytest.raises(BudgetError):
            solved(anatomy, importance, budget, Constraints(tolerance=1.0))
        return
    made = solved(anatomy, importance, budget, Constraints(tolerance=1.0))
    assert all(c(made.keep) <= limit for c, limit in zip(costs, limits, strict=True))
    assert kept(made, importance) == pytest.approx(max(values))
    assert made.gap < 1e-6


def test_amounts_are_limits_too():
    model = tiny.model("llama")
    anatomy = Anatomy.of(model)
    amount = round(layers_params(anatomy) * 0.6)
    made = plan(model, scored(model), f"params={amount / 1000}K")
    assert 0.99 * amount <= layers_params(anatomy, made.keep) <= amount
    assert made.keep == plan(model, scored(model), "params=60%").keep
    with pytest.raises(BudgetError, match=r"Nothing needs to go for params=15M: .* params=[\d.]+K"):
        plan(model, scored(model), "params=15M")
    beside = plan(model, scored(model), "params=15M, macs=50%")
    assert beside.keep == plan(model, scored(model), "macs=50%").keep
    with pytest.raises(BudgetError, match="No structure") as caught:
        plan(model, scored(model), "params=1K, macs=50%")
    nearest = re.search(r"the least is (params=[\d.]+K)\.", str(caught.value)).group(1)
    plan(model, scored(model), nearest)


@pytest.mark.parametrize("text", ["params=60%", "params=97%", "memory=70%", "params=100%"])
def test_layers_that_get_their_own_bias_tables_pay_for_them(text):
    model = tiny.model("t5")
    coarse = Constraints(tolerance=0.03)
    made = plan(model, scored(model), text, constraints=coarse)
    pruned = remove(model, made)
    tables = [name for name, _ in pruned.named_parameters() if "relative_attention_bias" in name]
    assert len(tables) == (2 if text == "params=100%" else 2 * tiny.LAYERS)
    numel = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    (spent,) = made.spending
    outside = Anatomy.of(model).outside_params
    if text.startswith("params"):
        assert [spent.dense, spent.kept] == [count - outside for count in numel]
    else:
        assert spent.dense > 4 * numel[0] and spent.kept - 4 * numel[1] < spent.dense - 4 * numel[0]
    assert spent.kept <= made.budget.limits[0].amount * spent.dense + 1


@pytest.mark.parametrize("text", ["memory=70%", "memory=75%@4x40", "memory=80KB@2x30"])
def test_a_memory_budget_is_met_by_what_the_real_model_holds(text):
    model = tiny.model("llama")
    made = plan(model, scored(model), text)
    (limit,), (spent,) = made.budget.limits, made.spending
    batch, tokens = limit.shape or (1, TOKENS)

    def held(model):
        ids = torch.full((batch, tokens), 3)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *tensors))

    assert spent.dense == held(model)
    assert spent.kept == held(remove(model, made))
    allowed = limit.amount if limit.absolute else limit.amount * spent.dense
    assert 0.99 * allowed <= spent.kept <= allowed + 1
    assert f"{limit}: {spent.dense / 1000:.4g} KB -> {spent.kept / 1000:.4g} KB" in made.explain()
    assert PruningPlan.from_dict(made.to_dict()) == made


def test_memory_that_the_embeddings_alone_exceed_names_the_nearest():
    model = tiny.model("llama")
    outside = 4 * Anatomy.of(model).outside_params
    with pytest.raises(BudgetError, match="No structure") as caught:
        plan(model, scored(model), f"memory={outside}B")
    nearest = re.search(r"the least is (memory=[\d.]+KB)\.", str(caught.value)).group(1)
    made = plan(model, scored(model), nearest)
    assert outside < made.spending[0].kept


def test_a_budget_that_no_structure_meets_names_the_nearest():
    model = tiny.model("llama")
    with pytest.raises(
        BudgetError, match="at least 1 heads and 1 neurons in every layer"
    ) as caught:
        plan(model, scored(model), "macs=1%")
    nearest = re.search(r"the least is (macs=[\d.]+%)", str(caught.value)).group(1)
    made = plan(model, scored(model), nearest)
    assert all(len(units) in (1, 2) for units in made.keep.values())
    with pytest.raises(BudgetError, match="No structure"):
        plan(model, scored(model), "macs=1%", constraints=Constraints(min_heads=0, min_neurons=20))


def test_a_budget_between_two_structures_names_the_nearest():
    model = tiny.model("bert")
    coarse = Constraints(min_heads=4, min_neurons=0, round_to=24)
    with pytest.raises(
        BudgetError, match="cannot be met within 1%: the nearest below is"
    ) as caught:
        plan(model, scored(model), "params=80%", constraints=coarse)
    nearest = re.search(r"below is (params=[\d.]+%)", str(caught.value)).group(1)
    made = plan(model, scored(model), nearest, constraints=coarse)
    assert made.params_share <= 0.8
    loose = Constraints(min_heads=4, min_neurons=0, round_to=24, tolerance=0.5)
    assert plan(model, scored(model), "params=80%", constraints=loose).keep == made.keep


COARSE = [("llama", 4, 0.4), ("llama", 4, 0.85), ("bert", 8, 0.65), ("bert", 8, 0.8)]


def most_kept(anatomy, importance, round_to, low, high):
    """The most importance that any selection keeps whose MACs are between two shares."""
    whole = layers_macs(anatomy, TOKENS)
    reachable = {whole: 0.0}  # MACs -> the most that is kept of the groups so far
    for group in anatomy:
        values = importance[group.name]
        best = values.argsort(descending=True).tolist()
        choices = (
            subsets(group, 1)
            if group.kind == "head"
            else [
                best[:n] for n in range(1, group.units + 1) if n == group.units or not n % round_to
            ]
        )
        found = {}
        for units in choices:
            saved = whole - layers_macs(anatomy, TOKENS, anatomy.everything | {group.name: units})
            for macs, value in reachable.items():
                at, now = macs - saved, value + float(values[list(units)].sum())
                found[at] = max(found.get(at, 0.0), now)
        reachable = found
    return max(value for macs, value in reachable.items() if low <= macs / whole <= high)


@pytest.mark.parametrize(("family", "round_to", "share"), COARSE)
def test_of_coarse_units_the_best_that_meet_the_budget_stay(family, round_to, share):
    model = tiny.model(family)
    importance = scored(model).by("reconstruction")
    total = sum(float(values.sum()) for values in importance.values())
    made = plan(
        model, scored(model), share_of("macs", share), constraints=Constraints(round_to=round_to)
    )

    def best(low, high):
        return most_kept(made.anatomy, importance, round_to, low, high)

    low, high = share * 0.99, share * 1.0001
    assert kept(made, importance) == pytest.approx(best(low, high))
    assert kept(made, importance) < best(0, high) - 1e-3 * total  # or this test would see nothing
    assert made.gap == pytest.approx(0, abs=1e-9)
    gain = (best(0, share + 0.1) - best(0, high)) / total / 10
    assert made.spending[0].price == pytest.approx(gain, rel=0.6)


def test_a_plan_that_may_not_be_the_best_says_how_far_it_may_be_off(monkeypatch):
    monkeypatch.setattr(knapsack, "_MOST_STATES", 3)
    gaps = []
    for family, round_to, _ in COARSE[1:3]:
        model = tiny.model(family)
        importance = scored(model).by("reconstruction")
        total = sum(float(values.sum()) for values in importance.values())
        for share in (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85):
            try:
                made = plan(
                    model,
                    scored(model),
                    share_of("macs", share),
                    constraints=Constraints(round_to=round_to),
                )
            except BudgetError:
                continue
            best = most_kept(made.anatomy, importance, round_to, share * 0.99, share * 1.0001)
            assert (best - kept(made, importance)) / total <= made.gap + 1e-9
            gaps.append(made.gap)
    assert len(gaps) > 10 and max(gaps) > 0


def test_the_price_is_what_a_little_more_budget_keeps_and_worth_is_by_it():
    model = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=96, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536,
            vocab_size=30,
        )
    )  # fmt: skip
    scores = scored(model)
    importance = scores.by("reconstruction")
    total = sum(float(values.sum()) for values in importance.values())
    for text in ("macs=40%", "macs=70%", "macs=70%, params=60%"):
        limits = Budget.parse(text).limits
        made = plan(model, scores, text)
        binding = [n for n, own in enumerate(made.spending) if own.price]
        assert len(binding) == 1
        raised = limits[binding[0]]
        more = list(limits)
        more[binding[0]] = Limit(raised.resource, raised.amount + 0.01)
        richer = plan(model, scores, Budget(tuple(more)))
        gain = (kept(richer, importance) - kept(made, importance)) / total
        own = made.spending[binding[0]]
        assert own.price == pytest.approx(gain, rel=0.05)
        per_unit = own.price * 100 * total / own.dense
        for group in made.anatomy:
            if group.kind != "neuron":
                continue
            stay = set(made.keep[group.name])
            values = importance[group.name]
            best = max(float(values[n]) for n in range(group.units) if n not in stay)
            last = min(float(values[n]) for n in stay)
            fewer = made.keep | {group.name: made.keep[group.name][1:]}
            macs, params = (
                layers_macs(made.anatomy, TOKENS, made.keep)
                - layers_macs(made.anatomy, TOKENS, fewer),
                layers_params(made.anatomy, made.keep) - layers_params(made.anatomy, fewer),
            )
            cost = macs if raised.resource == "macs" else params
            expected = (best / cost / per_unit, last / cost / per_unit)
            assert made.margins[group.name] == pytest.approx(expected)
            assert expected[0] == pytest.approx(1, abs=0.05) == expected[1]


def test_limits_that_no_structure_meets_together_name_the_nearest_of_each():
    """Three heads in three KV groups compute least; four heads in two groups cache least."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=48, vocab_size=30,
        )
    )  # fmt: skip
    constraints = Constraints(min_heads=3, min_neurons=40)

    def planned(*limits):
        return plan(model, scored(model), Budget(limits), constraints=constraints, tokens=60)

    def refused(*limits):
        with pytest.raises(BudgetError) as caught:
            planned(*limits)
        return str(caught.value)

    limits = []
    for text, room in (("macs=1%", 0.015), ("memory=1%@32x60", 0.005)):
        least = Limit.parse(re.search(r"the least is (.*)\.$", refused(Limit.parse(text))).group(1))
        limits.append(dataclasses.replace(least, amount=least.amount + room))
        planned(limits[-1])
    said = refused(*limits)
    assert f"meets all limits of {limits[0]}, {limits[1]} at once" in said
    named = re.search(r"the others hold: (.*), (.*)\.$", said).groups()
    for n, enough in enumerate(map(Limit.parse, named)):
        relaxed = list(limits)
        relaxed[n] = enough
        planned(*relaxed)
        relaxed[n] = dataclasses.replace(enough, amount=enough.amount - 2e-4)
        refused(*relaxed)


def test_floors_and_rounding_are_kept():
    model = tiny.model("bert")
    constraints = Constraints(min_heads=2, min_neurons=5, round_to=4, tolerance=0.2)
    widths = set()
    for share in (0.47, 0.6, 0.8):
        made = plan(model, scored(model, skew=6), share_of("macs", share), constraints=constraints)
        for group in made.anatomy:
            count = len(made.keep[group.name])
            if group.kind == "head":
                assert count >= 2
            else:
                assert count >= 5 and count % 4 == 0
                widths.add(count)
    assert len(widths) > 1
    bare = Constraints(min_heads=0, min_neurons=0, tolerance=0.5)
    emptied = plan(model, scored(model), "macs=5%", constraints=bare)
    assert () in emptied.keep.values()


def test_a_width_that_is_no_multiple_may_stay_whole():
    made = plan(
        tiny.model("bert"), scored(tiny.model("bert")), "macs=100%",
        constraints=Constraints(round_to=16),
    )  # fmt: skip
    assert made.keep == made.anatomy.everything  # 24 neurons


def test_kv_groups_stay_whole_or_keep_equally_many_heads():
    model = tiny.model("llama")
    for seed in range(6):
        made = plan(model, scored(model, seed), "macs=50%")
        pruned = copy_and_cut(model, made.keep)
        for group in Anatomy.of(pruned):
            assert group.units == len(made.keep[group.name])


def test_importance_all_zero_still_meets_the_budget():
    model = tiny.model("bert")
    scores = scored(model)
    nothing = {name: torch.zeros_like(v) for name, v in scores.by("reconstruction").items()}
    made = solved(Anatomy.of(model), nothing, share_of("macs", 0.5), Constraints())
    assert 0.495 <= made.macs_share <= 0.5
    assert all(math.isfinite(share) for share in made.lost.values())


def test_scores_of_another_model_are_refused():
    model = tiny.model("bert")
    with pytest.raises(HfpruneError, match="measured on a model of another structure"):
        plan(model, scored(tiny.model("llama")), "macs=50%")
    with pytest.raises(HfpruneError, match=r"'taylor'.*Available: reconstruction"):
        plan(model, scored(model), "macs=50%", criterion="taylor")


def test_the_length_is_that_of_the_calibration_data_by_default():
    model = tiny.model("llama")
    assert plan(model, scored(model), "macs=50%").tokens == TOKENS
    assert plan(model, scored(model), "macs=50%", tokens=50).tokens == 50


def test_a_budget_of_macs_holds_where_encoder_and_decoder_read_unequally_many_tokens():
    """By torch's own count, besides the task head."""
    dense, lengths = tiny.model("t5"), (40, 5)
    scores = dataclasses.replace(scored(dense), tokens=(39.8, 5.4))
    made = plan(dense, scores, "macs=60%")
    inputs = {
        name: torch.full((1, count), 3)
        for name, count in zip(("input_ids", "decoder_input_ids"), lengths, strict=True)
    }
    head = lengths[1] * dense.lm_head.weight.numel()
    before, after = (counted_macs(m, inputs) - head for m in (dense, remove(dense, made)))
    assert made.tokens == lengths
    assert made.macs_share == after / before
    assert 0.55 < made.macs_share <= 0.6
    assert "(40 and 5 tokens)" in made.explain()
    assert PruningPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert plan(dense, scores, "macs=60%", tokens=lengths) == made
    assert plan(dense, scores, "macs=60%", tokens=9).tokens == 9
    with pytest.raises(HfpruneError, match=r"1 numbers; .* \(encoder\.block, decoder\.block\)"):
        plan(dense, scores, "macs=60%", tokens=[9])


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_heads": -1},
        {"min_neurons": -2},
        {"round_to": 0},
        {"tolerance": 0},
        {"tolerance": float("nan")},
    ],
)
def test_constraints_that_make_no_sense(wrong):
    with pytest.raises(HfpruneError, match="must be 0 or more"):
        Constraints(**wrong)


@pytest.mark.parametrize("name", ["min_heads", "min_neurons", "round_to", "layers", "experts"])
@pytest.mark.parametrize("wrong", ["2", 1.5])
def test_constraints_that_are_no_whole_numbers(name, wrong):
    with pytest.raises(HfpruneError, match="must be whole numbers"):
        Constraints(**{name: wrong})


@pytest.mark.parametrize("family", ["mistral", "qwen3", "bert", "bart", "clip", "gpt_bigcode"])
def test_a_uniform_plan_makes_a_stock_model(family, tmp_path):
    model = tiny.model(family)
    holds_heads = family in ("mistral", "qwen3")
    every_head = Constraints(min_heads=1 if holds_heads else tiny.HEADS, uniform=True, tolerance=1)
    made = plan(model, scored(model), "macs=85%", constraints=every_head)
    assert made.macs_share <= 0.85
    widths = {(g.stack, g.kind): set() for g in made.anatomy}
    for group in made.anatomy:
        widths[group.stack, group.kind].add(
            (len(made.keep[group.name]), len(group.kv_of(made.keep[group.name])))
            if group.kind == "head"
            else len(made.keep[group.name])
        )
    assert all(len(found) == 1 for found in widths.values())
    inputs = tiny.batch(model)
    smaller = remove(model, made, compensate=[inputs])
    smaller.save_pretrained(tmp_path)
    plain = getattr(transformers, tiny.auto_class(family)).from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert type(plain) is type(smaller) is type(model)
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(smaller, inputs))
    assert plain.config.hfprune["lineage"] == [made.summary]


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 4]), st.floats(0.4, 0.95), st.integers(0, 2**31))
def test_a_uniform_plan_is_the_best_of_all_uniform_ones(heads_per_kv, share, seed):
    anatomy = little_anatomy(heads_per_kv)
    generator = torch.Generator().manual_seed(seed)
    importance = {
        g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in anatomy
    }
    limit = int(share * layers_macs(anatomy, TOKENS) + 0.5)

    def alike(name):
        """Both layers' best choices of a kind, for every number of units and KV groups."""
        group = anatomy[f"0.{name}"]
        shapes = {(len(u), len(group.kv_of(u))) for u in subsets(group, 1)}
        for shape in shapes:
            yield {
                f"{n}.{name}": max(
                    (u for u in subsets(group, 1) if (len(u), len(group.kv_of(u))) == shape),
                    key=lambda u, n=n: float(importance[f"{n}.{name}"][list(u)].sum()),
                )
                for n in range(2)
            }

    values = [
        sum(float(importance[name][list(units)].sum()) for name, units in keep.items())
        for heads, neurons in itertools.product(alike("attn"), alike("ffn"))
        if layers_macs(anatomy, TOKENS, keep := heads | neurons) <= limit
    ]
    constraints = Constraints(uniform=True, tolerance=1.0)
    if not values:
        with pytest.raises(BudgetError):
            solved(anatomy, importance, share_of("macs", share), constraints)
        return
    made = solved(anatomy, importance, share_of("macs", share), constraints)
    assert kept(made, importance) == pytest.approx(max(values))


def test_what_a_stock_config_cannot_hold_is_refused_before_planning():
    model = tiny.model("bert")
    with pytest.raises(HfpruneError, match=r"cannot hold fewer heads.*min_heads=4"):
        plan(model, scored(model), "macs=50%", constraints=Constraints(uniform=True))
    for family in ("helium", "mistral3"):  # their heads' number says nothing of the width of all
        model = tiny.model(family)
        with pytest.raises(HfpruneError, match=r"cannot hold fewer heads.*min_heads=4"):
            plan(model, scored(model), "macs=50%", constraints=Constraints(uniform=True))
    with pytest.raises(HfpruneError, match="1 or more"):
        Constraints(uniform=True, min_heads=0)
    uneven = copy_and_cut(tiny.model("llama"), {"layers.1.mlp.down_proj": range(9)})
    with pytest.raises(HfpruneError, match="different numbers of neurons"):
        plan(uneven, scored(uneven), "macs=50%", constraints=Constraints(uniform=True))


@pytest.mark.parametrize(
    ("family", "protect"),
    [
        ("bert", ("encoder.layer.0",)),
        ("bert", ("encoder.layer.0.attention", "encoder.layer.2.output.dense")),
        ("t5", ("encoder",)),
        ("bart", ("decoder.layers",)),
        ("clip", ("vision_model",)),
    ],
)
def test_what_is_protected_stays_whole(family, protect):
    model = tiny.model(family)
    made = plan(model, scored(model), "params=75%", constraints=Constraints(protect=protect))
    whole = {g.name for g in made.anatomy if g.name.startswith(protect)}
    assert 0 < len(whole) < len(made.anatomy.groups)
    assert all(len(made.keep[name]) == made.anatomy[name].units for name in whole)
    assert 0.74 < made.params_share <= 0.75  # of all layers, the protected ones too


def test_protecting_leaves_less_to_choose_from_and_says_so():
    model = tiny.model("bert")
    constraints = Constraints(protect=("encoder.layer.0", "encoder.layer.1"))
    with pytest.raises(BudgetError, match=r"and all of encoder\.layer\.0, encoder\.layer\.1"):
        plan(model, scored(model), "macs=50%", constraints=constraints)
    # A part of a name is no name.
    for wrong in ("encoder.layer.7", "encoder.lay", "encoder.layer.0.attention.selv"):
        with pytest.raises(HfpruneError, match=r"name in protect .* Did you mean 'encoder\.layer"):
            plan(model, scored(model), "macs=50%", constraints=Constraints(protect=(wrong,)))
    with pytest.raises(HfpruneError, match=r"a tuple of names: \('encoder\.layer\.0',\)"):
        Constraints(protect="encoder.layer.0")
    some = Constraints(protect=("encoder.layer.0",), uniform=True, min_heads=4)
    with pytest.raises(HfpruneError, match="Protect all layers of the stack or none"):
        plan(model, scored(model), "macs=75%", constraints=some)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart", "modernbert", "mixtral"])
@pytest.mark.parametrize("resource", ["macs", "params"])
def test_the_layers_of_least_importance_go_whole(family, resource):
    model = tiny.model(family)
    scores = scored(model)
    share = 0.5 if resource == "macs" else 0.62
    constraints = Constraints(layers=2, tolerance=0.03)  # the units of a tiny model are coarse
    made = plan(model, scores, share_of(resource, share), constraints=constraints)
    assert share * 0.97 <= getattr(made, f"{resource}_share") <= share * 1.0001
    importance = scores.by("reconstruction")
    assert set(made.dropped) == {stack.name for stack in made.anatomy.stacks}
    for stack in made.anatomy.stacks:
        worth = [
            sum(float(importance[g.name].sum()) for g in made.anatomy if (g.stack, g.layer) == at)
            for at in ((stack.stack, n) for n in range(stack.units))
        ]
        gone = min((n for n in range(stack.units) if n not in stack.pinned), key=worth.__getitem__)
        assert made.dropped[stack.name] == (gone,)
        assert made.keep[stack.name] == tuple(n for n in range(stack.units) if n != gone)
    for group in made.anatomy:
        assert made.drops(group) == (made.keep[group.name] == ())
    inputs = tiny.batch(model)
    pruned = remove(model, made)
    with masked(model, made), torch.no_grad():
        expected = tiny.outputs(model, inputs)
    torch.testing.assert_close(tiny.outputs(pruned, inputs), expected, rtol=1e-4, atol=1e-4)
    before, after = Anatomy.of(model), Anatomy.of(pruned)
    assert made.params_share == layers_params(after) / layers_params(before)
    assert made.macs_share == layers_macs(after, TOKENS) / layers_macs(before, TOKENS)
    assert PruningPlan.from_dict(made.to_dict()) == made


def test_the_last_layer_may_go_and_its_predecessor_stands_for_it():
    model = tiny.model("bert")
    scores = scored(model)
    for name, values in scores.by("reconstruction").items():
        values *= name.startswith("encoder.layer.0")
    made = plan(model, scores, "macs=20%", constraints=Constraints(layers=1, tolerance=0.1))
    assert made.keep["encoder.layer"] == (0,) and made.layer_map == [2]
    assert plan(model, scored(model), "macs=50%").layer_map is None
    both = tiny.model("bart")
    two = Constraints(layers=2, tolerance=0.1)
    of_both = plan(both, scored(both), "macs=50%", constraints=two)
    encoder, decoder = (of_both.keep[s.name] for s in of_both.anatomy.stacks)
    assert of_both.layer_map == [encoder[1] - 1, 2, 3 + decoder[1] - 1, 5]


def test_protected_layers_stay():
    model = tiny.model("bert")
    scores = scored(model)
    worst = plan(model, scores, "macs=50%", constraints=Constraints(layers=2)).dropped
    (gone,) = worst["encoder.layer"]
    for name in (f"encoder.layer.{gone}", f"encoder.layer.{gone}.output.dense"):
        constraints = Constraints(layers=2, protect=(name,))
        made = plan(model, scores, "macs=60%", constraints=constraints)
        assert gone in made.keep["encoder.layer"] and len(made.keep["encoder.layer"]) == 2
    both = tiny.model("bart")
    constraints = Constraints(layers=1, protect=("decoder",), tolerance=0.1)
    made = plan(both, scored(both), "params=75%", constraints=constraints)
    assert set(made.dropped) == {"encoder.layers"}
    constraints = Constraints(layers=1, protect=("encoder.layer.0", "encoder.layer.2"))
    with pytest.raises(HfpruneError, match="only 1 layers are to stay, but layers 0, 2 must"):
        plan(model, scores, "macs=50%", constraints=constraints)
    with pytest.raises(HfpruneError, match="layers must be 1 or more"):
        Constraints(layers=0)


def test_fewer_layers_of_the_same_widths_need_no_hfprune(tmp_path):
    model = tiny.model("gemma3_text")
    constraints = Constraints(layers=2, uniform=True, tolerance=1)
    made = plan(model, scored(model), "macs=55%", constraints=constraints)
    inputs = tiny.batch(model)
    smaller = remove(model, made, compensate=[inputs])
    smaller.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert plain.config.num_hidden_layers == 2 and type(plain) is type(model)
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(smaller, inputs))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe"])
def test_the_experts_of_least_importance_go(family):
    model = tiny.model(family)
    scores = scored(model)
    constraints = Constraints(experts=3, tolerance=0.05)
    made = plan(model, scores, "params=52%", constraints=constraints)
    assert 0.49 < made.params_share <= 0.52
    assert len(made.anatomy.experts) == tiny.LAYERS
    for block in made.anatomy.experts:
        best = scores.by("reconstruction")[block.name].topk(3).indices.tolist()
        assert made.keep[block.name] == tuple(sorted(best))
        said = f"Of {block.name}, these of 6 experts stay: {', '.join(map(str, sorted(best)))}."
        assert said in made.explain()
    inputs = tiny.batch(model)
    pruned = remove(model, made)
    with masked(model, made), torch.no_grad():
        expected = tiny.outputs(model, inputs)
    torch.testing.assert_close(tiny.outputs(pruned, inputs), expected, rtol=1e-4, atol=1e-4)
    assert made.params_share == layers_params(Anatomy.of(pruned)) / layers_params(made.anatomy)
    assert PruningPlan.from_dict(made.to_dict()) == made
    other = plan(model, scores, "params=95%", constraints=Constraints(tolerance=0.1))
    assert f"{block.name}: 3 -> 6 experts (+3 -0)" in made.diff(other)
    kept_whole = Constraints(experts=3, protect=("layers.1",), tolerance=0.1)
    assert set(made.keep) - set(plan(model, scores, "params=70%", constraints=kept_whole).keep) == {
        "layers.1.mlp.experts"
    }


def test_experts_that_cannot_go_are_refused():
    model = tiny.model("mixtral")
    with pytest.raises(HfpruneError, match="experts must be 2 or more, not 1"):
        plan(model, scored(model), "params=50%", constraints=Constraints(experts=1))
    mixed = Constraints(experts=3, uniform=True, protect=("layers.1.mlp",))
    with pytest.raises(HfpruneError, match="Protect all layers of the stack or none"):
        plan(model, scored(model), "params=50%", constraints=mixed)
    with pytest.raises(HfpruneError, match="A bert has no routed experts"):
        Constraints(experts=3).check(tiny.model("bert"))


def test_scores_from_before_experts_were_known_are_refused():
    model = tiny.model("mixtral")
    old = scored(model)
    for block in Anatomy.of(model).experts:
        del old.importance["reconstruction"][block.name]
    with pytest.raises(
        HfpruneError, match=r"nothing for layers\.0\.mlp\.experts.*Score this model"
    ):
        plan(model, old, "params=60%", constraints=Constraints(experts=3, tolerance=0.1))
    plan(model, old, "params=95%", constraints=Constraints(tolerance=0.1))


def test_importance_that_is_zero_in_places_does_not_trip_the_tolerance():
    model = tiny.model("bert")
    importance = scored(model).by("reconstruction")
    for name, values in importance.items():
        values *= name.startswith("encoder.layer.0")
    for share in (0.3, 0.5, 0.9, 1.0):
        made = solved(Anatomy.of(model), importance, share_of("macs", share), Constraints())
        assert share * 0.99 <= made.macs_share <= share * 1.0001


def test_a_uniform_plan_of_fewer_experts_makes_a_stock_model(tmp_path):
    model = tiny.model("mixtral")
    constraints = Constraints(experts=3, uniform=True, tolerance=0.1)
    smaller = remove(model, plan(model, scored(model), "params=50%", constraints=constraints))
    smaller.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    assert type(plain) is type(smaller) is type(model)
    inputs = tiny.batch(model)
    assert tiny.outputs(plain, inputs).equal(tiny.outputs(smaller, inputs))


def test_coarse_units_use_their_room_if_importance_alone_would_not():
    """One group holds all the importance; the other, coarse one alone comes near the limit."""
    model = tiny.model("bert")
    importance = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in Anatomy.of(model)}
    first = next(iter(importance))
    importance[first] += 1.0
    anatomy = Anatomy.of(model)
    scores = Scores({"reconstruction": importance}, anatomy.fingerprint, 4, (float(TOKENS),), {})
    for group in anatomy:  # a little negative worth: importance alone would keep the least
        if group.name != first:
            importance[group.name] -= 1e-6
    made = plan(model, scores, "params=60%")
    assert 0.59 < made.params_share <= 0.6
    assert len(made.keep[first]) == len(importance[first])


@pytest.mark.parametrize("resource", ["params", "memory"])
def test_a_protected_stack_shares_its_position_biases(resource):
    """What a stack that loses heads pays for tables of its own is not asked of one that cannot."""
    model = tiny.model("t5")
    encoder = Constraints(protect=("encoder",))
    with pytest.raises(BudgetError, match="the least is") as caught:
        plan(model, scored(model), f"{resource}=10%", constraints=encoder)
    least = re.search(rf"the least is ({resource}=[^. ]+(?:[.]\d+%)?(?:@1x9)?)", str(caught.value))
    made = plan(model, scored(model), least.group(1), constraints=encoder)
    (spent,) = made.spending
    amount = made.budget.limits[0].amount
    assert amount - 2e-4 < spent.kept / spent.dense <= amount


def test_nothing_is_less_than_can_be_asked_for():
    model = tiny.model("bert")
    empty = Constraints(min_heads=0, min_neurons=0)
    with pytest.raises(BudgetError, match=r"cannot be met .* the nearest below is macs=0\.01%"):
        plan(model, scored(model), "macs=0.1%", constraints=empty)


@pytest.mark.parametrize(
    ("options", "relax"),
    [({}, "tolerance"), ({"layers": 1}, "layers"), ({"round_to": 24}, "round_to")],
)
def test_what_keeps_a_budget_from_being_met_is_named(options, relax):
    model = tiny.model("bert")
    constraints = Constraints(tolerance=1e-6, **options)
    with pytest.raises(BudgetError, match=f"Ask for that, or relax {relax}"):
        plan(model, scored(model), "params=66.61%", constraints=constraints)


@pytest.mark.parametrize("tokens", [0, -5, (9, 0), "9", (9, "9"), True, 1.5, float("inf")])
def test_tokens_of_no_example(tokens):
    model = tiny.model("t5" if isinstance(tokens, tuple) else "bert")
    with pytest.raises(HfpruneError, match="tokens must be 1 or more"):
        plan(model, scored(model), "macs=60%", tokens=tokens)


def test_tokens_may_be_a_float_of_a_whole_number():
    model = tiny.model("bert")
    assert plan(model, scored(model), "macs=60%", tokens=9.0).tokens == 9
