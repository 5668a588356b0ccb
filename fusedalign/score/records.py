"""What passes between the parts of scoring: token sequences in, scores out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Window:
    """Tokens that go through the model at once, and the labels that count."""

    input_ids: list[int]
    labels: list[int]
    """as long as `input_ids`, unshifted; -100 where a token is context alone"""


@dataclass(frozen=True)
class Answer:
    """One text to score. It is one window, unless it is longer than the model takes: then each token counts in one."""

    name: str
    """"text", "completion", "chosen" or "rejected": what its columns are called after"""
    windows: tuple[Window, ...]
    text_bytes: int | None = None
    """UTF-8 bytes of the scored text, where that is plain text"""


@dataclass(frozen=True)
class Example:
    """A row of the data set; its answers begin with the same prompt, which is computed once."""

    row: int
    """its number in the data set, from 0"""
    answers: tuple[Answer, ...]


class RefusedRow(NamedTuple):
    """A row that cannot be scored."""

    row: int
    reason: str


@dataclass(frozen=True)
class Score:
    """What a model says of an answer, summed over its windows."""

    logps: float
    """the sum over the tokens that count, nats"""
    tokens: int
    """that count"""
    is_greedy: bool
    """whether each of them is the likeliest one after those before it"""
    per_token: dict[str, list[float]] = field(default_factory=dict)
    """on request: "logps", "entropy" and "ranks" (0 is the likeliest), of the tokens that count, in their order"""


class Source(Protocol):
    """A data set as examples."""

    def __len__(self) -> int:
        """Rows."""

    def examples(self, start: int, stop: int) -> tuple[list[Example], list[RefusedRow]]:
        """The rows from `start` to before `stop`, each either an example or refused."""
