"""Budgets: what the pruned layers may cost, as a share of what the dense layers cost."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune.errors import BudgetError, unknown

RESOURCES = ("macs", "params")


@dataclass(frozen=True)
class Budget:
    """A share of one resource of the layers that a plan may keep.

    Attributes:
        resource: "macs" or "params", of the layers (embeddings and task heads are not for
            removing).
        share: of the dense layers' cost, in (0, 1].
    """

    resource: str
    share: float

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise BudgetError(unknown("budget", self.resource, RESOURCES))
        if not 0 < self.share <= 1:
            raise BudgetError(
                "A budget is a share to keep, more than 0 and at most 1 (100 %);"
                f" {self.resource}={self.share} is not."
            )

    @staticmethod
    def parse(text: str | Budget) -> Budget:
        """Read "macs=50%" or "params=0.6".

        Raises:
            BudgetError: not of that form, an unknown resource, or a share out of range.
        """
        if isinstance(text, Budget):
            return text
        resource, equals, share = str(text).replace(" ", "").partition("=")
        try:
            percent = share.endswith("%")
            value = float(share.removesuffix("%")) / (100 if percent else 1)
        except ValueError:
            equals = ""
        if not equals:
            raise BudgetError(
                f"Cannot read the budget {text!r}: write it as 'macs=50%' or 'params=0.6'."
            )
        return Budget(resource, value)

    def __str__(self) -> str:
        percent = f"{self.share * 100:g}"
        exact = float(percent) / 100 == self.share  # or it would not be read back as this budget
        return f"{self.resource}={percent}%" if exact else f"{self.resource}={self.share!r}"
