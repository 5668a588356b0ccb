"""From token ids and masks to targets, and from per-token to per-sequence values. Imports torch alone.

Every function refuses tensors that are not plain memory, such as DTensors, with a TypeError.

T is the length of a row, B the number of rows. `labels[t]` is the token at t, -100 where it does not count;
`targets[t]` is the label at t + 1, which the hidden state at t predicts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedalign.checks import check_plain, values_within


class Pairs(NamedTuple):
    """The two halves of a batch that holds all chosen rows first, then all rejected rows, in the same order."""

    chosen: Tensor
    """[B, ...]"""
    rejected: Tensor
    """[B, ...]"""


class PreferencePair(NamedTuple):
    """The inputs of preference losses, from one batch of pairs; all [B]."""

    chosen_logps: Tensor
    """summed over the completion, nats"""
    rejected_logps: Tensor
    """summed over the completion, nats"""
    chosen_lengths: Tensor
    """int64, tokens of the completion"""
    rejected_lengths: Tensor
    """int64, tokens of the completion"""

    @property
    def chosen_mean_logps(self) -> Tensor:
        """averaged over the completion; 0 for an empty one"""
        return self.chosen_logps / self.chosen_lengths.clamp(min=1)

    @property
    def rejected_mean_logps(self) -> Tensor:
        """averaged over the completion; 0 for an empty one"""
        return self.rejected_logps / self.rejected_lengths.clamp(min=1)


def completion_labels(input_ids: Tensor, completion_mask: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels that count in the completion only.

    Args:
        input_ids: [B, T] int64.
        completion_mask: [B, T] bool (or 0/1), the completion's tokens; False on prompt and padding.
        ignore_index: the label of all other positions.

    Returns:
        [B, T] int64; unshifted.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> completion_labels(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])).tolist()
        [[-100, 6, 7]]
    """
    _check_same_shape("completion_mask", completion_mask, "input_ids", input_ids)
    return input_ids.masked_fill(~completion_mask.bool(), ignore_index)


def completion_mask(prompt_lengths: Tensor, attention_mask: Tensor) -> Tensor:
    """Which tokens belong to the completion, from how long each prompt is.

    Args:
        prompt_lengths: [B] integers, the prompt's tokens of each row, padding not counted.
        attention_mask: [B, T] bool (or 0/1), False on padding, on either side.

    Returns:
        [B, T] bool.

    Raises:
        ValueError: not one prompt length a row, or, of those on the CPU, a negative one.

    Example:
        >>> completion_mask(torch.tensor([1, 2]), torch.tensor([[0, 1, 1], [1, 1, 1]])).int().tolist()
        [[0, 0, 1], [0, 0, 1]]
    """
    check_plain(prompt_lengths=prompt_lengths, attention_mask=attention_mask)
    if prompt_lengths.shape != attention_mask.shape[:1]:
        expected, got = tuple(attention_mask.shape[:1]), tuple(prompt_lengths.shape)
        raise ValueError(f"prompt_lengths must have shape {expected} to match attention_mask, got {got}")
    prompt_lengths = values_within("prompt_lengths", prompt_lengths.float(), least=0.0)
    attention_mask = attention_mask.bool()
    return attention_mask & (attention_mask.cumsum(-1) > prompt_lengths[:, None])


def shift_labels(labels: Tensor, *, position_ids: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Targets aligned with the hidden states, which need no shift or copy themselves.

    Args:
        labels: [..., T] int64, unshifted.
        position_ids: [..., T], for packed rows: a 0 starts a new segment, and no token targets the next segment.
        ignore_index: the target of the last token of a row or segment, which predicts nothing.

    Returns:
        [..., T] int64: `targets[..., t] = labels[..., t + 1]`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> shift_labels(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]])).tolist()
        [[6, -100, 8, -100]]
    """
    check_plain(labels=labels)
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    if position_ids is not None:
        _check_same_shape("position_ids", position_ids, "labels", labels)
        targets[..., :-1].masked_fill_(position_ids[..., 1:] == 0, ignore_index)
    return targets


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the masked-in values of each row; 0 for a row without any.

    Args:
        values: [..., T], per-token values such as logps.
        mask: [..., T] bool (or 0/1); other values have no influence, not even NaN.

    Returns:
        [...], in the dtype of `values`.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("mask", mask, "values", values)
    return values.where(mask.bool(), 0).sum(-1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked-in values of each row; 0, with a gradient of 0, for a row without any.

    Args and Raises: as `sequence_sum`.

    Returns:
        [...], in the dtype of `values`.
    """
    return sequence_sum(values, mask) / mask.bool().sum(-1).clamp(min=1)


def segment_sum(values: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Sum of the masked-in values of each segment of packed rows, in the order of the segments.

    Args:
        values: [..., T], per-token values.
        mask: [..., T] bool (or 0/1), which count.
        position_ids: [..., T]; a 0 starts a new segment, so does a new row.

    Returns:
        [S], one for each of the S segments; waits for the device once, to learn S.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> ones = torch.ones(1, 5)
        >>> segment_sum(ones, ones, torch.tensor([[0, 1, 2, 0, 1]])).tolist()
        [3.0, 2.0]
    """
    _check_same_shape("mask", mask, "values", values)
    _check_same_shape("position_ids", position_ids, "values", values)
    starts = position_ids == 0
    starts[..., :1] = True
    segment = starts.flatten().cumsum(0) - 1
    count = int(segment[-1]) + 1 if len(segment) else 0
    # `index_add` adds sequentially: in fp32 the error would grow with the tokens, in bf16 sums would stop growing.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    counted = values.where(mask.bool(), 0).flatten().to(dtype)
    return counted.new_zeros(count).index_add(0, segment, counted).to(values.dtype)


def split_pairs(values: Tensor) -> Pairs:
    """Halves of a batch with all chosen rows first, then all rejected ones.

    Args:
        values: [2 * B, ...].

    Raises:
        ValueError: an odd number of rows.

    Example:
        >>> split_pairs(torch.tensor([1, 2, 3, 4])).rejected.tolist()
        [3, 4]
    """
    check_plain(values=values)
    if values.shape[0] % 2:
        raise ValueError(f"pairs need an even number of rows (all chosen, then all rejected), got {values.shape[0]}")
    return Pairs(*values.chunk(2)) if len(values) else Pairs(values, values)


def preference_pair(logps: Tensor, mask: Tensor) -> PreferencePair:
    """The inputs of preference losses, from per-token values of a batch of pairs, all chosen rows first.

    Args:
        logps: [2 * B, T], per-token logps, nats.
        mask: [2 * B, T] bool (or 0/1), the completions' tokens; other logps have no influence.

    Returns:
        `PreferencePair`.

    Raises:
        ValueError: the shapes differ, or an odd number of rows.

    Example:
        >>> pair = preference_pair(torch.tensor([[-1.0, -3.0], [-5.0, -9.0]]), torch.tensor([[1, 1], [1, 0]]))
        >>> pair.chosen_mean_logps.item(), pair.rejected_logps.item()
        (-2.0, -5.0)
    """
    check_plain(logps=logps, mask=mask)
    return PreferencePair(*split_pairs(sequence_sum(logps, mask)), *split_pairs(mask.bool().sum(-1)))


def _check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    check_plain(**{other_name: other, name: x})
    if x.shape != other.shape:
        raise ValueError(f"{name} must have shape {tuple(other.shape)} to match {other_name}, got {tuple(x.shape)}")
