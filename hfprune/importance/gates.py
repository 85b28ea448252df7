"""Gates: one factor per unit at its outlet, as hooks that always clean up.

A unit's outlet is the Linear that mixes it back into the residual stream. With a gate g = 1 on the
unit's slice of the outlet's input a, dL/dg = sum(a * dL/da): no gate needs to exist for its
gradient to be read, and no weight needs a gradient (Michel et al. 2019, "Are Sixteen Heads Really
Better than One?", arXiv:1905.10650).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hfprune.importance.lean import Lean
from hfprune.structure.anatomy import Anatomy, Block, Group, is_offloaded, moe_of, routing_of
from hfprune.structure.architectures import row_of
from hfprune.structure.cost import Selection

# Called with a group, its outlet's input (batch, tokens, units x columns) and the loss's gradient
# of the same shape; with a block of experts, their routing weights instead of the input. Batch and
# tokens are one dimension for experts and what lies beside them.
Receiver = Callable[[Group | Block, torch.Tensor, torch.Tensor], None]
# Called with a group, the size (L2 norm) of its outlet's output at each token, (batch, tokens), the
# outlet's input and the gradient of its output.
OutputReceiver = Callable[[Group, torch.Tensor, torch.Tensor, torch.Tensor], None]
Reporter = Callable[[torch.Tensor, torch.Tensor], None]  # of one outlet


def outlet_of(model: PreTrainedModel, group: Group) -> nn.Module:
    """The module that mixes a group's units back into the residual stream."""
    return model.base_model.get_submodule(group.outlet)


