"""Scoring: one pass of batches through the gated model, on any number of processes, gives every
criterion.
"""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfprune.errors import DataError, HfpruneError, expect
from hfprune.importance.batches import (
    Batch,
    by_example,
    check_batches,
    padding_mask,
    placed,
    reads,
)
from hfprune.importance.criteria import (
    CRITERIA,
    HALVED,
    JOINT,
    Criterion,
    Evidence,
    criterion_named,
)
from hfprune.importance.diagnosis import (
    check_finite,
    loss_of,
    warn_if_scarce,
    warn_if_unsettled,
)
from hfprune.importance.gates import (
    gate_gradients,
    outlet_of,
    output_gradients,
    towards_activations,
)
from hfprune.importance.losses import Loss, is_token_level, loss_named
from hfprune.importance.moments import MomentSums
from hfprune.importance.reconstruction import Joint
from hfprune.importance.scores import Scores
from hfprune.importance.weights import digest, outlet_rows, weight_norms
from hfprune.structure.anatomy import Anatomy, Block, Group

P = ParamSpec("P")

_SHARED_OUT = {"DataLoaderShard", "DataLoaderDispatcher"}
"""Accelerate's loaders of a process's share; by name, because they take a second to import."""

_CACHED = 2**18
"""So many numbers stay in a processor's cache until they are summed."""

_OBSERVED = 256
"""Units of a group by which halves are compared where no criterion reads the units' own gates."""


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    criteria: str | Sequence[str] | None = None,
    loss: str | Loss = "labels",
    seed: int = 0,
    checkpointing: bool = False,
    moments: bool = False,
) -> Scores:
    """Score every head, neuron and routed expert of a model from one pass over labelled batches.

    The weights are frozen while it runs and no weight gradient is allocated: the cost is a forward
    pass and a backward pass over activations. With torch.distributed running, give every process
    the same batches: each takes its share, and all return the scores of the whole.

    Args:
        model: a transformers model of a known family; left as it was.
        batches: what the model is called with, {name: tensor}; with labels for the loss on them.
        criteria: names from the registry, or one; all of them by default. Leave out
            `reconstruction` where memory is tight: it holds little more than half of
            (columns^2 + outputs^2) float32 numbers an outlet.
        loss: "labels", the model's own loss; "sampled", its loss on labels drawn from its own
            predictions, and "logits", how far its logits move, for which no labels are needed; or
            (model, batch) -> a loss summed over examples or labelled tokens.
        seed: of the criterion `random` and of the losses that draw.
        checkpointing: keep only what goes into each layer and compute the layer again in the
            backward pass: a third more time, for long sequences and models that hardly fit.
        moments: keep the second moments of each outlet's inputs, which `reconstruction` reads, in
            the scores: `compensate` then needs no data, and no other pass over them.

    Raises:
        HfpruneError: an unknown criterion or loss, or a criterion that does not give a finite
            number per unit (names the group).
        DataError: no batches, or one without examples or labels, or with labels of no class (names
            the batch); a loss that is no number or not finite (names the batch and the layer), or
            one that does not depend on some group of units (names the group).
    """
    if criteria is not None:
        expect(criteria, (str, Iterable), "criteria", "one name or several")
    expect(seed, Integral, "seed", "a whole number")
    check_batches(batches)
    names = [criteria] if isinstance(criteria, str) else criteria or CRITERIA
    wanted = {name: criterion_named(name) for name in names}
    chosen = loss if callable(loss) else loss_named(loss, seed)
    anatomy = Anatomy.of(model)
    total = operator.length_hint(batches) or None  # a loader of a stream has a len() that raises
    joint = MomentSums(model, total) if moments or not JOINT.isdisjoint(wanted) else None
    gathering = Gathering(model, anatomy, joint, joint_only=JOINT.issuperset(wanted))
    device = _device_of(model)
    if joint:
        warn_if_scarce(joint.least_bytes(anatomy), device)
    with towards_activations(model, checkpointing), gathering.watch(anatomy):
        shares = _shares(batches, total, model)
        for index, batch, counts in shares:
            here = placed(batch, index, device)
            gathering.start(here, index, counts)
            value = loss_of(chosen, model, here, index)
            check_finite(value, index, model, here, chosen)
            if value.requires_grad:
                value.backward()
            if counts and not gathering.seen:
                raise DataError(
                    f"The loss of calibration batch {index} does not depend on any head or neuron"
                    " of the model."
                )
    gathering.reduce(device)
    if not gathering.examples:
        raise DataError("There are no calibration batches; give at least one.")
    importance: dict[str, dict[str, torch.Tensor]] = {name: {} for name in wanted}
    halves: list[tuple[Evidence, Evidence]] = []
    kept: dict[str, torch.Tensor] = {}
    for part in tqdm(gathering.parts, "ranking", delay=2, leave=False):
        whole, pair = gathering.evidence(model, part, seed)
        halves.append(pair)
        with _own_precision(device):
            for name, function in wanted.items():
                importance[name][part.name] = _by_unit(name, function, part, whole)
        if moments and whole.joint:
            kept[part.name] = whole.joint.moments.inputs.cpu()
    agreement: dict[str, float] = {}
    for name, function in HALVED.items():
        if name in wanted and gathering.examples > 1:
            both = [torch.cat([function(pair[half]) for pair in halves]) for half in (0, 1)]
            agreement[name] = rank_correlation(*both)
    warn_if_unsettled(agreement, gathering.examples)
    return Scores(
        importance,
        anatomy.fingerprint,
        gathering.examples,
        tuple(count / gathering.examples for count in gathering.tokens),
        agreement,
        kept,
        digest(model, anatomy),
    )


