"""Scores against finite differences and hand computation; batching, padding, processes, errors."""

import copy
import dataclasses
import os
from contextlib import nullcontext

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_gates import losses, make, slopes

import hfprune
from hfprune.errors import DataError, HfpruneError
from hfprune.importance.criteria import CRITERIA, Evidence, criterion
from hfprune.importance.gates import outlet_of
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import rank_correlation, score
from hfprune.importance.sparsity import sparsify
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.surgery import copy_and_cut


def total(model, batch):
    """The summed loss in double precision; transformers' causal loss rounds to single."""
    return losses(model, batch).sum()


def rows(batch, at, width=None):
    """Some examples of a batch, without the columns beyond `width`."""
    return {
        name: tensor[at] if tensor.dim() == 1 else tensor[at, :width]
        for name, tensor in batch.items()
    }


def assert_same(one: Scores, other: Scores, **tolerance):
    assert one.importance.keys() == other.importance.keys()
    for name, groups in one.importance.items():
        for group, values in groups.items():
            torch.testing.assert_close(values, other.by(name)[group], **tolerance)
    assert (one.examples, one.fingerprint) == (other.examples, other.fingerprint)
    assert one.tokens == pytest.approx(other.tokens)
    assert one.moments.keys() == other.moments.keys()
    for group, values in one.moments.items():
        expected = other.moments[group]
        rounding = 1e-6 * float(expected.abs().max()) if tolerance["atol"] else 0.0  # of sums
        torch.testing.assert_close(values, expected, rtol=tolerance["rtol"], atol=rounding)


CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=["bert", "llama"])
def family(request):
    return request.param


def test_taylor_and_fisher_are_what_finite_differences_say():
    model, batch = make("bert")
    scores = score(model, [batch], ["taylor", "fisher"])
    for name, slope in slopes(model, batch).items():  # (examples, units)
        torch.testing.assert_close(
            scores.by("taylor")[name], slope.abs().mean(0), rtol=1e-6, atol=0
        )
        expected = slope.square().mean(0) / 2
        torch.testing.assert_close(scores.by("fisher")[name], expected, rtol=1e-6, atol=1e-15)
    assert scores.examples == 5
    assert scores.tokens == (int(batch["attention_mask"].sum()) / 5,)


def test_tokens_are_counted_in_every_stack_without_padding():
    model = tiny.model("t5")
    batch = tiny.batch(model)  # 9 tokens, and 5 for the decoder
    batch["attention_mask"][0, 6:] = 0
    labels = batch.pop("decoder_input_ids")
    batch["labels"] = labels.clone()
    batch["labels"][1, 2:] = -100
    scores = score(model, [batch, batch], ["fisher"])
    assert (scores.tokens, scores.examples) == (((6 + 9) / 2, (5 + 2) / 2), 4)
    masked = batch | {"decoder_attention_mask": torch.ones_like(labels)}
    assert score(model, [masked], ["fisher"]).tokens == (7.5, 5)
    given = batch | {"decoder_input_ids": labels}  # labels that are not its inputs say nothing
    assert score(model, [given], ["fisher"]).tokens == (7.5, 5)

    towers = tiny.model("clip")
    scores = score(
        towers,
        [tiny.batch(towers)],
        ["fisher"],
        loss=lambda m, b: m(**b).logits_per_image.square().sum(),
    )
    assert scores.tokens == (9, 17)  # a text; 16 patches and the class token


def test_the_models_own_loss_is_the_default(family):
    model, batch = make(family)
    single = {"rtol": 1e-4, "atol": 1e-7} if family == "llama" else CLOSE
    assert_same(score(model, [batch]), score(model, [batch], loss=total), **single)


def test_fisher_of_a_language_model_is_per_token():
    model, batch = make("llama")
    anatomy, expected = Anatomy.of(model), {}
    for group in anatomy:  # one gate for every token of every example
        gate = torch.ones(5, 7, group.units, dtype=torch.float64, requires_grad=True)

        def scale(module, args, gate=gate, columns=group.columns):
            return (args[0] * gate.repeat_interleave(columns, dim=-1),)

        hook = outlet_of(model, group).register_forward_pre_hook(scale)
        (slope,) = torch.autograd.grad(total(model, batch), gate)
        hook.remove()
        expected[group.name] = slope.square().sum(dim=(0, 1)) / (2 * 5)
    found = score(model, [batch], ["fisher"], loss=total).by("fisher")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, **CLOSE)


