"""Rows of tokens as one row without padding, in which a beginning that several rows share stands once.

B rows of at most L tokens become S packed tokens. A row is its *prefix*, which it shares with an
earlier row, and its *segment*, the tokens that stand for this row alone; both are runs of consecutive packed tokens.
The queries of a segment see the keys of the prefix and, causally, those of the segment.

A pair of answers to one prompt, chosen first::

    packed     [ prompt chosen | rejected | prompt chosen | rejected | ... | filler ]
    positions    0 1 2 ...       p ...      0 1 2 ...
    keys       [ prompt chosen | prompt rejected | prompt chosen | prompt rejected | ... | filler ]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.checks import check_plain
from fusedalign.compaction import send

#: Packed tokens come in multiples of this on a GPU, so that kernels meet fewer sizes.
GPU_MULTIPLE = 64


class Segment(NamedTuple):
    """A run of packed tokens, and the run before it that its queries see too."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class SharedKeys(NamedTuple):
    """The keys of all segments one after another, each with a copy of its prefix before it; K of them."""

    tokens: Tensor
    """[K] int64: the packed token of each key"""
    home: Tensor
    """[S] int64: the key of each packed token that is no copy"""
    copy: Tensor
    """[C] int64: the keys that are copies"""
    source: Tensor
    """[C] int64: the packed tokens that they are copies of"""


@dataclass(frozen=True, eq=False)
class RightPadded:
    """Padded rows, all of which begin with a token: causal attention needs no mask to keep them from the padding."""

    def to(self, *_: object, **__: object) -> RightPadded:
        """Itself: it holds no tensor."""
        return self


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """What a model and its attention need to run B padded rows [B, L] as S packed tokens.

    `to` moves what the model needs to a device; `token_index`, `valid` and `segments` stay on the CPU.
    """

    input_ids: Tensor
    """[1, S] int64"""
    position_ids: Tensor
    """[1, S] int64: the place of each token in its row"""
    row_counts: Tensor
    """[1, S] int64: the number of rows that each token stands for, 0 for the filler at the end"""
    query_offsets: Tensor
    """[segments + 1] int32: where the queries of each segment begin"""
    key_offsets: Tensor
    """[segments + 1] int32: where its keys begin"""
    shared: SharedKeys | None
    """None: no row shares a prefix, and keys stand as packed tokens do"""
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
        """S, with the filler."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """This batch with the model's tensors on `device`; none of these small copies waits for a GPU."""
        device = torch.device(device)
        return self._moved(lambda x: send(x, device) if x.device.type == "cpu" else x.to(device))

    def pin_memory(self) -> PackedBatch:
        """This batch with the model's tensors in pinned memory, as data loaders ask for."""
        return self._moved(lambda x: x.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            row_counts=move(self.row_counts),
            query_offsets=move(self.query_offsets),
            key_offsets=move(self.key_offsets),
            shared=None if self.shared is None else SharedKeys(*map(move, self.shared)),
        )

    def row_means(self, values: Tensor) -> Tensor:
        """Means over the tokens of each row, [B, ...] of [S, ...], summed in fp32 at least; 0 for an empty row."""
        wide = torch.promote_types(values.dtype, torch.float32)
        means = []
        for runs in self._row_runs():
            count = sum(run.stop - run.start for run in runs)
            total = sum(
                (values[run].sum(0, dtype=wide) for run in runs), values.new_zeros(values.shape[1:], dtype=wide)
            )
            means.append(total / max(1, count))
        return torch.stack(means) if means else values.new_zeros(0, *values.shape[1:], dtype=wide)

    def _row_runs(self) -> list[list[slice]]:
        """For each row the one or two runs of packed tokens that it is made of; none for an empty row."""
        runs: list[list[slice]] = []
        for tokens in (row[mask] for row, mask in zip(self.token_index, self.valid, strict=True)):
            cuts = (tokens.diff() != 1).nonzero().flatten().add(1).tolist()
            pieces = tokens.tensor_split(cuts) if len(tokens) else ()
            runs.append([slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces])
        return runs

    def spread(self, values: Tensor) -> Tensor:
        """Values of packed tokens, [S, ...], in the padded layout, [B, L, ...], zero on padding; differentiable."""
        return _spread(values, self)


