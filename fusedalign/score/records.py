"""The records of scoring: token sequences to score, and their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

#: The label of a token that is not scored.
IGNORED = -100


@dataclass(frozen=True)
class Window:
    """Tokens of one forward, and their labels."""

    input_ids: list[int]
    labels: list[int]
    """as long as `input_ids`, unshifted; `IGNORED` for tokens that are only context"""


@dataclass(frozen=True)
class Answer:
    """One text to score, in one window unless it exceeds the maximum length; each token is scored in one window."""

    name: str
    """"text", "completion", "chosen" or "rejected", from which its columns get their names"""
    windows: tuple[Window, ...]
    text_bytes: int | None = None
    """UTF-8 bytes of the scored text, if it is plain text"""


@dataclass(frozen=True)
class Example:
    """A row of the data set; its answers share a prompt, which is computed once."""

    row: int
    """its number in the data set, from 0"""
    answers: tuple[Answer, ...]


class RefusedRow(NamedTuple):
    """A row that cannot be scored."""

    row: int
    reason: str


@dataclass(frozen=True)
class Score:
    """The log-probability of an answer under a model, summed over its windows."""

    logps: float
    """the sum over the scored tokens, nats"""
    tokens: int
    """number of scored tokens"""
    is_greedy: bool
    """whether each scored token is the most likely one in its context"""
    per_token: dict[str, list[float]] = field(default_factory=dict)
    """on request: "logps", "entropy" and "ranks" (0: most likely) of the scored tokens, in order"""


class Source(Protocol):
    """A data set as examples."""

    def __len__(self) -> int:
        """The number of rows."""

    def examples(self, start: int, stop: int) -> tuple[list[Example], list[RefusedRow]]:
        """The rows from `start` up to, but not including, `stop`: each is an example or refused."""