@contextmanager
def gated(model: PreTrainedModel, gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Multiply each unit by its gate while the context is open.

    Args:
        model: any model with a row in the table.
        gates: {name of a group or of a layer's experts: (units,) factors}; a gate may require
            grad. What is left out is not touched.
    """
    anatomy = Anatomy.of(model)
    experts = {block.name: block for block in anatomy.experts}
    with ExitStack() as stack:
        for name, factors in gates.items():
            if name in experts:

                def reweigh(
                    module: nn.Module,
                    args: tuple[torch.Tensor, ...],
                    factors: torch.Tensor = factors,
                ) -> tuple[torch.Tensor, ...]:
                    hidden, index, weights = args
                    return hidden, index, weights * factors.to(weights)[index]

                routed = moe_of(model, experts[name])[1]
                stack.callback(routed.register_forward_pre_hook(reweigh).remove)
                continue
            group = anatomy[name]

            def scale(
                module: nn.Module,
                args: tuple[torch.Tensor, ...],
                factors: torch.Tensor = factors,
                columns: int = group.columns,
            ) -> tuple[torch.Tensor, ...]:
                wide = factors.repeat_interleave(columns).to(args[0])
                return (args[0] * wide, *args[1:])

            hook = outlet_of(model, group).register_forward_pre_hook(scale)
            stack.callback(hook.remove)
        yield


@contextmanager
def masked(model: PreTrainedModel, selection: Selection) -> Iterator[None]:
    """The model that a selection leaves, nothing removed: heads and neurons with closed gates,
    skipped layers, experts that no token is sent to.
    """
    anatomy, gates = Anatomy.of(model), {}
    for group in anatomy:
        if group.name in selection:
            gate = torch.zeros(group.units)
            gate[list(selection[group.name])] = 1
            gates[group.name] = gate
    with ExitStack() as stack:
        stack.enter_context(gated(model, gates))
        for layers in anatomy.stacks:
            whole = range(layers.units)
            for index in set(whole) - set(selection.get(layers.name, whole)):
                layer = model.base_model.get_submodule(f"{layers.name}.{index}")
                hook = layer.register_forward_hook(_skip, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)  # before those that collect hidden states
        for block in anatomy.experts:
            if block.name in selection:
                _route_to(stack, model, block, sorted(selection[block.name]))
        yield


def _route_to(stack: ExitStack, model: PreTrainedModel, block: Block, experts: list[int]) -> None:
    """Let a router choose among some of the experts until the stack closes."""
    router = moe_of(model, block)[0]
    kept = torch.tensor(experts, device=router.weight.device)  # type: ignore[arg-type]
    for module, name, axis in routing_of(model, block):
        whole = getattr(module, name)
        part = whole.detach().index_select(axis, kept)
        stack.callback(setattr, module, name, whole)
        trained = isinstance(whole, nn.Parameter)
        setattr(module, name, nn.Parameter(part, requires_grad=False) if trained else part)
    if "num_experts" in vars(router):
        stack.callback(setattr, router, "num_experts", router.num_experts)
        router.num_experts = len(experts)  # type: ignore[assignment]

    def number(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*output[:-1], kept[output[-1]])  # as the experts are numbered

    stack.callback(router.register_forward_hook(number).remove)


def _skip(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> torch.Tensor | tuple[Any, ...]:
    """Hand on what a layer was given, in the form of what it gave."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while the context is open; each module's own mode comes back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradient for any weight while the context is open; restored after."""
    # By name: accelerate brings offloaded weights as new parameters.
    parameters = model.named_parameters(remove_duplicate=False)
    trainable = [name for name, parameter in parameters if parameter.requires_grad]
    with evaluating(model):
        try:
            for name in trainable:
                model.get_parameter(name).requires_grad_(False)
            yield
        finally:
            for name in trainable:
                model.get_parameter(name).requires_grad_(True)


class _Watched(torch.autograd.Function):
    """Identity: a tensor is reported with the gradient of what passes through in the backward pass.

    It is saved as autograd saves things, and not by the hook's own reference: so that it is freed
    early, and is not held at all where a layer is computed again (see `recomputing`).
    """

    @staticmethod
    def forward(
        ctx: Any, passing: torch.Tensor, reported: torch.Tensor, report: Reporter
    ) -> torch.Tensor:
        ctx.save_for_backward(reported)
        ctx.report = report
        return passing.view_as(passing)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.report(*ctx.saved_tensors, *gradients)
        return gradients[0], None, None


def _watched(passing: torch.Tensor, reported: torch.Tensor, report: Reporter) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return passing
    if not passing.requires_grad:
        passing.requires_grad_(True)  # nothing before the first outlet has a gradient
    watched: torch.Tensor = _Watched.apply(passing, reported, report)
    return watched


@contextmanager
def gate_gradients(model: PreTrainedModel, anatomy: Anatomy, receive: Receiver) -> Iterator[None]:
    """Report every outlet's input and its gradient in each backward pass of the context.

    The model's weights should be frozen (see `frozen`): then the graph begins at the first outlet,
    and the backward pass computes gradients of activations only.
    """
    with ExitStack() as stack:
        for group in anatomy:

            def watch(
                module: nn.Module, args: tuple[torch.Tensor, ...], group: Group = group
            ) -> tuple[torch.Tensor, ...]:
                report = functools.partial(receive, group)
                return (_watched(args[0], args[0], report), *args[1:])

            hook = outlet_of(model, group).register_forward_pre_hook(watch)
            stack.callback(hook.remove)
        for block in anatomy.experts:
            _watch_experts(model, block, receive, stack)
        yield


@contextmanager
def output_gradients(
    model: PreTrainedModel, anatomy: Anatomy, receive: OutputReceiver
) -> Iterator[None]:
    """Report every outlet's input with the size of its output and the gradient there, (batch,
    tokens, outputs), in each backward pass of the context; for within `gate_gradients`.
    """
    with ExitStack() as stack:
        for group in anatomy:

            def watch(
                module: nn.Module,
                args: tuple[torch.Tensor, ...],
                output: torch.Tensor,
                group: Group = group,
            ) -> torch.Tensor:
                wide = torch.promote_types(output.dtype, torch.float32)
                size = torch.linalg.vector_norm(output.detach(), dim=-1, dtype=wide)
                return _watched(output, args[0].detach(), functools.partial(receive, group, size))

            stack.callback(outlet_of(model, group).register_forward_hook(watch).remove)
        yield


def _watch_experts(
    model: PreTrainedModel, block: Block, receive: Receiver, stack: ExitStack
) -> None:
    """Report routing weights and their gradients, 0 for the experts that a token is not sent to."""

    def spread(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(values), block.units).scatter(1, index, values)

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = args  # (batch x tokens, top_k)

        def report(values: torch.Tensor, gradient: torch.Tensor) -> None:
            receive(block, spread(values, index), spread(gradient, index))

        return hidden, index, _watched(weights, weights, report)

    stack.callback(moe_of(model, block)[1].register_forward_pre_hook(watch).remove)


@contextmanager
def towards_activations(model: PreTrainedModel, checkpointing: bool = False) -> Iterator[None]:
    """Backward passes of the context compute gradients of activations alone, and no more of them
    than are needed; layers are computed again where that is asked for, or weights are offloaded.
    """
    # The graph would hold every weight that was brought; computed again, a layer brings its own.
    again = checkpointing or any(map(is_offloaded, model.modules()))
    layers = recomputing(model) if again else nullcontext()
    with (
        torch.inference_mode(False),  # no graphs are made in the mode that a caller may be in
        frozen(model),
        uncached(model),
        unmarked(model),
        layers,
        Lean(),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Keep only what goes into each layer, and compute the layer again in the backward pass.

    The layers are wrapped here, not by the method of transformers: that one works only in
    training mode, in which some families drop out.
    """
    with ExitStack() as stack:
        for row in row_of(model.config.model_type).stacks:
            for layer in model.base_model.get_submodule(row.layers).children():
                # To its end: a layer that stops early would keep the last weights it was brought.
                again = functools.partial(
                    checkpoint,
                    layer.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    early_stop=False,
                    # A backward pass is outside of any such mode, and both must do the same.
                    context_fn=lambda: (Lean(), Lean()),
                )
                stack.enter_context(replaced_forward(layer, again))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward in a module's place while the context is open; its hooks still run."""
    before = vars(module).get("forward")  # accelerate's, on a model that it dispatched
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def unmarked(model: PreTrainedModel) -> Iterator[None]:
    """The labels that the model meets in the context leave no mark: transformers notes in the
    config which problem the first of them pose, and takes all that follow for the same.
    """
    before = getattr(model.config, "problem_type", None)
    try:
        yield
    finally:
        if getattr(model.config, "problem_type", None) != before:
            model.config.problem_type = before


@contextmanager
def uncached(model: PreTrainedModel) -> Iterator[None]:
    """No cache of keys and values while the context is open: one pass over whole texts needs none,
    and a layer that is computed twice would fill it twice.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