def pack_rows(
    rows: Sequence[Sequence[int] | Tensor], *, groups: int = 1, share: bool = True, multiple: int = 1
) -> PackedBatch:
    """Pack rows of token ids.

    Args:
        rows: B rows, of any lengths, empty ones too.
        groups: with G > 1 row i, row i + B/G, row i + 2 B/G, ... are answers to one prompt: all chosen first, then all
            rejected, as TRL orders them. The later ones share with the first the tokens with which both begin.
        share: False: nothing is shared.
        multiple: filler is added until S is a multiple of this, so that kernels meet fewer sizes.

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
        input_ids: [B, L] integers; tensors on a GPU are copied to the CPU, which waits for it.
        attention_mask: [B, L], 0 (or False) on padding, which may stand before a row, after it, or both.
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
    lengths, place = valid.sum(1), torch.arange(ids.shape[1])[None]
    first = valid.to(torch.uint8).argmax(1) if ids.shape[1] else lengths
    place = place - first[:, None]
    if not torch.equal(valid, (place >= 0) & (place < lengths[:, None])):
        raise ValueError("attention_mask must have no padding within a row, got a row with tokens on both sides of it")
    alike = _shared_lengths(ids, first, lengths, groups) if share and groups > 1 else torch.zeros_like(lengths)
    return _pack(ids, valid, place, lengths, alike, groups, multiple)


def pack_documents(input_ids: Tensor, position_ids: Tensor, *, multiple: int = 1) -> PackedBatch:
    """Take over rows that are packed already, as TRL's `padding_free` and `packing` give them.

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
    begins = positions == 0
    begins[:, :1] = True
    starts = begins.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([ids.numel()]))
    own = torch.arange(ids.numel())
    none = torch.zeros_like(lengths)
    token_index = own.view(ids.shape)
    return _finish(
        ids.flatten(), positions.flatten(), starts, lengths, none, none, token_index, ~(token_index < 0), multiple
    )


def _token_ids(x: Tensor) -> Tensor:
    """`x` as int64. TypeError where it holds no integers; a row without tokens may have any dtype."""
    if x.numel() and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"token ids must be integers, got {x.dtype}")
    return x.long()


def _shared_lengths(ids: Tensor, first: Tensor, lengths: Tensor, groups: int) -> Tensor:
    """[B]: with how many tokens each row begins as the first row of its prompt does; 0 for those first rows."""
    count, width = len(ids) // groups, ids.shape[1]
    place = torch.arange(width)[None]
    flush = ids.gather(1, (place + first[:, None]).clamp(max=max(0, width - 1)))
    inside = place < torch.minimum(lengths, lengths[:count].repeat(groups))[:, None]
    same = (flush == flush[:count].repeat(groups, 1)) & inside
    alike = same.to(torch.uint8).cumprod(1).sum(1)
    alike[:count] = 0
    return alike


