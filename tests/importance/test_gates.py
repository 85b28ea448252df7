"""Gates: their gradients against finite differences, and that nothing of them stays behind."""

import itertools

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hfprune.importance.gates import frozen, gate_gradients, gated, masked, outlet_of
from hfprune.structure.anatomy import Anatomy

STEP = 1e-5


def exact(model):
    """In double precision throughout: llama's own norm and attention round to single."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    model.set_attn_implementation("sdpa")
    return model.double()


def make(family):
    """A tiny model, a batch of five examples, two of them padded, and the loss of each example."""
    if family == "bert":
        model = exact(tiny.model("bert", "AutoModelForSequenceClassification"))
    else:
        model = exact(tiny.model("llama"))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny.VOCABULARY, (5, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:], mask[3, 5:] = 0, 0
    ids = ids.where(mask.bool(), 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch["labels"] = (
        torch.tensor([0, 1, 1, 0, 1]) if family == "bert" else ids.where(mask.bool(), -100)
    )
    return model, batch


def losses(model, batch):
    """(examples,) the loss of each example, by torch alone."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    terms = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return terms.sum(dim=1)


def slopes(model, batch):
    """{group: (examples, units)} the gate gradients by central differences."""
    found = {}
    with torch.no_grad():
        for group in Anatomy.of(model):
            columns = []
            for unit in range(group.units):
                sides = []
                for sign in (1, -1):
                    gate = torch.ones(group.units, dtype=torch.float64)
                    gate[unit] += sign * STEP
                    with gated(model, {group.name: gate}):
                        sides.append(losses(model, batch))
                columns.append((sides[0] - sides[1]) / (2 * STEP))
            found[group.name] = torch.stack(columns, dim=1)
    return found


@pytest.fixture(params=["bert", "llama"])
def family(request):
    return request.param


def hooks(model):
    return [
        hook
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in table
    ]


def test_gate_gradients_are_finite_differences(family):
    model, batch = make(family)
    anatomy = Anatomy.of(model)
    if family == "llama":
        assert {g.heads_per_kv for g in anatomy if g.kind == "head"} == {2}
    found = {}

    def receive(group, activation, gradient):
        shape = (*activation.shape[:2], group.units, group.columns)
        found[group.name] = (activation * gradient).reshape(shape).sum(dim=(1, 3))

    with frozen(model), gate_gradients(model, anatomy, receive):
        losses(model, batch).sum().backward()
    expected = slopes(model, batch)
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        assert slope.abs().max() > 1e-3
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)


def test_no_weight_gradient_is_ever_allocated(family):
    model, batch = make(family)
    seen = []

    def receive(group, activation, gradient):
        seen.append(any(p.requires_grad for p in model.parameters()))
        seen.append(any(p.grad is not None for p in model.parameters()))

    with frozen(model), gate_gradients(model, Anatomy.of(model), receive):
        losses(model, batch).sum().backward()
    assert len(seen) == 2 * len(Anatomy.of(model).groups)
    assert not any(seen)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_gate_scales_the_columns_of_its_unit(family):
    model, batch = make(family)
    anatomy = Anatomy.of(model)
    generator = torch.Generator().manual_seed(5)
    gates = {
        g.name: torch.rand(g.units, generator=generator, dtype=torch.float64)
        for g in anatomy
        if g.layer != 1
    }
    with torch.no_grad():
        with gated(model, gates):
            through_gates = losses(model, batch)
        plain = losses(model, batch)
        for name, gate in gates.items():
            columns = gate.repeat_interleave(anatomy[name].columns)
            outlet_of(model, anatomy[name]).weight.mul_(columns)  # (outputs, columns)
        torch.testing.assert_close(through_gates, losses(model, batch), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(through_gates, plain)


def test_masked_is_the_model_with_zeroed_outlet_columns(family):
    model, batch = make(family)
    anatomy = Anatomy.of(model)
    selection = tiny.selection(anatomy)
    with torch.no_grad():
        with masked(model, selection):
            closed = losses(model, batch)
        for group in anatomy:
            gone = sorted(set(range(group.units)) - set(selection[group.name]))
            outlet = outlet_of(model, group)
            blocks = outlet.weight.reshape(len(outlet.weight), group.units, group.columns)
            blocks[:, gone] = 0
        torch.testing.assert_close(closed, losses(model, batch), rtol=1e-12, atol=1e-12)


def test_a_gate_that_requires_grad_gets_the_same_gradient():
    model, batch = make("llama")
    anatomy = Anatomy.of(model)
    gates = {g.name: torch.ones(g.units, dtype=torch.float64, requires_grad=True) for g in anatomy}
    with frozen(model), gated(model, gates):
        losses(model, batch).sum().backward()
    for name, slope in slopes(model, batch).items():
        torch.testing.assert_close(gates[name].grad, slope.sum(dim=0), rtol=1e-6, atol=1e-8)


class Stop(Exception):
    pass


def test_hooks_go_with_their_context_even_after_an_error(family):
    model, batch = make(family)
    anatomy = Anatomy.of(model)
    contexts = {
        "gated": lambda: gated(model, {g.name: torch.ones(g.units) for g in anatomy}),
        "masked": lambda: masked(model, tiny.selection(anatomy)),
        "gate_gradients": lambda: gate_gradients(model, anatomy, lambda *_: None),
    }
    before = losses(model, batch)
    for context, fails in itertools.product(contexts.values(), (False, True)):
        try:
            with context():
                assert len(hooks(model)) == len(anatomy.groups)
                if fails:
                    raise Stop
        except Stop:
            assert fails
        assert not hooks(model)
    with pytest.raises(KeyError):  # in the middle of hanging them up
        gated(model, {anatomy.groups[0].name: torch.ones(4), "nowhere": torch.ones(4)}).__enter__()
    assert not hooks(model)
    assert losses(model, batch).equal(before)


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_gives_back_modes_and_requires_grad(fails):
    model, _ = make("bert")
    model.train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    assert len(set(modes)) == len(set(wanted)) == 2
    try:
        with frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            if fails:
                raise Stop
    except Stop:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_a_forward_without_gradients_inside_reports_nothing():
    model, batch = make("bert")
    seen = []
    with frozen(model), gate_gradients(model, Anatomy.of(model), lambda *a: seen.append(a)):
        with torch.no_grad():
            losses(model, batch)
        assert not seen
        losses(model, batch).sum().backward()
    assert len(seen) == len(Anatomy.of(model).groups)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "phimoe"])
def test_the_gates_of_experts_have_the_slope_of_finite_differences(family):
    model = tiny.model(family, dtype=torch.float64)
    inputs, found = tiny.batch(model), {}
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(tiny.outputs(model, inputs).shape, generator=generator).double()

    def loss():
        return (tiny.outputs(model, inputs) * weights).sum()

    def receive(part, activation, gradient):
        assert activation.shape == gradient.shape
        found[part.name] = (activation * gradient).double().flatten(0, -2).sum(0)

    anatomy = Anatomy.of(model)
    with frozen(model), gate_gradients(model, anatomy, receive):
        loss().backward()
    assert len(anatomy.experts) == tiny.LAYERS
    step = 1e-4
    for block in anatomy.experts:
        direction = torch.randn(block.units, generator=generator).double()
        sides = []
        for sign in (1, -1):
            with torch.no_grad(), gated(model, {block.name: 1 + sign * step * direction}):
                sides.append(loss())
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(found[block.name] @ direction, slope, rtol=1e-2, atol=5e-2)
