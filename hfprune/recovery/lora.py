"""Recovery by low-rank adapters: few numbers learn, and are merged into the weights at the end."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from hfprune.errors import RecipeError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@contextmanager
def adapted(student: PreTrainedModel, config: LoraConfig) -> Iterator[PeftModel]:
    """Within, the student carries adapters, and only they are trained (Hu et al. 2021, "LoRA",
    arXiv:2106.09685). After, it is a plain model again, in place: with the adapters merged into its
    weights, or as it was if an exception ended the context.

    Raises:
        RecipeError: PEFT is not installed, or the config is not one of LoRA or names modules that
            the student does not have.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RecipeError("lora needs PEFT: pip install 'hfprune[lora]'.") from None
    if not isinstance(config, LoraConfig):
        raise RecipeError(f"lora is a {type(config).__name__}; give a peft.LoraConfig.")
    if config.exclude_modules is None:  # an adapter beside a matrix without elements adds nothing
        weights = {name: getattr(m, "weight", None) for name, m in student.named_modules()}
        empty = [n for n, w in weights.items() if w is not None and not w.numel()]
        config = dataclasses.replace(config, exclude_modules=empty or None)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        try:
            model = get_peft_model(student, config)
        except ValueError as error:
            raise RecipeError(f"lora does not fit the student: {error}") from error
    # Biases, where the config trains them, are the student's own.
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    merged = False
    try:
        yield model
        model.merge_and_unload(safe_merge=True)
        merged = True
    finally:
        if not merged:
            for parameter, value in before:
                parameter.data.copy_(value)
            model.unload()
        vars(student).pop("peft_config", None)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in trained)
