"""Requests as rows of tokens to run, in groups with a common prefix, divided into batches. No tensors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: The cost of copying the key of a shared token to another row, relative to computing the token.
_COPY_COST = 1 / 8
#: The smallest shared part of a row: below it, sharing only adds keys to attention.
_MIN_SHARED = 1 / 8
#: Number of following rows considered when deciding where a group ends.
_LOOKAHEAD = 64
#: Packing gives each group of a batch as many slots as the largest has rows: the most slots per row.
_MAX_SLOTS = 4


class Continuation(NamedTuple):
    """The scored tokens of one request, all but the last of them in a row."""

    request: int
    """its number, from 0"""
    tokens: Sequence[int]
    end: int
    """number of tokens of the row before the last token of the continuation"""


@dataclass
class Row:
    """Tokens to run, and the continuations that their hidden states predict."""

    input_ids: tuple[int, ...]
    continuations: list[Continuation] = field(default_factory=list)
    shared: int = 0
    """length of the prefix that is common with the first row of its group"""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def cost(self) -> float:
        """In tokens, as a later row of its group."""
        return _cost(self, self.shared)


Group = list[Row]


def unique_rows(requests: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Row]:
    """The rows that all (context, continuation) need, cut from the left to `max_length`; no row is a prefix of another.

    The last token of a continuation is not an input, so one-token answers to the same question share one row.

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    continuations: dict[tuple[int, ...], list[Continuation]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"expected a context of 1 token or more and a continuation of 1 to {max_length} (max_length), got "
                f"{len(context)} and {len(continuation)} in request {number}"
            )
        input_ids = (*context, *continuation)[-(max_length + 1) :][:-1]
        continuations.setdefault(input_ids, []).append(Continuation(number, continuation, len(input_ids)))
    rows: list[Row] = []
    # Sorted so that a row is followed by its own prefixes.
    for input_ids in sorted(continuations, key=lambda ids: (*ids, math.inf)):
        if not rows or _common_prefix(rows[-1].input_ids, input_ids) < len(input_ids):
            rows.append(Row(input_ids))
        rows[-1].continuations += continuations[input_ids]
    return rows


def shared_groups(rows: Iterable[Row]) -> list[Group]:
    """Group rows that share a prefix with the first row of their group, such as a question or a few-shot prompt."""
    ordered = sorted(rows, key=lambda row: row.input_ids)
    groups: list[Group] = []
    for index, row in enumerate(ordered):
        row.shared = _shared_tokens(groups[-1][0], row) if groups else 0
        if row.shared and _joins(row, ordered[index + 1 : index + 1 + _LOOKAHEAD]):
            groups[-1].append(row)
        else:
            row.shared = 0
            groups.append([row])
    return sorted(groups, key=lambda group: (-len(group), -max(map(len, group))))


def single_groups(rows: Iterable[Row]) -> list[Group]:
    """A group for each row, the longest first."""
    return [[row] for row in sorted(rows, key=len, reverse=True)]


def take_batch(queue: deque[Group], budget: float, *, padded: bool) -> list[Group]:
    """Remove groups from the queue that cost at most `budget` tokens together, at least one row.

    Args:
        queue: the remaining groups; a group too large for a batch is split.
        budget: in tokens.
        padded: every group is one row, and costs as much as the longest row of the batch.
    """
    batch: list[Group] = []
    cost, rows, largest = 0.0, 0, 0
    while queue:
        group = queue.popleft()
        cost += batch_cost([batch[0] if padded and batch else group], padded=padded)
        rows, largest = rows + len(group), max(largest, len(group))
        if batch and (cost > budget or largest * (len(batch) + 1) > _MAX_SLOTS * rows):
            queue.appendleft(group)
            break
        if cost > budget:
            count = _fitting_rows(group, budget)
            if group[count:]:
                queue.appendleft(group[count:])
            return [group[:count]]
        batch.append(group)
    return batch


def batch_cost(batch: list[Group], *, padded: bool) -> float:
    """The cost of a batch in tokens; if padded, every group is one row, the longest first."""
    if padded:
        return len(batch) * len(batch[0][0])
    return sum(len(group[0]) + sum(row.cost for row in group[1:]) for group in batch)


def _fitting_rows(group: Group, budget: float) -> int:
    """The number of leading rows of the group within the budget, at least 1."""
    count, cost = 1, float(len(group[0]))
    while count < len(group) and cost + group[count].cost <= budget:
        cost += group[count].cost
        count += 1
    return count


def _joins(row: Row, following: list[Row]) -> bool:
    """Whether it is cheaper to add `row` to the previous group than to start a new group with it.

    The following rows that share more with `row` than with the previous group count too.
    """
    cost_joined, cost_apart = row.cost, float(len(row))
    for other in following:
        shared = _shared_tokens(row, other)
        if shared <= row.shared:
            break
        cost_joined += _cost(other, row.shared)
        cost_apart += _cost(other, shared)
    return cost_joined <= cost_apart


def _cost(row: Row, shared: int) -> float:
    return len(row) - shared * (1 - _COPY_COST)


def _shared_tokens(first: Row, row: Row) -> int:
    """The length of the prefix that `row` can share with `first`; 0 if it is too short to be useful."""
    common = _common_prefix(first.input_ids, row.input_ids)
    return common if common >= _MIN_SHARED * len(row) else 0


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
