"""How a problem is cut into tiles, tokens by vocabulary columns; how large they are is for each impl to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusedalign.problem import Problem


@dataclass(frozen=True)
class Tiles:
    """Their size; those at the ends may be smaller."""

    tokens: int
    vocab: int
    """columns"""

    def over_tokens(self, problem: Problem) -> Iterator[slice]:
        """All tokens of `problem`, a tile's at a time."""
        return slices(problem.hidden.shape[0], self.tokens)

    def over_vocab(self, problem: Problem) -> Iterator[slice]:
        """All columns, likewise."""
        return slices(problem.weight.shape[0], self.vocab)


def slices(size: int, step: int) -> Iterator[slice]:
    """0 to `size` in steps, the last one shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