def _pack(
    ids: Tensor, valid: Tensor, place: Tensor, lengths: Tensor, alike: Tensor, groups: int, multiple: int
) -> PackedBatch:
    """`place` [B, L] is that of each slot in its row, `alike` [B] the length of each row's prefix."""
    own = lengths - alike
    order = torch.arange(len(ids)).view(groups, -1).t().flatten()  # the rows of a prompt next to one another
    start = torch.empty_like(own)
    start[order] = own[order].cumsum(0) - own[order]
    prefix_start = start[: len(ids) // groups].repeat(groups)
    stands_alone = place >= alike[:, None]
    token_index = torch.where(stands_alone, start[:, None] + place - alike[:, None], prefix_start[:, None] + place)
    token_index = token_index.where(valid, 0)
    unique = valid & stands_alone
    packed_ids, positions = ids.new_empty(2, int(own.sum()))
    packed_ids[token_index[unique]] = ids[unique]
    positions[token_index[unique]] = place.expand_as(ids)[unique]
    order = order[own[order] > 0]
    return _finish(
        packed_ids,
        positions,
        start[order],
        own[order],
        prefix_start[order].where(alike[order] > 0, 0),
        alike[order],
        token_index,
        valid,
        multiple,
    )


def _finish(
    ids: Tensor,
    positions: Tensor,
    starts: Tensor,
    lengths: Tensor,
    prefix_starts: Tensor,
    prefix_lengths: Tensor,
    token_index: Tensor,
    valid: Tensor,
    multiple: int,
) -> PackedBatch:
    """The record, from packed tokens and the segments in their order; filler is a segment of its own."""
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    row_counts = torch.bincount(token_index[valid], minlength=len(ids))
    filler = -len(ids) % multiple if len(ids) else multiple
    if filler:
        ids, row_counts = F.pad(ids, (0, filler)), F.pad(row_counts, (0, filler))
        starts = F.pad(starts, (0, 1), value=len(positions))
        positions = torch.cat([positions, torch.arange(filler)])
        lengths = F.pad(lengths, (0, 1), value=filler)
        prefix_starts, prefix_lengths = F.pad(prefix_starts, (0, 1)), F.pad(prefix_lengths, (0, 1))
    keys = prefix_lengths + lengths
    columns = (x.tolist() for x in (starts, lengths, prefix_starts, prefix_lengths))
    return PackedBatch(
        input_ids=ids[None],
        position_ids=positions[None],
        row_counts=row_counts[None],
        query_offsets=_offsets(lengths),
        key_offsets=_offsets(keys),
        shared=_shared_keys(starts, lengths, prefix_starts, prefix_lengths),
        max_queries=int(lengths.max()),
        max_keys=int(keys.max()),
        token_index=token_index,
        valid=valid,
        segments=tuple(Segment(*segment) for segment in zip(*columns, strict=True)),
    )


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _shared_keys(starts: Tensor, lengths: Tensor, prefix_starts: Tensor, prefix_lengths: Tensor) -> SharedKeys | None:
    if not prefix_lengths.any():
        return None
    keys = prefix_lengths + lengths
    total = int(keys.sum())

    def per_key(x: Tensor) -> Tensor:
        return x.repeat_interleave(keys, output_size=total)

    place = torch.arange(total) - per_key(keys.cumsum(0) - keys)
    in_prefix = place < per_key(prefix_lengths)
    index = place + torch.where(in_prefix, per_key(prefix_starts), per_key(starts - prefix_lengths))
    home = (~in_prefix).nonzero()[:, 0]  # segments follow one another, so these are in the order of packed tokens
    copy = in_prefix.nonzero()[:, 0]
    return SharedKeys(index, home, copy, index[copy])


# -------------------------------------------------------------------------------------------- back to the padded layout


class _Spread(torch.autograd.Function):
    """Packed values at their slots, zero elsewhere.

    The gradient of a token is gathered from its first slot, and those of its other slots are added. The backward of
    `index_select` would add all of them by atomics, which queue up where many padded slots read one token.
    """

    @staticmethod
    def forward(ctx, values, home_token, home_slot, copy_token, copy_slot, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(home_token, home_slot, copy_token, copy_slot)
        ctx.shape = values.shape
        padded = values.new_zeros(slots, *values.shape[1:])
        padded[home_slot] = values[home_token]
        padded[copy_slot] = values[copy_token]
        return padded

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        home_token, home_slot, copy_token, copy_slot = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape)
        total[home_token] = grad[home_slot]
        total.index_add_(0, copy_token, grad[copy_slot])
        return total, None, None, None, None, None


def _spread(values: Tensor, batch: PackedBatch) -> Tensor:
    slots = batch.valid.flatten().nonzero()[:, 0]
    tokens = batch.token_index.flatten()[slots]
    order = torch.argsort(tokens, stable=True)
    repeats = F.pad(tokens[order].diff() == 0, (1, 0))[: len(order)]
    index = [send(x, values.device) for part in (order[~repeats], order[repeats]) for x in (tokens[part], slots[part])]
    padded = _Spread.apply(values, *index, batch.valid.numel())
    return padded.view(*batch.valid.shape, *values.shape[1:])  # type: ignore[no-any-return]
