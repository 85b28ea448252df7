"""Layers that are called one at a time do what the whole model does."""

import pytest
import tiny
import torch

from hfprune.recovery.layer_calls import advance, layer_calls
from hfprune.structure.architectures import row_of


def states_of(model, batch, path):
    """What goes into each layer of a stack, and what leaves the last."""
    layers, seen = model.base_model.get_submodule(path), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, out: seen.append(out)))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [state[0] if isinstance(state, tuple) else state for state in seen]


@pytest.mark.parametrize(
    "family", ["bert", "gemma3_text", "modernbert", "t5", "gpt2", "vit", "bloom", "qwen3_vl"]
)
def test_layer_by_layer_is_the_whole_model(family):
    model = tiny.model(family).eval()
    batch = tiny.batch(model)
    for stack in row_of(family).stacks:
        with torch.no_grad():
            (call,) = calls = layer_calls(model, stack.layers, [batch])
            for index, state in enumerate(states_of(model, batch, stack.layers)):
                torch.testing.assert_close(call.hidden, state)
                if index < len(call.rest):
                    advance(model, stack.layers, calls, index)


@pytest.mark.parametrize("seen", [False, True])
def test_layers_run_where_later_ones_are_told_of_their_states(seen):
    model = tiny.model("llama").eval()
    layers, ran = list(model.base_model.layers), []

    def tell(module, args, kwargs):
        return args, {**kwargs, "told": args[0].sum() if seen else torch.ones(())}

    layers[1].register_forward_pre_hook(tell, with_kwargs=True)
    layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    batches = [tiny.batch(model) for _ in range(3)]
    with torch.no_grad():
        calls = layer_calls(model, "layers", batches)
        assert len(ran) == (3 if seen else 1)  # the first batch shows it
        for call, batch in zip(calls, batches, strict=True):
            told = states_of(model, batch, "layers")[1].sum() if seen else torch.ones(())
            torch.testing.assert_close(call.rest[1][1]["told"], told)
