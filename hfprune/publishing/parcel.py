"""The exact files that are published: weights, structure, tokenizer, plan, recipe and report."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import PreTrainedModel

from hfprune.errors import PublishError, expect
from hfprune.files import whole_folder, write_whole
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.page import FIGURES
from hfprune.publishing.report import Report, weights_of
from hfprune.publishing.secrets import refuse_secrets
from hfprune.structure.modeling_hfprune import KEY

RECORD = "published.json"
"""In the folder that was published: {repository: {revision: commit}}."""

SHIM = "modeling_hfprune.py"
CARD = "README.md"
_MODEL = {".safetensors", ".json", ".jinja", ".txt", ".model", ".spm", ".codes", ".tiktoken"}
_NOT_MODEL = {RECORD, "trainer_state.json"}
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # how a Trainer calls its own, weights and all
_BESIDE = ("plan.json", "kept.png")
REPORT = "report.json"
_OF_RUN = {REPORT, "report.md", "report.html"}
_FIGURES = (f"{FIGURES}/*.png", f"{FIGURES}/*.svg")
OURS = frozenset({SHIM, "recipe.yaml", *_BESIDE, *_OF_RUN})
"""What is published beside the model and its tokenizer, but for the card and the figures."""

_READABLE = 1_000_000  # text files up to this many bytes are looked through for secrets


@dataclass(frozen=True)
class Parcel:
    """What is published, and what its card is made from.

    Attributes:
        model: the folder of the model.
        files: {path in the repository: a file, or its content}, all but the card.
        left_out: files of the folder that are not published.
        config: of the model, as in config.json.
        recipe: of the run, as in its recipe.yaml; {} without a run.
        plan: by which it was pruned last; None where it is not there.
        report: whose result is this model; None if it was not measured.
    """

    model: Path
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    config: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: PruningPlan | None = None
    report: Report | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(
            len(file) if isinstance(file, bytes) else file.stat().st_size
            for file in self.files.values()
        )

    @property
    def is_stock(self) -> bool:
        """Whether plain transformers loads the model."""
        return not self.config[KEY]["modules"]

    @property
    def picture(self) -> str | None:
        """The picture of what stays."""
        return "kept.png" if "kept.png" in self.files else None


@contextmanager
def packed(
    source: PreTrainedModel | str | os.PathLike[str], processor: Any = None
) -> Iterator[Parcel]:
    """The parcel of a model in memory, of a saved model's folder, or of a run's.

    Args:
        source: what is published.
        processor: a tokenizer or processor to save beside a model in memory; None for none.

    Raises:
        PublishError: no pruned model there, a run that is not finished, or a tokenizer for a folder
            that has its own.
        HfpruneError: a file holds what looks like a secret.
    """
    expect(source, (PreTrainedModel, str, os.PathLike), "source", "a model, or a folder of one")
    if isinstance(source, PreTrainedModel):
        if not hasattr(source.config, KEY):
            raise PublishError(_not_pruned(f"This {type(source).__name__}"))
        with TemporaryDirectory(prefix="hfprune-publish-") as temporary:
            for part in (source, processor):
                if part is not None:
                    part.save_pretrained(temporary)
            saved = Path(temporary)
            yield parcel_of(saved, saved, saved)
        return
    if processor is not None:
        raise PublishError("A folder is published with its own tokenizer; give none.")
    folder = Path(source)
    if not folder.is_dir():
        raise PublishError(f"There is no folder {folder}; give the folder of a run or a model.")
    if (folder / "steps.json").is_file():
        name = result_of(folder)
        yield parcel_of(folder / name, (folder / name).parent, folder)
    else:
        yield parcel_of(folder, folder, folder)


def result_of(run: Path) -> str:
    """The name of a run's last model, which was reloaded, compared and measured.

    Raises:
        PublishError: the run is not finished, or no longer.
    """
    missing = [name for name in ("reloaded.json", REPORT) if not (run / name).is_file()]
    if missing:
        raise PublishError(
            f"The run in {run} is not finished: it has no {' and no '.join(missing)}. Go on with"
            " `hfprune run`, or give the folder of one of its models."
        )
    name = str(json.loads((run / "reloaded.json").read_text())["model"])
    if report_of(run / name, run) is None:
        raise PublishError(
            f"The report in {run} is of another model than {name}, which was made anew since. Go on"
            " with `hfprune run`, or give the folder of the model, to publish it without a report."
        )
    return name


def report_of(model: Path, papers: Path) -> Report | None:
    """The report that lies in a folder, if its result is this model, with these weights."""
    try:
        report = Report.from_dict(json.loads((papers / REPORT).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or of another program
        return None
    return report if report.result.weights == weights_of(model) else None


def parcel_of(model: Path, beside: Path, papers: Path) -> Parcel:
    """The parcel of a model's folder.

    Args:
        model: the folder.
        beside: where its plan and picture lie.
        papers: where recipe and report lie.
    """
    config, report = _config_of(model), report_of(model, papers)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        inside = path.relative_to(model).as_posix()
        if belongs(inside):
            files[inside] = path
        elif inside not in (CARD, RECORD):
            left_out.append(inside)
    if not any(inside.endswith(".safetensors") for inside in files):
        raise PublishError(f"{model} has no weights in safetensors files.")
    measured = (*_OF_RUN, *_FIGURES) if report else ()
    for place, patterns in ((beside, _BESIDE), (papers, measured)):
        for path in sorted(p for pattern in patterns for p in place.glob(pattern)):
            files[path.relative_to(place).as_posix()] = path
    recipe = {}
    if said := _recipe_in(papers):
        _pin(said, papers)
        places = sorted(_places(said), key=len, reverse=True)
        recipe = _without_places(said, places)
        files["recipe.yaml"] = yaml.safe_dump(recipe, sort_keys=False).encode()
        for inside in _OF_RUN & files.keys():
            text = _without_places((papers / inside).read_text(encoding="utf-8"), places)
            files[inside] = text.encode()
    _look_through(files, recipe)
    plan = beside / "plan.json"
    return Parcel(
        model=model,
        files=files,
        left_out=tuple(name for name in left_out if name not in files),  # papers may lie beside
        config=config,
        recipe=recipe,
        plan=PruningPlan.load(plan) if plan.is_file() else None,
        report=report,
    )


def belongs(name: str) -> bool:
    """Whether a file of a model's folder is part of the model: no pickles, no hidden files, no
    checkpoints of its training.
    """
    path = Path(name)
    apart = any(p.startswith(".") or _CHECKPOINT.fullmatch(p) for p in path.parts)
    if apart or path.name in _NOT_MODEL or _reports(name):
        return False
    return name == SHIM or path.suffix in _MODEL


def _reports(name: str) -> bool:
    """Whether a file tells what was measured."""
    return name in _OF_RUN or name.startswith(f"{FIGURES}/")


def _config_of(model: Path) -> dict[str, Any]:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{model} is no model: its config.json cannot be read.") from error
    if KEY not in config:
        raise PublishError(_not_pruned(f"The model in {model}"))
    return dict(config)


def _not_pruned(what: str) -> str:
    return (
        f"{what} was not pruned by hfprune: its config has no {KEY!r}. Publish it by its own"
        " push_to_hub."
    )


def _recipe_in(papers: Path) -> dict[str, Any]:
    """The recipe of a run; {} if there is none, or one of another program."""
    try:
        said = yaml.safe_load((papers / "recipe.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    parts = ("data", "score", "prune")
    ours = isinstance(said, dict) and all(isinstance(said.get(part), dict) for part in parts)
    return said if ours else {}


def _pin(recipe: dict[str, Any], run: Path) -> None:
    """Name the commits for which the recipe's revisions stood when the run was made."""
    commits: dict[str, str] = {}
    with suppress(FileNotFoundError):  # a folder that was published carries its recipe alone
        steps = json.loads((run / "steps.json").read_text())
        commits = steps.get("dense", {}).get("commits", {})
    for what, section in (("model", recipe), ("data", recipe["data"])):
        if what in commits:
            section["revision"] = commits[what]


