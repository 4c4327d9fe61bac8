"""`pdtrim-deploy recipe`: look at what will be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe import Recipe


@click.group()
def recipe() -> None:
    """Show and validate recipes, or print their JSON Schema."""


@recipe.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
def show(file: Path, as_json: bool) -> None:
    """Print FILE with its includes and defaults resolved."""
    loaded = Recipe.load(file)
    if as_json:
        click.echo(json.dumps({"digest": loaded.digest, "recipe": loaded.model_dump(mode="json")}, indent=2))
    else:
        click.echo(f"# {file}, digest {loaded.digest}\n{loaded.to_yaml()}", nl=False)


@recipe.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
def validate(files: tuple[Path, ...]) -> None:
    """Check each of FILES; exit code 2 when any is wrong."""
    wrong = []
    for file in files:
        try:
            click.echo(f"{file}: ok, {Recipe.load(file).name}")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))


@recipe.command()
def schema() -> None:
    """Print the JSON Schema of a resolved recipe."""
    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
