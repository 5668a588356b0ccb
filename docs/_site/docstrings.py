"""An extension of Griffe: docstrings as `help()` shows them, in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: What stands in our docstrings, and what stands for it in Markdown.
_REWRITES = [
    (r"^Example::$", "**Example:**"),
    (r"^Example:$", "Examples:"),
    (r"::$", ":"),  # before a literal block
    (r"^(\s+[\w, ]+: )>", r"\1&gt;"),  # `beta: > 0` quotes nothing
    (r"`?\bdocs/(\w+)\.md`?", r"[\1](../\1.md)"),
]


class Docstrings(griffe.Extension):
    """Docstrings in Markdown, and signatures with the values of private constants."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by Griffe for each function."""
        for parameter in func.parameters:
            constant = func.module.members.get(str(parameter.default))
            if isinstance(constant, griffe.Attribute) and constant.value is not None:
                parameter.default = constant.value


def markdown(docstring: str) -> str:
    """A docstring in Markdown."""
    for pattern, replacement in _REWRITES:
        docstring = re.sub(pattern, replacement, docstring, flags=re.M)
    return docstring
