"""The attention of packed and of right-padded rows against dense masks in fp64, values and gradients."""

import inspect
import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F

from fusedalign.packing import attention as packed_attention
from fusedalign.packing import pack_padded, pack_rows
from fusedalign.packing.attention import _causal, _segments, _varlen, _WithPrefixes, varlen_attention

#: Groups of 2 and 3: a shared prefix, equal rows, a row that is a prefix, an empty row, nothing shared.
ROWS = [
    [3, 4, 5, 6, 7, 8, 9],
    [3, 4, 5],
    [6, 7],
    [8, 9, 4],
    [3, 4, 1, 1],
    [3, 4, 5, 6],
    [3, 4, 5, 6, 1, 2, 1, 2],
    [3, 4, 5],
    [3, 4, 5, 6, 2],
    [],
    [6, 7, 9, 9, 9, 9],
    [8],
]
WINDOWS = [None, 1, 3, 5, 100]
HEADS = [(2, 2), (4, 2), (3, 1)]


def operands(batch, heads, sizes=(8, 8), dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    tensors = (torch.randn(1, n, batch.tokens, size, generator=g) * 1.5 for n, size in shapes)
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def values_and_grads(f, operands, real):
    """The output of tokens [0, real), and gradients of a loss that weights each number differently."""
    out = f(*operands)[:, :real].double()
    direction = torch.linspace(1, 9, out.numel(), dtype=torch.float64, device=out.device).sin().view_as(out)
    return [out.detach(), *(x.double() for x in torch.autograd.grad((out * direction).sum(), operands))]


def eager_varlen(q, k, v, query_offsets, key_offsets, max_q, max_k, scale, window_size):
    """`torch.nn.attention.varlen.varlen_attn` in eager code, one segment at a time."""
    left, right = window_size
    assert right == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for (a, b), (c, d) in zip(
        *(itertools.pairwise(x) for x in (query_offsets.tolist(), key_offsets.tolist())), strict=True
    ):
        assert b - a <= max_q
        assert d - c <= max_k
        back = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        mask = (back >= 0) & ((back <= left) | (left < 0))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outs)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return eager_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5, (-1, 0))


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return eager_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    return eager_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def operator(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout, is_causal, debug, *, scale, **window):
    """Stand-in for the operator behind `varlen_attn`."""
    left, right = window["window_size_left"], window["window_size_right"]
    assert (dropout, is_causal, debug) == (0.0, left < 0, False)
    return (eager_varlen(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, scale, (left, right)),)


