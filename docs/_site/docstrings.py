"""An extension of Griffe: what our docstrings write for `help()`, in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Literal blocks end their introduction with one colon; `docs/` pages become links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring with its literal blocks and the names of pages in Markdown."""
    docstring = re.sub(r"^Example::$", "**Example:**", docstring, flags=re.M)
    docstring = re.sub(r"::$", ":", docstring, flags=re.M)
    return re.sub(r"`?\bdocs/(\w+)\.md`?", r"[\1](../\1.md)", docstring)
