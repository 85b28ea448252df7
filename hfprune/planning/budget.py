"""Budgets: what a pruned model may cost, as shares of what the dense one costs or in plain
amounts, of one resource or of several at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hfprune.errors import BudgetError, unknown

_COUNTS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_UNITS = {"macs": _COUNTS, "params": _COUNTS, "memory": _BYTES, "latency": _SECONDS}
_EXAMPLES = {"macs": "1.2G", "params": "15M", "memory": "400MB", "latency": "8ms"}

RESOURCES = tuple(_UNITS)
_WHOLE = {"latency": 1e9}  # counted in whole nanoseconds
_RUNS = ("memory", "latency")  # resources that depend on what runs: batch size and length

Shape = tuple[int, int]
"""Examples of a batch, tokens of an example."""


@dataclass(frozen=True)
class Limit:
    """How much of one resource a plan may keep.

    Attributes:
        resource: "macs" or "params", of the layers (embeddings and task heads are not for
            removing); "memory", bytes of all weights and of the key-value cache; "latency", seconds
            of one forward pass. Memory and latency are the whole model's.
        amount: a share of what the dense model costs, in (0, 1]; or, if `absolute`, MACs,
            parameters, bytes or seconds.
        absolute: the amount is no share.
        shape: batch size and tokens for which memory and latency are counted; None for one example
            as long as those whose MACs are counted.
    """

    resource: str
    amount: float
    absolute: bool = False
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise BudgetError(unknown("budget", self.resource, RESOURCES))
        if not 0 < self.amount < float("inf") or not (self.absolute or self.amount <= 1):
            raise BudgetError(
                "A budget is a share to keep, more than 0 and at most 1 (100 %), or an amount with"
                f" its unit ({self.resource}={_EXAMPLES[self.resource]});"
                f" {self.resource}={self.amount:g} is not."
            )
        if self.shape and (self.resource not in _RUNS or min(self.shape) < 1):
            raise BudgetError(
                "Batch size and tokens (@1x128) belong to memory and latency and are 1 or more;"
                f" {self.resource}@{self.shape[0]}x{self.shape[1]} is not so."
            )

    def of(self, dense: int) -> int:
        """What may be kept of a dense cost, in whole MACs, parameters, bytes or nanoseconds."""
        if not self.absolute:
            return int(self.amount * dense + 0.5)
        return round(self.amount * _WHOLE.get(self.resource, 1))

    def written(self, amount: int) -> str:
        """An amount of the resource as people read it, with four digits."""
        value = amount / _WHOLE.get(self.resource, 1)
        units = _UNITS[self.resource].items()
        scales = sorted((scale, unit) for unit, scale in units if "i" not in unit)
        scales = [(1.0, ""), *scales] if self.resource in ("macs", "params") else scales
        scale, unit = max([pair for pair in scales if pair[0] <= value], default=scales[0])
        return f"{value / scale:.4g} {unit}".rstrip()

    def allowing(self, amount: int, dense: int) -> Limit:
        """This limit, set to what just allows an amount: rounded up, so that it fits; of nothing,
        the least that can be asked for.
        """
        amount = max(1, amount)
        if not self.absolute:
            return dataclasses.replace(self, amount=math.ceil(amount / dense * 1e4) / 100 / 100)
        digit = 10 ** max(0, len(str(amount)) - 4)
        rounded = -(-amount // digit) * digit
        return dataclasses.replace(self, amount=rounded / _WHOLE.get(self.resource, 1))

    @staticmethod
    def parse(text: str) -> Limit:
        """Read "macs=50%", "params=0.6", "memory=400MB@1x128" or "latency=8ms".

        Raises:
            BudgetError: not of that form, an unknown resource, or an amount out of range.
        """
        match = re.fullmatch(
            r"(\w+)=([-+.\de]+?|nan|inf)(%|[a-zA-Z]*)(?:@(\d+)x(\d+))?", text.replace(" ", "")
        )
        if match is None:
            raise _unreadable(text)
        resource, number, unit, batch, tokens = match.groups()
        if resource not in RESOURCES:
            raise BudgetError(unknown("budget", resource, RESOURCES))
        units = {"": 1.0, "%": 0.01} | _UNITS[resource]
        if unit not in units:
            raise BudgetError(
                unknown(f"unit of {resource}", unit, ["%", *_UNITS[resource]])
                + f" Write {resource}=60% or {resource}={_EXAMPLES[resource]}."
            )
        try:
            value = float(number)
        except ValueError:
            raise _unreadable(text) from None
        amount = value / 100 if unit == "%" else value * units[unit]
        absolute = unit not in ("", "%")
        if absolute and resource != "latency":
            amount = round(amount)
        return Limit(resource, amount, absolute, (int(batch), int(tokens)) if batch else None)

    def __str__(self) -> str:
        if self.absolute:
            large_first = sorted(_UNITS[self.resource].items(), key=lambda pair: -pair[1])
            numbers = [(f"{self.amount / scale:.12g}", unit) for unit, scale in large_first]
            numbers.sort(key=lambda pair: _awkwardness(pair[0]))
            # The shortest that is read back as this limit; the last resort always is.
            base = f"{self.amount!r}s" if self.resource == "latency" else ""
            base = base or f"{self.amount / 1e3!r}K{'B' * (self.resource == 'memory')}"
            texts = [*map("".join, numbers), base]
        else:
            texts = [f"{self.amount * 100:g}%", repr(self.amount)]
        at = f"@{self.shape[0]}x{self.shape[1]}" if self.shape else ""
        spelled = [f"{self.resource}={text}{at}" for text in texts]
        return next(text for text in spelled if Limit.parse(text) == self or text == spelled[-1])


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: one limit or several, each of which it respects.

    Attributes:
        limits: one per resource; memory and latency may be limited for several shapes.
    """

    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        what = [(limit.resource, limit.shape) for limit in self.limits]
        if not what:
            raise BudgetError("A budget needs one limit at least, such as macs=50%.")
        if twice := next((w for w in what if what.count(w) > 1), None):
            raise BudgetError(f"{twice[0]} is limited twice in {self}; keep the smaller.")

    @staticmethod
    def parse(text: str | Budget | Sequence[str]) -> Budget:
        """Read "macs=50%", or several limits: "macs=50%, params=0.6" or a sequence of such texts.

        Raises:
            BudgetError: not of that form, an unknown resource, or an amount out of range.
        """
        if isinstance(text, Budget):
            return text
        texts = text if isinstance(text, list | tuple) else [text]
        return Budget(tuple(Limit.parse(part) for t in texts for part in str(t).split(",")))

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits))


def _awkwardness(number: str) -> tuple[int, int]:
    """By which the number that people would write is the least: one with few digits that say
    something, if it is no fraction and has no power of ten, and else a short one.
    """
    odd = number.startswith("0.") or "e" in number
    digits = len(number.replace(".", "").strip("0"))
    return (len(number), digits) if odd else (0, digits)


def _unreadable(text: str) -> BudgetError:
    return BudgetError(
        f"Cannot read the budget {text!r}: write it as 'macs=50%' or 'params=0.6', or as"
        " 'memory=400MB@1x128' or 'latency=8ms' (batch size x tokens after the @); several with"
        " commas."
    )