def _places(values: Any) -> set[str]:
    """The absolute paths in a recipe."""
    if isinstance(values, dict | list):
        inside = values.values() if isinstance(values, dict) else values
        return set().union(*map(_places, inside))
    absolute = isinstance(values, str) and (values.startswith("~") or os.path.isabs(values))
    return {values} if absolute else set()


def _without_places(values: Any, places: Sequence[str]) -> Any:
    """Values whose absolute paths, which mean nothing elsewhere, are cut to their last part."""
    if isinstance(values, dict):
        return {key: _without_places(value, places) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_places(value, places) for value in values]
    if isinstance(values, str):
        for place in places:
            for written in (str, _in_json, _in_html):
                values = values.replace(written(place), written(Path(place).name))
    return values


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_html(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))


def _look_through(files: Mapping[str, Path | bytes], recipe: Any) -> None:
    refuse_secrets(recipe, "recipe.yaml")
    for name, file in files.items():
        if Path(name).suffix in (".safetensors", ".png"):
            continue
        if isinstance(file, Path) and file.stat().st_size > _READABLE:
            continue  # a vocabulary
        content = file if isinstance(file, bytes) else file.read_bytes()
        refuse_secrets(content.decode("utf-8", "replace"), name)


def write_out(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write a parcel's files as a folder, under a temporary name and then renamed.

    Raises:
        PublishError: the folder exists.
    """
    if folder.exists():
        raise PublishError(f"{folder} exists; choose a folder that does not.")
    with whole_folder(folder) as temporary:
        for name, file in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                path.write_bytes(file)
            else:
                shutil.copyfile(file, path)


def recorded(source: Any, repo_id: str, revision: str) -> str | None:
    """The commit as which a folder was last published at a revision; None if it was not."""
    if isinstance(source, PreTrainedModel):
        return None
    return _record_in(Path(source)).get(repo_id, {}).get(revision)


def record(source: Any, repo_id: str, revision: str, commit: str) -> None:
    """Remember the commit as which a folder was published."""
    if isinstance(source, PreTrainedModel):
        return
    known = _record_in(Path(source))
    known.setdefault(repo_id, {})[revision] = commit
    write_whole(Path(source) / RECORD, json.dumps(known, indent=2) + "\n")


def _record_in(folder: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise PublishError(
            f"{folder / RECORD} cannot be read: {error}. Delete it: it only remembers as which"
            " commits the folder was published."
        ) from error
