"""The recipes: configurations and scripts that come with the package, by name; and the command that prints them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from fusedalign.commandline import CommandParser, suggestion, terminal_width, wrapped_table
from fusedalign.embedded import data_directory


def recipes() -> dict[str, Path]:
    """The files of the recipes by name, configurations first."""
    folder = data_directory().parent
    return {path.stem: path for ending in ("yaml", "py") for path in sorted(folder.glob(f"*.{ending}"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe. ValueError: no recipe has this name."""
    known = recipes()
    if name not in known:
        raise ValueError(f"a recipe must be one of {', '.join(known)}, got {name!r}{suggestion(name, known)}")
    return known[name]


def configurations() -> dict[str, Path]:
    """The recipes that `--config` takes by name."""
    return {name: path for name, path in recipes().items() if path.suffix == ".yaml"}


def config_path(name: str) -> str:
    """The file that `--config NAME` means: an existing one, else the recipe of this name.

    Raises:
        FileNotFoundError: neither exists.
    """
    if not name:
        raise ValueError("--config must name a YAML file or a recipe, got nothing")
    if Path(name).exists() and not (Path(name).is_dir() and name in configurations()):
        return name
    known = configurations()
    if name in known:
        return str(known[name])
    hint = suggestion(Path(name).stem, known)
    raise FileNotFoundError(
        f"--config must name a YAML file that exists or a recipe ({', '.join(known)}), got {name}{hint}"
    )


def about(path: Path) -> str:
    """What a recipe does: its first comment or the first line of its docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return text.partition("\n")[0].lstrip("# ")


def recipes_command(argv: Sequence[str]) -> None:
    """Run `fusedalign recipes`: list the recipes, or print one. ValueError for an unknown name."""
    parser = CommandParser(
        "fusedalign recipes",
        "Lists the recipes of this package, or prints one, to be saved and changed:\n\n"
        "  fusedalign recipes dpo > mine.yaml\n"
        "  fusedalign dpo --config mine.yaml\n\n"
        "A training command takes a recipe by its name too: fusedalign dpo --config dpo",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print; default: list all")
    options = parser.parse(argv)
    if options is None:
        return
    if options.name is not None:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    rows = [(name, about(path)) for name, path in recipes().items()]
    print("\n".join(wrapped_table(rows, columns=terminal_width())))
