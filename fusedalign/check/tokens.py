"""Token sequences as text: trained tokens in colour or in brackets, special tokens visible, cuts marked."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

from fusedalign.check.rows import Sequence

#: Characters at the beginning and at the end of a run of tokens that are shown.
_SHOWN = 240, 160
_OPEN, _CLOSE = "[[", "]]"
_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class Style(NamedTuple):
    """How text is printed."""

    colour: bool
    """trained tokens are green; else they are in brackets"""
    width: int
    """characters of a line"""

    @property
    def legend(self) -> str:
        """What marks trained tokens."""
        return "trained tokens are green" if self.colour else f"trained tokens are in {_OPEN} {_CLOSE}"


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    trained: bool = False
    special: bool = False


def render_tokens(kept: Sequence, whole: Sequence, tokenizer: Any, style: Style, skip: int = 0) -> list[str]:
    """Lines of a sequence.

    Args:
        kept: what truncation leaves of `whole`.
        whole: the sequence before.
        tokenizer: decodes it.
        style: of the lines.
        skip: tokens at the beginning that are not shown.
    """
    pieces: list[Piece] = []
    cut = len(whole.ids) - len(kept.ids)
    mark = Piece(f"[{cut:,} tokens cut, {max(0, whole.targets - kept.targets):,} of them trained]", special=True)
    from_start = cut and kept.ids != whole.ids[: len(kept.ids)]
    pieces += [mark] if from_start else []
    pieces += [Piece("(the same prompt) ", special=True)] if skip else []
    start = skip
    for trained, run in itertools.groupby(kept.trained[skip:]):
        end = start + len(list(run))
        pieces += _visible(_decode(tokenizer, kept.ids, start, end), tokenizer, trained)
        start = end
    pieces += [mark] if cut and not from_start else []
    return _lines(_bracketed(pieces) if not style.colour else pieces, style)


def _decode(tokenizer: Any, ids: list[int], start: int, end: int) -> str:
    """The text of a run of tokens; decoded alone it could lose the space that it begins with."""
    before, both = (tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in (start, end))
    return str(both[len(before) :] if both.startswith(before) else tokenizer.decode(ids[start:end]))


def _visible(text: str, tokenizer: Any, trained: bool) -> list[Piece]:
    """Pieces of a text with its middle left out, special tokens apart, and control characters escaped."""
    head, tail = _SHOWN
    if len(text) > head + tail + 40:
        left_out = len(text) - head - tail
        gap = Piece(f" ... {left_out:,} characters ... ", trained, True)
        return [*_visible(text[:head], tokenizer, trained), gap, *_visible(text[-tail:], tokenizer, trained)]
    names = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [Piece(_escaped(part), trained, part in names) for part in parts if part]


def _escaped(text: str) -> str:
    """Line breaks after a visible backslash n, other control characters as escapes."""
    text = "".join(x if x == "\n" or x.isprintable() else repr(x)[1:-1] for x in text)
    return text.replace("\n", "\\n\n")


def _bracketed(pieces: list[Piece]) -> list[Piece]:
    """The pieces with brackets around each run of trained ones."""
    result: list[Piece] = []
    for trained, run in itertools.groupby(pieces, key=lambda piece: piece.trained):
        parts = list(run)
        result += [Piece(_OPEN, True), *parts, Piece(_CLOSE, True)] if trained else parts
    return result


def _lines(pieces: list[Piece], style: Style) -> list[str]:
    """Lines of at most `style.width` characters, with colours where wanted."""
    lines: list[list[tuple[str, str]]] = [[]]
    breaks = False
    for piece in pieces:
        code = (_GREEN if piece.trained else "") + (_DIM if piece.special else "") if style.colour else ""
        for character in piece.text:
            if character == "\n":
                breaks = True
                continue
            if (breaks and piece.text != _CLOSE) or len(lines[-1]) >= style.width:
                lines.append([])
            breaks = breaks and piece.text == _CLOSE
            lines[-1].append((character, code))
    return [_coded(line) for line in lines if line]


def _coded(line: list[tuple[str, str]]) -> str:
    runs = itertools.groupby(line, key=lambda entry: entry[1])
    texts = ((code, "".join(character for character, _ in run)) for code, run in runs)
    return "".join(f"{code}{text}{_RESET}" if code else text for code, text in texts)
