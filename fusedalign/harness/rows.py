"""Requests as the rows that a model has to run, in groups that begin alike, cut into batches. No tensors here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: What copying a token's key for another row costs, as a share of what computing the token costs.
_COPY = 1 / 8
#: Less of a row than this is not worth sharing: attention would only have more keys.
_LEAST_SHARE = 1 / 8
#: Following rows that are looked at to decide where a group ends.
_LOOKAHEAD = 64
#: Packing lays out all groups of a batch for the largest: how many slots for rows there may be for each row.
_SLOTS = 4


class Continuation(NamedTuple):
    """What one request asks for: the log-probability of tokens that a row holds or ends before."""

    request: int
    """its number among the requests, from 0"""
    tokens: Sequence[int]
    end: int
    """how many tokens of the row come before its last one"""


@dataclass
class Row:
    """Tokens to run, and the continuations that are read off there."""

    input_ids: tuple[int, ...]
    continuations: list[Continuation] = field(default_factory=list)
    shared: int = 0
    """with how many tokens it begins as the first row of its group does"""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def cost(self) -> float:
        """In tokens, after the first row of its group."""
        return _cost(self, self.shared)


Group = list[Row]


def unique_rows(requests: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Row]:
    """The rows that all (context, continuation) need, cut from the left to `max_length`, none the beginning of another.

    The last token of a continuation predicts nothing, so answers of one token to one question are one row.

    Raises:
        ValueError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    wanted: dict[tuple[int, ...], list[Continuation]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"expected a context of 1 token or more and a continuation of 1 to {max_length} (max_length), got "
                f"{len(context)} and {len(continuation)} in request {number}"
            )
        input_ids = (*context, *continuation)[-(max_length + 1) :][:-1]
        wanted.setdefault(input_ids, []).append(Continuation(number, continuation, len(input_ids)))
    rows: list[Row] = []
    # In this order a row comes right before its own beginnings.
    for input_ids in sorted(wanted, key=lambda ids: (*ids, math.inf)):
        if not rows or _common(rows[-1].input_ids, input_ids) < len(input_ids):
            rows.append(Row(input_ids))
        rows[-1].continuations += wanted[input_ids]
    return rows


def shared_groups(rows: Iterable[Row]) -> list[Group]:
    """Rows in groups that share the beginning of their first row: a question, or a few-shot prompt."""
    ordered = sorted(rows, key=lambda row: row.input_ids)
    groups: list[Group] = []
    for index, row in enumerate(ordered):
        row.shared = _worth(groups[-1][0], row) if groups else 0
        if row.shared and _joins(row, ordered[index + 1 : index + 1 + _LOOKAHEAD]):
            groups[-1].append(row)
        else:
            row.shared = 0
            groups.append([row])
    return sorted(groups, key=lambda group: (-len(group), -max(map(len, group))))


def single_groups(rows: Iterable[Row]) -> list[Group]:
    """Each row on its own, the longest first."""
    return [[row] for row in sorted(rows, key=len, reverse=True)]


def take_batch(queue: deque[Group], budget: float, *, padded: bool) -> list[Group]:
    """Groups off the queue that cost at most `budget` tokens together, one row at least.

    Args:
        queue: what is taken leaves it. A group that is too large for a batch is cut.
        budget: in tokens.
        padded: rows, which are on their own then, cost as much as the longest of the batch.
    """
    batch: list[Group] = []
    cost, rows, most = 0.0, 0, 0
    while queue:
        group = queue.popleft()
        cost += batch_cost([batch[0] if padded and batch else group], padded=padded)
        rows, most = rows + len(group), max(most, len(group))
        if batch and (cost > budget or most * (len(batch) + 1) > _SLOTS * rows):
            queue.appendleft(group)
            break
        if cost > budget:
            kept = _fitting(group, budget)
            if group[kept:]:
                queue.appendleft(group[kept:])
            return [group[:kept]]
        batch.append(group)
    return batch


def batch_cost(batch: list[Group], *, padded: bool) -> float:
    """In tokens; padded rows are on their own, the longest first."""
    if padded:
        return len(batch) * len(batch[0][0])
    return sum(len(group[0]) + sum(row.cost for row in group[1:]) for group in batch)


def _fitting(group: Group, budget: float) -> int:
    """How many rows of the group, from the first, stay within the budget; 1 at least."""
    count, cost = 1, float(len(group[0]))
    while count < len(group) and cost + group[count].cost <= budget:
        cost += group[count].cost
        count += 1
    return count


def _joins(row: Row, following: list[Row]) -> bool:
    """Whether `row` costs least in the group before it, rather than as the first of a new group.

    Of the rows after it those count that share more with it than with that group.
    """
    joined, apart = row.cost, float(len(row))
    for other in following:
        common = _worth(row, other)
        if common <= row.shared:
            break
        joined += _cost(other, row.shared)
        apart += _cost(other, common)
    return joined <= apart


def _cost(row: Row, shared: int) -> float:
    return len(row) - shared * (1 - _COPY)


def _worth(first: Row, row: Row) -> int:
    """Tokens that `row` may take from `first`; 0 where they are too few."""
    common = _common(first.input_ids, row.input_ids)
    return common if common >= _LEAST_SHARE * len(row) else 0


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """With how many tokens both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
