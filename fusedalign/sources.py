"""The fields of dataclasses and the flags of parsers, read from source files: importing their modules takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a dataclass as a flag of the command line."""

    name: str
    help: str = ""
    default: Any = None
    """None also where the source computes the default"""
    flags: tuple[str, ...] = ()
    """all spellings, as `HfArgumentParser` makes them from the field"""


def package_file(name: str) -> Path:
    """A source file, such as "trl/scripts/utils.py", of a package that is installed; the package is not imported.

    Raises:
        ModuleNotFoundError: no such package.
        FileNotFoundError: no such file in it.
    """
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    for folder in spec.submodule_search_locations:
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise FileNotFoundError(f"{package} must have the file {path}, got none in {spec.submodule_search_locations[0]}")


@functools.cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def parser_flags(file: Path) -> set[str]:
    """The flags that the calls of `add_argument`, or of `add`, in a source file name."""
    return {
        word.value
        for call in ast.walk(parsed(file))
        if isinstance(call, ast.Call) and _name(call.func) in ("add_argument", "add")
        for word in call.args
        if isinstance(word, ast.Constant) and isinstance(word.value, str) and word.value.startswith("--")
    }


def own_fields(file: Path, class_name: str) -> list[Field]:
    """The fields that a dataclass itself defines, in order.

    Raises:
        LookupError: the file has no such class.
    """
    tree = parsed(file)
    scope = class_of(tree, class_name)
    return [
        _field(statement, [scope, tree])
        for statement in scope.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.dump(statement.annotation)
        and _value(_keyword(statement.value, "init"), []) is not False
    ]


def class_of(tree: ast.Module, name: str) -> ast.ClassDef:
    """The class of a name in a syntax tree. LookupError: there is none."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
    raise LookupError(f"expected the class {name}, got a file without it")


def base_names(file: Path, class_name: str) -> list[str]:
    """The names of the base classes of a class, as the file writes them."""
    return [name for name in map(_name, class_of(parsed(file), class_name).bases) if name]


def _field(statement: ast.AnnAssign, scopes: list[ast.AST]) -> Field:
    """A field from its line: `name: type = value`, `= field(default=..., metadata=...)` or `= argument(...)`."""
    name = _name(statement.target)
    default: ast.AST | None = statement.value
    metadata: dict[Any, Any] = {}
    if isinstance(statement.value, ast.Call) and _name(statement.value.func) == "field":
        default = _keyword(statement.value, "default") or _keyword(statement.value, "default_factory")
        metadata = _mapping(_keyword(statement.value, "metadata"), scopes)
    elif isinstance(statement.value, ast.Call) and _name(statement.value.func) == "argument":
        default, about = statement.value.args
        metadata = {"help": _value(about, scopes)}
    value = _value(default, scopes)
    flags = field_flags(name, value, ast.unparse(statement.annotation), metadata.get("aliases") or ())
    return Field(name, str(metadata.get("help") or ""), value, flags)


def field_flags(name: str, default: Any, kind: str, aliases: str | Sequence[str] = ()) -> tuple[str, ...]:
    """The flags that `HfArgumentParser` makes from a field; `kind`: its type, as the source writes it."""
    flags = [*spellings(name), *([aliases] if isinstance(aliases, str) else aliases)]
    if default is True and kind in ("bool", "bool | None", "Optional[bool]", "typing.Optional[bool]"):
        flags += [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
    return tuple(flags)


def spellings(name: str) -> list[str]:
    """The flag of a name, with underscores and with hyphens."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _mapping(node: ast.AST | None, scopes: list[ast.AST]) -> dict[str, Any]:
    if not isinstance(node, ast.Dict):
        return {}
    return {_value(key, scopes): _value(value, scopes) for key, value in zip(node.keys, node.values, strict=True)}


def _value(node: ast.AST | None, scopes: list[ast.AST]) -> Any:
    """The value of an expression: literals, names of the scopes, defaults of other classes; None for others."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Lambda):
        return _value(node.body, scopes)
    if isinstance(node, ast.Name):
        return {"list": [], "dict": {}}.get(node.id) if node.id in ("list", "dict") else _named(node.id, scopes)
    if isinstance(node, ast.Attribute):  # `HeadOptions().impl`
        owner = node.value.func if isinstance(node.value, ast.Call) else node.value
        return _default_of(_name(owner), node.attr, scopes)
    return None


def _named(name: str, scopes: list[ast.AST]) -> Any:
    """The last value that the scopes assign to a name, or the value in the file of ours that it is imported from."""
    for scope in scopes:
        values = [x.value for x in ast.walk(scope) if isinstance(x, ast.Assign) and name in map(_name, x.targets)]
        if values:
            return _value(values[-1], scopes)
    file = _imported_from(name, scopes)
    return None if file is None else _named(name, [parsed(file)])


def _default_of(class_name: str, name: str, scopes: list[ast.AST]) -> Any:
    file = _imported_from(class_name, scopes)
    if file is None:
        return None
    return next((field.default for field in own_fields(file, class_name) if field.name == name), None)


def _imported_from(name: str, scopes: list[ast.AST]) -> Path | None:
    """The file of this package that a name is imported from; None: another package, or not imported."""
    for statement in _statements(scopes):
        is_ours = isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("fusedalign.")
        if is_ours and name in [alias.name for alias in statement.names]:
            return package_file(f"{(statement.module or '').replace('.', '/')}.py")
    return None


def _statements(scopes: list[ast.AST]) -> Iterator[Any]:
    for scope in scopes:
        yield from getattr(scope, "body", [])


def _keyword(node: ast.AST | None, name: str) -> ast.AST | None:
    keywords = node.keywords if isinstance(node, ast.Call) else []
    return next((keyword.value for keyword in keywords if keyword.arg == name), None)


def _name(node: ast.AST) -> str:
    """The last part of a dotted name; "" for another expression."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