def test_magnitude_and_activation_by_hand():
    model, batch = make("llama")
    scores = score(model, [batch], ["magnitude", "activation"], loss=total)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    size, inputs = tiny.HEAD_DIM, {}
    for name, outlet in (("o", attention.o_proj), ("down", mlp.down_proj)):
        outlet.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        losses(model, batch)
    real = batch["attention_mask"].bool()
    magnitude = scores.by("magnitude")
    activation = scores.by("activation")
    for head in range(tiny.HEADS):
        at = slice(head * size, (head + 1) * size)
        kv = slice(head // 2 * size, (head // 2 + 1) * size)
        owned = [attention.q_proj.weight[at], attention.k_proj.weight[kv]]
        owned += [attention.v_proj.weight[kv], attention.o_proj.weight[:, at]]
        norm = torch.cat([w.flatten() for w in owned]).norm()
        torch.testing.assert_close(magnitude["layers.0.self_attn"][head], norm, **CLOSE)
        wanda = inputs["o"][real][:, at].norm(dim=0) * attention.o_proj.weight[:, at].norm(dim=0)
        found = activation["layers.0.self_attn"][head]
        torch.testing.assert_close(found, wanda.norm(), **CLOSE)
    for neuron in (0, tiny.WIDTH - 1):
        owned = [mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron]]
        owned += [mlp.down_proj.weight[:, neuron]]
        name = "layers.0.mlp.down_proj"
        torch.testing.assert_close(magnitude[name][neuron], torch.cat(owned).norm(), **CLOSE)
        wanda = inputs["down"][real][:, neuron].norm() * mlp.down_proj.weight[:, neuron].norm()
        torch.testing.assert_close(activation[name][neuron], wanda, **CLOSE)


def test_scores_depend_neither_on_batches_nor_on_padding(family):
    model, batch = make(family)
    whole = score(model, [batch], loss=total)
    for sizes in ((1, 1, 1, 1, 1), (2, 3), (4, 1)):
        start, batches = 0, []
        for size in sizes:
            batches.append(rows(batch, slice(start, start + size)))
            start += size
        assert_same(score(model, batches, loss=total), whole, **CLOSE)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    bare = [rows(batch, slice(i, i + 1), width) for i, width in enumerate(lengths)]
    assert_same(score(model, bare, loss=total), whole, **CLOSE)


def test_the_model_is_left_as_it_was(family):
    model, batch = make(family)
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    score(model, [batch])
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("way", ["score", "wanda", "taylor"])
def test_wrong_labels_leave_no_mark(way):
    model, batch = make("bert")
    model.config.problem_type = None
    before = model.config.to_dict()
    for labels in (batch["labels"].double(), batch["labels"]):  # the first as of several labels
        batches = [batch | {"labels": labels}]
        with pytest.raises(ValueError) if labels.is_floating_point() else nullcontext():
            if way == "score":
                score(model, batches, ["fisher"])
            else:
                sparsify(model, 0.5, criterion=way, batches=batches)
    assert model.config.to_dict() == before


def test_random_is_seeded_and_differs_between_groups():
    model, batch = make("bert")
    draws = [score(model, [batch], ["random"], seed=seed).by("random") for seed in (0, 0, 1)]
    names = list(draws[0])
    assert all(draws[0][n].equal(draws[1][n]) for n in names)
    assert not any(draws[0][n].equal(draws[2][n]) for n in names)
    assert not draws[0][names[0]].equal(draws[0][names[2]])


def test_scores_come_back_from_their_folder(tmp_path):
    model, batch = make("bert")
    scores = score(model, [batch], list(CRITERIA))
    scores.save(tmp_path / "new" / "folder")
    again = Scores.load(tmp_path / "new" / "folder")
    assert_same(again, scores, rtol=0, atol=0)
    assert again == dataclasses.replace(scores, importance=again.importance)
    scores.save(tmp_path / "new" / "folder")  # over itself
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["scores.safetensors"]


