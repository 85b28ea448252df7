"""Compensation: never worse where it measures, exact where it can be, the model left in order."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModel

from hfprune.errors import DataError, HfpruneError
from hfprune.importance.gates import outlet_of
from hfprune.recovery.compensation import compensate
from hfprune.recovery.junctions import Junction, junction_of
from hfprune.recovery.layer_calls import layer_calls
from hfprune.structure.anatomy import Anatomy, axis_of, layer_of
from hfprune.structure.architectures import row_of
from hfprune.structure.surgery import copy_and_cut

FAMILIES = ["bert", "llama", "gpt2", "gemma3_text", "t5"]


def batches(model, count=6, tokens=11, seed=0, examples=4):
    """Batches of examples whose last tokens are padding in every other one."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (examples, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, tokens - 3 :] = 0
        batch = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
        if model.config.is_encoder_decoder:
            answer = torch.randint(3, tiny.VOCABULARY, (examples, 7), generator=generator)
            batch |= {
                "decoder_input_ids": answer,
                "decoder_attention_mask": torch.ones_like(answer),
            }
            batch["decoder_attention_mask"][::2, 5:] = 0
        made.append(batch)
    return made


def uneven(anatomy, share=0.5):
    """A choice of half of every group's units, the first ones or the last."""
    keep = {}
    for number, group in enumerate(anatomy):
        kept = max(1, round(group.kv_groups * share))
        first = (group.kv_groups - kept) * (number % 2)
        keep[group.name] = tuple(
            unit
            for unit in range(group.units)
            if first <= unit // group.heads_per_kv < first + kept
        )
    return keep


