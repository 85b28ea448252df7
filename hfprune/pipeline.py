"""run(recipe): the whole walk, resumable; every step leaves its artefact in the run's folder.

A step is done when its artefact is there and was made under the same key, a hash of the recipe
sections that it and the steps before it read. Change the budget and the dense model and its scores
are kept; kill a run and the next one goes on where it stopped. Artefacts are written under a
temporary name and renamed, so there are no half ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfprune.data import Batches, blocks, labelled, load_texts
from hfprune.errors import HfpruneError, RecipeError
from hfprune.evaluation.evaluate import (
    Quality,
    evaluate_classification,
    evaluate_perplexity,
    paired_difference,
)
from hfprune.evaluation.measure import measure_side_by_side
from hfprune.importance.criteria import criterion_named
from hfprune.importance.scoring import Scores, score
from hfprune.planning.plan import PruningPlan
from hfprune.planning.solve import Constraints, plan
from hfprune.pruning import remove
from hfprune.publishing.figures import draw_kept, kept_as_text
from hfprune.publishing.reload import reload_and_compare
from hfprune.publishing.report import Report, Variant
from hfprune.recipe import SPLITS, Distill, Finetune, Recipe
from hfprune.recovery.compensation import compensate
from hfprune.structure.checkpoint import from_pretrained
from hfprune.structure.cost import counted_macs

if TYPE_CHECKING:
    from datasets import Dataset

_KEYS = "steps.json"
_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Step:
    """One arrow of the walk.

    Attributes:
        name: what is being done, for the person who waits.
        artefact: file or folder in the run's folder.
        reads: recipe sections that decide the artefact, besides those of the steps before.
        make: writes the artefact at the path it is given.
    """

    name: str
    artefact: str
    reads: tuple[str, ...]
    make: Callable[[Path], None]


def run(
    recipe: Recipe | str | os.PathLike[str],
    say: Callable[[str], None] = print,
    until: str | None = None,
) -> Report | None:
    """Do everything that a recipe asks for, or what is left of it, and return the report.

    Args:
        recipe: a Recipe or a YAML file.
        say: where progress goes, line by line.
        until: the last artefact to make ("scores", "plan.json", ...); None for all, with a report.

    Raises:
        RecipeError: the recipe is wrong, or its output folder holds something else; before anything
            is loaded.
        HfpruneError: and its children, as the steps do; what was finished stays.
    """
    made = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    made.check()
    return _Run(made, say).go(until)


def evaluation_batches(recipe: Recipe) -> Batches:
    """The batches that a run of the recipe is judged on."""
    made = _Run(recipe, print)
    return Batches(made.splits["test"], made.tokenizer, recipe.score.batch_size)


class _Run:
    """The state of one run: its folder, its keys, and lazily loaded data."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.say = say
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
        if (
            self.folder.exists()
            and any(self.folder.iterdir())
            and not (self.folder / _KEYS).is_file()
        ):
            raise RecipeError(
                f"output: {self.folder} exists and is not the folder of a run; choose another, or"
                " remove it."
            )
        self.variants = ["dense", "pruned"]
        self.variants += ["compensated"] if recipe.prune.compensate else []
        self.variants += ["distilled"] if recipe.distill else []
        self.last = self.variants[-1]
        self._key = ""  # of the step that is being made

    def go(self, until: str | None) -> Report | None:
        transformers.set_seed(self.recipe.seed)
        if self.recipe.measure.threads:
            torch.set_num_threads(self.recipe.measure.threads)
        self.folder.mkdir(parents=True, exist_ok=True)
        key, done = "", self._keys()
        for step in self._steps():
            sections = {name: self.recipe.to_dict()[name] for name in step.reads}
            contents = self._contents() if "data" in step.reads else []
            text = json.dumps([key, step.artefact, sections, contents])
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            made = done.get(step.artefact, {}).get("key") == key
            if made and (self.folder / step.artefact).exists():
                self.say(f"{step.name}: done before")
            else:
                self.say(f"{step.name} ...")
                start = time.perf_counter()
                if done.pop(step.artefact, None):  # it is about to be another recipe's
                    self._write_json(_KEYS, done)
                self._make(step, key)
                seconds = time.perf_counter() - start
                done[step.artefact] = {"key": key, "seconds": round(seconds, 1)}
                self._write_json(_KEYS, done)
                self.say(f"{step.name}: {seconds:.1f} s")
            if step.artefact == until:
                return None
        (self.folder / _RECIPE).write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))
        report = Report.from_dict(json.loads((self.folder / "report.json").read_text()))
        (self.folder / "report.md").write_text(report.markdown())
        return report

    def _contents(self) -> list[str]:
        """Hashes of the data files: edited sentences are other sentences."""
        files = [] if self.recipe.data.dataset else [getattr(self.recipe.data, s) for s in SPLITS]
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]

    def _steps(self) -> list[Step]:
        teach = "Fine-tuning the dense model" if self.recipe.finetune else "Loading the dense model"
        steps = [
            Step(
                teach,
                "dense",
                ("model", "revision", "gguf_file", "task", "data", "seed", "finetune"),
                self.make_dense,
            ),
            Step("Scoring heads and neurons", "scores", ("score",), self.make_scores),
            Step("Planning", "plan.json", ("prune",), self.make_plan),
            Step("Drawing what stays", "kept.png", (), self.make_picture),
            Step("Removing", "pruned", (), self.make_pruned),
        ]
        if self.recipe.prune.compensate:
            steps.append(
                Step("Compensating by least squares", "compensated", (), self.make_compensated)
            )
        if self.recipe.distill:
            steps.append(Step("Distilling", "distilled", ("distill",), self.make_distilled))
        return [
            *steps,
            Step("Reloading in a fresh process", "reloaded.json", (), self.make_reloaded),
            Step("Evaluating and measuring", "report.json", ("measure",), self.make_report),
        ]

    def _make(self, step: Step, key: str) -> None:
        """Write an artefact under a temporary name, then rename it into place."""
        final = self.folder / step.artefact
        temporary = self.folder / f".{key}-{step.artefact}"
        self._key = key
        _remove(temporary)
        try:
            step.make(temporary)
        except OSError as error:
            raise HfpruneError(
                f"{step.name}: cannot write in {self.folder}: {error.strerror or error}. Finished"
                " steps are kept."
            ) from error
        _remove(final)
        temporary.rename(final)

    def _keys(self) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return dict(json.loads((self.folder / _KEYS).read_text()))
        self._write_json(_KEYS, {})
        return {}

    def _write_json(self, name: str, values: Any) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.replace(self.folder / name)

    # What the steps share, loaded when first needed.

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        extra = {"gguf_file": self.recipe.gguf_file} if self.recipe.gguf_file else {}
        tokenizer = AutoTokenizer.from_pretrained(
            self.recipe.model, revision=self.recipe.revision, **extra
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        texts = load_texts(self.recipe.data)
        make = blocks if self.recipe.task == "text-generation" else labelled
        return make(texts, self.tokenizer, self.recipe.data)

    @cached_property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        settings = self.recipe.score
        shuffled = self.splits["train"].shuffle(seed=self.recipe.seed)
        return list(Batches(shuffled, self.tokenizer, settings.batch_size, settings.examples))

    @property
    def scores(self) -> Scores:
        return Scores.load(self.folder / "scores")

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.folder / "plan.json")

    def model(self, name: str) -> PreTrainedModel:
        """A model of this run, in eval mode."""
        return from_pretrained(self.folder / name)

    def save(self, model: PreTrainedModel, path: Path) -> None:
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    # The steps.

    def make_dense(self, path: Path) -> None:
        self._check_data()
        model = self._load_dense()
        self.constraints.check(model)
        if self.recipe.finetune:
            self._finetune(model, self.recipe.finetune)
        self.save(model, path)

    def _check_data(self) -> None:
        """Read the data before any model: what is wrong with it shows at once, not at the end."""
        largest, examples = max(self.recipe.measure.batch_sizes), len(self.splits["test"])
        if largest > examples:
            raise RecipeError(
                f"measure.batch_sizes: data.test makes {examples} examples, too few for a batch of"
                f" {largest}."
            )

    def _load_dense(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        extra: dict[str, Any] = {"revision": self.recipe.revision}
        if self.recipe.gguf_file:
            extra |= {"gguf_file": self.recipe.gguf_file, "dtype": torch.float32}
        if self.recipe.task == "text-generation":
            model = AutoModelForCausalLM.from_pretrained(self.recipe.model, **extra)
        else:
            if self.recipe.finetune:  # a new task: as many classes as the labels have
                extra["num_labels"] = 1 + max(max(s["labels"]) for s in self.splits.values())
            model = AutoModelForSequenceClassification.from_pretrained(self.recipe.model, **extra)
        if self.recipe.gguf_file:
            # The weights are plain tensors by now; what is left of the GGUF loader only forbids
            # saving.
            vars(model).update(hf_quantizer=None, is_quantized=False)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
        return model.eval()

    def _finetune(self, model: PreTrainedModel, settings: Finetune) -> None:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        training = self._training(settings, "finetune-checkpoints")
        trainer = Trainer(
            model,
            TrainingArguments(**training),
            train_dataset=self.splits["train"],
            eval_dataset=self.splits["dev"],
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=_accuracy,
        )
        _train_frozen(model, settings, lambda: trainer.train(resume_from_checkpoint=_last(trainer)))
        shutil.rmtree(training["output_dir"], ignore_errors=True)

    def make_scores(self, path: Path) -> None:
        # All criteria from the one pass: a plan by another one needs no scoring again.
        scores = score(
            self.model("dense"),
            self.calibration,
            loss=self.recipe.score.loss,
            seed=self.recipe.seed,
        )
        scores.save(path)
        agreement = scores.agreement.get(self.recipe.prune.criterion)
        if agreement is not None:
            self.say(
                f"  {scores.examples:,} examples of {scores.tokens:.1f} tokens; the two halves of"
                f" them rank the units alike to {agreement:.2f} (1 is equal)"
            )

    def make_plan(self, path: Path) -> None:
        settings = self.recipe.prune
        made = plan(
            self.model("dense"),
            self.scores,
            settings.budget,
            settings.criterion,
            self.constraints,
        )
        made.save(path)
        self.say(made.explain())

    def make_picture(self, path: Path) -> None:
        self.say(kept_as_text(self.plan))
        drawn = path.with_suffix(".tmp.png")  # the ending tells matplotlib the format
        draw_kept(self.plan, drawn)
        drawn.rename(path)

    def make_pruned(self, path: Path) -> None:
        self.save(remove(self.model("dense"), self.plan), path)

    def make_compensated(self, path: Path) -> None:
        refitted = compensate(
            self.model("dense"), self.model("pruned"), self.calibration, self.plan.keep
        )
        self.save(refitted, path)

    def make_distilled(self, path: Path) -> None:
        from transformers import DataCollatorWithPadding

        from hfprune.recovery.distillation import DistillationArguments, distill

        settings = self.recipe.distill
        assert settings is not None
        student = self.model("compensated" if self.recipe.prune.compensate else "pruned")
        training = self._training(settings, "distill-checkpoints")
        args = DistillationArguments(
            **training,
            task_weight=settings.task_weight,
            logits_weight=settings.logits_weight,
            hidden_weight=settings.hidden_weight,
            temperature=settings.temperature,
        )
        classify = self.recipe.task == "text-classification"
        _train_frozen(
            student,
            settings,
            lambda: distill(
                student,
                self.model("dense"),
                self.splits["train"],
                self.splits["dev"],
                args=args,
                layer_map=self.plan.layer_map,
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=_accuracy if classify else None,
                resume=True,
            ),
        )
        self.save(student.eval(), path)
        shutil.rmtree(training["output_dir"], ignore_errors=True)

    def _training(self, settings: Finetune | Distill, checkpoints: str) -> dict[str, Any]:
        """What fine-tuning and distillation share; one checkpoint an epoch, the best by the dev
        split at the end.
        """
        classify = self.recipe.task == "text-classification"
        output = self.folder / f".{checkpoints}-{self._key}"
        for stale in set(self.folder.glob(f".{checkpoints}-*")) - {output}:
            shutil.rmtree(stale)  # of a recipe that was changed before its training ended
        return {
            "output_dir": str(output),
            "num_train_epochs": settings.epochs,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "warmup_steps": settings.warmup,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "train_sampling_strategy": "group_by_length",
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy" if classify else "loss",
            "logging_steps": 50,
            "seed": self.recipe.seed,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }

    def make_reloaded(self, path: Path) -> None:
        """Load the result by hfprune and without it, in fresh processes, and compare logits."""
        model = self.model(self.last)
        without = "stock" if self.plan.uniform else "remote-code"
        found = reload_and_compare(
            self.folder / self.last, model, self._probe(), ("hfprune", without)
        )
        path.write_text(
            json.dumps({"model": self.last, "largest_logit_difference": found}, indent=2) + "\n"
        )
        how = "plain transformers" if self.plan.uniform else "trust_remote_code"
        self.say(f"  equal logits by hfprune.from_pretrained and by {how} without hfprune: {found}")

    def _probe(self) -> dict[str, torch.Tensor]:
        batch = next(iter(Batches(self.splits["test"], self.tokenizer, 8)))
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def make_report(self, path: Path) -> None:
        models = {name: self.model(name) for name in self.variants}
        classify = self.recipe.task == "text-classification"
        test = Batches(self.splits["test"], self.tokenizer, self.recipe.score.batch_size)
        quality: dict[str, Quality] = {}
        for name, model in models.items():
            judge = evaluate_classification if classify else evaluate_perplexity
            quality[name] = judge(model, test, seed=self.recipe.seed)
        sizes = self.recipe.measure.batch_sizes
        sample = self.splits["test"].shuffle(seed=self.recipe.seed)
        timed = {size: Batches(sample, self.tokenizer, size, size)[0] for size in sizes}
        measured = measure_side_by_side(
            models,
            timed,
            folders={name: self.folder / name for name in self.variants},
            repeats=self.recipe.measure.repeats,
            threads=self.recipe.measure.threads or None,
        )
        tokens = self.plan.tokens
        one = {"input_ids": torch.full((1, tokens), self.tokenizer.pad_token_id or 0)}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        report = Report(
            variants=tuple(
                Variant(
                    name=name,
                    quality=quality[name],
                    difference=(
                        None
                        if name == "dense"
                        else paired_difference(
                            quality["dense"], quality[name], seed=self.recipe.seed
                        )
                    ),
                    params=sum(p.numel() for p in models[name].parameters()),
                    macs=counted_macs(models[name], one),
                    measured=measured[name],
                )
                for name in self.variants
            ),
            tokens=tokens,
            machine={
                "CPU": platform.processor() or platform.machine(),
                "threads": str(torch.get_num_threads()),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            seconds={name: entry["seconds"] for name, entry in self._keys().items()},
        )
        path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def _accuracy(prediction: Any) -> dict[str, float]:
    """Accuracy on the dev split, by which the best checkpoint is chosen."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _train_frozen(
    model: PreTrainedModel, settings: Finetune | Distill, train: Callable[[], Any]
) -> None:
    """Train, the input embeddings frozen if the settings say so; trainable again after."""
    embeddings = model.get_input_embeddings().weight
    embeddings.requires_grad_(not settings.freeze_embeddings)
    try:
        train()
    finally:
        embeddings.requires_grad_(True)
        model.eval()


def _last(trainer: transformers.Trainer) -> str | None:
    """The trainer's newest checkpoint, to go on from."""
    from transformers.trainer_utils import get_last_checkpoint

    output = trainer.args.output_dir
    return get_last_checkpoint(output) if output and Path(output).is_dir() else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