def test_a_save_that_stops_halfway_mixes_no_two_scores(tmp_path, monkeypatch):
    model, batch = make("bert")
    older = score(model, [batch], ["magnitude"])
    newer = score(model, [batch, batch], ["fisher"])
    older.save(tmp_path)
    renamed, replace = [], os.replace

    def full(source, target):
        replace(source, target)
        renamed.append(target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        newer.save(tmp_path)
    assert len(renamed) == 1
    assert_same(Scores.load(tmp_path), newer, rtol=0, atol=0)


def damaged(folder, of):
    path = folder / "scores.safetensors"
    if of == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif of == "bytes":
        path.write_bytes(b"xx")
    elif of == "metadata":  # as hfprune 0.1.0 wrote them
        save_file(load_file(path), path)
    else:
        path.unlink()


@pytest.mark.parametrize("of", ["half", "bytes", "metadata", "all"])
def test_scores_that_cannot_be_read(tmp_path, of):
    model, batch = make("bert")
    score(model, [batch], ["magnitude"]).save(tmp_path)
    damaged(tmp_path, of)
    with pytest.raises(HfpruneError, match="holds no scores that this hfprune can read"):
        Scores.load(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_halves_agree_when_they_hold_the_same_examples(size):
    model, batch = make("bert")
    twice = rows(
        batch, torch.tensor([0, 0, 1, 1, 2, 2])
    )  # the halves are alike, example by example
    batches = [rows(twice, slice(i, i + size)) for i in range(0, 6, size)]
    agreement = score(model, batches).agreement
    assert agreement == dict.fromkeys(("taylor", "fisher", "reconstruction"), pytest.approx(1))


def test_the_halves_disagree_a_little_when_they_differ():
    model, batch = make("bert")
    batches = [rows(batch, slice(i, i + 1)) for i in range(4)]
    for value in score(model, batches).agreement.values():
        assert 0.1 < value < 0.999


def test_examples_are_summed_a_few_at_a_time(family, monkeypatch):
    model, batch = make(family)
    at_once = score(model, [batch])
    tokens, columns = batch["input_ids"].shape[1], model.config.intermediate_size
    monkeypatch.setattr("hfprune.importance.scoring._CACHED", 2 * tokens * columns)
    assert_same(score(model, [batch]), at_once, **CLOSE)


def test_joint_criteria_alone_are_compared_by_some_units(family, monkeypatch):
    monkeypatch.setattr("hfprune.importance.scoring._OBSERVED", 3)
    model, batch = make(family)
    scores = score(model, [batch], ["reconstruction"])
    halves = [
        score(model, [rows(batch, slice(start, None, 2))], ["fisher"]).by("fisher")
        for start in (0, 1)
    ]
    first = [torch.cat([values[:3] for values in half.values()]) for half in halves]
    assert scores.agreement == {"reconstruction": pytest.approx(rank_correlation(*first))}
    together = score(model, [batch], ["fisher", "reconstruction"])
    for group, values in scores.by("reconstruction").items():
        torch.testing.assert_close(values, together.by("reconstruction")[group], **CLOSE)


def test_rank_correlation_is_spearmans():
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for ties in (1000, 5):
        one, other = torch.randint(ties, (2, 40), generator=generator).double()
        expected = scipy.spearmanr(one, one + other).statistic
        assert rank_correlation(one, one + other) == pytest.approx(expected)


def test_no_batches():
    model, _ = make("bert")
    with pytest.raises(DataError, match="no calibration batches"):
        score(model, [])


def test_no_labels():
    model, labelled = make("bert")
    batch = {name: tensor for name, tensor in labelled.items() if name != "labels"}
    with pytest.raises(
        DataError, match=r"batch 1: .* 'labels' \(it has input_ids, attention_mask\)"
    ):
        score(model, [labelled, batch])
    headless = tiny.model("bert", "AutoModel")
    with pytest.raises((DataError, TypeError), match="labels"):
        score(headless, [batch | {"labels": torch.zeros(5, dtype=torch.long)}])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_label_of_no_class_is_named(family):
    model, batch = make(family)
    wrong = batch | {"labels": batch["labels"].clone()}
    wrong["labels"].flatten()[2] = 99
    classes = 2 if family == "bert" else tiny.VOCABULARY
    with pytest.raises(DataError, match=f"batch 1: The label 99 is none of the .* {classes} class"):
        score(model, [batch, wrong])
    wrong["input_ids"] = batch["input_ids"] + tiny.VOCABULARY  # no matter of labels
    with pytest.raises(IndexError):
        score(model, [batch, wrong])


def test_batches_without_examples():
    model, batch = make("bert")
    for empty in ({}, rows(batch, slice(0, 0))):
        with pytest.raises(DataError, match="batch 1 has no examples"):
            score(model, [batch, empty])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda model, batch: model(**batch).logits[:, 0], r"a tensor of shape \(5,\)"),
        (lambda model, batch: float(model(**batch).loss.detach()), "a float"),
        (lambda model, batch: None, "a NoneType"),
    ],
)
def test_a_loss_that_is_no_number(wrong, says):
    model, batch = make("bert")
    with pytest.raises(DataError, match=f"batch 0 is {says}; it has to be a tensor with one num"):
        score(model, [batch], loss=wrong)


