"""The bytes that a model takes where it runs: its weights, and the keys and values that it caches
while it generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hfprune.errors import UnsupportedModelError
from hfprune.structure.anatomy import Anatomy, Group
from hfprune.structure.architectures import row_of
from hfprune.structure.cost import Selection, group_params, layers_params, table_params

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Memory:
    """Bytes of any structure of a model, embeddings and task head included.

    Attributes:
        anatomy: of the model.
        item: bytes of a weight, and of a cached number.
        cached: {group name: cached numbers per column of its keys' heads}, of the attentions that
            cache: batch size x tokens, twice.
        whole: {stack path: cached numbers of each layer's attentions whose heads are not units}.
    """

    anatomy: Anatomy
    item: int
    cached: Mapping[str, int]
    whole: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(model: PreTrainedModel, batch_size: int, tokens: int) -> Memory:
        """The memory of a model that holds a batch of examples of `tokens` tokens.

        A model that does not generate caches nothing. An encoder and its decoder read equally many
        tokens.

        Raises:
            UnsupportedModelError: the weights are not all of one size.
        """
        sizes = {p.element_size() for p in model.parameters()}
        if len(sizes) > 1:
            kinds = sorted({str(p.dtype) for p in model.parameters()})
            raise UnsupportedModelError(
                f"This model's weights are of {' and '.join(kinds)}: their bytes are counted for"
                " weights of one kind only. Load it with one dtype."
            )
        anatomy = Anatomy.of(model)
        lengths = _cached_lengths(model, tokens)
        decoder = len(anatomy.stacks) - 1
        cached = {
            group.name: 2 * batch_size * (tokens if group.cross else lengths[group.layer])
            for group in anatomy
            if group.kind == "head" and lengths and group.stack == decoder
        }
        stacks = row_of(model.config.model_type).stacks
        whole = {
            block.name: tuple(
                sum(
                    batch_size * length * _width(model, block.name, layer, path)
                    for attention in stacks[block.stack].whole
                    for path in (attention.k, attention.v)
                    if path
                )
                for layer, length in enumerate(lengths)
            )
            for block in anatomy.stacks
            if stacks[block.stack].whole and lengths
        }
        return Memory(anatomy, sizes.pop(), cached, whole)

    def of_group(self, group: Group, units: int, kv_groups: int) -> int:
        """Bytes of a group that keeps `units` units in `kv_groups` KV groups, of a stack that loses
        heads.
        """
        params = group_params(group, units, kv_groups) + units * self._tables.get(group.name, 0)
        return self.item * (params + self._cache(group, kv_groups))

    def of_all(self, keep: Selection) -> int:
        """Bytes of the whole model that a selection leaves."""
        numbers = self.anatomy.outside_params + layers_params(self.anatomy, keep)
        for stack in self.anatomy.stacks:
            stay = keep.get(stack.name, range(stack.units))
            numbers += sum(self.whole[stack.name][n] for n in stay if stack.name in self.whole)
            numbers += sum(
                self._cache(g, len(g.kv_of(keep.get(g.name, range(g.units)))))
                for g in self.anatomy
                if g.stack == stack.stack and g.layer in stay
            )
        return self.item * numbers

    @cached_property
    def _tables(self) -> dict[str, int]:
        return table_params(self.anatomy)

    def _cache(self, group: Group, kv_groups: int) -> int:
        # An emptied attention still tells the cache how many tokens went by, by a column of zeros.
        columns = kv_groups * group.columns or int(not group.cross)
        return self.cached.get(group.name, 0) * columns


def _cached_lengths(model: PreTrainedModel, tokens: int) -> list[int]:
    """Tokens whose keys and values each layer keeps; none for a model that does not generate."""
    from transformers import DynamicCache
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config
    # A family of encoders decodes only where its config says so.
    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    encoders = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # which has no mask token
    decodes = decodes or config.model_type not in encoders
    if not (model.can_generate() and decodes):
        return []
    windows = [getattr(own, "sliding_window", None) for own in DynamicCache(config=config).layers]
    # A layer with a window has seen its newest token when it asks for those before it.
    return [min(tokens, window - 1) if window else tokens for window in windows]


def _width(model: PreTrainedModel, stack: str, layer: int, path: str) -> int:
    weight = model.base_model.get_submodule(f"{stack}.{layer}.{path}").weight
    assert isinstance(weight, torch.Tensor), "a projection has a weight"
    return weight.shape[0]
