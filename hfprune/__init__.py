"""hfprune: score heads and neurons by gradient, remove them, recover the quality, publish what
reloads anywhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfprune.errors import HfpruneError
    from hfprune.importance.criteria import criterion
    from hfprune.importance.scores import Scores
    from hfprune.importance.scoring import score
    from hfprune.importance.sparsity import Sparsity, sparsify
    from hfprune.pipeline import run
    from hfprune.planning.budget import Budget
    from hfprune.planning.constraints import Constraints
    from hfprune.planning.latency import LatencyTable, measure_latency
    from hfprune.planning.plan import PruningPlan
    from hfprune.planning.solve import plan, plan_family
    from hfprune.pruning import inspect, masked, preview, prune, remove
    from hfprune.publishing.family import publish_family
    from hfprune.publishing.hub import publish
    from hfprune.recipe import Recipe
    from hfprune.recovery.arguments import DistillationArguments
    from hfprune.recovery.compensation import compensate
    from hfprune.recovery.distillation import DistillationTrainer, distill
    from hfprune.recovery.gradual import GradualPruning
    from hfprune.recovery.schedule import Schedule
    from hfprune.recovery.sparse_training import GradualSparsity, KeepSparse
    from hfprune.recovery.teacher_cache import TeacherCache
    from hfprune.structure.anatomy import Anatomy
    from hfprune.structure.architectures import Row, register
    from hfprune.structure.checkpoint import as_stock, from_pretrained

__version__ = "0.1.0"

# Imported on first use: torch and transformers take seconds, which `hfprune --help` should not.
_HOMES = {
    "Anatomy": "structure.anatomy",
    "Budget": "planning.budget",
    "Constraints": "planning.constraints",
    "DistillationArguments": "recovery.arguments",
    "DistillationTrainer": "recovery.distillation",
    "GradualPruning": "recovery.gradual",
    "GradualSparsity": "recovery.sparse_training",
    "HfpruneError": "errors",
    "KeepSparse": "recovery.sparse_training",
    "LatencyTable": "planning.latency",
    "PruningPlan": "planning.plan",
    "Recipe": "recipe",
    "Row": "structure.architectures",
    "Schedule": "recovery.schedule",
    "Scores": "importance.scores",
    "Sparsity": "importance.sparsity",
    "TeacherCache": "recovery.teacher_cache",
    "as_stock": "structure.checkpoint",
    "compensate": "recovery.compensation",
    "criterion": "importance.criteria",
    "distill": "recovery.distillation",
    "from_pretrained": "structure.checkpoint",
    "inspect": "pruning",
    "masked": "pruning",
    "measure_latency": "planning.latency",
    "plan": "planning.solve",
    "plan_family": "planning.solve",
    "preview": "pruning",
    "prune": "pruning",
    "publish": "publishing.hub",
    "publish_family": "publishing.family",
    "register": "structure.architectures",
    "remove": "pruning",
    "run": "pipeline",
    "score": "importance.scoring",
    "sparsify": "importance.sparsity",
}

__all__ = [
    "Anatomy",
    "Budget",
    "Constraints",
    "DistillationArguments",
    "DistillationTrainer",
    "GradualPruning",
    "GradualSparsity",
    "HfpruneError",
    "KeepSparse",
    "LatencyTable",
    "PruningPlan",
    "Recipe",
    "Row",
    "Schedule",
    "Scores",
    "Sparsity",
    "TeacherCache",
    "as_stock",
    "compensate",
    "criterion",
    "distill",
    "from_pretrained",
    "inspect",
    "masked",
    "measure_latency",
    "plan",
    "plan_family",
    "preview",
    "prune",
    "publish",
    "publish_family",
    "register",
    "remove",
    "run",
    "score",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hfprune' has no attribute {name!r}")
    return getattr(import_module(f"hfprune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