def test_a_loss_that_is_not_finite_is_named_by_its_batch():
    model, batch = make("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[1] = torch.nan
    batches = [rows(batch, slice(i, i + 1)) for i in range(4)]
    batches[2] = batches[2] | {"input_ids": torch.ones_like(batches[2]["input_ids"])}
    with pytest.raises(DataError, match="calibration batch 2 is nan"):
        score(model, batches)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_unknown_criterion_names_the_nearest():
    model, batch = make("bert")
    with pytest.raises(HfpruneError, match=r"'tayler'\. Did you mean 'taylor'\?"):
        score(model, [batch], ["tayler"])
    scores = score(model, [batch], "taylor")
    with pytest.raises(HfpruneError, match=r"Unknown criterion 'fisher'.*Available: taylor"):
        scores.by("fisher")


def test_what_is_no_name_is_unknown():
    model, batch = make("bert")
    with pytest.raises(HfpruneError, match=r"Unknown criterion <function .*Available: activation"):
        score(model, [batch], [CRITERIA["taylor"]])
    with pytest.raises(HfpruneError, match="Unknown loss None"):
        score(model, [batch], loss=None)


def test_a_loss_that_does_not_depend_on_the_units():
    model, batch = make("bert")
    with pytest.raises(DataError, match="does not depend on any head or neuron"):
        score(model, [batch], loss=lambda model, batch: torch.tensor(1.0))

    def early(model, batch):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return model(**inputs, output_hidden_states=True).hidden_states[2].square().sum()

    with pytest.raises(DataError, match=r"does not depend on encoder\.layer\.2\.attention\.self"):
        score(model, [batch], loss=early)


@pytest.fixture
def registry():
    names = set(CRITERIA)
    yield CRITERIA
    for name in CRITERIA.keys() - names:
        del CRITERIA[name]


def test_a_criterion_of_ones_own(registry):
    @hfprune.criterion
    def outlet_only(evidence: Evidence) -> torch.Tensor:
        return evidence.outlet.sum(dim=1)

    model, batch = make("bert")
    found = score(model, [batch]).by("outlet_only")
    weight = model.bert.encoder.layer[1].output.dense.weight
    expected = weight.detach().square().sum(dim=0)
    torch.testing.assert_close(found["encoder.layer.1.output.dense"], expected, **CLOSE)
    with pytest.raises(HfpruneError, match="'outlet_only' already"):
        criterion(outlet_only)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda values: values.index_fill(0, torch.tensor(1), torch.nan), "values .* not finite"),
        (lambda values: values[:1], r"a tensor of shape \(1,\)"),
        (lambda values: values.tolist(), "a list"),
    ],
)
def test_a_criterion_that_gives_no_number_per_unit(registry, spoil, says):
    @hfprune.criterion
    def careless(evidence: Evidence) -> torch.Tensor:
        heads = len(evidence.weights) == tiny.HEADS
        return evidence.weights if heads else spoil(evidence.weights)

    model, batch = make("bert")
    named = rf"'careless' gives {says} for encoder\.layer\.0\.output\.dense; .* {tiny.WIDTH} units"
    with pytest.raises(HfpruneError, match=named):
        score(model, [batch], ["careless"])


def labelled(family):
    model = tiny.model(family)
    batch = tiny.batch(model)
    if family == "t5":
        return model, batch | {"labels": batch["decoder_input_ids"]}
    return model, batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral", "opt", "t5"])
