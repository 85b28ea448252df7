"""Bytes against those of the tensors of really pruned models, and of what they really cache."""

import pytest
import tiny
import torch
from transformers import EncoderDecoderCache

from hfprune.errors import UnsupportedModelError
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.architectures import ROWS
from hfprune.structure.memory import Memory
from hfprune.structure.surgery import copy_and_cut

BATCH, TOKENS = 2, 9
GENERATING = sorted(name for name in ROWS if tiny.auto_class(name) in tiny.GENERATING)
SOME = ("bert", "clip", "gemma3_text", "gpt2", "llama", "mixtral", "olmo2", "t5", "whisper")


def cached(model, inputs):
    """Bytes of the keys and values that a forward pass leaves in the cache."""
    cache = model(**inputs, use_cache=True).past_key_values
    both = [] if cache is None else [cache]
    if isinstance(cache, EncoderDecoderCache):
        both = [cache.self_attention_cache, cache.cross_attention_cache]
    tensors = [t for c in both for layer in c.layers if layer.is_initialized
               for t in (layer.keys, layer.values)]  # fmt: skip
    return sum(t.numel() * t.element_size() for t in tensors)


def weights(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def check(family, dtype):
    dense = tiny.model(family, dtype=dtype)
    inputs = tiny.batch(dense, TOKENS)
    tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else TOKENS  # with images
    if dense.config.is_encoder_decoder:
        states = dense.get_encoder()(inputs[dense.main_input_name])[0]
        tokens = states.shape[1]
        inputs["decoder_input_ids"] = torch.full((BATCH, tokens), 3)
    memory = Memory.of(dense, BATCH, tokens)
    anatomy = Anatomy.of(dense)
    last = anatomy.stacks[-1]
    for keep in ({}, tiny.selection(anatomy), {last.name: sorted({0, 2, *last.pinned})}):
        pruned = copy_and_cut(dense, keep)
        cache = cached(pruned, inputs) if family in GENERATING else 0
        assert memory.of_all(keep) == weights(pruned) + cache
        again = Memory.of(pruned, BATCH, tokens)
        assert again.of_all({}) == weights(pruned) + cache
        # What a group adds does not depend on the others.
        added = sum(
            memory.of_group(anatomy[name], len(units), len(anatomy[name].kv_of(units)))
            - memory.of_group(anatomy[name], 0, 0)
            for name, units in keep.items()
            if name in anatomy
        )
        if added:
            nothing = {group.name: () for group in anatomy}
            assert memory.of_all(nothing) + added == memory.of_all(keep)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_pruned_model_and_its_cache(family, dtype):
    check(family, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(ROWS) - set(SOME)))
def test_bytes_of_every_other_family(family):
    check(family, torch.float32)


def test_weights_of_two_kinds_are_refused():
    model = tiny.model("llama")
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"of torch\.bfloat16 and torch\.float32"):
        Memory.of(model, 1, 9)
