"""The YAML file of `--config`, read strictly; errors name the file and the line or field."""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def read_config(path: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not UTF-8, not YAML, not a mapping of names to values, or a repeated name.
    """
    if Path(path).is_dir():
        raise ValueError(f"--config must name a YAML file, got the folder {path}")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"--config must name a YAML file in UTF-8, got {path} with other bytes: {error}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config must name a valid YAML file, got {path}{line}: {problem or error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"--config must name a YAML file of `field: value` lines, got {path}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with an error for a repeated name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        for key, _ in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
#: Fields of text that also take true and false.
_TRUE_OR_FALSE = ("resume_from_checkpoint", "fused_packed")


def file_value(parser: Any, action: argparse.Action, value: Any, name: str) -> Any:
    """A field's value from YAML, converted as the value of a flag.

    argparse itself converts defaults only if they are strings. `name` is that of field and file, for errors.

    Raises:
        ValueError: a value of the wrong type, or not one of the choices.
    """
    allowed = kinds(parser, action.dest)
    if value is None and type(None) not in allowed:
        raise ValueError(f"{name} must have a value, got nothing: leave the line out for the default")
    for kind, word in ((dict, "mapping"), (list, "list")):
        if isinstance(value, kind) and kind not in allowed:
            raise ValueError(f"{name} must be one value, got the {word} {value}")
    is_nested = isinstance(value, list) and (not value or isinstance(value[0], dict | list))
    if value is None or isinstance(value, dict) or is_nested:
        return value
    if isinstance(value, bool) and action.dest in _TRUE_OR_FALSE:
        value = str(value).lower()
    if isinstance(value, bool) and bool not in allowed:
        raise ValueError(
            f"{name} must not be {str(value).lower()}, which is also how YAML reads a bare "
            f"{'yes or on' if value else 'no or off'}: put such a word in quotes"
        )
    flag = f"--{action.dest}"
    try:
        if not isinstance(value, list):
            converted = getattr(parser.parse_known_args([f"{flag}={value}"])[0], action.dest)
            # A scalar of a list field stays a scalar: TRL distinguishes `all-linear` from a list of one name.
            return value if isinstance(converted, list) else converted
        if action.nargs != "+":
            return value
        return getattr(parser.parse_known_args([flag, *map(str, value)])[0], action.dest)
    except ValueError as error:
        raise ValueError(f"{name}{str(error).removeprefix(flag)}") from None


def kinds(parser: Any, name: str) -> set[type]:
    """The types of a field, without their parameters."""
    cls = next(cls for cls in parser.dataclass_types if name in cls.__dataclass_fields__)
    hint = get_type_hints(cls)[name]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(option) or option for option in options}