def test_computing_layers_again_gives_the_same_scores(family):
    model, batch = labelled(family)
    plain = score(model, [batch])
    calls = []
    outlet = outlet_of(model, Anatomy.of(model).groups[0])
    outlet.register_forward_hook(lambda *_: calls.append(1))
    again = score(model, [batch], checkpointing=True)
    assert len(calls) == 2
    assert_same(again, plain, rtol=1e-6, atol=1e-12)
    assert not any("forward" in vars(module) for module in model.modules())
    assert getattr(model.config, "use_cache", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_inference_mode_changes_nothing(dtype):
    model = tiny.model("bert", "AutoModelForSequenceClassification", dtype=dtype)
    with torch.inference_mode():
        batch = tiny.batch(model) | {"labels": torch.tensor([0, 1])}
        inside = score(model, [batch], moments=True)
    assert_same(inside, score(model, [batch], moments=True), rtol=0, atol=0)


def test_a_model_in_training_with_checkpointing_of_its_own():
    model, batch = labelled("opt")  # its layers have dropout
    plain = score(model, [batch])
    model.train()
    model.activation_checkpointing_enable()
    for checkpointing in (False, True):
        assert_same(
            score(model, [batch], checkpointing=checkpointing), plain, rtol=1e-6, atol=1e-12
        )
    assert model.training and model.is_activation_checkpointing


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_experts_and_what_lies_beside_them_are_scored(family):
    model = tiny.model(family)
    batch = tiny.batch(model)
    batch["labels"] = batch["input_ids"]
    scores = score(model, [batch], list(CRITERIA))
    anatomy = Anatomy.of(model)
    for name in CRITERIA:
        for part in (*anatomy, *anatomy.experts):
            values = scores.by(name)[part.name]
            assert values.shape == (part.units,) and values.min() >= 0 and values.max() > 0
    # The sums over examples do not depend on how they are batched.
    by_one = score(model, [{k: v[n : n + 1] for k, v in batch.items()} for n in range(2)])
    for name in ("taylor", "fisher", "activation"):
        for part in (*anatomy, *anatomy.experts):
            one, both = by_one.by(name)[part.name], scores.by(name)[part.name]
            torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-6)


def test_random_of_two_seeds_has_nothing_in_common():
    model, batch = make("bert")
    draws = [
        torch.cat(list(score(model, [batch], "random", seed=n).by("random").values()))
        for n in (0, 1, 2)
    ]
    numbers = torch.cat(draws)
    assert len(numbers.unique()) == len(numbers)


def test_a_loss_that_reads_no_layer_is_not_taken_for_no_batches():
    model, batch = make("bert")
    probe = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    with pytest.raises(DataError, match="batch 0 does not depend on any head or neuron"):
        score(model, [batch], loss=lambda m, b: (m(**b).logits.detach() * probe).sum())


def test_autocast_reaches_no_statistics():
    model = tiny.model("bert", "AutoModelForSequenceClassification")
    batch = tiny.batch(model) | {"labels": torch.tensor([0, 1])}
    plain = score(model, [batch], moments=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = score(model, [batch], moments=True)
    for group, values in plain.by("activation").items():
        torch.testing.assert_close(cast.by("activation")[group], values, rtol=0.1, atol=0)
        assert cast.moments[group].dtype == torch.float32


def test_a_criterion_is_not_asked_about_groups_without_units(registry):
    @criterion
    def relative(evidence):
        return evidence.squared / evidence.squared.max()

    model, batch = make("bert")
    anatomy = Anatomy.of(model)
    selection = {g.name: () if g.layer == 1 else tuple(range(g.units)) for g in anatomy}
    pruned = copy_and_cut(model, selection)
    found = score(pruned, [batch], "relative", loss=total).by("relative")
    assert [len(values) for values in found.values()] == [len(s) for s in selection.values()]


def test_scores_know_their_weights_again(tmp_path, caplog):
    model, batch = make("bert")
    scores = score(model, [batch], ["fisher"])
    scores.save(tmp_path)
    again = Scores.load(tmp_path)
    anatomy = Anatomy.of(model)
    for same in (model, copy.deepcopy(model).to(torch.bfloat16)):
        again.check_model(same, anatomy)
    assert "other weights" not in caplog.text
    other = copy.deepcopy(model)
    with torch.no_grad():  # as a little training leaves it
        for parameter in other.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    again.check_model(other, anatomy)
    assert "measured on other weights" in caplog.text
    caplog.clear()
    old = dataclasses.replace(again, weights="")  # of an hfprune that did not know
    old.check_model(other, anatomy)
    assert not caplog.text
    with pytest.raises(HfpruneError, match="another structure"):
        again.check_model(tiny.model("llama"), Anatomy.of(tiny.model("llama")))
