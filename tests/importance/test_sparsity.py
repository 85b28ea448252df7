"""Which weights become zero: against sorting by brute force, finite differences, exact counts."""

import re

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hfprune
from hfprune.errors import DataError, HfpruneError, UnsupportedModelError
from hfprune.importance.losses import labels_loss
from hfprune.importance.sparsity import Sparsity, linear_layers, sparsify
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut


def labelled(family="llama", dtype=torch.float32):
    model = tiny.model(family, dtype=dtype)
    batch = tiny.batch(model)
    batch["attention_mask"][1, 6:] = 0
    return model, batch | {"labels": batch["input_ids"]}


def rows(module, tensor):
    """(outputs, inputs), as Linear stores it."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def weights(model):
    return {path: m.weight.detach().clone() for path, m in linear_layers(model).items()}


def smallest(values, count):
    """The places of the smallest, by sorting all (value, place) pairs."""
    return {place for _, place in sorted((v, i) for i, v in enumerate(values.tolist()))[:count]}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "qwen2_moe"])
def test_it_covers_the_linear_layers_inside_the_layers(family):
    model = tiny.model(family)
    found = linear_layers(model)
    assert all(model.get_submodule(path) is module for path, module in found.items())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            outside = any(word in path for word in ("lm_head", "cls", "pooler", "classifier"))
            assert (path in found) != outside


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_the_smallest_weights_go(family, scope):
    model, _ = labelled(family)
    before = weights(model)
    others = {n: p.clone() for n, p in model.named_parameters() if n[:-7] not in before}
    result = sparsify(model, 0.3, scope=scope)
    pools = []
    for path, module in linear_layers(model).items():
        size, gone = rows(module, before[path]).abs(), rows(module, ~result.masks[path])
        pools += list(zip(size, gone, strict=True)) if scope == "row" else [(size, gone)]
    if scope == "global":
        pools = [
            tuple(torch.cat([part.flatten() for part in side]) for side in zip(*pools, strict=True))
        ]
    for size, gone in pools:
        count = round(0.3 * size.numel())
        assert set(gone.flatten().nonzero().flatten().tolist()) == smallest(size.flatten(), count)
    for path, module in linear_layers(model).items():
        assert module.weight.equal(before[path] * result.masks[path])
    assert all(p.equal(others[n]) for n, p in model.named_parameters() if n in others)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("n_m", ["2:4", "1:4", "3:8"])
def test_n_of_every_m_stay(n_m):
    model, _ = labelled("gpt2")
    before = weights(model)
    kept, of = map(int, n_m.split(":"))
    result = sparsify(model, 1 - kept / of, n_m=n_m)
    for path, module in linear_layers(model).items():
        blocks = rows(module, result.masks[path]).reshape(-1, of)
        assert (blocks.sum(dim=1) == kept).all()
        size = rows(module, before[path]).abs().reshape(-1, of)
        least_kept = size.where(blocks, torch.inf).amin(dim=1)
        assert (least_kept >= size.where(~blocks, -torch.inf).amax(dim=1)).all()
    assert n_m in str(result)


def test_equal_weights_are_counted_exactly():
    for scope in ("global", "layer", "row"):
        model, _ = labelled()
        with torch.no_grad():
            for module in linear_layers(model).values():
                module.weight.copy_(module.weight.sign())
        result = sparsify(model, 0.5, scope=scope)
        assert result.zeros == result.weights // 2
    again = sparsify(model, 0.5)  # zeros go first
    assert all(again.masks[path].equal(mask) for path, mask in result.masks.items())


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    model, batch = labelled()
    before, seen = weights(model), {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
        for path, module in linear_layers(model).items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    result = sparsify(model, 0.5, criterion="wanda", scope="row", batches=parts)
    for path, weight in before.items():
        saliency = weight.abs() * seen[path][real].norm(dim=0)
        order = saliency.argsort(dim=1)
        expected = torch.ones_like(weight, dtype=torch.bool)
        expected.scatter_(1, order[:, : weight.shape[1] // 2], False)
        assert (result.masks[path] == expected).float().mean() > 0.999  # of equals in rounding
        assert (result.masks[path].sum(dim=1) == weight.shape[1] // 2).all()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_does_not_count_for_wanda_in_any_stack(family):
    """Encoder and decoder are equally long and padded differently; so each has a mask that fits."""
    model = tiny.model(family)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCABULARY, (1, 6), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}
    batch["attention_mask"][:, 4:], batch["labels"][:, 3:] = 0, -100
    lengths = {"input_ids": 4, "attention_mask": 4, "labels": 3}
    bare = {name: tensor[:, : lengths[name]] for name, tensor in batch.items()}
    padded, alone = (
        sparsify(tiny.model(family), criterion="wanda", scope="row", batches=[b])
        for b in (batch, bare)
    )
    for path in linear_layers(model):
        same = padded.masks[path] == alone.masks[path]
        assert same.float().mean() > 0.999, path  # of equals in rounding


def test_taylor_is_the_slope_of_finite_differences():
    model, batch = labelled("bert", dtype=torch.float64)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    path = "bert.encoder.layer.1.attention.output.dense"
    weight = model.get_submodule(path).weight
    saliency = torch.zeros_like(weight)
    with torch.no_grad():
        for at in [(0, 0), (3, 7), (31, 2), *((5, column) for column in range(32))]:
            for part in parts:
                sides = []
                for scale in (1 + 1e-5, 1 - 1e-5):
                    value = weight[at].item()
                    weight[at] = value * scale
                    sides.append(labels_loss(model, part))
                    weight[at] = value
                saliency[at] += ((sides[0] - sides[1]) / 2e-5).abs()
    result = sparsify(model, 0.5, criterion="taylor", scope="row", batches=parts)
    gone = (~result.masks[path][5]).nonzero().flatten().tolist()
    assert set(gone) == smallest(saliency[5], 16)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_taylor_needs_no_mode_of_its_caller():
    (model, batch), (other, _) = labelled(), labelled()
    with torch.inference_mode():
        inside = sparsify(model, 0.5, criterion="taylor", batches=[batch])
    expected = sparsify(other, 0.5, criterion="taylor", batches=[batch])
    assert all(inside.masks[path].equal(mask) for path, mask in expected.masks.items())
    model(**batch).loss.backward()  # its weights are no worse for it


def test_what_is_saved_comes_back_as_ordinary_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    model, batch = labelled()
    result = sparsify(model, 0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, mask in result.masks.items():
        assert again.get_submodule(path).weight.ne(0).equal(mask)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_the_report_says_what_zeros_do_not_do():
    model, _ = labelled()
    text = str(sparsify(model, 0.5))
    assert "(50.0%; " in text and "by magnitude within each layer." in text
    assert "Zeros alone make nothing faster or smaller" in text


def test_bad_requests_change_nothing():
    model, batch = labelled()
    before = weights(model)
    for match, options in {
        r"'magnitud'\. Did you mean 'magnitude'": {"criterion": "magnitud"},
        r"Unknown scope 'rows'\. Did you mean 'row'": {"scope": "rows"},
        r"sparsity is 50": {"sparsity": 50},
        r"sparsity is '50%'; give a share": {"sparsity": "50%"},
        r"'wanda' needs calibration data": {"criterion": "wanda"},
        r"n_m is '2-4'": {"n_m": "2-4"},
        r"n_m is \(2, 4\)": {"n_m": (2, 4)},
        r"n_m='1:4' sets 0\.75": {"n_m": "1:4"},
        r"24 inputs, which 16 does not divide": {"n_m": "8:16"},
        r"no calibration batches": {"criterion": "wanda", "batches": []},
        r"Unknown loss 'label'": {"criterion": "taylor", "batches": [batch], "loss": "label"},
        r"Unknown loss None": {"criterion": "taylor", "batches": [batch], "loss": None},
        r"Unknown criterion None": {"criterion": None},
    }.items():
        with pytest.raises(HfpruneError, match=match):
            sparsify(model, **options)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"magnitude of model\.layers\.1\.mlp\.up_proj is not fin"):
        sparsify(model)
    assert sum((weights(model)[path] != w).sum() for path, w in before.items()) == 1  # the NaN
    with pytest.raises(UnsupportedModelError, match="on meta"):
        sparsify(tiny.model("bert").to("meta"))


def test_masks_of_another_model():
    small, _ = labelled("bert")
    result = sparsify(labelled("llama")[0])
    with pytest.raises(HfpruneError, match=r"of another model: model\.layers\.0.* is not there"):
        result.apply(small)


def test_masks_that_do_not_all_fit_change_nothing():
    model = tiny.model("llama")
    masks = dict(sparsify(labelled()[0]).masks)
    last = list(masks)[-1]
    masks[last] = masks[last][:, 1:]
    before = weights(model)
    with pytest.raises(HfpruneError, match=rf"of another model: {re.escape(last)} has"):
        Sparsity(masks, 1).apply(model)
    assert all(weights(model)[path].equal(weight) for path, weight in before.items())


def test_a_loss_that_depends_on_no_layer():
    model, batch = labelled()
    with pytest.raises(DataError, match="batch 0 does not depend on any layer"):
        sparsify(model, criterion="taylor", batches=[batch], loss=lambda *_: torch.tensor(1.0))


def test_every_row_is_rounded_alike():
    for share, of_32, of_24 in ((0.01, 0, 0), (0.55, 18, 13)):
        result = sparsify(labelled()[0], share, scope="row")
        for mask in result.masks.values():
            gone = of_32 if mask.shape[1] == 32 else of_24
            assert ((~mask).sum(dim=1) == gone).all()
        assert f" ({result.zeros / result.weights:.1%}; " in str(result)


def test_inputs_that_are_not_finite_are_named_by_their_batch():
    model, batch = labelled()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan
    batches = [batch, batch | {"input_ids": torch.zeros_like(batch["input_ids"])}, batch]
    with pytest.raises(DataError, match=r"self_attn\.q_proj are not finite in .* batch 1"):
        sparsify(model, criterion="wanda", batches=batches)


@pytest.mark.parametrize("family", ["llama", "mixtral", "wav2vec2"])
def test_experts_are_left_and_the_report_says_so(family):
    model = tiny.model(family)
    experts = [p.clone() for n, p in model.named_parameters() if ".experts." in n]
    for result in (sparsify(model), Sparsity.of(model)):
        assert result.experts == sum(p.numel() for p in experts)
        assert ("weights of the routed experts stay" in str(result)) == (family == "mixtral")
    after = [p for n, p in model.named_parameters() if ".experts." in n]
    assert all(one.equal(other) for one, other in zip(experts, after, strict=True))


def test_it_is_public():
    assert hfprune.sparsify is sparsify


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "wanda"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_pruned_layer_without_heads_has_no_weights_to_compete(family, criterion):
    model = tiny.model(family)
    batch = tiny.batch(model) | {"labels": tiny.batch(model)["input_ids"]}
    groups = Anatomy.of(model)
    pruned = copy_and_cut(
        model, {g.name: () if g.layer == 1 else tuple(range(g.units)) for g in groups}
    )
    made = sparsify(pruned, 0.5, criterion=criterion, batches=[batch])
    assert all(mask.numel() for mask in made.masks.values())
    assert made.zeros / made.weights == pytest.approx(0.5, abs=1e-3)
