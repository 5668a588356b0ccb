"""Rows of tokens packed into one row without padding, in which a prompt that several rows share is stored once.

B rows of at most L tokens become S packed tokens. A row consists of a *prefix*, which it shares with an earlier row,
and a *segment*, tokens of this row only; both are runs of consecutive packed tokens. The queries of a segment attend to
the keys of the prefix and, causally, to those of the segment.

A pair of answers to one prompt, chosen first::

    packed     [ prompt chosen | rejected | prompt chosen | rejected | ... | filler ]
    positions    0 1 2 ...       p ...      0 1 2 ...
    keys       [ prompt chosen | prompt rejected | prompt chosen | prompt rejected | ... | filler ]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.checks import check_plain
from fusedalign.compaction import send

#: S is a multiple of this on a GPU, so that kernels are compiled for fewer sizes.
GPU_MULTIPLE = 64


class Segment(NamedTuple):
    """A run of packed tokens, and the earlier run that its queries attend to as well."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class SharedKeys(NamedTuple):
    """Indices of the keys of all segments, K in total; each segment's keys follow a copy of its prefix's keys."""

    tokens: Tensor
    """[K] int64: the packed token of each key"""
    home: Tensor
    """[S] int64: the key of each packed token in its own segment"""
    copy: Tensor
    """[C] int64: the keys that are copies"""
    source: Tensor
    """[C] int64: the packed token of each copy"""


