"""A run of several budgets is a family of sizes: published together, as revisions or as a
collection.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import yaml

from hfprune.errors import PublishError, expect, unknown
from hfprune.importance.scores import Scores
from hfprune.planning.budget import Budget
from hfprune.planning.plan import PruningPlan
from hfprune.publishing.client import MAIN, Client, check_name, told
from hfprune.publishing.hub import Published, Terms, prepare, send, tell, write
from hfprune.publishing.page import write_page
from hfprune.publishing.parcel import REPORT, Parcel, parcel_of, report_of, result_of
from hfprune.publishing.report import Report
from hfprune.publishing.units import Pruning
from hfprune.publishing.wording import table_row

Kind = Literal["revisions", "collection"]


@dataclass(frozen=True)
class Member:
    """One size of a family.

    Attributes:
        name: of the model in the run's folder, such as "round-1/distilled".
        size: what its budget leaves, such as "macs-80": its branch, or the end of its name.
    """

    name: str
    size: str


def publish_family(
    run: str | os.PathLike[str],
    repo_id: str,
    kind: Kind = "revisions",
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    dry_run: str | os.PathLike[str] | None = None,
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Published]:
    """Publish every size of a run that had several budgets.

    All are checked before the first is sent; each is one commit, as `publish` makes it. If it fails
    on the way, the same call goes on.

    Args:
        run: the folder of a finished run with a list of budgets.
        repo_id: "owner/name".
        kind: "revisions" puts each size on a branch of one repository, such as "macs-80", and the
            smallest on the main branch, too, in the end; "collection" gives each a repository,
            such as "owner/name-macs-80", in a collection of that name.
        private: whether new repositories are private; None for the Hub's default.
        token: that may write; None for the one of `hf auth login` or HF_TOKEN.
        license: of the pruned models; None for the base model's.
        dry_run: write a folder for each size in here, and open no connection.
        verify: download each again, load it both ways and compare outputs.
        say: where progress goes, line by line.

    Returns:
        {size: what was published}, and for revisions also "main".

    Raises:
        PublishError, HfpruneError: as by `publish`; or the run has one size only.
    """
    if kind not in get_args(Kind):
        raise PublishError(unknown("kind of family", kind, get_args(Kind)))
    expect(run, (str, os.PathLike), "run", "the folder of a finished run")
    folder, terms = Path(run), Terms(private, license=license, verify=verify, say=say)
    members = members_of(folder)
    places = {member.size: (f"{repo_id}-{member.size}", MAIN) for member in members}
    if kind == "revisions":
        places = {member.size: (repo_id, member.size) for member in members}
        places[MAIN] = (repo_id, MAIN)
        members.append(Member(members[-1].name, MAIN))
    for name, _ in places.values():
        check_name(name)
    with ExitStack() as stack:
        parcels = {m.size: stack.enter_context(_packed(folder, m.name)) for m in members}
        tell(
            [f"left out, no part of a model: {n}" for p in parcels.values() for n in p.left_out],
            say,
        )
        table = _table(folder, members, places)
        if dry_run is not None:
            there = Path(dry_run)
            return {
                size: write(parcels[size], *place, license, there / size, table)
                for size, place in places.items()
            }
        client = Client(token)
        orders = {
            size: prepare(client, parcels[size], folder, *place, terms, table)
            for size, place in places.items()
        }
        tell([f"warning: {w}" for order in orders.values() for w in order.warnings], say)
        done = {size: send(client, order, terms) for size, order in orders.items()}
        if kind == "collection":
            with told("Gathering"):
                url = client.gather(repo_id, [p.repo_id for p in done.values()], private)
            say(f"Gathered in a collection: {url}")
        return done


def members_of(run: Path) -> list[Member]:
    """The sizes of a finished run, largest first.

    Raises:
        PublishError: there is one only, or the run is not finished.
    """
    if not (run / "steps.json").is_file():
        raise PublishError(f"{run} is not the folder of a run.")
    result_of(run)
    report, budgets = _report_of_run(run), _budgets_of(run)
    if len(budgets) < 2:
        raise PublishError(
            f"The run in {run} has one size, {budgets[0]}: a family needs a list in prune.budget."
            " Publish it by `publish`, or without --family."
        )
    return [
        Member(variant.name, re.sub(r"[^\w.]+", "-", budget).strip("-"))
        for variant, budget in zip(report.variants[1:], budgets, strict=True)
    ]


def _report_of_run(run: Path) -> Report:
    return Report.from_dict(json.loads((run / REPORT).read_text(encoding="utf-8")))


def _budgets_of(run: Path) -> list[str]:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    said = recipe["prune"]["budget"]
    return [str(Budget.parse(budget)) for budget in ([said] if isinstance(said, str) else said)]


@contextmanager
def _packed(run: Path, name: str) -> Iterator[Parcel]:
    """The parcel of one size, with a report that ends with it."""
    model, report = run / name, _report_of_run(run)
    if name == report.result.name:
        yield parcel_of(model, model.parent, run)
        return
    report = _report_until(report, name, run)
    with TemporaryDirectory(prefix="hfprune-family-") as temporary:
        papers = Path(temporary)
        for paper in ("recipe.yaml", "steps.json"):
            shutil.copyfile(run / paper, papers / paper)
        (papers / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        (papers / "report.md").write_text(report.markdown(), encoding="utf-8")
        write_page(report, papers / "report.html")
        if report_of(model, papers) is None:
            raise PublishError(f"{model} is not the model that was measured. Go on with `run`.")
        yield parcel_of(model, model.parent, papers)


def _report_until(report: Report, name: str, run: Path) -> Report:
    """A run's report, as far as this size; what came later was not needed for it."""
    names = [variant.name for variant in report.variants]
    until = names.index(name) + 1
    plan = PruningPlan.load((run / name).parent / "plan.json")
    scores = Scores.load((run / names[1]).parent / "scores")  # the dense model's
    later = tuple(f"{Path(other).parent}/" for other in names[until:])

    def needed(steps: Mapping[str, float]) -> dict[str, float]:
        return {artefact: v for artefact, v in steps.items() if not artefact.startswith(later)}

    return dataclasses.replace(
        report,
        variants=report.variants[:until],
        pruning=Pruning.of(plan, scores),
        seconds=needed(report.seconds),
        energy=needed(report.energy),
    )


def _table(run: Path, members: list[Member], places: Mapping[str, tuple[str, str]]) -> str:
    """All sizes side by side, as Markdown: where each is, its quality, parameters and latency."""
    header, dense, *rows = _report_of_run(run).cells()
    columns = [
        i
        for i, name in enumerate(header)
        if i and name.startswith((header[1], "vs dense [", "parameters", "latency"))
    ]
    lines = [["where", *(header[i] for i in columns)], ["---", *("---:" for _ in columns)]]
    lines.append(["dense", *(dense[i] for i in columns)])
    for member, row in zip(members, rows, strict=False):  # the smallest may be there twice
        repo, branch = places[member.size]
        where = f"[{repo}](https://huggingface.co/{repo})" if branch == MAIN else f"`{branch}`"
        lines.append([where, *(row[i] for i in columns)])
    table = "\n".join(map(table_row, lines))
    if MAIN not in places:
        return table
    return f"{table}\n\nName one by `revision=`; the main branch holds the smallest."
