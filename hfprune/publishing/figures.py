"""Pictures of what was pruned: for the terminal and as image files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfprune.planning.plan import PruningPlan
    from hfprune.structure.anatomy import Group

_BAR = 48  # characters of a full bar in the terminal
_MARKS = 96  # more units than this are drawn as one bar, not one by one
KEPT, GONE = "#2c6fbb", "#e4e4e4"


def kept_as_text(plan: PruningPlan) -> str:
    """The kept units of every group: heads one by one, neurons as a bar of their share."""
    lines = []
    width = max(len(_label(group, plan)) for group in plan.anatomy)
    for group in plan.anatomy:
        kept = set(plan.keep[group.name])
        if group.units <= _MARKS and group.kind == "head":
            drawing = "".join("█" if unit in kept else "·" for unit in range(group.units))
        else:
            full = round(_BAR * len(kept) / max(1, group.units))
            drawing = "█" * full + "·" * (_BAR - full)
        lines.append(f"{_label(group, plan):<{width}}  {drawing}  {len(kept):,}/{group.units:,}")
    return "\n".join(lines)


def draw_kept(plan: PruningPlan, path: str | os.PathLike[str]) -> None:
    """Draw which heads and how many neurons of every layer stay, to a PNG, SVG or PDF file.

    Left, one square a head in its place; right, one bar a layer with the share of its neurons.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    heads = [g for g in plan.anatomy if g.kind == "head"]
    neurons = [g for g in plan.anatomy if g.kind == "neuron"]
    rows = max(len(heads), len(neurons))
    figure = Figure(figsize=(9, 1.2 + 0.34 * rows), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max((g.units for g in heads), default=1)
    for y, group in enumerate(heads):
        kept = set(plan.keep[group.name])
        for unit in range(group.units):
            color = KEPT if unit in kept else GONE
            left.add_patch(Rectangle((unit + 0.06, y - 0.42), 0.88, 0.84, color=color, lw=0))
        left.text(most + 0.3, y, f"{len(kept)}/{group.units}", va="center", fontsize=8)
    left.set(
        xlim=(0, most + 2.2), ylim=(len(heads) - 0.4, -0.6), title="Attention heads", xlabel="head"
    )
    left.set_xticks(range(0, most + 1, max(1, most // 6)))
    left.set_yticks(range(len(heads)), [_label(g, plan) for g in heads], fontsize=8)
    shares = [len(plan.keep[g.name]) / max(1, g.units) for g in neurons]
    right.barh(range(len(neurons)), [1] * len(neurons), color=GONE, height=0.8)
    right.barh(range(len(neurons)), shares, color=KEPT, height=0.8)
    for y, group in enumerate(neurons):
        right.text(
            1.02, y, f"{len(plan.keep[group.name]):,}/{group.units:,}", va="center", fontsize=8
        )
    right.set(
        xlim=(0, 1.3), ylim=(len(neurons) - 0.4, -0.6), title="FFN neurons", xlabel="share kept"
    )
    right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    right.set_yticks(range(len(neurons)), [_label(g, plan) for g in neurons], fontsize=8)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle(
        f"{plan.anatomy.model_type}, {plan.budget} by {plan.criterion}: "
        f"{plan.macs_share:.0%} of the layers' MACs, {plan.params_share:.0%} of their parameters",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _label(group: Group, plan: PruningPlan) -> str:
    several = len({g.stack for g in plan.anatomy}) > 1
    stack = f"{group.name.split('.')[0]} " if several else ""  # encoder, decoder, text_model ...
    part = "cross-attention" if group.cross else {"head": "heads", "neuron": "neurons"}[group.kind]
    gone = " (removed)" if plan.drops(group) else ""
    return f"{stack}layer {group.layer}{gone} {part}"
