"""The command line: thin over the Python API, one command per step and `run` for all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hfprune.publishing.report import Report
    from hfprune.recipe import Recipe

app = typer.Typer(
    help="Prune Hugging Face models: score, plan, remove, recover, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/minilm/movie.yaml.")]


@app.command()
def run(recipe: RecipeFile) -> None:
    """Do everything that a recipe asks for; run it again to go on where it stopped."""
    from hfprune.recipe import Recipe

    made = Recipe.load(recipe)
    report = _walk(made)
    if report is not None:  # of several processes, only the first has it
        console = _console()
        console.print(report.table())
        console.print(report.caption(), markup=False, highlight=False)
        console.print(f"Everything is in {made.output}.", markup=False, highlight=False)


@app.command()
def inspect(model: Model) -> None:
    """Print a model's layers, units, parameters and MACs."""
    from hfprune.pruning import inspect as anatomy_of
    from hfprune.structure.checkpoint import from_pretrained

    typer.echo(anatomy_of(from_pretrained(model)))


@app.command()
def score(recipe: RecipeFile) -> None:
    """Score the dense model's heads and neurons as a recipe says; the scores are in `scores` in its
    output folder, of a recipe of several budgets in `round-1/scores`.
    """
    from hfprune.recipe import Recipe
    from hfprune.rounds import Round

    made = Recipe.load(recipe)
    _walk(made, Round.of(made)[0].path("scores"))


@app.command()
def prune(recipe: RecipeFile) -> None:
    """Do what a recipe asks for up to removal and compensation, without the last distillation."""
    _walk(recipe, "start")


@app.command()
def distill(recipe: RecipeFile) -> None:
    """Do what a recipe asks for up to the last distillation, without evaluation."""
    _walk(recipe, "result")


@app.command()
def plan(
    model: Model,
    scores: Annotated[Path, typer.Argument(help="Folder that `hfprune score` wrote.")],
    budget: Annotated[
        str, typer.Argument(help="Such as macs=50%, memory=400MB@1x128; several with commas.")
    ],
    output: Annotated[Path, typer.Option(help="Where the plan is written.")] = Path("plan.json"),
    criterion: Annotated[str, typer.Option(help="By which importance.")] = "reconstruction",
    min_heads: Annotated[int, typer.Option(help="Heads that every attention keeps.")] = 1,
    min_neurons: Annotated[int, typer.Option(help="Neurons that every FFN keeps.")] = 1,
    round_to: Annotated[int, typer.Option(help="FFN widths are multiples of this.")] = 1,
    uniform: Annotated[bool, typer.Option(help="All layers alike: a stock model.")] = False,
    protect: Annotated[
        list[str] | None, typer.Option(help="Layer or stack that stays whole; may be repeated.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers stay.")] = None,
    experts: Annotated[int | None, typer.Option(help="How many experts a layer keeps.")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of the example whose MACs count, else as calibrated; one for each stack.",
        ),
    ] = None,
    latency: Annotated[
        Path | None, typer.Option(help="Table that `hfprune latency` wrote; else measured now.")
    ] = None,
) -> None:
    """Plan what stays under a budget, and explain it."""
    from hfprune.errors import HfpruneError
    from hfprune.importance.scores import Scores
    from hfprune.planning.budget import Budget
    from hfprune.planning.constraints import Constraints
    from hfprune.planning.latency import LatencyTable
    from hfprune.planning.solve import plan as plan_under
    from hfprune.structure.checkpoint import from_pretrained

    # All that can be wrong is read before the model, which may take minutes.
    limits = Budget.parse(budget)
    constraints = Constraints(
        min_heads,
        min_neurons,
        round_to,
        uniform=uniform,
        protect=tuple(protect or ()),
        layers=layers,
        experts=experts,
    )
    if output.is_dir():
        raise HfpruneError(f"{output} is a folder; give --output the name of a file.")
    table = LatencyTable.load(latency) if latency else None
    scored = Scores.load(scores)
    scored.by(criterion)
    lengths = tokens[0] if tokens and len(tokens) == 1 else tokens or None
    made = plan_under(
        from_pretrained(model), scored, limits, criterion, constraints, lengths, table
    )
    made.save(output)
    typer.echo(f"{made.explain()}\nWritten to {output}.")


