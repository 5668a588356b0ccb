"""How a problem is cut into tiles, tokens by vocabulary columns; each impl chooses their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusedalign.problem import Problem


@dataclass(frozen=True)
class TileSizes:
    """The size of a tile; the last ones may be smaller."""

    tokens: int
    vocab: int
    """columns"""

    def token_slices(self, problem: Problem) -> Iterator[slice]:
        """The tokens of `problem`, a tile at a time."""
        return slices(problem.hidden.shape[0], self.tokens)

    def vocab_slices(self, problem: Problem) -> Iterator[slice]:
        """The vocabulary columns of `problem`, a tile at a time."""
        return slices(problem.weight.shape[0], self.vocab)


def slices(size: int, step: int) -> Iterator[slice]:
    """0 to `size` in steps, the last one shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
