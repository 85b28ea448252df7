"""run(recipe): the whole walk, resumable; every step leaves its artefact in the run's folder.

A step is done when its artefact is there and was made under the same key, a hash of the recipe
sections and the files that it and the steps before it read. Change the budget and the dense model
and its scores are kept; kill a run and the next one goes on where it stopped. Artefacts are written
under a temporary name and renamed, so there are no half ones.

Several processes (`accelerate launch`, `torchrun`) walk together. What to do is decided by the
first, which alone writes; all meet after every step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from hfprune.data import Batches, files_read
from hfprune.errors import CheckpointError, HfpruneError, RecipeError, unknown
from hfprune.evaluation.hardware import metered
from hfprune.files import alone_in, sha256_of, why_unwritable, write_whole
from hfprune.processes import Processes, launched
from hfprune.publishing.parcel import belongs
from hfprune.publishing.report import Report
from hfprune.recipe import SPLITS, Recipe
from hfprune.steps import DONE, Step, Steps, checkpoints_of, steps_done

_RECIPE = "recipe.yaml"
_KEY = "[0-9a-f]" * 16  # as temporary names begin


def run(
    recipe: Recipe | str | os.PathLike[str],
    say: Callable[[str], None] = print,
    until: str | None = None,
) -> Report | None:
    """Do everything that a recipe asks for, or what is left of it, and return the report.

    Started by `accelerate launch` or `torchrun`, the processes score and train together; their
    `output` must be one folder, which all of them see.

    Args:
        recipe: a Recipe or a YAML file.
        say: where progress goes, line by line; of several processes, only the first says it.
        until: the last artefact to make ("scores", "plan.json", ...; of several rounds, the last
            round's, and another's by its path, "round-1/scores"), or "start", what distillation
            starts from, or "result", what it ends with; None for all, with a report.

    Returns:
        The report; None if it was not asked for, and to all processes but the first.

    Raises:
        RecipeError: the recipe is wrong, or its output folder holds something else or another run
            that is at work; before anything is loaded.
        OtherProcessError: another process of this run failed.
        HfpruneError: and its children, as the steps do; what was finished stays.
    """
    made = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    made.check()
    with launched() as processes:
        walk = _Run(made, say, processes)
        with walk.alone():
            return walk.go(until)


def evaluation_batches(recipe: Recipe) -> Batches:
    """The batches that a run of the recipe is judged on."""
    return Steps(recipe, print, Processes()).test


def calibration_batches(recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """The batches that a run of the recipe scores and compensates on."""
    return Steps(recipe, print, Processes()).calibration


class _Run:
    """The bookkeeping of one run: which steps are done, under which key, and by whom."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None], processes: Processes) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.processes = processes
        self.say: Callable[[str], None] = say if processes.main else _say_nothing
        self.steps = Steps(recipe, self.say, processes)
        if (
            self.folder.exists()
            and any(self.folder.iterdir())
            and not (self.folder / DONE).is_file()
        ):
            raise RecipeError(
                f"output: {self.folder} exists and is not the folder of a run; choose another, or"
                " remove it."
            )
        processes.gather()  # all have seen the folder as it was
        if processes.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / DONE).exists():
                self._write_done({})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other run writes in the folder: each would remove what the other is making.

        Raises:
            RecipeError: one does.
        """
        with ExitStack() as stack:
            try:
                if self.processes.main:
                    stack.enter_context(alone_in(self.folder))
            except BlockingIOError as error:
                raise RecipeError(
                    f"output: another run is at work in {self.folder}; wait until it has ended, or"
                    " choose another folder."
                ) from error
            yield

    def go(self, until: str | None) -> Report | None:
        transformers.set_seed(self.recipe.seed)
        if self.recipe.measure.threads:
            torch.set_num_threads(self.recipe.measure.threads)
        if self.processes.count > 1:
            self.say(f"{self.processes.count} processes do it together.")
        key = ""
        steps = self.steps.listed()
        last = None if until is None else self._last(until, steps)
        for step in steps:
            key = self._key(step, key)
            done = steps_done(self.folder)
            made = done.get(step.artefact, {}).get("key") == key
            if self.processes.told(made and (self.folder / step.artefact).exists()):
                self.say(f"{step.name}: done before")
            else:
                self.say(f"{step.name} ...")
                seconds = self._make(step, key)
                self.say(f"{step.name}: {seconds:.1f} s")
            if step.artefact == last:
                return None
        return self._report() if self.processes.main else None

    def _last(self, until: str, steps: list[Step]) -> str:
        """The artefact that `until` means."""
        final = self.steps.rounds[-1]
        names = {Path(step.artefact).name: step.artefact for step in steps}
        names |= {step.artefact: step.artefact for step in steps}
        names |= {"start": final.path(final.start), "result": final.path(final.result)}
        if until not in names:
            raise HfpruneError(unknown("artefact", until, names))
        return names[until]

    def _report(self) -> Report:
        report = Report.from_dict(json.loads((self.folder / "report.json").read_text()))
        recipe = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
        write_whole(self.folder / _RECIPE, recipe)
        write_whole(self.folder / "report.md", report.markdown())
        return report

    def _key(self, step: Step, before: str) -> str:
        """Hash of what decides an artefact: the recipe's values, and the files that they name."""
        contents = [_digest(Path(file)) for file in self._files(step)]
        if "model" in step.reads and Path(self.recipe.model).is_dir():
            contents.append(_digest_of_model(Path(self.recipe.model), self.recipe.gguf_file))
        text = json.dumps([before, step.artefact, step.reads, contents])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _files(self, step: Step) -> list[str]:
        """The data files that a step reads: edited sentences are other sentences."""
        if self.recipe.data.dataset:
            return []
        files = [getattr(self.recipe.data, s) for s in SPLITS] if "data" in step.reads else []
        return files + (list(self.recipe.measure.also.values()) if "measure" in step.reads else [])

    def _make(self, step: Step, key: str) -> float:
        """Write an artefact under a temporary name, then rename it into place; in seconds."""
        start = time.perf_counter()
        final = self.folder / step.artefact
        temporary = final.with_name(f".{key}-{final.name}")
        try:
            if self.processes.main:
                self._prepare(step, temporary)
            self.processes.gather()
            with metered() as meter:
                if step.together or self.processes.main:
                    step.make(temporary)
                joules = meter.joules()
            seconds = time.perf_counter() - start
            if self.processes.main:
                _remove(final)
                temporary.rename(final)
                entry: dict[str, Any] = {"key": key, "seconds": round(seconds, 1)}
                if joules is not None and self._draws_here_alone():
                    entry["joules"] = round(joules, 1)
                if self.steps.commits:
                    entry["commits"] = dict(self.steps.commits)
                self._write_done(steps_done(self.folder) | {step.artefact: entry})
                _remove(checkpoints_of(temporary))
        except Exception as error:
            of_checkpoint = error.__cause__ if isinstance(error, CheckpointError) else None
            why = why_unwritable(of_checkpoint or error, self.folder)
            if why is None:
                raise
            raise HfpruneError(
                f"{step.name}: cannot write in {self.folder}: {why}. Finished steps and the last"
                " checkpoint are kept; make room or rights, and run it again."
            ) from error
        self.processes.gather()
        return seconds

    def _draws_here_alone(self) -> bool:
        """Whether all work is done by this machine's processors, whose counters can be read."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.processes.cpu and here == self.processes.count

    def _prepare(self, step: Step, temporary: Path) -> None:
        """Remove what earlier tries left, of this step and of other recipes."""
        temporary.parent.mkdir(exist_ok=True)
        _remove(temporary)
        checkpoints = checkpoints_of(temporary)
        for stale in set(temporary.parent.glob(f".{_KEY}-*")) - {checkpoints}:
            _remove(stale)
        done = steps_done(self.folder)
        if done.pop(step.artefact, None):  # it is about to be another recipe's
            self._write_done(done)

    def _write_done(self, done: dict[str, Any]) -> None:
        write_whole(self.folder / DONE, json.dumps(done, indent=2) + "\n")


def _digest(path: Path) -> str:
    """Hash of a file, or of all files that are read of a folder of data and their names."""
    return sha256_of(path) if path.is_file() else _digest_of_all(path, files_read(path))


def _digest_of_model(folder: Path, gguf_file: str | None) -> str:
    """Hash of what is read of a model's folder, and of nothing that training left beside it."""
    weights = {folder / gguf_file} if gguf_file else set(folder.glob("pytorch_model*.bin"))
    files = {p for p in folder.iterdir() if p.is_file() and belongs(p.name)}
    return _digest_of_all(folder, weights | files)


def _digest_of_all(folder: Path, files: Iterable[Path]) -> str:
    names = [f"{p.relative_to(folder).as_posix()} {sha256_of(p)}" for p in sorted(files)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _say_nothing(line: str) -> None:
    """Of several processes, one tells."""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