@app.command()
def latency(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Where the table is written.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that run at once.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; medians count.")] = 15,
) -> None:
    """Measure on this machine where a model's time goes, for budgets of latency."""
    from hfprune.planning.latency import measure_latency
    from hfprune.structure.checkpoint import from_pretrained

    measure_latency(from_pretrained(model), batch_size, tokens, threads, repeats).save(output)
    typer.echo(f"The latency table is in {output}: use it by --latency, @{batch_size}x{tokens}.")


@app.command()
def remove(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan that `hfprune plan` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the smaller model.")],
    scores: Annotated[
        Path | None,
        typer.Option(help="Folder of scores with moments: refit what stays by them."),
    ] = None,
) -> None:
    """Remove what a plan drops and save the smaller model, verified, with the model's processor."""
    from hfprune.errors import HfpruneError
    from hfprune.files import whole_folder
    from hfprune.importance.scores import Scores
    from hfprune.planning.plan import PruningPlan
    from hfprune.pruning import remove as remove_units
    from hfprune.structure.checkpoint import from_pretrained, refuse_nowhere, save_with_processor
    from hfprune.tasks import processor_of

    if output.exists():
        raise HfpruneError(f"{output} exists; choose a folder that does not.")
    kept = PruningPlan.load(plan)
    by = None if scores is None else Scores.load(scores)
    refuse_nowhere(model)
    processor = processor_of(model)
    smaller = remove_units(from_pretrained(model), kept, compensate=by)
    with whole_folder(output) as folder:
        save_with_processor(smaller, processor, folder)
    typer.echo(f"The smaller model is in {output}; it was reloaded and compared.")


@app.command()
def push(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Folder of a run, or of a pruned model.")],
    repo: Annotated[str, typer.Argument(help="Where on the Hub: owner/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if not there.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Propose it as a pull request.")] = False,
    parent: Annotated[
        str | None, typer.Option(help="Commit to publish on top of, though others made it.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Such as apache-2.0; by default the base model's.")
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option(help="Only write what would be uploaded to this folder.")
    ] = None,
    family: Annotated[
        Literal["revisions", "collection"] | None,
        typer.Option(
            help="Of a run of several budgets every size, and how they are kept together."
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Push to a Hub on this machine instead, and download back.")
    ] = False,
) -> None:
    """Publish a run's or a pruned model on the Hub; download it again and compare."""
    if rehearse:
        from hfprune.publishing.rehearsal import rehearse_push

        status = rehearse_push([a for a in context.obj if a != "--rehearse"], source, repo)
        raise SystemExit(status)
    from hfprune.errors import HfpruneError
    from hfprune.publishing.family import publish_family
    from hfprune.publishing.hub import publish

    _quiet_loading()
    if family:
        for name, given in (("revision", revision), ("create-pr", create_pr), ("parent", parent)):
            if given:
                raise HfpruneError(f"--{name} is of one model; --family places each by itself.")
        sizes = publish_family(
            source,
            repo,
            family,
            private=private,
            license=license,
            dry_run=dry_run,
            say=typer.echo,
        )
        published = list(sizes.values())
    else:
        one = publish(
            source,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
            license=license,
            dry_run=dry_run,
            say=typer.echo,
        )
        published = [one]
    for done in published:
        if dry_run:
            typer.echo(f"What would be uploaded is in {done.url}: {len(done.files)} files.")
        else:
            typer.echo(f"Published and verified: {done.repo_id} ({done.revision}), {done.url}")
    if dry_run:
        typer.echo("A push takes over, besides, what the cards of the base and on the Hub say.")


@app.command()
def check(recipe: RecipeFile) -> None:
    """Check a recipe whole, without loading anything."""
    from hfprune.recipe import Recipe

    Recipe.load(recipe)
    typer.echo(f"{recipe} is a complete recipe.")


def _walk(recipe: Path | Recipe, until: str | None = None) -> Report | None:
    """Run a recipe, telling what is done."""
    from hfprune.pipeline import run as run_recipe

    console = _console()
    _quiet_loading()
    return run_recipe(
        recipe,
        say=lambda line: console.print(line, markup=False, highlight=False),
        until=until,
    )


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _quiet_loading() -> None:
    """The pipeline says what it does; the bars and notes of every load and save would drown it."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that hfprune raises on purpose are one line, not a traceback.

    Args:
        arguments: of the command line; by default those of this process.
    """
    from hfprune.errors import HfpruneError

    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(given, obj=given)
    except (HfpruneError, OSError) as error:  # OSError: a model or file that is not there
        typer.echo(f"hfprune: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from error
