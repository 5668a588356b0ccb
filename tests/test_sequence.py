"""Shifts, masks, sums and pairs."""

import re

import pytest
import torch

from fusedalign import linear_logps, simpo_loss
from fusedalign.sequence import (
    completion_labels,
    completion_mask,
    preference_pair,
    segment_sum,
    sequence_mean,
    sequence_sum,
    shift_labels,
    split_pairs,
)


def test_shift_labels_aligns_with_hidden_states():
    labels = torch.randint(0, 50, (3, 7))
    targets = shift_labels(labels)
    assert torch.equal(targets[:, :-1], labels[:, 1:])
    assert (targets[:, -1] == -100).all()
    assert torch.equal(shift_labels(labels[0]), targets[0])


def test_other_ignore_index_values_work():
    """For the last token of a row, of a segment, and for tokens outside the completion."""
    labels, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    assert shift_labels(labels, ignore_index=-1).tolist() == [[6, 7, 8, -1]]
    assert shift_labels(labels, position_ids=positions, ignore_index=-1).tolist() == [[6, -1, 8, -1]]
    assert completion_labels(labels, positions, ignore_index=-1).tolist() == [[-1, 6, -1, 8]]


def test_shifted_targets_score_like_shifted_hidden_states():
    hidden, weight, labels = torch.randn(3, 7, 8), torch.randn(50, 8), torch.randint(0, 50, (3, 7))
    logps = linear_logps(hidden, weight, shift_labels(labels)).logps
    shifted = linear_logps(hidden[:, :-1], weight, labels[:, 1:].contiguous()).logps
    torch.testing.assert_close(logps[:, :-1], shifted)
    assert not logps[:, -1].any()


def test_packed_segments_equal_padded_rows():
    """Three sequences, packed in one row and padded in three: equal sums, and no target crosses a segment boundary."""
    weight, lengths = torch.randn(50, 8), (4, 1, 3)
    hiddens = [torch.randn(n, 8) for n in lengths]
    labels = [torch.randint(0, 50, (n,)) for n in lengths]
    packed_positions = torch.cat([torch.arange(n) for n in lengths])[None]
    targets = shift_labels(torch.cat(labels)[None], position_ids=packed_positions)
    packed = linear_logps(torch.cat(hiddens)[None], weight, targets)
    got = segment_sum(packed.logps, targets != -100, packed_positions)
    padded_hidden = torch.nn.utils.rnn.pad_sequence(hiddens, batch_first=True)
    padded_targets = shift_labels(torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100))
    padded = linear_logps(padded_hidden, weight, padded_targets)
    torch.testing.assert_close(got, sequence_sum(padded.logps, padded_targets != -100))
    assert got[1] == 0  # one token predicts nothing


def test_each_row_starts_a_new_segment():
    ones = torch.ones(2, 3)
    positions = torch.tensor([[0, 1, 0], [5, 6, 7]])  # the second row starts in the middle of a text
    assert segment_sum(ones, ones, positions).tolist() == [2, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_bf16_segments_are_summed_without_loss(dtype):
    """Summed sequentially in bf16, 4097 numbers near -1 would stop at -256."""
    values, ones = torch.full((1, 40_000), -1.1, dtype=dtype), torch.ones(1, 40_000)
    (got,) = segment_sum(values, ones, torch.arange(40_000)[None])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), values.double().sum(), rtol=torch.finfo(dtype).eps, atol=0)


def test_segment_sum_gradients_reach_their_tokens():
    values = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask, positions = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0], [3, 4, 0, 1]])
    segment_sum(values, mask, positions).backward(torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64))
    assert values.grad.tolist() == [[2, 2, 0, 3], [0, 5, 7, 7]]


def test_rows_without_tokens_have_no_segments():
    assert segment_sum(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0)).shape == (0,)


@pytest.mark.parametrize("left", [False, True])
def test_completion_mask_allows_padding_on_either_side(left):
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    attention = attention.flip(-1) if left else attention
    mask = completion_mask(torch.tensor([2, 2, 0]), attention)
    assert mask.sum(-1).tolist() == [2, 0, 0]
    assert mask[0].int().tolist() == ([0, 0, 0, 1, 1] if left else [0, 0, 1, 1, 0])
    assert mask.dtype == torch.bool  # ~mask of an integer mask is -1 and -2


def test_completion_labels_ignore_prompt_and_padding():
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    assert completion_labels(ids, torch.tensor([[False, True, True], [False, False, False]])).tolist() == [
        [-100, 6, 7],
        [-100, -100, -100],
    ]


