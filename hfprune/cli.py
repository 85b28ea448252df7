"""The command line: thin over the Python API, one command per step and `run` for all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

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
    from rich.console import Console

    from hfprune.pipeline import run as run_recipe
    from hfprune.recipe import Recipe

    console = Console(width=None if sys.stdout.isatty() else 160)
    made = Recipe.load(recipe)
    report = run_recipe(made, say=lambda line: console.print(line, markup=False, highlight=False))
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
def check(recipe: RecipeFile) -> None:
    """Check a recipe whole, without loading anything."""
    from hfprune.recipe import Recipe

    Recipe.load(recipe)
    typer.echo(f"{recipe} is a complete recipe.")


def main() -> None:
    """Entry point: errors that hfprune raises on purpose are one line, not a traceback."""
    from hfprune.errors import HfpruneError

    try:
        app()
    except HfpruneError as error:
        typer.echo(f"hfprune: {error}", err=True)
        raise SystemExit(2) from error