@pytest.fixture(params=["segments", operator, varlen_2_10, varlen_2_11, varlen_2_13])
def attend(request, monkeypatch):
    """Each attention path; eager code replaces the kernel, so that the code around it is tested without a GPU."""
    if request.param == "segments":
        return _segments
    monkeypatch.setattr(packed_attention, "_has_operator", lambda: request.param is operator)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    monkeypatch.setattr(packed_attention, "varlen_attention", lambda: request.param)
    parameters = frozenset(inspect.signature(request.param).parameters)
    monkeypatch.setattr(packed_attention, "_varlen_parameters", lambda: parameters)
    return _varlen


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_packed_attention_equals_dense_attention(attend, groups, heads, window):
    batch = pack_rows(ROWS, groups=groups, multiple=11)
    assert (batch.shared is None) == (groups == 1)
    real = int((batch.row_counts > 0).sum())
    assert batch.tokens > real  # there are filler tokens
    inputs, scale = operands(batch, heads, (12, 7)), 0.7
    if window is not None and attend is _varlen and packed_attention.varlen_attention() is varlen_2_10:
        with pytest.raises(packed_attention.LayoutError, match=r"attention with a window needs PyTorch 2\.11"):
            attend(*inputs, batch, scale, window)
        return
    got = values_and_grads(lambda q, k, v: attend(q, k, v, batch, scale, window), inputs, real)
    want = values_and_grads(lambda q, k, v: oracles.attention(q, k, v, batch, scale, window), inputs, real)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_right_padded_attention_equals_dense_attention(heads, window):
    inputs = operands(pack_rows([range(1, 10)]), heads, (8, 5))
    got = values_and_grads(lambda q, k, v: _causal(q, k, v, 0.7, window), inputs, 9)
    repeats = heads[0] // heads[1]
    want = values_and_grads(
        lambda q, k, v: oracles.dense(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), 0.7, window),
        inputs,
        9,
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_of_shared_keys_are_summed():
    batch = pack_rows(ROWS, groups=3)
    keys, values = (torch.randn(batch.tokens, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert batch.shared is not None
    assert torch.autograd.gradcheck(lambda k, v: _WithPrefixes.apply(k, v, *batch.shared), (keys, values))


# On a GPU

SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


def padded_sdpa(query, key, value, batch, scale, window):
    """The same result from padded rows: SDPA with a mask, each row separately."""
    index, valid = batch.token_index.to(query.device), batch.valid.to(query.device)
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    place = torch.arange(index.shape[1], device=query.device)
    back = place[:, None] - place[None]
    allowed = (back >= 0) if window is None else (back >= 0) & (back < window)
    allowed = allowed & valid[:, None, None, :] | torch.eye(len(place), dtype=torch.bool, device=query.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(1, 2)
    packed = out.new_zeros(batch.tokens, *out.shape[2:])
    for row, mask, tokens in reversed(list(zip(out, valid, index, strict=True))):  # first row wins
        packed = packed.index_copy(0, tokens[mask], row[mask])
    return packed[None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(varlen_attention() is None, reason="needs torch.nn.attention.varlen")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 37])
def test_the_kernel_error_is_at_most_twice_that_of_sdpa(dtype, sizes, heads, window):
    """Its error against fp64 is at most twice that of SDPA on padded rows, plus half an ulp."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for length, own in ((70, 50), (1, 130), (200, 1), (40, 0)):
        prompt = torch.randint(0, 99, (length,), generator=g).tolist()
        rows.append([prompt + torch.randint(0, 99, (own + i,), generator=g).tolist() for i in (0, 9)])
    rows = [row for side in zip(*rows, strict=True) for row in side]
    batch = pack_rows(rows, groups=2, multiple=64)
    assert batch.shared is not None
    real, device = int((batch.row_counts > 0).sum()), batch.to("cuda")
    inputs, scale = operands(batch, heads, sizes, dtype, "cuda"), sizes[0] ** -0.5
    got = values_and_grads(lambda q, k, v: _varlen(q, k, v, device, scale, window), inputs, real)
    eager = values_and_grads(lambda q, k, v: padded_sdpa(q, k, v, batch, scale, window), inputs, real)
    exact = values_and_grads(
        lambda q, k, v: oracles.attention(q, k, v, batch, scale, window), [x.double() for x in inputs], real
    )
    for name, a, b, want in zip(("out", "dq", "dk", "dv"), got, eager, exact, strict=True):
        rounding = torch.finfo(dtype).eps * want.abs().max().item()
        budget = 2 * (b - want).abs().max().item() + rounding
        error = (a - want).abs().max().item()
        assert math.isfinite(error), name
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"
    assert not any(x.grad is not None for x in inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layout_copied_to_the_gpu_is_used_from_the_gpu(tmp_path):
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]], device="cuda")
    batch = pack_padded(ids, (ids > 0).long(), groups=2)
    assert batch.input_ids.device.type == "cpu"
    pinned = batch.pin_memory()
    assert pinned.input_ids.is_pinned()
    assert pinned.shared.tokens.is_pinned()
    layout = pinned.to("cuda", non_blocking=True)
    assert {layout.input_ids.device.type, layout.shared.tokens.device.type} == {"cuda"}
    assert torch.equal(layout.input_ids.cpu(), batch.input_ids)
    values = torch.randn(batch.tokens, 3, device="cuda")
    assert torch.equal(batch.spread(values).cpu(), batch.spread(values.cpu()))
