"""Hooks of MkDocs: links out of the site lead to the repository, links to pages show titles, numbers stay on a line."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

#: A fenced block or a code span, in which nothing is a link; or the target of a relative link, and its text if a page.
_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]*`)"
    r"|(?P<text>\[\w+\.md(?=\]\())?(?P<open>\]\()(?P<target>(?![a-z]+:|#|/)[^)\s]+)",
    re.S | re.M,
)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page's source: relative links to what is no page lead to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        path, _, anchor = match["target"].partition("#")
        uri = posixpath.normpath(posixpath.join(folder, path))
        file = files.get_file_from_path(uri)
        if file is not None and file.inclusion.is_included():
            text = f"[{file.page.title}" if match["text"] else ""
            return text + match["open"] + match["target"]
        address = posixpath.normpath(posixpath.join("docs", uri))
        if not (Path(config.docs_dir).parent / address).exists():
            return match[0]  # a dead link: MkDocs warns of it
        target = f"{config.repo_url}/blob/main/{address}" + (f"#{anchor}" if anchor else "")
        return (match["text"] or "") + match["open"] + target

    return _LINK.sub(replace, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs for each page's HTML: no browser breaks 1.6e-07 at its hyphen."""
    return re.sub(r"<td>(?=[-\d.]+(e[-+]\d+)?</td>)", '<td class="number">', html)