@dataclass(frozen=True, eq=False)
class RightPadded:
    """Padded rows that all begin with a token: causal attention needs no mask, since padding comes last."""

    def to(self, *_: object, **__: object) -> RightPadded:
        """Itself: it holds no tensor."""
        return self


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The inputs of a model and its attention that run B padded rows [B, L] as S packed tokens.

    `to` moves the tensors that the model reads; `token_index`, `valid` and `segments` stay on the CPU.
    """

    input_ids: Tensor
    """[1, S] int64"""
    position_ids: Tensor
    """[1, S] int64: the position of each token in its row"""
    row_counts: Tensor
    """[1, S] int64: the number of rows that contain each token, 0 for the filler at the end"""
    query_offsets: Tensor
    """[segments + 1] int32: the first query of each segment"""
    key_offsets: Tensor
    """[segments + 1] int32: the first key of each segment"""
    shared: SharedKeys | None
    """None: no row shares a prefix, and the keys are those of the packed tokens"""
    max_queries: int
    """of a segment"""
    max_keys: int
    """of a segment"""
    token_index: Tensor
    """[B, L] int64: the packed token of each padded slot, 0 where that is padding"""
    valid: Tensor
    """[B, L] bool: False on padding"""
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """S, including the filler."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """This batch with the model's tensors on `device`; these small copies do not synchronise with a GPU."""
        device = torch.device(device)
        return self._moved(lambda x: send(x, device) if x.device.type == "cpu" else x.to(device))

    def pin_memory(self) -> PackedBatch:
        """This batch with the model's tensors in pinned memory, as data loaders ask for."""
        return self._moved(lambda x: x.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        names = ("input_ids", "position_ids", "row_counts", "query_offsets", "key_offsets")
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        shared = None if self.shared is None else SharedKeys(*map(move, self.shared))
        return dataclasses.replace(self, **moved, shared=shared)

    def row_means(self, values: Tensor) -> Tensor:
        """Means over the tokens of each row, [B, ...] of [S, ...], summed in fp32 at least; 0 for an empty row."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        zero = values.new_zeros(values.shape[1:], dtype=dtype)
        means = []
        for runs in self._row_runs():
            total = sum((values[run].sum(0, dtype=dtype) for run in runs), zero)
            means.append(total / max(1, sum(run.stop - run.start for run in runs)))
        return torch.stack(means) if means else zero.new_zeros(0, *zero.shape)

    def _row_runs(self) -> list[list[slice]]:
        """The one or two runs of packed tokens of each row; none for an empty row."""
        runs: list[list[slice]] = []
        for tokens in (row[mask] for row, mask in zip(self.token_index, self.valid, strict=True)):
            cuts = (tokens.diff() != 1).nonzero().flatten().add(1).tolist()
            pieces = tokens.tensor_split(cuts) if len(tokens) else ()
            runs.append([slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces])
        return runs

    def spread(self, values: Tensor) -> Tensor:
        """Values of packed tokens, [S, ...], in the padded layout, [B, L, ...], zero on padding; differentiable."""
        slots = self.valid.flatten().nonzero()[:, 0]
        tokens = self.token_index.flatten()[slots]
        order = torch.argsort(tokens, stable=True)
        repeats = F.pad(tokens[order].diff() == 0, (1, 0))[: len(order)]
        parts = (order[~repeats], order[repeats])
        index = [send(x, values.device) for part in parts for x in (tokens[part], slots[part])]
        padded = _Spread.apply(values, *index, self.valid.numel())
        return padded.view(*self.valid.shape, *values.shape[1:])


def pack_rows(
    rows: Sequence[Sequence[int] | Tensor], *, groups: int = 1, share: bool = True, multiple: int = 1
) -> PackedBatch:
    """Pack rows of token ids.

    Args:
        rows: B rows, of any lengths, empty ones too.
        groups: with G > 1 row i, row i + B/G, row i + 2 B/G, ... are answers to one prompt: all chosen first, then all
            rejected, in TRL's order. Each later row shares its common beginning with the first of them.
        share: False: no prefix is shared.
        multiple: filler is added until S is a multiple of this, so that kernels are compiled for fewer sizes.

    Returns:
        The batch, on the CPU; L is the length of the longest row.

    Raises:
        TypeError: token ids that are no integers.
        ValueError: the number of rows is no multiple of `groups`, or `multiple` is below 1.

    Example:
        >>> pack_rows([[5, 6, 7], [5, 6, 8, 9]], groups=2).input_ids.tolist()
        [[5, 6, 7, 8, 9]]
    """
    tensors = [_token_ids(torch.as_tensor(row)) for row in rows]
    lengths = torch.tensor([len(x) for x in tensors], dtype=torch.int64)
    input_ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) if tensors else lengths.new_zeros(0, 0)
    attention_mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
    return pack_padded(input_ids, attention_mask, groups=groups, share=share, multiple=multiple)


def pack_answers(
    prompts: Sequence[Sequence[int]], *answers: Sequence[Sequence[int]], share: bool = True, multiple: int = 1
) -> PackedBatch:
    """Pack prompts with one or more answers each: all first answers, then all second ones, and so on.

    Args:
        prompts: P rows of token ids.
        answers: each P rows of token ids, for instance chosen and rejected completions.
        share, multiple: as in `pack_rows`.

    Raises:
        ValueError: not one answer a prompt.

    Example:
        >>> pack_answers([[5, 6]], [[7]], [[8, 9]]).position_ids.tolist()
        [[0, 1, 2, 2, 3]]
    """
    for each in answers:
        if len(each) != len(prompts):
            raise ValueError(f"answers must have one row for each of {len(prompts)} prompts, got {len(each)}")
    rows = [[*prompt, *answer] for each in answers for prompt, answer in zip(prompts, each, strict=True)]
    return pack_rows(rows, groups=max(1, len(answers)), share=share, multiple=multiple)


def pack_padded(
    input_ids: Tensor, attention_mask: Tensor, *, groups: int = 1, share: bool = True, multiple: int = 1
) -> PackedBatch:
    """Pack padded rows.

    Args:
        input_ids: [B, L] integers; tensors on a GPU are copied to the CPU, which synchronises.
        attention_mask: [B, L], 0 (or False) on padding, which may be before a row, after it, or both.
        groups, share, multiple: as in `pack_rows`.

    Raises:
        ValueError: the shapes differ, padding within a row, or a number of rows that is no multiple of `groups`.
    """
    check_plain(input_ids=input_ids, attention_mask=attention_mask)
    ids, valid = _token_ids(input_ids.cpu()), attention_mask.cpu().bool()
    if ids.ndim != 2 or ids.shape != valid.shape:
        raise ValueError(
            f"input_ids and attention_mask must both be [rows, length], got {tuple(ids.shape)} and {tuple(valid.shape)}"
        )
    if groups < 1 or len(ids) % groups:
        raise ValueError(f"rows must be a multiple of groups={groups}, got {len(ids)}")
    lengths = valid.sum(1)
    rows = _PaddedRows(ids, valid, valid.to(torch.uint8).argmax(1) if ids.shape[1] else lengths, lengths)
    positions = rows.positions
    if not torch.equal(valid, (positions >= 0) & (positions < lengths[:, None])):
        raise ValueError("attention_mask must have no padding within a row, got a row with tokens on both sides of it")
    shared_lengths = _shared_lengths(rows, groups) if share and groups > 1 else torch.zeros_like(lengths)
    return _pack(rows, shared_lengths, groups, multiple)


def pack_documents(input_ids: Tensor, position_ids: Tensor, *, multiple: int = 1) -> PackedBatch:
    """The batch of rows that are packed already, for instance by TRL's `padding_free` or `packing`.

    Args:
        input_ids: [B, L] integers, documents one after another.
        position_ids: [B, L]; a 0 begins a document.
        multiple: as in `pack_rows`.

    Returns:
        A batch whose padded layout is that of `input_ids`.

    Raises:
        ValueError: the shapes differ.
    """
    check_plain(input_ids=input_ids, position_ids=position_ids)
    ids, positions = _token_ids(input_ids.cpu()), position_ids.cpu().long()
    if ids.ndim != 2 or ids.shape != positions.shape:
        raise ValueError(
            f"input_ids and position_ids must both be [rows, length], got {tuple(ids.shape)} and "
            f"{tuple(positions.shape)}"
        )
    is_start = positions == 0
    is_start[:, :1] = True
    starts = is_start.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([ids.numel()]))
    zeros = torch.zeros_like(lengths)
    token_index = torch.arange(ids.numel()).view(ids.shape)
    segments = _Segments(starts, lengths, zeros, zeros)
    valid = torch.ones_like(ids, dtype=torch.bool)
    return _batch(ids.flatten(), positions.flatten(), segments, token_index, valid, multiple)


def _token_ids(x: Tensor) -> Tensor:
    """`x` as int64. TypeError if it has no integer dtype; a row without tokens may have any dtype."""
    if x.numel() and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"token ids must be integers, got {x.dtype}")
    return x.long()


class _PaddedRows(NamedTuple):
    """Padded rows of token ids."""

    input_ids: Tensor
    """[B, L]"""
    valid: Tensor
    """[B, L] bool: False on padding"""
    first: Tensor
    """[B]: the column of the first token"""
    lengths: Tensor
    """[B]"""

    @property
    def positions(self) -> Tensor:
        """[B, L]: the position of each slot in its row; below 0 or at least its length on padding."""
        return torch.arange(self.input_ids.shape[1])[None] - self.first[:, None]


class _Segments(NamedTuple):
    """The segments of a batch in their order, [segments] each, see `Segment`."""

    starts: Tensor
    lengths: Tensor
    prefix_starts: Tensor
    prefix_lengths: Tensor


def _shared_lengths(rows: _PaddedRows, groups: int) -> Tensor:
    """[B]: the number of first tokens that each row shares with the first row of its prompt; 0 for those first rows."""
    count, width = len(rows.input_ids) // groups, rows.input_ids.shape[1]
    columns = torch.arange(width)[None]
    aligned = rows.input_ids.gather(1, (columns + rows.first[:, None]).clamp(max=max(0, width - 1)))
    inside = columns < torch.minimum(rows.lengths, rows.lengths[:count].repeat(groups))[:, None]
    is_equal = (aligned == aligned[:count].repeat(groups, 1)) & inside
    shared_lengths = is_equal.to(torch.uint8).cumprod(1).sum(1)
    shared_lengths[:count] = 0
    return shared_lengths


def _pack(rows: _PaddedRows, shared_lengths: Tensor, groups: int, multiple: int) -> PackedBatch:
    """The batch of padded rows; `shared_lengths` [B] are the lengths of their prefixes."""
    ids, valid, positions = rows.input_ids, rows.valid, rows.positions
    own_lengths = rows.lengths - shared_lengths
    order = torch.arange(len(ids)).view(groups, -1).t().flatten()  # the rows of a prompt next to one another
    starts = torch.empty_like(own_lengths)
    starts[order] = own_lengths[order].cumsum(0) - own_lengths[order]
    prefix_starts = starts[: len(ids) // groups].repeat(groups)
    in_segment = positions >= shared_lengths[:, None]
    segment_index = starts[:, None] + positions - shared_lengths[:, None]
    token_index = torch.where(in_segment, segment_index, prefix_starts[:, None] + positions).where(valid, 0)
    unique = valid & in_segment
    packed_ids, packed_positions = ids.new_empty(2, int(own_lengths.sum()))
    packed_ids[token_index[unique]] = ids[unique]
    packed_positions[token_index[unique]] = positions[unique]
    order = order[own_lengths[order] > 0]
    prefix_lengths = shared_lengths[order]
    segments = _Segments(
        starts[order], own_lengths[order], prefix_starts[order].where(prefix_lengths > 0, 0), prefix_lengths
    )
    return _batch(packed_ids, packed_positions, segments, token_index, valid, multiple)


def _batch(
    ids: Tensor, positions: Tensor, segments: _Segments, token_index: Tensor, valid: Tensor, multiple: int
) -> PackedBatch:
    """The record of packed tokens and their segments; filler is a segment of its own."""
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    row_counts = torch.bincount(token_index[valid], minlength=len(ids))
    filler = -len(ids) % multiple if len(ids) else multiple
    if filler:
        added = (len(positions), filler, 0, 0)
        segments = _Segments(*(F.pad(x, (0, 1), value=value) for x, value in zip(segments, added, strict=True)))
        ids, row_counts = F.pad(ids, (0, filler)), F.pad(row_counts, (0, filler))
        positions = torch.cat([positions, torch.arange(filler)])
    key_lengths = segments.prefix_lengths + segments.lengths
    return PackedBatch(
        input_ids=ids[None],
        position_ids=positions[None],
        row_counts=row_counts[None],
        query_offsets=_offsets(segments.lengths),
        key_offsets=_offsets(key_lengths),
        shared=_shared_keys(segments, key_lengths),
        max_queries=int(segments.lengths.max()),
        max_keys=int(key_lengths.max()),
        token_index=token_index,
        valid=valid,
        segments=tuple(Segment(*segment) for segment in zip(*(x.tolist() for x in segments), strict=True)),
    )


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _shared_keys(segments: _Segments, key_lengths: Tensor) -> SharedKeys | None:
    if not segments.prefix_lengths.any():
        return None
    total = int(key_lengths.sum())

    def per_key(x: Tensor) -> Tensor:
        return x.repeat_interleave(key_lengths, output_size=total)

    offsets = torch.arange(total) - per_key(key_lengths.cumsum(0) - key_lengths)
    in_prefix = offsets < per_key(segments.prefix_lengths)
    segment_starts = segments.starts - segments.prefix_lengths
    tokens = offsets + torch.where(in_prefix, per_key(segments.prefix_starts), per_key(segment_starts))
    home = (~in_prefix).nonzero()[:, 0]  # in the order of packed tokens, since segments follow one another
    copy = in_prefix.nonzero()[:, 0]
    return SharedKeys(tokens, home, copy, tokens[copy])


class _Spread(torch.autograd.Function):
    """Packed values at their padded slots, zero elsewhere.

    The gradient of a token is gathered from its first slot, and the gradients of its other slots are added to it. The
    backward of `index_select` would add all of them by atomics, which contend where many slots read one token.
    """

    @staticmethod
    def forward(ctx, values, home_token, home_slot, copy_token, copy_slot, slots):
        ctx.save_for_backward(home_token, home_slot, copy_token, copy_slot)
        ctx.shape = values.shape
        padded = values.new_zeros(slots, *values.shape[1:])
        padded[home_slot] = values[home_token]
        padded[copy_slot] = values[copy_token]
        return padded

    @staticmethod
    def backward(ctx, grad):
        home_token, home_slot, copy_token, copy_slot = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape)
        total[home_token] = grad[home_slot]
        total.index_add_(0, copy_token, grad[copy_slot])
        return total, None, None, None, None, None
