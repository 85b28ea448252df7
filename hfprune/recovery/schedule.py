"""When gradual pruning makes its plans, and how far towards the budget each of them goes."""

from __future__ import annotations

import dataclasses
from numbers import Real

from hfprune.errors import HfpruneError, expect
from hfprune.planning.budget import Budget


def cubic(progress: float, start: float, end: float) -> float:
    """The share that stays when a part `progress` of the schedule is over: from start to end.

    Fast at first, while there is much that is not needed, and slow at last (Zhu and Gupta 2017,
    equation 1).
    """
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When plans are made, and what share of the way to the budget each goes.

    Attributes:
        begin: share of the run's steps up to which everything stays; the first plan comes `every`
            steps later, because none is needed to keep all.
        end: share of the steps after which the last plan is made. What is left after it is for
            recovery with what then stays.
        every: steps from one plan to the next.
    """

    begin: float = 0.0
    end: float = 0.7
    every: int = 10

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            expect(value, Real, name, "a number")
        if not (0 <= self.begin < self.end <= 1 and self.every >= 1):
            raise HfpruneError(
                "A schedule needs 0 <= begin < end <= 1, shares of the run's steps, and a plan"
                f" every 1 or more steps: {self}."
            )

    def last(self, steps: int) -> int:
        """The step after which the last plan is made."""
        return max(1, round(self.end * steps))

    def due(self, step: int, steps: int) -> bool:
        """Whether a plan is made after a step of a run of so many."""
        first, last = round(self.begin * steps), self.last(steps)
        return step == last or (first < step < last and (step - first) % self.every == 0)

    def progress(self, step: int, steps: int) -> float:
        """How much of the schedule is over after a step: 0 before it begins, 1 at its end."""
        first, last = round(self.begin * steps), self.last(steps)
        return max(0.0, (step - first) / (last - first)) if step < last else 1.0

    def at(self, step: int, steps: int, budget: Budget) -> Budget:
        """The budget of the plan made after a step."""
        progress = self.progress(step, steps)
        limits = (
            dataclasses.replace(limit, amount=cubic(progress, 1.0, limit.amount))
            for limit in budget.limits
        )
        return Budget(tuple(limits))
