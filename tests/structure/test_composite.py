"""A text model that reads images: one anatomy of two stacks, budgets over both or one."""

import pytest
import tiny
import torch
import transformers

import hfprune
from hfprune.errors import HfpruneError, UnsupportedModelError
from hfprune.importance.losses import labels_loss
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.cost import layers_params
from hfprune.structure.surgery import copy_and_cut


def labelled(model, tokens=9):
    inputs = tiny.batch(model, tokens)
    return inputs | {"labels": inputs["input_ids"].clone()}


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "pruned_stacks", [{0, 1}, *(pytest.param({n}, marks=pytest.mark.slow) for n in (0, 1))]
)
def test_a_budget_covers_both_stacks_or_one(family, pruned_stacks, tmp_path):
    model = tiny.model(family)
    batches = [labelled(model, tokens) for tokens in (7, 9)]
    anatomy = Anatomy.of(model)
    protect = tuple(s.name for s in anatomy.stacks if s.stack not in pruned_stacks)
    scores = hfprune.score(model, batches)
    plan = hfprune.plan(
        model,
        scores,
        "params=80%",
        constraints=hfprune.Constraints(protect=protect, tolerance=0.05),
    )
    lost = {group.stack for group in anatomy if len(plan.keep[group.name]) < group.units}
    assert lost and lost <= pruned_stacks
    pruned = hfprune.remove(model, plan, compensate=batches)
    share = layers_params(Anatomy.of(pruned)) / layers_params(anatomy)
    assert 0.75 < share < 0.801
    pruned.save_pretrained(tmp_path)
    again = hfprune.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = tiny.batch(model)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    assert again.generate(**inputs, **options).equal(pruned.generate(**inputs, **options))


def test_layers_that_nobody_reads_have_no_units_and_stay():
    model = tiny.model("llava")
    assert model.config.vision_feature_layer == -2
    tower = Anatomy.of(model).stacks[0]
    assert tower.pinned == (2,)
    assert {g.layer for g in Anatomy.of(model) if g.stack == 0} == {0, 1}
    model.config.vision_feature_layer = 1  # from the front: a layer that goes would move it
    anatomy = Anatomy.of(model)
    assert anatomy.stacks[0].pinned == (0, 1, 2)
    assert {g.layer for g in anatomy if g.stack == 0} == {0}
    model.config.vision_feature_layer = [-2, -3]
    anatomy = Anatomy.of(model)
    assert anatomy.stacks[0].pinned == (0, 1, 2)
    assert {g.layer for g in anatomy if g.stack == 0} == {0, 1}


def test_layers_with_full_attention_are_numbered_anew():
    model = tiny.model("qwen2_5_vl")
    assert model.config.vision_config.fullatt_block_indexes == [1, 2]
    pruned = copy_and_cut(model, {"visual.blocks": (0, 2)})
    assert pruned.config.vision_config.fullatt_block_indexes == [1]
    assert pruned.model.visual.fullatt_block_indexes == [1]
    assert model.model.visual.fullatt_block_indexes == [1, 2]


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_the_loss_of_images_and_text_is_the_sum_over_labelled_tokens(family):
    model = tiny.model(family)
    batch = labelled(model)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        torch.testing.assert_close(labels_loss(model, batch), expected)


@pytest.mark.parametrize("family", ["siglip", "siglip_vision_model"])
def test_uniform_widths_that_also_size_the_pooling_head_are_refused_before_scoring(family):
    model = tiny.model(family)
    with pytest.raises(HfpruneError, match=r"is also that of .*head\.mlp.* without uniform"):
        hfprune.Constraints(uniform=True, min_heads=tiny.HEADS).check(model)
    tower = Anatomy.of(model).stacks[-1].name
    hfprune.Constraints(uniform=True, min_heads=tiny.HEADS, protect=(tower,)).check(model)
    clip = tiny.model("clip")  # whose tower has no such head
    hfprune.Constraints(uniform=True, min_heads=tiny.HEADS).check(clip)


def test_a_tower_of_another_family_is_refused():
    text = tiny.config("llava").text_config
    tower = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=16, patch_size=4,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=tower, text_config=text)
    )
    with pytest.raises(UnsupportedModelError, match="not built as the row for 'llava'"):
        Anatomy.of(model)


def test_experts_that_are_chosen_by_groups_all_stay():
    config = tiny.config("glm4_moe")
    config.n_group, config.topk_group = 2, 1
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    block = Anatomy.of(model).experts[0]
    with pytest.raises(HfpruneError, match="must stay of its experts"):
        copy_and_cut(model, {block.name: range(4)})
    with pytest.raises(HfpruneError, match="chosen by groups of equal size: all 6 must stay"):
        hfprune.Constraints(experts=4).check(model)
    hfprune.Constraints(experts=6).check(model)


def test_a_layer_that_the_config_cannot_describe_any_more_is_refused():
    config = tiny.config("ernie4_5_moe")
    config.moe_layer_interval = 2  # layer 1 has experts, as number 0 it would have none
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(HfpruneError, match="layers that are of more than one kind"):
        copy_and_cut(model, {"layers": (1, 2)})
