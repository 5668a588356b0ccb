"""Windows in batches: windows that share a prompt form a unit, units of equal width a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from fusedalign.score.records import IGNORED, Example, Window

#: Examples with the same prompt of at least this many tokens run together, at most so many answers at a time.
_MIN_SHARED_TOKENS, _MAX_SHARING = 8, 8


class WindowKey(NamedTuple):
    """The index of a window: of its example, of the answer in it, and of the window in that answer."""

    example: int
    answer: int
    window: int


class Unit(NamedTuple):
    """Windows that run together because they share a prompt."""

    windows: tuple[Window, ...]
    keys: tuple[WindowKey, ...]


def make_units(examples: Iterable[tuple[int, Example]], *, packed: bool) -> Iterator[Unit]:
    """Group the answers of an example and, if rows are packed, examples with the same prompt, computed once then."""
    by_prompt: dict[tuple[int, ...], list[tuple[Window, WindowKey]]] = {}
    for i, example in examples:
        windows = [
            (window, WindowKey(i, j, k))
            for j, answer in enumerate(example.answers)
            for k, window in enumerate(answer.windows)
        ]
        shares = packed and len(windows) == len(example.answers)
        prompt = _prompt(windows[0][0]) if shares and windows else ()
        if len(prompt) >= _MIN_SHARED_TOKENS:
            by_prompt.setdefault(prompt, []).extend(windows)
        else:
            for group in [windows] if shares else [[entry] for entry in windows]:
                yield Unit(*zip(*group, strict=True))
    for windows in by_prompt.values():
        for start in range(0, len(windows), _MAX_SHARING):
            yield Unit(*zip(*windows[start : start + _MAX_SHARING], strict=True))


def _prompt(window: Window) -> tuple[int, ...]:
    """The tokens before the first one that is scored."""
    length = next((i for i, label in enumerate(window.labels) if label != IGNORED), len(window.labels))
    return tuple(window.input_ids[:length])


def batches(units: Iterable[Unit], max_tokens: int, *, packed: bool) -> Iterator[list[Unit]]:
    """Units with equally many windows, longest first, in batches of at most `max_tokens` tokens, at least one unit."""
    batch: list[Unit] = []
    batch_tokens = 0
    for unit in sorted(units, key=lambda unit: (len(unit.windows), -packed_tokens(unit), unit.keys)):
        tokens = packed_tokens(unit) if packed else max(len(window.input_ids) for window in unit.windows)
        longest = tokens if packed or not batch else max(len(window.input_ids) for window in batch[0].windows)
        total = batch_tokens + tokens if packed else longest * (len(batch) + 1)
        if batch and (total > max_tokens or len(unit.windows) != len(batch[0].windows)):
            yield batch
            batch, total = [], tokens
        batch.append(unit)
        batch_tokens = total
    if batch:
        yield batch


def packed_tokens(unit: Unit) -> int:
    """Tokens of a unit; the prefix that a later window shares with the first one counts once."""
    first, *others = (window.input_ids for window in unit.windows)
    total = len(first)
    for ids in others:
        shared = next(
            (i for i, (x, y) in enumerate(zip(first, ids, strict=False)) if x != y), min(len(first), len(ids))
        )
        total += len(ids) - shared
    return total


def halves(batch: Sequence[Unit]) -> list[list[Unit]]:
    """Split a batch in two; a single unit into its windows."""
    if len(batch) > 1:
        return [list(batch[: len(batch) // 2]), list(batch[len(batch) // 2 :])]
    return [[Unit((window,), (key,))] for window, key in zip(*batch[0], strict=True)]


def padded_tensors(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and attention mask, [B, L] on the CPU, padded on the right."""

    def pad(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(window.input_ids) for window in windows])
    ids = pad((window.input_ids for window in windows), 0)
    labels = pad((window.labels for window in windows), IGNORED)
    return ids, labels, torch.arange(ids.shape[1])[None] < lengths[:, None]
