"""Importance with interactions against brute force: least squares solved anew for every choice."""

import pytest
import tiny
import torch

from hfprune.importance.gates import frozen, gate_gradients, outlet_of, output_gradients
from hfprune.importance.moments import Moments, MomentSums, drawn_tokens
from hfprune.importance.reconstruction import DAMPING, Joint, removal_errors
from hfprune.importance.scoring import rank_correlation, score
from hfprune.structure.anatomy import Anatomy

COLUMNS, OUTPUTS = 12, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-9}


def joint(width, bias, inputs=None, columns=COLUMNS):
    """Moments of random inputs, with correlated columns, and the outlet's weights."""
    generator = torch.Generator().manual_seed(width)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(5 * columns, columns) @ draw(columns, columns) + 1 if inputs is None else inputs
    one = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    gradients = draw(30, OUTPUTS)
    moments = Moments(one.T @ one, gradients.T @ gradients)
    return x, Joint(moments, draw(columns, OUTPUTS), columns // width, bias)


def refitted_error(x, known, gone):
    """The least damped error of outputs without the columns `gone`, by solving for the rest."""
    damping = DAMPING * x.square().sum(dim=0).mean()
    if known.bias:
        x = x - x.mean(dim=0)
    columns = x.shape[1]
    gram = x.T @ x + damping * torch.eye(columns)
    stay = [c for c in range(columns) if c not in gone]
    change = torch.zeros_like(known.weight)
    change[gone] = -known.weight[gone]
    if stay:
        right = gram[stay][:, gone] @ known.weight[gone]
        change[stay] = torch.linalg.solve(gram[stay][:, stay], right)
    seen = known.moments.gradients / known.moments.gradients.trace()
    return float(torch.trace(seen @ change.T @ gram @ change))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_units_go_in_the_order_of_brute_force(width, bias):
    x, known = joint(width, bias)
    left, gone, before, order, added = set(range(COLUMNS // width)), [], 0.0, [], []

    def error(unit):
        return refitted_error(x, known, [*gone, *range(unit * width, (unit + 1) * width)])

    while left:
        unit = min(left, key=error)
        order.append(unit)
        added.append(error(unit) - before)
        before = error(unit)
        left.remove(unit)
        gone += range(unit * width, (unit + 1) * width)
    found = removal_errors(known)
    assert found.argsort().tolist() == order
    assert found[order].tolist() == pytest.approx(nearest_ascending(added), rel=1e-5)
    assert float(found.sum()) == pytest.approx(before, rel=1e-5)


def nearest_ascending(values):
    """Isotonic regression by its definition as the largest least mean."""
    count = len(values)
    return [
        max(min(sum(values[j:k]) / (k - j) for k in range(i + 1, count + 1)) for j in range(i + 1))
        for i in range(count)
    ]


@pytest.mark.parametrize("width", [1, 2])
def test_importance_adds_up_to_what_removal_costs(width):
    """Of so many units that several go at once."""
    x, known = joint(width, bias=True, columns=320)
    found = removal_errors(known)
    order = found.argsort()
    for count in (50, 100, 130, len(order)):
        gone = [int(unit) * width + c for unit in order[:count] for c in range(width)]
        added = float(found[order[:count]].sum() / refitted_error(x, known, gone))
        assert 0.97 < added < 1 + 1e-5


def test_what_the_others_take_over_is_not_lost():
    x, _ = joint(1, bias=True)
    x[:, 3] = 2 * x[:, 7] - x[:, 0] + 5  # the last term is for the bias
    _, known = joint(1, bias=True, inputs=x)
    found = removal_errors(known)
    assert found[[0, 3, 7]].min() < 0.02 * found.median()


def test_a_loss_that_sees_nothing_leaves_no_error():
    _, known = joint(1, bias=True)
    known.moments.gradients.zero_()
    assert removal_errors(known).tolist() == [0.0] * COLUMNS


def test_fewer_tokens_than_outputs_are_enough():
    """Then rounding makes the gradients' moment indefinite; nor has every output a gradient."""
    x, known = joint(1, bias=True)
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 40, generator=draw) * torch.rand(40, generator=draw) ** 4
    gradients[:, 7] = 0
    weight = torch.randn(COLUMNS, 40, generator=draw)
    moment = gradients.T @ gradients
    assert torch.linalg.eigvalsh(moment)[0] < 0
    moments = Moments(known.moments.inputs.float(), moment)
    found = removal_errors(Joint(moments, weight, COLUMNS, bias=True))
    exact = Joint(Moments(known.moments.inputs, moment.double()), weight.double(), COLUMNS, True)
    assert float(found.sum()) == pytest.approx(
        refitted_error(x, exact, list(range(COLUMNS))), rel=1e-3
    )


def moments_of(model, batches):
    sums, anatomy = MomentSums(model), Anatomy.of(model)
    watching = output_gradients(model, anatomy, sums.receive)
    with frozen(model), gate_gradients(model, anatomy, lambda *_: None), watching:
        for batch in batches:
            sums.start(batch)
            (model(**batch).loss * len(batch["labels"])).backward()
    return {group.name: sums.take(group) for group in anatomy}


def padded(model):
    batch = tiny.batch(model)
    batch["labels"] = torch.tensor([0, 1])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 3:] = 0
    return batch


def test_moments_are_what_autograd_says():
    model = tiny.model("bert", "AutoModelForSequenceClassification").double()
    batch, name = padded(model), "encoder.layer.0.output.dense"
    outlet, seen = model.get_submodule(f"bert.{name}"), {}

    def keep(module, args, output):
        seen["x"], seen["y"] = args[0], output
        output.retain_grad()

    hook = outlet.register_forward_hook(keep)
    (2 * model(**batch).loss).backward()
    hook.remove()
    inputs = torch.zeros(outlet.in_features + 1, outlet.in_features + 1, dtype=torch.float64)
    size = seen["y"].detach().norm(dim=-1, keepdim=True)
    relative = seen["y"].grad * size
    one = torch.cat([seen["x"], torch.ones_like(size)], dim=-1).detach() / size
    for row, g, mask in zip(one, relative, batch["attention_mask"], strict=True):
        row, g = row[mask.bool()], g[mask.bool()]
        own = g.square().sum(dim=1)
        for token, weight in zip(row, (own + own.mean()) / 2, strict=True):
            inputs += weight * torch.outer(token, token)
    gradients = relative.flatten(0, 1)
    model.zero_grad()
    found = moments_of(model, [batch])[name]
    torch.testing.assert_close(found.inputs, inputs, **CLOSE)
    torch.testing.assert_close(found.gradients, gradients.T @ gradients, **CLOSE)
    split = moments_of(model, [{k: v[n : n + 1] for k, v in batch.items()} for n in range(2)])[name]
    torch.testing.assert_close(split.inputs, found.inputs, **CLOSE)


def test_the_size_of_a_tokens_output_decides_nothing():
    """Behind a norm an output may be small and its gradient large: their product is what counts."""
    model = tiny.model("gemma3_text").double()
    group, batch = next(iter(Anatomy.of(model))), tiny.batch(model)
    inputs = torch.randn(*batch["input_ids"].shape, 6, dtype=torch.float64)
    outputs, gradient = torch.randn(2, *batch["input_ids"].shape, 4, dtype=torch.float64)
    found = []
    for small in (1.0, 1e-3):
        scale = torch.ones(*outputs.shape[:2], 1, dtype=torch.float64)
        scale[:, 0] = small
        sums = MomentSums(model)
        sums.start(batch)
        sums.receive(group, (outputs * scale).norm(dim=-1), inputs * scale, gradient / scale)
        # The constant one of the bias has no such scale.
        moments = sums.take(group)
        found.append((moments.inputs[:-1, :-1], moments.gradients))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
def test_scores_are_the_errors_of_each_outlet(family):
    model = tiny.model(family)
    batch = tiny.batch(model)
    batch["labels"] = batch["input_ids"]
    scores = score(model, [batch], ["reconstruction", "fisher"])
    again = score(model, [batch], ["reconstruction"], checkpointing=True)
    anatomy = Anatomy.of(model)
    for group in anatomy:
        found = scores.by("reconstruction")[group.name]
        assert found.shape == (group.units,) and found.min() > 0
        weight = outlet_of(model, group).weight
        assert weight.grad is None and weight.requires_grad
        torch.testing.assert_close(again.by("reconstruction")[group.name], found)
    for block in anatomy.experts:  # they share no outlet
        fisher = scores.by("fisher")[block.name]
        torch.testing.assert_close(scores.by("reconstruction")[block.name], fisher)


def test_drawn_tokens_stand_for_all_by_their_weight():
    weight = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    weight[100:200], weight[7] = 0.0, 20.0
    index, share = drawn_tokens(weight, 60)
    assert float(share.sum()) == pytest.approx(float(weight.sum()))
    fair = 60 * weight / weight.sum()
    assert (index.bincount(minlength=500) - fair).abs().max() < 1
    everything, own = drawn_tokens(weight, 500)
    assert everything.tolist() == list(range(500)) and own is weight
    assert drawn_tokens(torch.zeros(5), 2)[1].tolist() == [0.0, 0.0]


def test_moments_of_drawn_tokens_order_units_as_those_of_all_do():
    model = tiny.model("llama").double()
    group = next(g for g in Anatomy.of(model) if g.kind == "neuron")
    batch = {"input_ids": torch.zeros(10, 400, dtype=torch.long)}
    columns, outputs = 32, 8
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    inputs = normal(10, 400, columns) @ normal(columns, columns) * normal(columns).exp()
    weight, gradient = normal(columns, outputs), normal(10, 400, outputs)
    gradient = gradient * normal(10, 400, 1).exp()  # tokens that matter unlike
    found = []
    for batches in (None, 1):
        sums = MomentSums(model, batches)
        sums.start(batch)
        sums.receive(group, (inputs @ weight).norm(dim=-1), inputs, gradient)
        found.append(removal_errors(Joint(sums.take(group), weight, columns, bias=False)))
    assert not torch.equal(*found)
    assert rank_correlation(*found) > 0.95


def test_moments_of_wide_outlets_are_the_sum_over_batches():
    """More columns than are multiplied at once, and rows that wait for others."""
    model = tiny.model("llama").double()
    group = next(iter(Anatomy.of(model)))
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    size, inputs, gradient = normal(5, 90).exp(), normal(5, 90, 600), normal(5, 90, 300)
    sums = MomentSums(model)
    for example in range(5):
        own = slice(example, example + 1)
        sums.start({"input_ids": torch.zeros(1, 90, dtype=torch.long)})
        sums.receive(group, size[own], inputs[own], gradient[own])
    found = sums.take(group)
    relative = gradient * size[..., None]
    weight = relative.square().sum(dim=-1)
    weight = (weight + weight.mean(dim=1, keepdim=True)) / 2
    one = torch.cat([inputs, torch.ones(5, 90, 1)], dim=-1) / size[..., None]
    expected = torch.einsum("et,eti,etj->ij", weight, one, one)
    torch.testing.assert_close(found.inputs, expected)
    torch.testing.assert_close(found.gradients, torch.einsum("eti,etj->ij", relative, relative))
