"""Pruning while training: a callback that closes gates on a schedule, and removes at the end what
is closed.

The importance comes from the training's own backward passes: no batch is run for it. The share that
stays falls by the cubic schedule of Zhu and Gupta 2017, "To prune, or not to prune",
arXiv:1710.01878. Every plan is made afresh from all units, the closed ones too: what a unit would
give if it were open is seen at its gate, so one that turns out to matter comes back.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfprune.errors import BudgetError, DataError, HfpruneError, expect
from hfprune.importance.criteria import JOINT, criterion_named
from hfprune.importance.gates import gate_gradients, gated, outlet_of
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import Gathering
from hfprune.planning.budget import Budget
from hfprune.planning.constraints import Constraints
from hfprune.planning.plan import PruningPlan
from hfprune.planning.solve import plan
from hfprune.processes import deepspeed_asked, refuse_disagreement
from hfprune.recovery.schedule import Schedule
from hfprune.structure.anatomy import Anatomy, Block, Group, check_whole
from hfprune.structure.checkpoint import as_stock
from hfprune.structure.surgery import cut

logger = logging.getLogger(__name__)

_KEY = "hfprune.gradual"  # of what goes into the checkpoints' trainer_state.json


class GradualPruning(TrainerCallback):
    """Prune a model while a Trainer, ours or the stock one, trains it.

    The model ends pruned, in place, when `train()` returns: of the pruned class, its removed
    tensors freed. Until then it is whole, with gates at the outlets; checkpoints hold the whole
    model and resume exactly. Removal waits for the end of training because only then nothing else
    holds the parameters: the optimizer, and the wrapper of a data-parallel model, know them by
    identity. So a Trainer trains a model to its end with this callback once; for more training,
    make another Trainer.

    With `load_best_model_at_end`, only checkpoints from the end of the schedule on compete: those
    before are of a larger model. Evaluation during training sees the gates.

    The gradient of a closed unit's weights is 0, so it keeps them, weight decay aside.

    Args:
        budget: what stays, in shares of the dense model: "macs=50%", "macs=50%, params=60%".
        criterion: name of the importance criterion.
        constraints: floors, granularity, what must stay; whole layers and experts do not go by
            gates.
        schedule: when plans are made.
        smoothing: how much of the importance a step leaves to those before it, in [0, 1): an
            exponential moving average over the steps, each step's importance being shares of its
            sum, because gradients shrink as training goes on.
        tokens: length of the example whose MACs are counted; by default the means of the training
            data.

    Attributes:
        plan: the latest plan; None before the first.
        importance: {group: (units,) float64}, the moving average; the sum over all is 1.

    Raises:
        HfpruneError: an argument out of range, or an unknown criterion.
        BudgetError: the budget cannot be read or is not in shares.
    """

    def __init__(
        self,
        budget: str | Budget,
        *,
        criterion: str = "fisher",
        constraints: Constraints | None = None,
        schedule: Schedule | None = None,
        smoothing: float = 0.9,
        tokens: int | None = None,
    ) -> None:
        for name, value, kind in (
            ("constraints", constraints, Constraints),
            ("schedule", schedule, Schedule),
        ):
            expect(value, (kind, type(None)), name, f"hfprune.{kind.__name__}")
        self.plan: PruningPlan | None = None
        self.importance: dict[str, torch.Tensor] = {}
        self._budget = Budget.parse(budget)
        self._criterion = criterion
        self._constraints = constraints or Constraints()
        # Heads come in large pieces: on the way to the budget a plan may stay below its share.
        self._loose = dataclasses.replace(self._constraints, tolerance=1.0)
        self._schedule = schedule or Schedule()
        self._smoothing = smoothing
        self._tokens = tokens
        self._hooks, self._watching = ExitStack(), ExitStack()
        self._done = False
        criterion_named(criterion)
        if criterion in JOINT:
            raise HfpruneError(
                f"{criterion} needs moments of whole layers, which are not gathered in training;"
                " give fisher or taylor."
            )
        if any(limit.absolute for limit in self._budget.limits):
            raise BudgetError(
                f"Gradual pruning goes from all to a share of it, and {self._budget} is an amount;"
                " give shares, such as macs=50%."
            )
        if not 0 <= smoothing < 1:
            raise HfpruneError(f"smoothing is {smoothing}; give a number from 0 to below 1.")
        for name in ("layers", "experts"):
            if getattr(self._constraints, name) is not None:
                raise HfpruneError(
                    f"Gradual pruning closes heads and neurons, not {name}: remove whole {name}"
                    " with hfprune.remove before training, and leave them out of the constraints."
                )

    # The walk: open the gates, gather, close by the schedule, remove.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the gates up, and go on where the checkpoint was.

        Raises:
            HfpruneError: the callback has pruned a model before, or the checkpoint is of another
                kind of run.
            UnsupportedModelError: the model is sharded or wrapped.
            BudgetError: the budget cannot be met.
        """
        model: PreTrainedModel = kwargs["model"]
        if self._done:
            raise HfpruneError(
                "This callback has pruned its model; make a new Trainer, without it, to train on."
            )
        if args.n_gpu > 1 or args.deepspeed or deepspeed_asked():
            raise HfpruneError(
                "Gradual pruning needs one process per GPU, each with the whole model: start with"
                " `accelerate launch`, without DeepSpeed."
            )
        check_whole(model)
        self._hooks.close()  # of a run that an exception ended
        self.plan, self.importance = None, {}
        self._anatomy = Anatomy.of(model)
        self._constraints.check(model)
        self._ungated: dict[str, torch.Tensor] = {}
        self._gates = {
            g.name: torch.ones(g.units, device=model.device) for g in self._anatomy if g.units
        }
        self._examples, self._folded_at = 0, state.global_step
        self._measured = [0] * len(self._anatomy.stacks)
        self._final = False
        equal = {p.name: torch.ones(p.units) for p in (*self._anatomy, *self._anatomy.experts)}
        self._planned(model, equal, self._budget, self._loose)  # while nothing is lost yet
        if state.global_step:
            self._restore(state)
        self._gather_anew(model)
        self._watching = ExitStack()
        self._watching.enter_context(self._watched(model))
        self._hooks.callback(lambda: self._watching.close())
        if self._final:
            self._watch_no_more(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take in the step's importance where it is asked for, and make a plan when one is due."""
        model: PreTrainedModel = kwargs["model"]
        if self._final:
            return
        due = self._schedule.due(state.global_step, state.max_steps)
        if due or control.should_save or control.should_evaluate:
            self._fold(model, state)
        if due:
            self._close(model, state)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take in the importance before a checkpoint is written."""
        model: PreTrainedModel = kwargs["model"]
        if not self._final and (control.should_save or control.should_evaluate):
            self._fold(model, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Remove what is closed.

        Raises:
            HfpruneError: training ended before the schedule.
        """
        model: PreTrainedModel = kwargs["model"]
        self._hooks.close()
        if not self._final or self.plan is None:
            raise HfpruneError(
                f"Training ended after step {state.global_step}, before the last plan at step"
                f" {self._schedule.last(state.max_steps)}: nothing was removed. Resume from the"
                " last checkpoint, or let the schedule end earlier."
            )
        cut(model, self.plan.keep, self.plan.summary)
        if self.plan.uniform:
            as_stock(model)
        self._done = True

    # Gathering.

    @contextmanager
    def _watched(self, model: PreTrainedModel) -> Iterator[None]:
        """The gates' hooks, each behind one that keeps what comes before the gate."""
        with ExitStack() as stack:
            handle = model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
            stack.callback(handle.remove)
            for group in self._anatomy:

                def keep(
                    module: nn.Module, args: tuple[torch.Tensor, ...], name: str = group.name
                ) -> None:
                    if torch.is_grad_enabled():
                        self._ungated[name] = args[0].detach()

                hook = outlet_of(model, group).register_forward_pre_hook(keep)
                stack.callback(hook.remove)
            stack.callback(self._ungated.clear)
            stack.enter_context(gated(model, self._gates))
            stack.enter_context(gate_gradients(model, self._anatomy, self._receive))
            yield

    def _watch_no_more(self, model: PreTrainedModel) -> None:
        """The gates stay as they are, and cost no more than the multiplication."""
        self._watching.close()
        self._watching = ExitStack()
        self._watching.enter_context(gated(model, self._gates))

    def _gather_anew(self, model: PreTrainedModel) -> None:
        self._gathering = Gathering(model, self._anatomy)
        self._batches, self._overflowed = 0, False

    def _see_batch(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if torch.is_grad_enabled():
            batch = {k: v for k, v in kwargs.items() if torch.is_tensor(v) and v.dim()}
            self._gathering.start(batch, self._batches)
            self._batches += 1

    def _receive(
        self, part: Group | Block, activation: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Take one outlet's gradient, behind its gate, with the input that came before the gate.

        With a the input and g the gate, dL/dg = sum(a * dL/d(ga)): also where g is 0, and ga with
        it.
        """
        if isinstance(part, Group):
            if part.name not in self._ungated:
                raise HfpruneError(
                    "The model ran forward twice before one backward pass; gradual pruning can tell"
                    " whose gradient it sees only if each forward pass has its own."
                )
            activation = self._ungated.pop(part.name)
        try:
            self._gathering.receive(part, activation, gradient)
        except DataError:  # gradients of a scaled float16 loss overflow now and then
            self._overflowed = True

    def _fold(self, model: PreTrainedModel, state: TrainerState) -> None:
        """Take what all processes gathered since the last time into the moving average."""
        steps, self._folded_at = state.global_step - self._folded_at, state.global_step
        lost = torch.tensor(float(self._overflowed or not self._batches), device=model.device)
        if dist.is_initialized():
            dist.all_reduce(lost)
        if steps and not lost:
            gathering = self._gathering
            gathering.reduce(model.device)
            function = criterion_named(self._criterion)
            found = {
                p.name: function(gathering.evidence(model, p, 0)[0]).double().cpu()
                for p in gathering.parts
            }
            total = sum(float(values.sum()) for values in found.values()) or 1.0
            stays = self._smoothing**steps if self.importance else 0.0
            for name, values in found.items():
                earlier = self.importance.get(name, torch.zeros_like(values))
                self.importance[name] = stays * earlier + (1 - stays) * values / total
            self._examples += gathering.examples
            self._measured = [sum(n) for n in zip(self._measured, gathering.tokens, strict=True)]
        self._gather_anew(model)
        state.stateful_callbacks[_KEY] = self._snapshot()  # type: ignore[call-overload, index]

    # Planning.

    def _planned(
        self,
        model: PreTrainedModel,
        importance: Mapping[str, torch.Tensor],
        budget: Budget,
        constraints: Constraints,
    ) -> PruningPlan:
        scores = Scores(
            importance={self._criterion: importance},
            fingerprint=self._anatomy.fingerprint,
            examples=self._examples,
            tokens=tuple(count / max(1, self._examples) for count in self._measured),
            agreement={},
        )
        return plan(model, scores, budget, self._criterion, constraints, self._tokens)

    def _close(self, model: PreTrainedModel, state: TrainerState) -> None:
        """Make the plan that is due and set the gates by it."""
        last = state.global_step == self._schedule.last(state.max_steps)
        if not self.importance:
            if last:
                raise DataError(
                    "No importance was gathered before the last plan: the gradients were never"
                    " finite. Lower learning_rate, or let the schedule end later."
                )
            return
        if self.plan is None:  # what no plan can meet shows now, and not at the end
            self._planned(model, self.importance, self._budget, self._constraints)
        budget = self._schedule.at(state.global_step, state.max_steps, self._budget)
        made = self._planned(model, self.importance, budget, self._loose)
        if last:
            self._warn_of_a_gap(model)
        _agree(made)
        opened = sum(
            int((self._gates[name][list(units)] == 0).sum())
            for name, units in made.keep.items()
            if name in self._gates
        )
        self._set_gates(made)
        closed = sum(int((gate == 0).sum()) for gate in self._gates.values())
        logger.info(
            "Step %d: %s, %d units closed, %d opened again.",
            *(state.global_step, made.budget, closed, opened),
        )
        self.plan, self._final = made, last
        if last:
            self._watch_no_more(model)
            # The checkpoints so far are of a larger model: the best is among those to come.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks[_KEY] = self._snapshot()  # type: ignore[call-overload, index]

    def _warn_of_a_gap(self, model: PreTrainedModel) -> None:
        """Say when the last plan stays far below the budget; training is not thrown away for it."""
        try:
            self._planned(model, self.importance, self._budget, self._constraints)
        except BudgetError as error:
            logger.warning("%s The model is pruned to that.", error)

    def _set_gates(self, made: PruningPlan) -> None:
        for name, gate in self._gates.items():
            gate.zero_()
            gate[list(made.keep[name])] = 1

    # Resuming.

    def _snapshot(self) -> dict[str, Any]:
        """All that the rest of the run needs, as plain values: they are read back as they were."""
        return {
            "run": self._run(),
            "step": self._folded_at,
            "examples": self._examples,
            "tokens": self._measured,
            "importance": {name: values.tolist() for name, values in self.importance.items()},
            "plan": self.plan.to_dict() if self.plan else None,
            "final": self._final,
        }

    def _run(self) -> list[Any]:
        """What must not change when a run goes on."""
        schedule = dataclasses.astuple(self._schedule)
        settings = [str(self._budget), self._criterion, *schedule, self._smoothing]
        return [*settings, str(self._constraints), self._tokens]

    def _restore(self, state: TrainerState) -> None:
        saved: Any = state.stateful_callbacks.get(_KEY)  # type: ignore[union-attr]
        if saved is None:
            raise HfpruneError(
                f"The checkpoint of step {state.global_step} was written without gradual pruning;"
                " start afresh, or leave the callback out."
            )
        if saved["run"] != self._run():
            raise HfpruneError(
                f"The checkpoint was pruned by {saved['run']} (budget, criterion, begin, end,"
                f" every, smoothing, constraints, tokens), not by {self._run()}; go on with the"
                " same."
            )
        self._folded_at, self._final = saved["step"], saved["final"]
        self._examples, self._measured = saved["examples"], saved["tokens"]
        self.importance = {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in saved["importance"].items()
        }
        if saved["plan"]:
            self.plan = PruningPlan.from_dict(saved["plan"])
            self._set_gates(self.plan)


def _agree(made: PruningPlan) -> None:
    """Refuse to go on when the processes have made different plans.

    Raises:
        HfpruneError: in every process.
    """
    if dist.is_initialized():
        prints = [""] * dist.get_world_size()
        dist.all_gather_object(prints, made.fingerprint)
        refuse_disagreement("the plan", prints)