def _by_unit(
    name: str, function: Criterion, part: Group | Block, evidence: Evidence
) -> torch.Tensor:
    """What a criterion gives for a group of units: (units,) float64.

    Raises:
        HfpruneError: it is not a finite number for each of them.
    """
    if not part.units:
        return torch.zeros(0, dtype=torch.float64)
    values = function(evidence)
    found = None
    if not isinstance(values, torch.Tensor):
        found = f"a {type(values).__name__}"
    elif values.shape != (part.units,):
        found = f"a tensor of shape {tuple(values.shape)}"
    elif not torch.isfinite(values).all():
        found = "values that are not finite"
    if found:
        raise HfpruneError(
            f"The criterion {name!r} gives {found} for {part.name}; it has to give a finite number"
            f" for each of its {part.units} units."
        )
    return values.double().cpu()


def _shares(
    batches: Iterable[Batch], total: int | None, model: PreTrainedModel
) -> Iterator[tuple[int, Batch, bool]]:
    """This process's batches, with their numbers among all, and whether they count.

    Sharded weights are gathered by all processes at once: so each takes equally many batches, the
    last one again where there are too few.

    Raises:
        DataError: a loader that accelerate prepared: it holds a share already.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1 and (prepared := type(batches).__name__) in _SHARED_OUT:
        raise DataError(
            f"The batches come from accelerator.prepare() (a {prepared}), which gives every process"
            " other ones; give the loader that was prepared."
        )
    index, batch = -1, None
    for index, batch in enumerate(tqdm(batches, "scoring", total, delay=2, leave=False)):
        if index % world == rank:
            yield index, batch, True
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if sharded and batch is not None and rank > index % world:
        yield index, batch, False


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where a model reads its batches; an offloaded one brings its weights there."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _own_precision(device: torch.device) -> torch.autocast:
    """No autocast while the context is open: sums are in float32 or wider, and some products are
    not defined of two precisions.
    """
    return torch.autocast(device.type, enabled=False)


def _examples_at_once(activation: torch.Tensor) -> int:
    """How many examples' products fit a processor's cache; a GPU takes all at once."""
    if activation.device.type != "cpu":
        return len(activation)
    return max(1, _CACHED // max(1, activation[0].numel()))


def _of_units(values: torch.Tensor, columns: int) -> torch.Tensor:
    """(..., units) sums over the columns of each unit; the values themselves where it is one."""
    return values.unflatten(-1, (-1, columns)).sum(dim=-1) if columns > 1 else values


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of two equally long vectors; 0 if one of them is constant."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num()) if len(one) > 1 else 1.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Place of each value in ascending order; equal values share the mean of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which].double()


class Gathering:
    """Running sums per group, in two halves of the examples so that their agreement shows.

    Args:
        model: whose gates they are of.
        anatomy: of the model.
        joint: what gathers the moments, where they are wanted.
        joint_only: leave out what joint criteria do not read: squared inputs, and the gates of all
            but some units, by which the halves are compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        joint: MomentSums | None = None,
        joint_only: bool = False,
    ) -> None:
        self.gates: dict[str, torch.Tensor] = {}  # (2, 2, units): sizes and squares, by halves
        self.inputs: dict[str, torch.Tensor] = {}  # (units, columns)
        self.examples = 0
        self.tokens = [0] * len(anatomy.stacks)
        self.parts: list[Group | Block] = [*anatomy, *anatomy.experts]
        self.joint = joint
        self._model = model
        self._joint_only = joint_only
        self._batch: Batch = {}
        self._index = 0
        self._ignored = False
        self.seen: set[int] = set()  # stacks whose gradients this batch has given

    @contextmanager
    def watch(self, anatomy: Anatomy) -> Iterator[None]:
        """Receive what each backward pass of the context gives."""
        with ExitStack() as stack:
            gates = self._unless_ignored(self.receive)
            stack.enter_context(gate_gradients(self._model, anatomy, gates))
            if self.joint:
                outputs = self._unless_ignored(self.joint.receive)
                stack.enter_context(output_gradients(self._model, anatomy, outputs))
            yield

    def _unless_ignored(self, receive: Callable[P, None]) -> Callable[P, None]:
        device = _device_of(self._model)  # once: it is looked for among the parameters

        def filtered(*args: P.args, **kwargs: P.kwargs) -> None:
            if not self._ignored:
                with _own_precision(device):
                    receive(*args, **kwargs)

        return filtered

    def start(self, batch: Batch, index: int, counts: bool = True) -> None:
        """Tell which batch, of all processes' batches, the coming gradients belong to, and whether
        they count.
        """
        self._batch, self._index, self._ignored, self.seen = batch, index, not counts, set()
        if self.joint:
            self.joint.start(batch)

    def receive(
        self, group: Group | Block, activation: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Add one group's input and gradient, each (batch, tokens, units x columns), or without a
        dimension for the batch.
        """
        activation, gradient = (
            by_example(self._model, self._batch, t) for t in (activation, gradient)
        )
        columns = self._observed(group) * group.columns
        activation, gradient = activation[..., :columns], gradient[..., :columns]
        mask = padding_mask(self._model, self._batch, activation, reads(self._model, group.name))
        real = activation.new_ones(activation.shape[:2]) if mask is None else mask
        several = _examples_at_once(activation)
        pieces = [t.split(several) for t in (activation, gradient, real)]
        wide = torch.promote_types(activation.dtype, torch.float32)  # bf16 would lose small terms
        some: list[torch.Tensor] = []
        for values, slopes, counted in zip(*pieces, strict=True):
            values = values.to(wide)
            some.append(self._gate_sums(group, values, slopes.to(wide)))
            if not self._joint_only:
                # A product of matrices: no masked copy is made.
                inputs = counted.to(wide).flatten() @ values.square().flatten(0, 1)
                self._add(self.inputs, group, inputs.unflatten(0, (-1, group.columns)).double())
        sums = torch.cat(some, dim=1)
        halves = (self._half_of(sums) @ sums).double()
        if not torch.isfinite(halves).all():
            raise DataError(
                f"The gate gradients of {group.name} are not finite in calibration batch"
                f" {self._index}."
            )
        self._add(self.gates, group, halves)
        if not self.seen:
            self.examples += len(activation)
        if group.stack not in self.seen:
            self.seen.add(group.stack)
            self.tokens[group.stack] += int(real.sum())

    def _observed(self, group: Group | Block) -> int:
        """How many of a group's units, its first, are observed."""
        few = self._joint_only and isinstance(group, Group)
        return min(group.units, _OBSERVED) if few else group.units

    def _gate_sums(
        self, group: Group | Block, values: torch.Tensor, slopes: torch.Tensor
    ) -> torch.Tensor:
        """(2, examples, units) of some examples: their gate gradients' sizes, and squares."""
        product = values * slopes
        if is_token_level(self._model, self._batch):
            of_token = _of_units(product, group.columns)
            of_example = of_token.sum(dim=1)
            squares = of_token.square_().sum(dim=1)
        else:
            of_example = _of_units(product.sum(dim=1), group.columns)  # tokens first: cheaper
            squares = of_example.square()
        return torch.stack([of_example.abs_(), squares])

    def _half_of(self, sums: torch.Tensor) -> torch.Tensor:
        """(2, examples), one where the example, every other of the batch, is of the half.

        Batches take turns in which half their first example goes to: they may be of one example.
        """
        of_half = sums.new_zeros(2, sums.shape[1])
        of_half[self._index % 2, ::2] = 1
        of_half[(self._index + 1) % 2, 1::2] = 1
        return of_half

    @staticmethod
    def _add(sums: dict[str, torch.Tensor], group: Group | Block, values: torch.Tensor) -> None:
        sums[group.name] = sums[group.name].add_(values) if group.name in sums else values

    def reduce(self, device: torch.device) -> None:
        """Add up the sums of all processes."""
        if not dist.is_initialized():
            return
        counts = torch.tensor([self.examples, *self.tokens], device=device)
        dist.all_reduce(counts)
        self.examples, *self.tokens = counts.tolist()
        reached = torch.tensor([int(g.name in self.gates) for g in self.parts], device=device)
        dist.all_reduce(reached)
        seen = [g for g, times in zip(self.parts, reached, strict=True) if times]
        if self.joint:
            groups = [g for g in seen if isinstance(g, Group)]
            self.joint.reduce(((g, *outlet_rows(self._model, g).shape) for g in groups), device)
        for group in seen:
            self._total(self.gates, group, (2, 2, self._observed(group)), device)
            if not self._joint_only:
                self._total(self.inputs, group, (group.units, group.columns), device)

    @staticmethod
    def _total(
        sums: dict[str, torch.Tensor],
        group: Group | Block,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Add up one group's sums of all processes; this one may have none."""
        own = sums.get(group.name)
        total = torch.zeros(shape, dtype=torch.float64, device=device) if own is None else own
        dist.all_reduce(total)
        sums[group.name] = total

    def evidence(
        self, model: PreTrainedModel, group: Group | Block, seed: int
    ) -> tuple[Evidence, tuple[Evidence, Evidence]]:
        """The evidence of a group, from all examples and from each half of them; with a seed of its
        own, made of the one given.
        """
        if group.units and group.name not in self.gates:
            raise DataError(f"The loss does not depend on {group.name}: no gradient reached it.")
        outlet, weights = weight_norms(model, group)
        none = torch.zeros(2, 2, group.units, dtype=torch.float64)
        absolute, squared = self.gates.get(group.name, none).cpu()
        whole = Evidence(
            absolute=absolute.sum(dim=0),
            squared=squared.sum(dim=0),
            inputs=self.inputs.get(group.name, torch.zeros_like(outlet)).cpu(),
            outlet=outlet,
            weights=weights,
            examples=self.examples,
            seed=zlib.crc32(f"{seed}/{group.name}".encode()),
            joint=self._joint(group),
        )
        one, other = (
            dataclasses.replace(
                whole,
                joint=None,
                absolute=absolute[half],
                squared=squared[half],
                examples=max(1, (self.examples + 1 - half) // 2),
            )
            for half in (0, 1)
        )
        return whole, (one, other)

    def _joint(self, group: Group | Block) -> Joint | None:
        if self.joint is None or isinstance(group, Block) or not group.units:
            return None
        return Joint(
            self.joint.take(group),
            outlet_rows(self._model, group),
            group.units,
            bias=getattr(outlet_of(self._model, group), "bias", None) is not None,
        )
