"""`pdtrim-deploy recipe`: look at what will be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe import Recipe


@click.group()
def recipe() -> None:
    """Show and validate recipes, or print their JSON Schema.

    \b
    Examples:
      pdtrim-deploy recipe show recipes/smollm2-demo.yaml
      pdtrim-deploy recipe validate recipes/smollm2-demo.yaml recipes/llama-3.1-8b-balanced.yaml
      pdtrim-deploy recipe schema
    """


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
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for machines.")
def validate(files: tuple[Path, ...], as_json: bool) -> None:
    """Check each of FILES; exit code 2 when any is wrong."""
    wrong, results = [], []
    for file in files:
        try:
            loaded = Recipe.load(file)
        except UserError as error:
            wrong.append(str(error))
            results.append({"file": str(file), "ok": False, "problem": str(error)})
            continue
        results.append({"file": str(file), "ok": True, "name": loaded.name, "digest": loaded.digest})
        if not as_json:
            click.echo(f"{file}: ok, {loaded.name}")
    if as_json:
        click.echo(json.dumps(results, indent=2))
    if wrong:
        raise UserError("\n".join(wrong))


@recipe.command()
def schema() -> None:
    """Print the JSON Schema of a resolved recipe."""
    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
