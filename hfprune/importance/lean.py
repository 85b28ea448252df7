"""The functions that a scoring pass computes in its own way, for less time or memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hfprune.importance.cross_entropy import cross_entropy
from hfprune.importance.linear import linear

_LEAN: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {
    F.cross_entropy: cross_entropy,
    F.linear: linear,
}


class Lean(TorchFunctionMode):
    """Within this context the functions of `torch.nn.functional` that have a lean one are that:
    also where a model's own code calls them.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _LEAN.get(function, function)(*args, **(kwargs or {}))
