"""Oracles for packed rows and their attention, in plain loops."""

from typing import NamedTuple

import torch


class Expected(NamedTuple):
    """The layout that `pack_rows` documents, as Python lists."""

    ids: list
    positions: list
    counts: list
    segments: list
    """(start, length, prefix start, prefix length)"""
    rows: list
    """for each row the packed tokens that it is made of"""


def packed(rows, groups=1, share=True, multiple=1) -> Expected:
    """The first row of each prompt, then the part of its other rows after their common prefix with the first."""
    count = len(rows) // groups
    ids, positions, segments, token_rows = [], [], [], [None] * len(rows)
    for prompt in range(count):
        first_start = len(ids)
        for row in range(prompt, len(rows), count):
            tokens, alike = rows[row], 0
            if share and row != prompt:
                first = rows[prompt]
                while alike < min(len(tokens), len(first)) and tokens[alike] == first[alike]:
                    alike += 1
            start = len(ids)
            ids += tokens[alike:]
            positions += range(alike, len(tokens))
            if len(tokens) > alike:
                segments.append((start, len(tokens) - alike, first_start if alike else 0, alike))
            token_rows[row] = [*range(first_start, first_start + alike), *range(start, len(ids))]
    counts = [sum(token in row for row in token_rows) for token in range(len(ids))]
    filler = multiple if not ids else -len(ids) % multiple
    if filler:
        segments.append((len(ids), filler, 0, 0))
    return Expected(ids + [0] * filler, positions + list(range(filler)), counts + [0] * filler, segments, token_rows)


def assert_is(batch, expected: Expected) -> None:
    """Assert everything that a batch holds except the padded layout."""
    assert batch.input_ids.tolist() == [expected.ids]
    assert batch.position_ids.tolist() == [expected.positions]
    assert batch.row_counts.tolist() == [expected.counts]
    assert [tuple(segment) for segment in batch.segments] == expected.segments
    lengths = [length for _, length, _, _ in expected.segments]
    keys = [length + prefix for _, length, _, prefix in expected.segments]
    assert batch.query_offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.key_offsets.tolist() == [sum(keys[:i]) for i in range(len(keys) + 1)]
    assert batch.query_offsets.dtype == batch.key_offsets.dtype == torch.int32
    assert (batch.max_queries, batch.max_keys) == (max(lengths), max(keys))
    assert batch.tokens == len(expected.ids)
    keys_of_queries = [
        (token, token < start)
        for start, length, prefix, width in expected.segments
        for token in [*range(prefix, prefix + width), *range(start, start + length)]
    ]
    if keys == lengths:
        assert batch.shared is None
        return
    tokens, home, copy, source = (x.tolist() for x in batch.shared)
    assert tokens == [token for token, _ in keys_of_queries]
    assert [tokens[i] for i in home] == list(range(batch.tokens))
    assert copy == [i for i, (_, is_copy) in enumerate(keys_of_queries) if is_copy]
    assert not set(copy) & set(home)
    assert source == [tokens[i] for i in copy]


def assert_padded(batch, rows, slots, width) -> None:
    """Assert that each row's tokens start at its slot in the padded layout."""
    assert batch.valid.shape == batch.token_index.shape == (len(rows), width)
    for tokens, first, index, valid in zip(rows, slots, batch.token_index, batch.valid, strict=True):
        assert valid.tolist() == [first <= i < first + len(tokens) for i in range(width)]
        assert batch.input_ids[0, index[valid]].tolist() == tokens
        assert batch.position_ids[0, index[valid]].tolist() == list(range(len(tokens)))
        assert not index[~valid].any()


def attention(query, key, value, batch, scale, window=None, by_row=None):
    """[1, H, S, d] -> [1, S, H, d] in fp64: each row separately under a dense mask, zero for filler tokens.

    A shared token gets the output of its first row.
    """
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
    out = q.new_zeros(1, q.shape[2], q.shape[1], v.shape[-1])
    done_tokens = set()
    for index, valid in zip(batch.token_index, batch.valid, strict=True):
        tokens = index[valid].to(q.device)
        fresh = [i for i, token in enumerate(tokens.tolist()) if token not in done_tokens]
        done_tokens |= set(tokens.tolist())
        if fresh:
            row_out = dense(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], scale, window).transpose(1, 2)
            out = out.index_copy(1, tokens[fresh], row_out[:, fresh])
    return out


def dense(query, key, value, scale, window=None):
    """Causal attention over at most `window` tokens including the query's own, [B, H, T, d] -> [B, H, T, d]."""
    place = torch.arange(query.shape[2], device=query.device)
    back = place[:, None] - place[None]
    mask = back >= 0 if window is None else (back >= 0) & (back < window)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value
