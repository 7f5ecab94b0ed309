"""`atom recipes`: the recipes that ship, and checking one's own."""

from pathlib import Path
from typing import Annotated

import typer

from atomcli.cli.command import command
from atomcli.cli.console import Table, console

app = typer.Typer(help="The recipes that ship, and yours.", rich_markup_mode=None)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe that ships, by name, or a YAML file.")]


@app.command("list")
@command
def list_recipes() -> None:
    """List the recipes that ship."""
    from atomcli.recipe import load_recipe, shipped_recipes

    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    table = Table(["recipe", "scheme", "kv cache", "description"])
    for name, recipe in recipes.items():
        table.add(name, recipe.scheme().name, recipe.kv_cache.format, recipe.description)
    rows = [
        {
            "name": name,
            "scheme": recipe.scheme().name,
            "kv_cache": recipe.kv_cache.format,
            "description": recipe.description,
        }
        for name, recipe in recipes.items()
    ]
    console.result({"recipes": rows}, table)
    console.note("\n`atom recipes show NAME` prints one; `atom recipes copy NAME my.yaml` makes it yours.")


@app.command("show")
@command
def show(recipe: RecipeName) -> None:
    """Print a recipe, defaults filled in."""
    import yaml

    from atomcli.recipe import load_recipe

    resolved = load_recipe(recipe).resolved()
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    console.result(resolved, text.rstrip())


@app.command("copy")
@command
def copy(
    recipe: RecipeName,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Copy a recipe, comments included."""
    from atomcli.errors import UsageError
    from atomcli.recipe import load_recipe, shipped_recipes

    load_recipe(recipe)
    if to.exists() and not force:
        raise UsageError(f"{to} exists already", "Name another file, or overwrite it with --force")
    text = shipped_recipes().get(recipe, Path(recipe)).read_text(encoding="utf-8")
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{to} can't be written: {error.strerror}", "Name another file") from error
    console.result({"recipe": recipe, "file": to}, f"{recipe} copied to {to}")
    console.note(f"next: atom recipes validate {to}")


@app.command("validate")
@command
def validate(recipe: RecipeName) -> None:
    """Check a recipe: keys, values, consistency."""
    from atomcli.recipe import load_recipe

    valid = load_recipe(recipe)
    scheme = valid.scheme().name
    console.result(
        {"recipe": recipe, "valid": True, "scheme": scheme},
        f"{recipe} is valid: {scheme}, KV cache {valid.kv_cache.format}",
    )
