"""The steps of a run: each makes one artefact from those of the steps before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedModel

from hfprune.data import (
    Batches,
    Collate,
    check_classes,
    check_other_classes,
    class_names,
    commit_of,
    lengths_of,
    load_named,
    load_splits,
    seen_among,
    untaught,
)
from hfprune.errors import BudgetError, DataError, RecipeError
from hfprune.evaluation.evaluate import model_inputs
from hfprune.evaluation.measure import check_length
from hfprune.findings import Findings
from hfprune.importance.criteria import criterion_named
from hfprune.importance.scores import Scores
from hfprune.importance.scoring import score
from hfprune.planning.budget import Budget
from hfprune.planning.latency import LatencyTable, measure_latency
from hfprune.planning.plan import PruningPlan
from hfprune.planning.resources import check_budget
from hfprune.planning.solve import Constraints, plan
from hfprune.processes import Processes
from hfprune.pruning import remove
from hfprune.publishing.figures import draw_kept, kept_as_text
from hfprune.publishing.page import write_page
from hfprune.publishing.reload import WAYS, reload_and_compare
from hfprune.publishing.report import Report
from hfprune.recipe import FREE, Recipe
from hfprune.recovery.compensation import compensate
from hfprune.rounds import Round, budget_on_given, constraints_on_given, in_all
from hfprune.structure.anatomy import Anatomy
from hfprune.structure.checkpoint import from_pretrained, remember_origin, save_with_processor
from hfprune.structure.cost import longest, tokens_of, written_tokens
from hfprune.structure.fitness import forget_gguf
from hfprune.tasks import Processor, task_named
from hfprune.training import Training

if TYPE_CHECKING:
    from datasets import Dataset


DONE = "steps.json"
"""What a run has done, by artefact, in its folder."""


@dataclass(frozen=True)
class Step:
    """One arrow of the walk.

    Attributes:
        name: what is being done, for the person who waits.
        artefact: file or folder in the run's folder.
        reads: what of the recipe decides the artefact, besides what the steps before read.
        make: writes the artefact at the path it is given.
        together: every process takes part, and only the first writes; else the first does it all.
    """

    name: str
    artefact: str
    reads: Mapping[str, Any]
    make: Callable[[Path], None]
    together: bool = False


class Steps:
    """The steps of one run, and what they share, loaded when first needed.

    Args:
        recipe: what is to be done.
        say: where progress goes, line by line.
        processes: those that do it together.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None], processes: Processes) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.say = say
        self.processes = processes
        self.task = task_named(recipe.task)
        criterion_named(recipe.prune.criterion)
        self.constraints = Constraints(
            recipe.prune.min_heads,
            recipe.prune.min_neurons,
            recipe.prune.round_to,
            uniform=recipe.prune.uniform,
            protect=recipe.prune.protect,
            layers=recipe.prune.layers,
            experts=recipe.prune.experts,
        )
        self.commits: dict[str, str] = {}  # of the Hub model and dataset that were loaded
        self.rounds = Round.of(recipe)
        self.last = self.rounds[-1].path(self.rounds[-1].result)
        if len(self.rounds) > 1:
            self.variants = ["dense", *(r.path(r.result) for r in self.rounds)]
        else:
            self.variants = ["dense", "pruned"]
            self.variants += ["compensated"] if recipe.prune.compensate else []
            self.variants += ["distilled"] if recipe.distill else []

    def listed(self) -> list[Step]:
        """Every step, in order."""
        teach = "Fine-tuning the dense model" if self.recipe.finetune else "Loading the dense model"
        source = ("model", "revision", "gguf_file", "task", "data", "seed", "finetune")
        steps = [
            Step(
                teach,
                "dense",
                self._sections(*source),
                self.make_dense,
                together=self.recipe.finetune is not None,
            )
        ]
        for number in self.rounds:
            steps += self._of_round(number)
        return [
            *steps,
            Step("Reloading in a fresh process", "reloaded.json", {}, self.make_reloaded),
            Step(
                "Evaluating and measuring",
                "report.json",
                self._sections("measure"),
                self.make_report,
            ),
            Step("Drawing the report", "report.html", {}, self.make_page),
        ]

    def _of_round(self, this: Round) -> list[Step]:
        """The steps of one round."""
        prune = self._sections("prune")
        prune["prune"]["budget"] = self.recipe.prune.budgets[this.number - 1]
        scored = self._sections("score")

        def step(
            name: str,
            artefact: str,
            make: Callable[[Round, Path], None],
            reads: Mapping[str, Any] | None = None,
            together: bool = False,
        ) -> Step:
            name = f"{name}, round {this.number}" if this.folder else name
            return Step(name, this.path(artefact), reads or {}, partial(make, this), together)

        steps = [
            step("Scoring heads and neurons", "scores", self.make_scores, scored, together=True)
        ]
        if this.latency:
            if table := self.recipe.prune.latency_table:
                prune["table"] = Path(table).read_text()
            else:
                runs = {"threads": self.recipe.measure.threads, "shape": this.latency.shape}
                steps.append(step("Measuring latency", "latency.json", self.make_latency, runs))
        if this.first:
            steps.append(step("Planning", "plan.json", self.make_plan, prune, together=True))
        else:
            steps += [
                step("Planning", "cut.json", self.make_plan, prune, together=True),
                step("Adding up what goes", "plan.json", self.make_sum),
            ]
        steps += [
            step("Drawing what stays", "kept.png", self.make_picture),
            step("Removing", "pruned", self.make_pruned),
        ]
        if self.recipe.prune.compensate:
            steps.append(
                step("Compensating by least squares", "compensated", self.make_compensated)
            )
        if self.recipe.distill:
            distill = self._sections("distill")
            steps.append(
                step("Distilling", "distilled", self.make_distilled, distill, together=True)
            )
        return steps

    def _sections(self, *names: str) -> dict[str, Any]:
        """Sections of the recipe, as plain values."""
        values = self.recipe.to_dict()
        return {name: values[name] for name in names}

    @property
    def _source(self) -> dict[str, Any]:
        """How the model and what belongs to it are loaded."""
        extra = {"gguf_file": self.recipe.gguf_file} if self.recipe.gguf_file else {}
        return {"revision": self.recipe.revision, **extra}

    @cached_property
    def processor(self) -> Processor:
        """The dense model's tokenizer or image processor."""
        return self.task.load_processor(self.recipe.model, **self._source)

    @cached_property
    def loaded(self) -> dict[str, Dataset]:
        """The splits as they were loaded: "train", "dev" and "test"."""
        splits = load_splits(self.recipe.data)
        self._resolved("data", commit_of(splits["train"]))
        return splits

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """The splits as examples."""
        return self.task.examples(self.loaded, self.processor, self.recipe.data)

    @cached_property
    def collate(self) -> Collate:
        """What makes batches of examples."""
        return self.task.collator(
            self.processor, partial(AutoConfig.from_pretrained, self.recipe.model, **self._source)
        )

    @cached_property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """The batches that importance is measured on, and outlets are refitted on."""
        settings = self.recipe.score
        shuffled = self.splits["train"].shuffle(seed=self.recipe.seed)
        return list(Batches(shuffled, self.collate, settings.batch_size, settings.examples))

    @property
    def test(self) -> Batches:
        """The batches that models are judged on."""
        return Batches(self.splits["test"], self.collate, self.recipe.score.batch_size)

    @cached_property
    def also(self) -> dict[str, Batches]:
        """The batches of other kinds that models are judged on besides, by their names."""
        data, size = self.recipe.data, self.recipe.score.batch_size
        splits = {_field_of(name): rows for name, rows in self.loaded_also.items()}
        made = self.task.examples(splits, self.processor, data) if splits else {}
        return {
            name: Batches(made[_field_of(name)], self.collate, size) for name in self.loaded_also
        }

    @cached_property
    def loaded_also(self) -> dict[str, Dataset]:
        """The data of other kinds as they were loaded, by their names."""
        return load_named(self.recipe.data, self.recipe.measure.also, "measure.also")

    def check_also(self, dense: PreTrainedModel) -> None:
        """Refuse data of other kinds whose labels are not of the dense model's classes."""
        if self.task.classes:
            own, column = self.loaded["test"], self.recipe.data.label
            known = len(dense.config.id2label or {})
            for name in self.also:  # as examples, they have labels
                other = self.loaded_also[name]
                check_other_classes(_field_of(name), other, own, column, known)

    @property
    def training(self) -> Training:
        """How models are trained here."""
        return Training(self.recipe, self.task, self.splits, self.collate, self.processes)

    @property
    def done(self) -> dict[str, Any]:
        """What the run has done; see `steps_done`."""
        return steps_done(self.folder)

    @property
    def energy(self) -> dict[str, float]:
        """Joules of every step up to the last model; {} if one of them could not be read."""
        done, artefacts = self.done, [step.artefact for step in self.listed()]
        found = {
            artefact: done.get(artefact, {}).get("joules")
            for artefact in artefacts[: artefacts.index(self.last) + 1]
        }
        known = {artefact: joules for artefact, joules in found.items() if joules is not None}
        return known if len(known) == len(found) and any(known.values()) else {}

    @property
    def scores(self) -> Scores:
        """The scores of the dense model."""
        return self.scores_of(self.rounds[0])

    @property
    def plan(self) -> PruningPlan:
        """What stays of the dense model in the end."""
        return self.plan_of(self.rounds[-1])

    def scores_of(self, this: Round) -> Scores:
        """The scores of the model that a round prunes."""
        return Scores.load(self.folder / this.path("scores"))

    def plan_of(self, this: Round) -> PruningPlan:
        """What stays of the dense model after a round."""
        return PruningPlan.load(self.folder / this.path("plan.json"))

    def cut_of(self, this: Round) -> PruningPlan:
        """What stays of the model that a round prunes."""
        return PruningPlan.load(self.folder / this.path("plan.json" if this.first else "cut.json"))

    def table_of(self, this: Round) -> LatencyTable | None:
        """By which latency is planned: the recipe's table or the measured one; None if it is not
        planned for.
        """
        if this.latency is None:
            return None
        return LatencyTable.load(
            self.recipe.prune.latency_table or self.folder / this.path("latency.json")
        )

    def model(self, name: str) -> PreTrainedModel:
        """A model of this run, in eval mode."""
        return from_pretrained(self.folder / name)

    def save(self, model: PreTrainedModel, path: Path) -> None:
        """Write a model with its processor; only the first process does."""
        if self.processes.main:
            save_with_processor(model, self.processor, path)

    def make_dense(self, path: Path) -> None:
        """The dense model, which has learnt the task."""
        self._check_data()
        model = self._load_dense()
        self._resolved("model", getattr(model.config, "_commit_hash", None))
        self.check_prunable(model)
        self.check_also(model)
        self._check_longest(model)
        if self.recipe.measure.lengths:
            check_length(model, self.probe(), max(self.recipe.measure.lengths))
        if self.recipe.finetune:
            self.training.finetune(model, checkpoints_of(path))
        self.save(model, path)

    def _check_longest(self, dense: PreTrainedModel) -> None:
        """Try the longest text: that a model has not so many positions would show in a training."""
        if self.task.reads == "text":
            own = (max(lengths_of(split)) for split in self.splits.values())
            longest = max(*own, *(batches.longest for batches in self.also.values()))
            try:
                check_length(dense, self.probe(), longest)
            except DataError as error:
                raise RecipeError(
                    f"data.max_length is {self.recipe.data.max_length}: {error}"
                ) from error

    def check_prunable(self, dense: PreTrainedModel) -> None:
        """Refuse what no plan can be made for: known before anything is trained or scored."""
        self.constraints.check(dense)
        file = self.recipe.prune.latency_table
        table = LatencyTable.load(file) if file else None
        for budget in (self.recipe.prune.budgets[0], *self.recipe.measure.curve):
            check_budget(Budget.parse(budget), dense, table)

    def _resolved(self, what: str, commit: str | None) -> None:
        """Note which commit a Hub id stood for; branches move on."""
        if commit:
            self.commits[what] = commit

    def _check_data(self) -> None:
        """Read the data before any model: what is wrong with it shows at once, not at the end."""
        largest, examples = max(self.recipe.measure.batch_sizes), len(self.splits["test"])
        _ = self.also
        _ = self.seen  # says so
        self._tell_untaught()
        if largest > examples:
            raise RecipeError(
                f"measure.batch_sizes: data.test makes {examples} examples, too few for a batch of"
                f" {largest}."
            )

    def _tell_untaught(self) -> None:
        """Say which classes are judged that nothing teaches; a stray label makes one, too."""
        if not (self.task.classes and self.recipe.finetune):
            return
        column = self.recipe.data.label
        found = untaught(self.loaded, column)
        names = class_names(self.loaded, column) if found else []
        for split, numbers in found.items():
            first = ", ".join(f"{number} ({names[number]})" for number in numbers[:5])
            others = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
            self.say(
                f"  Warning: data.{split} has examples of classes that data.train has none of:"
                f" {first}{others}. The head has an output for each, and nothing teaches it. Add"
                " examples to data.train, or take the labels out if they are wrong."
            )

    @cached_property
    def seen(self) -> float:
        """The share of the test texts that stand in the training split, too; 0 of images, which
        are not compared.
        """
        if self.task.reads != "text":
            return 0.0
        data, test = self.recipe.data, self.loaded["test"]
        columns = [data.text, data.text_pair] if data.text_pair else [data.text]
        count = seen_among(test, self.loaded["train"], columns)
        if count:
            self.say(
                f"  Warning: {count:,} of {len(test):,} examples of data.test"
                f" ({count / len(test):.1%}) also stand in data.train: the model is judged on what"
                " it learnt. Take them out of one of the two."
            )
        return count / len(test)

    def _load_dense(self) -> PreTrainedModel:
        extra = self._source
        if self.recipe.gguf_file:
            extra["dtype"] = torch.float32
        names = class_names(self.loaded, self.recipe.data.label) if self.task.classes else []
        if names and self.recipe.finetune:  # the head is new
            extra["id2label"] = dict(enumerate(names))
            extra["label2id"] = {name: number for number, name in enumerate(names)}
            extra["ignore_mismatched_sizes"] = True
        model = self.task.load(self.recipe.model, **extra)
        check_classes(names, list((model.config.id2label or {}).values()))
        if self.recipe.gguf_file:
            forget_gguf(model)
        remember_origin(model, self.recipe.revision, self.recipe.gguf_file or "config.json")
        return model.eval()

    def make_scores(self, this: Round, path: Path) -> None:
        """The importance of every unit by the criteria: all of them come from the one pass, so a
        plan by another one needs no scoring again.
        """
        model = self.model(this.given)
        if this.first:  # the dense model may have been made for another budget
            self.check_prunable(model)
        torch.nn.Module.to(model, self.processes.device)
        settings = self.recipe.score
        scores = score(
            model,
            self.calibration,
            list(dict.fromkeys((*settings.criteria, *FREE))) if settings.criteria else None,
            settings.loss,
            self.recipe.seed,
            settings.checkpointing,
            settings.moments,
        )
        if self.processes.main:
            scores.save(path)
        agreement = scores.agreement.get(self.recipe.prune.criterion)
        if agreement is not None:
            self.say(
                f"  {scores.examples:,} examples of {written_tokens(scores.tokens, 1)} tokens; the"
                f" two halves of them rank the units alike to {agreement:.2f} (1 is equal)"
            )

    def make_latency(self, this: Round, path: Path) -> None:
        """Where the time of the model that a round prunes goes, on this machine."""
        assert this.latency is not None
        given = self.model(this.given)
        lengths = tokens_of(Anatomy.of(given), self.scores_of(this).tokens)
        shape = this.latency.shape or (1, longest(lengths))
        measure_latency(given, *shape, self.recipe.measure.threads or None).save(path)

    def make_plan(self, this: Round, path: Path) -> None:
        """What stays of the model that the round is given; every process plans for itself."""
        given, scores, table = self.model(this.given), self.scores_of(this), self.table_of(this)
        budget, constraints = this.budget, self.constraints
        if not this.first:
            earlier = self.plan_of(self.rounds[this.number - 2])
            budget = budget_on_given(budget, earlier.anatomy, earlier.tokens)
            constraints = constraints_on_given(constraints, earlier)
        made = plan(given, scores, budget, self.recipe.prune.criterion, constraints, latency=table)
        if this.first:
            self.curve_plans(given, scores)  # what no plan can meet shows now, not at the report
        self.processes.agree("the plan", made.fingerprint)
        if self.processes.main:
            made.save(path)
        if this.first:
            self.say(made.explain())

    def make_sum(self, this: Round, path: Path) -> None:
        """What stays of the dense model after this round and all before it."""
        made = in_all(
            self.plan_of(self.rounds[this.number - 2]),
            self.cut_of(this),
            self.scores.by(self.recipe.prune.criterion),
            this.budget,
        )
        made.save(path)
        self.say(made.explain())

    def make_picture(self, this: Round, path: Path) -> None:
        """A picture of what stays of the dense model."""
        plan = self.plan_of(this)
        self.say(kept_as_text(plan))
        draw_kept(plan, path)

    def make_pruned(self, this: Round, path: Path) -> None:
        """The smaller model, its weights as they were."""
        self.save(remove(self.model(this.given), self.cut_of(this)), path)

    def make_compensated(self, this: Round, path: Path) -> None:
        """The smaller model, its outlets refitted."""
        refitted = compensate(
            self.model(this.given),
            self.model(this.path("pruned")),
            self.calibration,
            self.cut_of(this).keep,
        )
        self.save(refitted, path)

    def make_distilled(self, this: Round, path: Path) -> None:
        """The smaller model, taught by the dense one."""
        student = self.model(this.path(this.start))
        self.training.distil(
            student, self.model("dense"), self.plan_of(this).layer_map, checkpoints_of(path)
        )
        self.save(student, path)

    def make_reloaded(self, path: Path) -> None:
        """Load the result by hfprune and without it, in a fresh process, and compare logits."""
        without = "stock" if self.plan.uniform else "remote-code"
        found = reload_and_compare(
            self.folder / self.last, self.model(self.last), self.probe(), ["hfprune", without]
        )
        path.write_text(
            json.dumps({"model": self.last, "largest_logit_difference": found}, indent=2) + "\n"
        )
        self.say(f"  equal logits by hfprune.from_pretrained and by {WAYS[without]}: {found}")

    def probe(self) -> dict[str, torch.Tensor]:
        """A few test examples, without their answers."""
        batch = Batches(self.splits["test"], self.collate, 8)[0]
        return model_inputs(batch, torch.device("cpu"))

    def make_report(self, path: Path) -> None:
        """Quality and cost of every variant, side by side."""
        report = Findings(self).report()
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")

    def curve_plans(self, dense: PreTrainedModel, scores: Scores) -> list[PruningPlan]:
        """The plans of `measure.curve`, which are judged by closed gates and before any recovery.

        Raises:
            BudgetError: no structure meets one of its budgets.
        """
        table = self.table_of(self.rounds[0])
        criteria = dict.fromkeys((self.recipe.prune.criterion, *FREE))
        try:
            return [
                plan(dense, scores, budget, criterion, self.constraints, latency=table)
                for criterion in criteria
                for budget in self.recipe.measure.curve
            ]
        except BudgetError as error:
            raise BudgetError(f"measure.curve: {error}") from error

    def make_page(self, path: Path) -> None:
        """The report as a page, with its pictures beside it."""
        write_page(Report.from_dict(json.loads((self.folder / "report.json").read_text())), path)


def _field_of(also: str) -> str:
    """The field of the recipe that names data of another kind; errors tell it."""
    return f"measure.also.{also}"


def checkpoints_of(artefact: Path) -> Path:
    """Where the training that makes an artefact keeps its checkpoints."""
    return artefact.with_name(f"{artefact.name}-checkpoints")


def steps_done(folder: Path) -> dict[str, Any]:
    """What a run has done: {artefact: its key, the seconds it took ...}.

    Raises:
        RecipeError: the file that says it is damaged.
    """
    with suppress(FileNotFoundError):
        try:
            return dict(json.loads((folder / DONE).read_text()))
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"output: {folder / DONE} is damaged ({error}), so what the run has done is not"
                " known. Choose another folder, or remove this one."
            ) from error
    return {}