@pytest.mark.parametrize("f", [sequence_sum, sequence_mean])
def test_masked_values_have_no_influence(f):
    values = torch.tensor([[1.0, 2.0, torch.nan], [torch.inf, 3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    out = f(values, mask)
    assert out.tolist() == ([3, 8] if f is sequence_sum else [1.5, 4])
    out.sum().backward()
    assert torch.isfinite(values.grad).all()
    assert values.grad[0, 2] == values.grad[1, 0] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_masked_values_have_no_influence_on_segments(bad):
    values = torch.tensor([[1.0, 2.0, bad], [bad, 3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    out = segment_sum(values, mask, torch.tensor([[0, 1, 2], [0, 1, 0]]))
    assert out.tolist() == [3, 3, 5]
    out.sum().backward()
    assert torch.equal(values.grad, mask.float())


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_keep_the_dtype_of_the_values(dtype, mask_dtype):
    """Whatever the mask's dtype; lengths are int64."""
    values, mask = torch.ones(2, 3, dtype=dtype), torch.tensor([[1, 1, 0], [1, 0, 0]]).to(mask_dtype)
    pair = preference_pair(values, mask)
    for x in (sequence_sum(values, mask), sequence_mean(values, mask), pair.chosen_logps, pair.rejected_mean_logps):
        assert x.dtype == dtype
    assert pair.chosen_lengths.dtype == pair.rejected_lengths.dtype == torch.int64
    assert completion_mask(torch.zeros(2, dtype=torch.int64), mask).dtype == torch.bool


@pytest.mark.parametrize("f", [sequence_sum, sequence_mean])
def test_an_empty_completion_is_zero_with_zero_gradient(f):
    values = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    out = f(values, mask)
    assert out[0] == 0
    out.sum().backward()
    assert not values.grad[0].any()
    assert values.grad[1].all()


def test_split_pairs_returns_chosen_and_rejected_halves():
    chosen, rejected = split_pairs(torch.arange(12).view(6, 2))
    assert chosen.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert rejected.tolist() == [[6, 7], [8, 9], [10, 11]]
    assert split_pairs(torch.zeros(0, 3)).rejected.shape == (0, 3)


def test_preference_pair_is_three_lines_from_a_batch_to_a_loss():
    hidden, weight = torch.randn(4, 5, 8), torch.randn(30, 8)
    targets = torch.randint(0, 30, (4, 5)).masked_fill(torch.rand(4, 5) < 0.4, -100)
    targets[1] = targets[2] = -100  # a chosen and a rejected completion that are empty
    pair = preference_pair(linear_logps(hidden, weight, targets).logps, targets != -100)
    losses = simpo_loss(pair.chosen_mean_logps, pair.rejected_mean_logps).losses
    assert losses.shape == (2,)
    assert torch.isfinite(losses).all()
    assert pair.chosen_logps[1] == pair.chosen_mean_logps[1] == pair.rejected_mean_logps[0] == 0
    assert pair.rejected_lengths.tolist() == (targets[2:] != -100).sum(-1).tolist()
    torch.testing.assert_close(pair.rejected_mean_logps[1], pair.rejected_logps[1] / pair.rejected_lengths[1])


ONES = torch.ones(2, 3)
BAD = [
    (lambda: sequence_sum(ONES, ONES[:1]), "mask must have shape (2, 3) to match values, got (1, 3)"),
    (lambda: sequence_mean(ONES, ONES[:, :1]), "mask must have shape (2, 3) to match values, got (2, 1)"),
    (lambda: shift_labels(ONES.long(), position_ids=ONES[0]), "position_ids must have shape (2, 3)"),
    (lambda: completion_labels(ONES.long(), ONES[0]), "completion_mask must have shape (2, 3) to match input_ids"),
    (
        lambda: completion_mask(torch.ones(3), ONES),
        "prompt_lengths must have shape (2,) to match attention_mask, got (3,)",
    ),
    (lambda: segment_sum(ONES, ONES[:, :1], ONES), "mask must have shape (2, 3) to match values, got (2, 1)"),
    (lambda: segment_sum(ONES, ONES, ONES[0]), "position_ids must have shape (2, 3) to match values, got (3,)"),
    (
        lambda: completion_mask(torch.tensor([1, -2]), ONES),
        "prompt_lengths must be finite and >= 0, got -2",
    ),
    (lambda: completion_mask(torch.tensor([1, torch.nan]), ONES), "prompt_lengths must be finite and >= 0, got nan"),
    (lambda: split_pairs(torch.zeros(3, 2)), "pairs need an even number of rows"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_shapes_raise(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