def stream(model, data):
    """What each stack's layers leave in the residual stream, in every batch, without padding."""
    found = []
    stacks = row_of(model.config.model_type).stacks
    ends = [model.base_model.get_submodule(stack.layers)[-1] for stack in stacks]
    for batch in data:
        hooks = [
            end.register_forward_hook(
                lambda module, args, out, batch=batch: found.append(flat(out, batch))
            )
            for end in ends
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return torch.cat(found)


def flat(out, batch):
    out = out[0] if isinstance(out, tuple) else out
    mask = batch["attention_mask"]
    return (out[mask.bool()] if mask.shape == out.shape[:2] else out.flatten(0, 1)).double()


def error(model, dense, data):
    return float((stream(model, data) - stream(dense, data)).square().mean())


def assert_close_models(one, other, **tolerance):
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_the_dense_model_than_no_compensation(family):
    dense = tiny.model(family)
    data = batches(dense)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert error(refitted, dense, data) < 0.9 * error(pruned, dense, data)
    fresh = batches(dense, seed=7)
    assert error(refitted, dense, fresh) < error(pruned, dense, fresh)


def single(dense, group, kept):
    """A model that lost units of one group only: then that outlet's error is the whole of it."""
    return copy_and_cut(dense, {group.name: kept})


def sums_error(dense, pruned, group, data):
    """Mean squared error of the residual sum after an outlet, the rest of the model being equal."""
    outlets = [outlet_of(model, group) for model in (dense, pruned)]
    total = count = 0.0
    for batch in data:
        seen = []
        hooks = [
            o.register_forward_hook(lambda m, args, out: seen.append(flat(out, batch)))  # noqa: B023
            for o in outlets
        ]
        with torch.no_grad():
            dense(**batch)
            pruned(**batch)
        for hook in hooks:
            hook.remove()
        total += float((seen[0] - seen[1]).square().sum())
        count += len(seen[0])
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_outlets_error_never_grows_and_is_least_squares(family):
    """Before the first cut nothing differs, so the outlet's own output is the sum's error."""
    dense = tiny.model(family)
    data = batches(dense, examples=40)
    for group in list(Anatomy.of(dense))[:2]:
        pruned = single(dense, group, uneven(Anatomy.of(dense))[group.name])
        before = sums_error(dense, pruned, group, data)
        compensate(dense, pruned, data)
        after = sums_error(dense, pruned, group, data)
        assert after < before
        assert after <= 1.1 * least_squares(dense, pruned, group, data) + 1e-9  # the ridge's


def least_squares(dense, pruned, group, data):
    """The least mean squared error that any outlet could have, by torch's own solver."""
    inputs, targets = [], []
    for batch in data:
        hooks = [
            outlet_of(pruned, group).register_forward_hook(
                lambda m, args, out: inputs.append(flat(args[0], batch))  # noqa: B023
            ),
            outlet_of(dense, group).register_forward_hook(
                lambda m, args, out: targets.append(flat(out, batch))  # noqa: B023
            ),
        ]
        with torch.no_grad():
            dense(**batch)
            pruned(**batch)
        for hook in hooks:
            hook.remove()
    x, y = torch.cat(inputs), torch.cat(targets)
    if getattr(outlet_of(pruned, group), "bias", None) is not None:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum() / len(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family):
    dense = tiny.model(family)
    same = copy_and_cut(dense, Anatomy.of(dense).everything)
    compensate(dense, same, batches(dense))
    assert_close_models(same, dense, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3_text"])
def test_layers_before_the_first_cut_stay_as_they_were(family):
    dense = tiny.model(family)
    anatomy = Anatomy.of(dense)
    keep = {g.name: u for g, u in zip(anatomy, uneven(anatomy).values(), strict=True) if g.layer}
    pruned = compensate(dense, copy_and_cut(dense, keep), batches(dense))
    first = next(iter(anatomy))
    assert_close_models(layer_of(pruned, first), layer_of(dense, first), rtol=0, atol=0)


def rows_of(module, values, unit, other, size, scale=1.0):
    """Make a unit's output rows a multiple of another's."""
    for tensor in [module.weight, *([module.bias] if module.bias is not None else [])]:
        tensor[unit * size : (unit + 1) * size] = scale * tensor[other * size : (other + 1) * size]


@torch.no_grad()
def test_a_neuron_that_is_a_copy_is_taken_over_exactly():
    dense = tiny.model("bert")
    for layer in dense.base_model.encoder.layer:
        for unit in range(4):  # 0...3 say what 4...7 say
            rows_of(layer.intermediate.dense, None, unit, unit + 4, 1)
    keep = {g.name: range(4, g.units) for g in Anatomy.of(dense) if g.kind == "neuron"}
    exact_when_refitted(dense, keep)


@torch.no_grad()
def test_a_neuron_that_is_a_sum_of_kept_ones_is_taken_over_exactly():
    dense = tiny.model("llama")  # its up projection is linear
    for layer in dense.base_model.layers:
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        gate[0], gate[2] = gate[1], gate[1]
        up[0] = 2 * up[1] - 0.5 * up[2]
    keep = {g.name: range(1, g.units) for g in Anatomy.of(dense) if g.kind == "neuron"}
    exact_when_refitted(dense, keep)


@torch.no_grad()
def test_a_head_that_is_a_copy_is_taken_over_exactly():
    dense = tiny.model("llama")
    size = tiny.HEAD_DIM
    for layer in dense.base_model.layers:
        attention = layer.self_attn
        rows_of(attention.q_proj, None, 0, 2, size)  # head 0 of KV group 0 is head 2 of KV group 1
        rows_of(attention.q_proj, None, 1, 3, size)
        rows_of(attention.k_proj, None, 0, 1, size)
        rows_of(attention.v_proj, None, 0, 1, size, scale=-3.0)
    keep = {g.name: (2, 3) for g in Anatomy.of(dense) if g.kind == "head"}
    exact_when_refitted(dense, keep)


def exact_when_refitted(dense, keep):
    """The removed units are linear copies: all of the error is the ridge's and goes with it."""
    data = batches(dense, count=12)
    pruned = copy_and_cut(dense, keep)
    before = error(pruned, dense, data)
    after = error(compensate(dense, pruned, data), dense, data)
    assert before > 1e-2
    assert after < 1e-4 * before


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_bfloat16(family):
    dense = tiny.model(family, dtype=torch.bfloat16)
    data = batches(dense)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert {p.dtype for p in refitted.parameters()} == {torch.bfloat16}
    assert error(refitted, dense, data) < error(pruned, dense, data)


def test_autocast_around_it_does_not_go_on_with_the_old_weights():
    dense = tiny.model("llama")
    data, keep = batches(dense), uneven(Anatomy.of(dense))
    pruned = copy_and_cut(dense, keep)
    plainly = compensate(dense, copy_and_cut(dense, keep), data, keep)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tiny.outputs(pruned, data[0])  # autocast keeps its copies of the weights
        compensate(dense, pruned, data, keep)
        inside = tiny.outputs(pruned, data[0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert inside.equal(tiny.outputs(pruned, data[0]))
    assert error(pruned, dense, data) < 1.02 * error(plainly, dense, data)


def test_no_bias_is_made():
    dense = tiny.model("llama")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    names = [name for name, _ in pruned.named_parameters()]
    compensate(dense, pruned, batches(dense))
    assert [name for name, _ in pruned.named_parameters()] == names
    assert not any("bias" in name for name in names)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_bias_is_refitted(family):
    dense = tiny.model(family)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    before = [outlet_of(pruned, g).bias.clone() for g in Anatomy.of(pruned)]
    compensate(dense, pruned, batches(dense))
    for group, bias in zip(Anatomy.of(pruned), before, strict=True):
        assert not torch.allclose(outlet_of(pruned, group).bias, bias)


def test_an_emptied_group_gets_the_mean_as_its_bias():
    dense = tiny.model("bert")
    data = batches(dense)
    first = next(g for g in Anatomy.of(dense) if g.kind == "head")
    pruned = single(dense, first, ())
    compensate(dense, pruned, data)
    outputs = []
    hook = outlet_of(dense, first).register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.no_grad():
        for batch in data:
            dense(**batch)
    hook.remove()
    real = torch.cat(
        [out[b["attention_mask"].bool()] for out, b in zip(outputs, data, strict=True)]
    )
    torch.testing.assert_close(
        outlet_of(pruned, first).bias.detach(), real.mean(dim=0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_only_outlets_change_and_modes_come_back(family):
    dense = tiny.model(family)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense))).train()
    dense.train()
    layer_of(dense, next(iter(Anatomy.of(dense)))).eval()
    modes = [[m.training for m in model.modules()] for model in (dense, pruned)]
    before = [copy.deepcopy(model.state_dict()) for model in (dense, pruned)]
    assert compensate(dense, pruned, batches(dense)) is pruned
    assert [[m.training for m in model.modules()] for model in (dense, pruned)] == modes
    assert all(p.requires_grad and p.grad is None for p in pruned.parameters())
    for model in (dense, pruned):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(dense.state_dict()[name].equal(tensor) for name, tensor in before[0].items())
    outlets = tuple(f"{g.outlet}." for g in Anatomy.of(pruned))
    changed = [n for n, tensor in before[1].items() if not pruned.state_dict()[n].equal(tensor)]
    assert len(changed) > 3
    for name in changed:
        assert name.removeprefix(f"{pruned.base_model_prefix}.").startswith(outlets), name


@pytest.mark.parametrize(
    ("family", "junctions"),
    [
        ("bert", [("attention.output.LayerNorm",), ("output.LayerNorm",)]),
        ("llama", [("post_attention_layernorm",), ("",)]),
        ("gpt2", [("ln_2",), ("",)]),
        (
            "gemma3_text",
            [
                ("pre_feedforward_layernorm", "post_attention_layernorm"),
                ("", "post_feedforward_layernorm"),
            ],
        ),
        ("t5", [("layer.1",), ("",)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_junction_is_where_the_outlet_joins_the_stream(family, junctions, dtype):
    model = tiny.model(family, dtype=dtype)
    with torch.no_grad():
        stack = row_of(family).stacks[0]
        (call,) = layer_calls(model, stack.layers, batches(model, count=1))
        groups = [g for g in Anatomy.of(model) if g.stack == 0 and g.layer == 0]
        found = [junction_of(model, group, call, 0) for group in groups]
        assert found == [Junction(*junction) for junction in junctions]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_padding_does_not_matter(family):
    dense = tiny.model(family)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = batches(dense)
    longer = []
    for batch in data:
        wide = dict(batch)
        for name, tensor in batch.items():
            wide[name] = torch.nn.functional.pad(tensor, (0, 5))
        longer.append(wide)
    one = compensate(dense, copy.deepcopy(pruned), data)
    other = compensate(dense, copy.deepcopy(pruned), longer)
    for group in Anatomy.of(pruned):
        weights = [outlet_of(model, group).weight.detach() for model in (one, other)]
        assert weights[0].shape[axis_of(outlet_of(one, group), 1)] == group.units * group.columns
        torch.testing.assert_close(*weights, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kept",
    [(0, 2), (1,), *(pytest.param(kept, marks=pytest.mark.slow) for kept in ((1, 2), (0, 1)))],
)
def test_the_layers_that_stay_take_over_from_those_that_go(family, kept):
    dense = tiny.model(family)
    keep = uneven(Anatomy.of(dense), 0.75)
    keep |= {stack.name: kept for stack in Anatomy.of(dense).stacks}
    data = batches(dense)
    pruned = copy_and_cut(dense, keep)
    refitted = compensate(dense, copy.deepcopy(pruned), data, keep)
    assert error(refitted, dense, data) < error(pruned, dense, data)


@pytest.mark.parametrize("gone", range(3))
def test_a_layer_that_does_nothing_is_not_missed(gone):
    dense = tiny.model("llama")
    with torch.no_grad():
        for outlet in ("self_attn.o_proj", "mlp.down_proj"):
            dense.get_submodule(f"model.layers.{gone}.{outlet}").weight.zero_()
    keep = {"layers": [n for n in range(3) if n != gone]}
    data = batches(dense)
    pruned = compensate(dense, copy_and_cut(dense, keep), data, keep)
    assert error(pruned, dense, data) < 1e-10


def test_layers_that_went_unsaid_are_refused_before_any_work():
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, {"encoder.layer": (0, 2)})
    before = copy.deepcopy(pruned)
    for kept in (None, {"encoder.layer": (0,)}):
        with pytest.raises(HfpruneError, match=r"has 2 layers and the dense one 3; .*kept=plan"):
            compensate(dense, pruned, batches(dense), kept)
    assert_close_models(pruned, before, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [{}, {"layers": (0, 2)}])
def test_what_experts_leave_behind_is_taken_up_by_later_outlets(keep):
    dense = tiny.model("mixtral")
    keep = keep | {f"layers.{n}.mlp.experts": (0, 1, 4) for n in range(3)}
    data = batches(dense)
    pruned = copy_and_cut(dense, keep)
    refitted = compensate(dense, copy.deepcopy(pruned), data, keep)
    assert error(refitted, dense, data) < error(pruned, dense, data)


def test_labels_are_not_read():
    dense = tiny.model("llama")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = batches(dense)
    wrong = [batch | {"labels": torch.full((4, 11), 10_000)} for batch in data]
    one = compensate(dense, copy.deepcopy(pruned), data)
    assert_close_models(compensate(dense, pruned, wrong), one, rtol=0, atol=0)


def test_batches_without_images_say_nothing_of_their_tower():
    dense = tiny.model("llava")
    shown = [tiny.batch(dense, seed=seed) for seed in range(6)]
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in shown]
    for batch in texts:
        batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] < tiny.VOCABULARY - 1, 3)
    keep = {
        name: units
        for name, units in uneven(Anatomy.of(dense)).items()
        if name.startswith("vision_tower")
    }

    def compensated(data):
        return compensate(dense, copy_and_cut(dense, keep), data, keep)

    mixed = compensated([b for pair in zip(texts, shown, strict=True) for b in pair])

    def error(model):
        with torch.no_grad():
            pairs = [(tiny.outputs(model, b), tiny.outputs(dense, b)) for b in shown]
        return sum(float((one - other).square().sum()) for one, other in pairs)

    assert error(mixed) < 0.5 * error(copy_and_cut(dense, keep))
    with pytest.raises(DataError, match=r"No calibration batch reaches vision_tower\.encoder"):
        compensated(texts)


def test_no_batches():
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    with pytest.raises(DataError, match="no calibration batches"):
        compensate(dense, pruned, [])


def test_few_tokens_do_no_harm(caplog):
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = [{name: tensor[:1, :4] for name, tensor in batches(dense)[0].items()}]
    fresh = batches(dense, seed=7)
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert error(refitted, dense, fresh) < 2 * error(pruned, dense, fresh)
    assert "encoder.layer.0.attention.output.dense has 16 columns and only 4 calib" in caplog.text


def cut_in_the_first_layer(dense):
    """A model that lost half of its first layer's units: all later ones read what that changed."""
    keep = uneven(Anatomy.of(dense))
    return copy_and_cut(dense, {g.name: keep[g.name] for g in Anatomy.of(dense) if not g.layer})


def test_a_later_outlet_is_fitted_to_the_stream_s_error_on_what_it_really_reads():
    dense = tiny.model("llama")
    data = batches(dense, examples=40)
    refitted = compensate(dense, cut_in_the_first_layer(dense), data)
    found = {"reads": [], "stream": [], "wanted": []}

    def keep_rows(name):
        return lambda module, args, *_: found[name].append(flat(args[0], batch))

    for batch in data:
        layer, same = refitted.model.layers[1], dense.model.layers[1]
        hooks = [
            layer.self_attn.o_proj.register_forward_hook(keep_rows("reads")),
            layer.register_forward_hook(keep_rows("stream")),
            same.post_attention_layernorm.register_forward_hook(keep_rows("wanted")),
        ]
        with torch.no_grad():
            refitted(**batch)
            dense(**batch)
        for hook in hooks:
            hook.remove()
    reads, stream, wanted = (torch.cat(rows) for rows in found.values())
    least = reads @ torch.linalg.lstsq(reads, wanted - stream).solution
    weight = refitted.model.layers[1].self_attn.o_proj.weight.detach().double()

    def left(output):
        return float((stream + output - wanted).square().mean())

    original = dense.model.layers[1].self_attn.o_proj.weight.detach().double()
    assert left(reads @ weight.T) < left(reads @ original.T)
    assert left(reads @ weight.T) <= 1.1 * left(least)


def test_the_stream_is_made_good_through_a_norm_that_lies_between(monkeypatch):
    dense = tiny.model("gemma3_text")
    data = batches(dense, examples=14)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    through = compensate(dense, copy.deepcopy(pruned), data)
    monkeypatch.setattr(
        "hfprune.recovery.sweep.junction_of", lambda *_: Junction(None)
    )  # the outlet's own output
    own = compensate(dense, pruned, data)
    assert error(through, dense, data) < error(own, dense, data)


@pytest.mark.parametrize("family", ["bert", "gemma3_text"])
def test_how_examples_are_batched_does_not_matter(family):
    dense = tiny.model(family, dtype=torch.float64)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = batches(dense, count=6)
    one = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert_close_models(compensate(dense, pruned, [one]), refitted, rtol=1e-6, atol=1e-8)


def test_what_is_not_finite_is_refused_by_name_and_nothing_is_changed():
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    with torch.no_grad():
        dense.bert.embeddings.word_embeddings.weight[7] = torch.nan
        pruned.bert.embeddings.word_embeddings.weight[7] = torch.nan
    data = batches(dense, count=6)
    for number, batch in enumerate(data):
        ids = batch["input_ids"]
        batch["input_ids"] = ids.where(ids != 7, 8) if number != 4 else ids.clone().fill_(7)
    with pytest.raises(DataError, match=r"layer\.0\.attention.* not finite in calibration batch 4"):
        compensate(dense, pruned, data)


@torch.no_grad()
def test_what_was_refitted_before_an_error_is_undone():
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    before = copy.deepcopy(pruned)
    dense.bert.encoder.layer[2].output.dense.weight[0] = torch.inf
    with pytest.raises(DataError, match=r"layer\.2\.output"):
        compensate(dense, pruned, batches(dense))
    assert_close_models(pruned, before, rtol=0, atol=0)


@pytest.mark.parametrize(("examples", "warned"), [(4, True), (5, False)])
def test_too_few_examples_to_hold_any_out(examples, warned, caplog):
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = [{name: t[:1] for name, t in batch.items()} for batch in batches(dense, count=examples)]
    compensate(dense, pruned, data)
    assert ("Fits are judged on every 5th example" in caplog.text) == warned


def custom(family, **settings):
    """A random model of a family, with some settings of its own."""
    torch.manual_seed(0)
    config = tiny.config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    return AutoModel.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["opt", "qwen2_moe", "ernie4_5_moe", "falcon", "xmod"])
def test_outlets_of_other_shapes_and_sums_that_are_called_twice(family):
    """All tokens in one dimension, an output that is added to in place, a norm called twice."""
    dense = tiny.model(family)
    data, fresh = batches(dense), batches(dense, seed=7)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert error(refitted, dense, fresh) < error(pruned, dense, fresh)
    unmasked = [{"input_ids": batch["input_ids"]} for batch in data]
    ones = [b | {"attention_mask": torch.ones_like(b["input_ids"])} for b in unmasked]
    models = [compensate(dense, copy.deepcopy(pruned), given) for given in (unmasked, ones)]
    assert_close_models(*models, rtol=1e-3, atol=1e-4)


def test_a_norm_that_is_called_before_the_outlet_and_after_it():
    dense = custom("xmod", pre_norm=True)
    data = batches(dense)
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert error(refitted, dense, data) < 0.9 * error(pruned, dense, data)


def test_tokens_before_examples_are_refused():
    dense = tiny.model("mlcd_vision_model")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    pair = tiny.batch(dense)
    with pytest.raises(DataError, match="batches of one example"):
        compensate(dense, pruned, [pair])
    compensate(dense, pruned, [{n: t[i : i + 1] for n, t in pair.items()} for i in range(2)])


def test_inputs_that_hardly_vary_leave_what_they_cannot_tell():
    """Eight equal sentences of eight tokens, and a thousand columns: singular in float32."""
    dense = custom("bert", intermediate_size=1024)
    ids = torch.arange(3, 11).expand(8, 8)
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    refitted = compensate(dense, copy.deepcopy(pruned), data)
    assert error(refitted, dense, data) < error(pruned, dense, data)


@pytest.mark.parametrize(
    ("pair", "kept", "says"),
    [
        (lambda d, p: (p, d), {}, "were they swapped"),
        (lambda d, p: (d, d), {}, "one and the same"),
        (lambda d, p: (custom("gpt2"), p), {}, "is a bert, the dense one a gpt2"),
        (lambda d, p: (custom("bert", hidden_size=64), p), {}, "not of the size"),
        (lambda d, p: (custom("bert", intermediate_size=6), p), {}, "were they swapped"),
        (lambda d, p: (d, p), {"nothing": (0,)}, "no such group"),
        (lambda d, p: (d, p), {"encoder.layer.0.output.dense": (99,)}, "must be distinct"),
    ],
)
def test_what_is_not_the_dense_model_is_named(pair, kept, says):
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    before = {n: p.clone() for n, p in pruned.state_dict().items()}
    with pytest.raises(HfpruneError, match=says):
        compensate(*pair(dense, pruned), batches(dense), kept)
    assert all(p.equal(before[n]) for n, p in pruned.state_dict().items())


def test_batches_may_come_one_by_one_and_what_is_none_is_named():
    dense = tiny.model("bert")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    data = batches(dense)
    one = compensate(dense, copy.deepcopy(pruned), iter(data))
    assert_close_models(one, compensate(dense, copy.deepcopy(pruned), data), rtol=0, atol=0)
    padding = {n: torch.zeros_like(t) if n == "attention_mask" else t for n, t in data[0].items()}
    for given, says in (
        (data[0], "batch 0 is a str; give a list"),
        ([data[0], {n: t[:0] for n, t in data[0].items()}], "batch 1 has no examples"),
        ([padding], "all padding"),
    ):
        with pytest.raises(DataError, match=says):
            compensate(dense, pruned, given)


def test_few_tokens_are_told_once(caplog):
    dense = tiny.model("bert", "AutoModelForSequenceClassification")
    pruned = copy_and_cut(dense, uneven(Anatomy.of(dense)))
    compensate(dense, pruned, [{"input_ids": torch.full((5, 1), 4)}])
    told = [record.getMessage() for record in caplog.records if "columns" in record.getMessage()]
    assert told and len(told) == len(set(told))
