"""Layouts of packed rows against plain loops, and the operations on them."""

import pickle

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedalign.packing import RightPadded, pack_answers, pack_documents, pack_padded, pack_rows

few = settings(deadline=None, max_examples=40, derandomize=True)
tokens = st.integers(1, 3)  # so few that random rows share prefixes or are equal
rows_of = lambda n: st.lists(st.lists(tokens, max_size=6), min_size=n, max_size=n)  # noqa: E731
batches = st.integers(1, 3).flatmap(
    lambda groups: st.tuples(st.just(groups), st.integers(0, 4).flatmap(lambda n: rows_of(groups * n)))
)
options = st.fixed_dictionaries({"share": st.booleans(), "multiple": st.sampled_from([1, 4, 7])})


def width_of(rows):
    return max(map(len, rows), default=0)


@few
@given(batches, options)
def test_pack_rows_equals_the_plain_loop(batch, options):
    groups, rows = batch
    layout = pack_rows(rows, groups=groups, **options)
    oracles.assert_is(layout, oracles.packed(rows, groups, **options))
    oracles.assert_padded(layout, rows, [0] * len(rows), width_of(rows))


@few
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(rows_of(n), st.lists(rows_of(n), max_size=3))), options)
def test_pack_answers_equals_the_plain_loop(batch, options):
    prompts, answers = batch
    rows = [prompt + answer for each in answers for prompt, answer in zip(prompts, each, strict=True)]
    layout = pack_answers(prompts, *answers, **options)
    oracles.assert_is(layout, oracles.packed(rows, max(1, len(answers)), **options))
    oracles.assert_padded(layout, rows, [0] * len(rows), width_of(rows))


@few
@given(batches, options, st.data())
def test_pack_padded_equals_the_plain_loop(batch, options, data):
    """Padding on the left, on the right or on both sides; ids at padding are ignored."""
    groups, rows = batch
    width = width_of(rows) + data.draw(st.integers(0, 3))
    slots = [data.draw(st.integers(0, width - len(row))) for row in rows]
    ids, mask = torch.randint(1, 4, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        ids[i, slot : slot + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, slot : slot + len(row)] = 1
    mask = mask.bool() if data.draw(st.booleans()) else mask
    layout = pack_padded(ids, mask, groups=groups, **options)
    oracles.assert_is(layout, oracles.packed(rows, groups, **options))
    oracles.assert_padded(layout, rows, slots, width)


@few
@given(st.integers(1, 3), st.integers(1, 8), st.sampled_from([1, 4]), st.data())
def test_pack_documents_equals_the_plain_loop(count, width, multiple, data):
    """A row starts a document whatever its first position is (strategy `wrapped` cuts documents)."""
    ids, positions, documents = torch.randint(1, 9, (count, width)), [], []
    for row in ids.tolist():
        starts = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
        first = data.draw(st.integers(0, 5))
        own = []
        for i, begins in enumerate(starts):
            if begins or i == 0:
                documents.append([])
                own.append(first if i == 0 and not begins else 0)
            else:
                own.append(own[-1] + 1)
            documents[-1].append(row[i])
        positions.append(own)
    layout = pack_documents(ids, torch.tensor(positions), multiple=multiple)
    expected = oracles.packed(documents, multiple=multiple)
    given_positions = [x for row in positions for x in row]
    oracles.assert_is(layout, expected._replace(positions=given_positions + expected.positions[len(given_positions) :]))
    assert layout.valid.all()
    assert torch.equal(layout.token_index.flatten(), torch.arange(count * width))
    assert torch.equal(layout.input_ids[0, layout.token_index], ids)


def test_64_pairs_are_packed_like_the_plain_loop():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (3, 64), generator=g).tolist()
    prompts, chosen, rejected = ([torch.randint(1, 50, (n,), generator=g).tolist() for n in row] for row in lengths)
    rows = [p + a for each in (chosen, rejected) for p, a in zip(prompts, each, strict=True)]
    oracles.assert_is(pack_answers(prompts, chosen, rejected), oracles.packed(rows, 2))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([5, 6, 7], [5, 6, 8], [5, 6, 7, 8]),
        ([5, 7], [5, 8], [5, 7, 8]),  # a prompt of one token
        ([5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8, 9]),  # answers with a common prefix
        ([5, 6], [5, 6], [5, 6]),
        ([5, 6], [5, 6, 7], [5, 6, 7]),
        ([5, 6, 7], [5, 6], [5, 6, 7]),
        ([6, 7], [5, 6, 8], [6, 7, 5, 6, 8]),  # cut at the beginning
        ([5, 6], [], [5, 6]),
        ([], [5, 6], [5, 6]),
        ([], [], [0]),  # a layout has at least one token
    ],
)
def test_a_pair_shares_its_common_prefix(chosen, rejected, expected):
    layout = pack_rows([chosen, rejected], groups=2)
    assert layout.input_ids.tolist() == [expected]
    oracles.assert_padded(layout, [chosen, rejected], [0, 0], max(len(chosen), len(rejected)))


def test_rows_may_be_tensors():
    layout = pack_rows([torch.tensor([5, 6], dtype=torch.int32), torch.tensor([5, 7])], groups=2)
    assert layout.input_ids.tolist() == [[5, 6, 7]]
    assert layout.input_ids.dtype == torch.int64


