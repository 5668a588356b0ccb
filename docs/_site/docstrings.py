"""An extension of Griffe: docstrings as `help()` shows them, in Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

#: What stands in our docstrings, and what stands for it in Markdown.
_REWRITES = [
    (r"^Example::$", "**Example:**"),
    (r"^Example:$", "Examples:"),
    (r"::$", ":"),  # before a literal block
    (r"^( +(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+: )", r"\1 "),  # names that share a description, on two lines
    (r"^(\s+[\w, ]+: )>", r"\1&gt;"),  # `beta: > 0` quotes nothing
    (r"(?<=^Returns:\n)(?: +\S.*\n?)+", lambda match: re.sub(r":(?=\s)", "&#58;", match[0])),  # no type before a colon
    (r"`?\bdocs/(\w+)\.md`?", r"[\1](../\1.md)"),
]
#: A name in a code span, perhaps with its module.
_NAME = r"`(?:fusedalign\.(?:\w+\.)?)?(\w+)`"


class Docstrings(griffe.Extension):
    """Docstrings in Markdown with links and lists of attributes; signatures with the values of constants."""

    def __init__(self) -> None:
        text = "\n".join(page.read_text() for page in Path("docs/api").glob("*.md"))
        self.addresses = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", text, flags=re.M)}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for each module, class, function and attribute, for a class before its attributes."""
        if obj.docstring is not None:
            if obj.is_class:
                fields = {name: x for name, x in obj.attributes.items() if x.docstring and not name.startswith("_")}
                obj.docstring.value = listed(
                    obj.docstring.value, {name: x.docstring.value for name, x in fields.items()}
                )
                for x in fields.values():
                    x.docstring = None  # an object without a docstring is not shown
            own = {obj.name, *(parameter.name for parameter in getattr(obj, "parameters", ()))}
            others = {name: path for name, path in self.addresses.items() if name not in own}
            obj.docstring.value = linked(markdown(obj.docstring.value), others)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by Griffe when all modules are read."""
        modules = [pkg]
        for module in modules:
            modules += (child for child in module.modules.values() if not child.is_alias)
            for function in module.functions.values():
                for parameter in function.parameters:
                    constant = module.members.get(str(parameter.default))
                    if constant is not None and constant.is_attribute:
                        parameter.default = constant.value


def listed(docstring: str, fields: dict[str, str]) -> str:
    """The docstring of a class, with those of its attributes as a section."""
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in fields.items()]
    return "\n".join([docstring.rstrip(), "", "Attributes:", *lines]) if lines else docstring


def markdown(docstring: str) -> str:
    """A docstring in Markdown."""
    for pattern, replacement in _REWRITES:
        docstring = re.sub(pattern, replacement, docstring, flags=re.M)
    return docstring


def linked(docstring: str, addresses: dict[str, str]) -> str:
    """A docstring in which the names of public objects are links to them."""

    def link(match: re.Match) -> str:
        address = addresses.get(match[1])
        return f"[{match[0]}][{address}]" if address else match[0]

    return re.sub(_NAME, link, docstring)