@few
@given(batches, st.sampled_from([torch.float64, torch.bfloat16]), st.sampled_from([(), (3,)]))
def test_row_means_equal_means_of_each_row(batch, dtype, trailing):
    groups, rows = batch
    layout = pack_rows(rows, groups=groups, multiple=4)
    values = torch.randn(layout.tokens, *trailing).to(dtype)
    means = layout.row_means(values)
    assert means.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert means.shape == (len(rows), *trailing)
    for mean, tokens in zip(means, oracles.packed(rows, groups).rows, strict=True):
        want = values[tokens].double().mean(0) if tokens else torch.zeros(trailing)
        torch.testing.assert_close(mean, want.to(mean.dtype))


@few
@given(batches, st.integers(0, 2**31))
def test_spread_returns_values_to_their_rows(batch, seed):
    groups, rows = batch
    layout = pack_rows(rows, groups=groups, multiple=4)
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.tokens, 2, generator=g, dtype=torch.float64, requires_grad=True)
    got = layout.spread(values)
    want = values[layout.token_index] * layout.valid[..., None]
    assert torch.equal(got, want)
    upstream = torch.randn(got.shape, generator=g, dtype=torch.float64)
    grads = [torch.autograd.grad(x, values, upstream, allow_unused=True)[0] for x in (got, want)]
    torch.testing.assert_close(*(torch.zeros_like(values) if x is None else x for x in grads))


def test_spread_passes_gradcheck_and_takes_integers():
    layout = pack_rows([[5, 6, 7], [5, 6, 8, 9], [5], [5]], groups=2)
    flat = torch.randn(layout.tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.spread, (flat,))
    counts = torch.arange(layout.tokens)
    assert torch.equal(layout.spread(counts), counts[layout.token_index] * layout.valid)


MODEL_TENSORS = ("input_ids", "position_ids", "row_counts", "query_offsets", "key_offsets")
LAYOUTS = {
    "shared": lambda: pack_rows([[5, 6, 7], [5, 6, 8]], groups=2),
    "not shared": lambda: pack_rows([[5, 6, 7], [5, 6, 8]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("move", [lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.to("cpu", non_blocking=True)])
def test_pickled_and_moved_layouts_are_equal(name, move):
    layout = LAYOUTS[name]()
    copy = move(layout)
    for field in (*MODEL_TENSORS, "token_index", "valid"):
        assert torch.equal(getattr(copy, field), getattr(layout, field)), field
    assert copy.segments == layout.segments
    assert (copy.max_queries, copy.max_keys) == (layout.max_queries, layout.max_keys)
    assert (copy.shared is None) == (layout.shared is None)
    assert layout.shared is None or all(map(torch.equal, copy.shared, layout.shared))


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_model_tensors_move_to_the_device(name):
    """`to` moves the tensors that the model reads; index tensors stay on the CPU."""
    moved = LAYOUTS[name]().to("meta")
    model_tensors = [getattr(moved, field) for field in MODEL_TENSORS] + list(moved.shared or ())
    assert {x.device.type for x in model_tensors} == {"meta"}
    assert {moved.token_index.device.type, moved.valid.device.type} == {"cpu"}


def test_pin_memory_pins_the_layout(monkeypatch):
    """The DataLoader pins batches through their `pin_memory` method."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    from torch.utils.data._utils.pin_memory import pin_memory

    layout = LAYOUTS["shared"]()
    pinned = pin_memory({"layout": layout})["layout"]
    assert torch.equal(pinned.input_ids, layout.input_ids + 1)
    assert torch.equal(pinned.shared.copy, layout.shared.copy + 1)
    assert torch.equal(pinned.token_index, layout.token_index)


def test_right_padded_layouts_move_and_pickle():
    layout = RightPadded()
    assert layout.to("meta") is layout
    assert isinstance(pickle.loads(pickle.dumps(layout)), RightPadded)


class _Sharded(torch.Tensor):
    """A tensor subclass with its own arithmetic, like DTensor."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("its arithmetic was asked for")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_rows([[1], [2], [3]], groups=2), r"rows must be a multiple of groups=2, got 3"),
        (lambda: pack_rows([[1]], groups=0), r"rows must be a multiple of groups=0, got 1"),
        (lambda: pack_answers([[1]], [[2]], [[3], [4]]), r"one row for each of 1 prompts, got 2"),
        (
            lambda: pack_padded(torch.ones(2, 3).long(), torch.ones(2, 4)),
            r"must both be \[rows, length\], got \(2, 3\) and \(2, 4\)",
        ),
        (lambda: pack_padded(torch.ones(3).long(), torch.ones(3)), r"must both be \[rows, length\], got \(3,\)"),
        (
            lambda: pack_padded(torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [1, 0, 1]])),
            "no padding within a row, got a row with tokens on both sides",
        ),
        (
            lambda: pack_documents(torch.ones(2, 3).long(), torch.zeros(2, 4).long()),
            r"must both be \[rows, length\], got \(2, 3\) and \(2, 4\)",
        ),
    ],
)
def test_bad_rows_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("pack", [pack_padded, pack_documents])
def test_tensors_that_are_not_plain_are_refused(pack):
    ids = torch.ones(2, 3).long()
    with pytest.raises(TypeError, match="_Sharded"):
        pack(ids.as_subclass(_Sharded), ids)
    with pytest.raises(TypeError, match="_Sharded"):
        pack(ids, ids.as_subclass(_Sharded))


@pytest.mark.parametrize("pack", [lambda x: pack_rows([x]), lambda x: pack_padded(x[None], torch.ones(1, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_token_ids_that_are_not_integers_are_refused(pack, dtype):
    with pytest.raises(TypeError, match="token ids must be integers, got torch"):
        pack(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("multiple", [0, -64])
def test_a_multiple_below_1_is_refused(multiple):
    with pytest.raises(ValueError, match=f"multiple must be at least 1, got {multiple}"):
        pack_rows([[1, 2]], multiple=multiple)
