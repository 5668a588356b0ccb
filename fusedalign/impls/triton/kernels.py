"""Device code: blocks of logits in registers, and what is computed from them. `launch.py` calls these kernels.

Every kernel works on `[BLOCK_N, BLOCK_V]` blocks, tokens by vocabulary columns. A block of logits is a product that the
kernel computes itself (half-precision operands, fp32 sums, through tensor descriptors where the GPU has them), or is
read from a tile that the library's product has written (`SOURCE`). Sums have a fixed order, so two runs agree bitwise.

Names: z final logits, e = exp(z - the row's largest z in this half of a block), rows and cols positions in the operands
of this call, row and col the first of a block, target a token's column in this call. Arguments that are None switch
their part of a kernel off. Helpers take tuples: operands = (hidden, weight, d, weight_start, hidden_stride,
weight_stride), head = (bias, v_start, in_scale, out_scale).

**No compiled variant depends on the number of tokens**, which differs at every step. Triton compiles anew where an
integer becomes 1 or (not) a multiple of 16, or a pointer (not) 16-byte aligned: sizes, starts and vectors of one number
per token are exempt from that. A size that must be known to be a multiple of 16, for wide loads and stores, is passed
as a count of units, `UNIT` a constant.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: fp16 keeps e = 1 as 2**15, so that 1.8e-12 of the row's largest value is still not zero.
KEPT_ONE = tl.constexpr(32768.0)
#: Stands in for -inf in a difference whose exp() must be 0 and whose product with 0 must be 0.
LOG_ZERO = tl.constexpr(-1e4)
#: Larger than every column.
NO_COLUMN = tl.constexpr(2**31 - 1)
#: The fields of `SoftmaxStats` that the kernels compute, as arguments `row_*` [n] and `block_*` [blocks, n]; the first
#: two always, the others where they are not None.
STATS = ("max", "e", "e_log_e", "e_sq", "logit", "top")
#: Vectors of one number per token, or per token and block: slices that start anywhere, read under a mask.
TOKEN_VECTORS = [
    *("targets", "target_logit", "reference", "kept_max", "e_scale", "d_target", "total_scale", "scale"),
    *(f"{prefix}_{name}" for prefix in ("block", "row") for name in STATS),
    *("row_log_e", "row_entropy", "d_logps", "d_lse", "d_entropy"),
]
#: Integers that depend on the number of tokens, or on how a vocabulary is cut for that number.
SIZES = ["n", "v", "v_start", "weight_start", "blocks", "kept_tile", "kept_stride", "count"]


def _kernel(function):
    """A kernel that is not specialised for any of the arguments above."""
    return triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TOKEN_VECTORS)(function)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """The exponential form cancels near 0 (6e-8 absolute); EXACT: a series there, to fp32 rounding."""
    t = 1.0 - 2.0 / (_exp(2.0 * x) + 1.0)
    if EXACT:
        s = x * x
        series = x * (1.0 + s * (-0.33333334 + s * (0.13333334 + s * (-0.053968254 + s * 0.021869488))))
        t = tl.where(s < 0.09, series, t)
    return t


@triton.jit
def _block_of(index, n, v, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the index-th block: GROUP rows of blocks at a time, so that operands stay in the L2 cache."""
    rows, cols = tl.cdiv(n, BLOCK_N), tl.cdiv(v, BLOCK_V)
    group = index // (GROUP * cols)
    group_start = group * GROUP
    height = min(rows - group_start, GROUP)
    offset = index % (GROUP * cols)
    return group_start + offset % height, offset // height


@triton.jit
def _raw_logits(
    operands,
    block_n,
    block_v,
    n,
    v,
    SOURCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The left and the right half of a block of hidden @ weight[weight_start:].T in fp32; undefined beyond n and v.

    In halves, because what is computed from each takes registers and, to be stored, shared memory.
    SOURCE "memory": `hidden` is a tile of raw logits, [n, v] contiguous, from the library's product.
    """
    hidden, weight, d, weight_start, hidden_stride, weight_stride = operands
    rows = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    if SOURCE == "memory":
        offsets = rows.to(tl.int64)[:, None] * v + cols[None, :]
        z = tl.load(hidden + offsets, mask=(rows < n)[:, None] & (cols < v)[None, :], other=0.0)  # [BLOCK_N, BLOCK_V]
    else:
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        if SOURCE == "descriptor":
            for k in range(0, d, BLOCK_D):
                a = hidden.load([block_n * BLOCK_N, k])  # [BLOCK_N, BLOCK_D]
                b = weight.load([weight_start + block_v * BLOCK_V, k])  # [BLOCK_V, BLOCK_D]
                z = tl.dot(a, b.T, z)
        else:
            ks = tl.arange(0, BLOCK_D)
            # Rows beyond the end read the last one: their logits are masked or never stored.
            a_rows = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * hidden_stride
            b_rows = (weight_start + tl.minimum(cols, v - 1)).to(tl.int64)[:, None] * weight_stride
            for k in range(0, d, BLOCK_D):
                mask = (ks < d - k)[None, :]
                a = tl.load(hidden + a_rows + (k + ks)[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
                b = tl.load(weight + b_rows + (k + ks)[None, :], mask=mask, other=0.0)  # [BLOCK_V, BLOCK_D]
                z = tl.dot(a, b.T, z)
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def _final_logits(z, head, cols, v, HAS_SOFTCAP: tl.constexpr, EXACT_TANH: tl.constexpr):
    """out_scale * tanh(in_scale * (raw + bias)), or in_scale * (raw + bias) without softcap."""
    bias, v_start, in_scale, out_scale = head
    if bias is not None:
        z += tl.load(bias + v_start + cols, mask=cols < v, other=0.0).to(tl.float32)[None, :]
    z *= in_scale
    if HAS_SOFTCAP:
        z = out_scale * _tanh(z, EXACT_TANH)
    return z


@triton.jit
def _slope(z, out_scale):
    """1 - tanh**2, from final logits."""
    t = z * (1.0 / out_scale)
    return 1.0 - t * t


@triton.jit
def _store(out, stride, x, row, col, n, v, DESCRIPTOR: tl.constexpr):
    """A block `x` into its place in [n, v], rows `stride` apart."""
    if DESCRIPTOR:
        out.store([row, col], x.to(out.dtype))
    else:
        rows, cols = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
        block = out + row.to(tl.int64) * stride + col
        mask = (rows < n - row)[:, None] & (cols < v - col)[None, :]
        tl.store(block + rows[:, None] * stride + cols[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _keep_exps(dest, e, row, col, n, v, DESCRIPTOR: tl.constexpr):
    """Store e of half a block; dest = (kept, span, tile_stride, stride).

    Columns are kept in tiles of `span`, 16 * tile_stride apart, each [n, span] with rows `stride` apart.
    """
    kept, span, tile_stride, stride = dest
    tile = col // span
    inner = col - tile * span
    if DESCRIPTOR:
        kept.store([tile, row, inner], tl.reshape(e.to(kept.dtype), (1, e.shape[0], e.shape[1])))
    else:
        tile_start = kept + tile.to(tl.int64) * tile_stride * 16
        _store(tile_start, stride, e, row, inner, n, v - tile * span, False)


@triton.jit
def _sum_half(
    z,
    head,
    dest,
    partials,
    token,
    cols,
    row,
    col,
    START: tl.constexpr,
    n,
    v,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    KEEP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Softmax statistics of half a block, one number a row, from its raw logits; keeps e as `sums_kernel` says.

    The half begins START columns into the block. partials = (e_log_e, e_sq, logit, top), None where not needed, token =
    (target, reference), [BLOCK_N] each.

    Returns the largest z, the sums of e, e log e, e * e and z, the column of the largest z, and z at the target.
    """
    target, reference = token
    block_e_log_e, block_e_sq, block_logit, block_top = partials
    z = _final_logits(z, head, cols, v, HAS_SOFTCAP, EXACT_TANH)
    final = z
    inside = (cols < v)[None, :]
    target_logit = tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    logit = target_logit
    if block_logit is not None:
        logit = tl.sum(tl.where(inside, z, 0.0), 1)
    z = tl.where(inside, z, -float("inf"))
    m = tl.max(z, 1)
    top = target
    if block_top is not None:  # cheaper than a maximum that carries its index along
        top = tl.min(tl.where(z == m[:, None], cols[None, :], NO_COLUMN), 1)
    # Where all is -inf, any finite reference gives e = 0; the difference of two infinities would give NaN.
    log_e = z - tl.where(m == -float("inf"), 0.0, m)[:, None]
    e = _exp(log_e)
    total = tl.sum(e, 1)
    e_log_e, e_sq = total, total
    if block_e_log_e is not None:
        e_log_e = tl.sum(e * tl.maximum(log_e, LOG_ZERO), 1)
    if block_e_sq is not None:
        e_sq = tl.sum(e * e, 1)
    if KEEP != "no":
        col += START
        e *= _exp(m - reference)[:, None] if KEEP == "reference" else KEPT_ONE
        if HAS_SOFTCAP:
            e *= _slope(final, head[3])
        e = tl.where(cols[None, :] == target[:, None], 0.0, e)
        _keep_exps(dest, e, row, col, n, v, DESCRIPTOR)
    return m, total, e_log_e, e_sq, logit, top, target_logit


@_kernel
def sums_kernel(
    hidden,
    weight,
    bias,
    targets,
    target_logit,
    block_max,
    block_e,
    block_e_log_e,
    block_e_sq,
    block_logit,
    block_top,
    kept,
    kept_max,
    reference,
    n,
    v,
    d,
    v_start,
    weight_start,
    hidden_stride,
    weight_stride,
    kept_span,
    kept_tile: tl.int64,
    kept_stride,
    in_scale,
    out_scale,
    PROGRAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    KEEP: tl.constexpr,
    KEPT_DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Softmax statistics of each row of each block, [blocks of columns, n], and the targets' logits, [n].

    KEEP "half": also e * slope * KEPT_ONE into `kept`, see `_keep_exps`, and the largest z of each half block into
    kept_max, [half blocks, n]. KEEP "reference": also exp(z - reference) * slope into `kept`. Both: 0 at the targets.

    v and kept_stride are in units of UNIT columns.
    """
    HALF: tl.constexpr = BLOCK_V // 2
    v, kept_stride = v * UNIT, kept_stride * UNIT
    operands = (hidden, weight, d, weight_start, hidden_stride, weight_stride)
    head = (bias, v_start, in_scale, out_scale)
    dest = (kept, kept_span, kept_tile, kept_stride)
    partials = (block_e_log_e, block_e_sq, block_logit, block_top)
    blocks = tl.cdiv(n, BLOCK_N) * tl.cdiv(v, BLOCK_V)
    for index in tl.range(tl.program_id(0), blocks, PROGRAMS, flatten=FLATTEN):
        block_n, block_v = _block_of(index, n, v, BLOCK_N, BLOCK_V, GROUP)
        z0, z1 = _raw_logits(operands, block_n, block_v, n, v, SOURCE, BLOCK_N, BLOCK_V, BLOCK_D)  # [BLOCK_N, HALF]
        row, col = block_n * BLOCK_N, block_v * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        cols0 = col + tl.arange(0, HALF)
        cols1 = cols0 + HALF
        in_n = rows < n
        target = (tl.load(targets + rows, mask=in_n, other=-1) - v_start).to(tl.int32)  # [BLOCK_N]
        ref = tl.load(reference + rows, mask=in_n, other=0.0) if KEEP == "reference" else 0.0  # [BLOCK_N]
        token = (target, ref)
        m0, total0, e_log_e0, e_sq0, logit0, top0, target_logit0 = _sum_half(
            z0, head, dest, partials, token, cols0, row, col, 0, n, v, HAS_SOFTCAP, EXACT_TANH, KEEP, KEPT_DESCRIPTOR
        )
        m1, total1, e_log_e1, e_sq1, logit1, top1, target_logit1 = _sum_half(
            z1, head, dest, partials, token, cols1, row, col, HALF, n, v, HAS_SOFTCAP, EXACT_TANH, KEEP, KEPT_DESCRIPTOR
        )
        if KEEP == "half":
            offsets = 2 * block_v.to(tl.int64) * n + rows
            tl.store(kept_max + offsets, m0, mask=in_n)
            tl.store(kept_max + offsets + n, m1, mask=in_n)

        has_target = (target >= col) & (target < min(v, col + BLOCK_V)) & in_n
        tl.store(target_logit + rows, target_logit0 + target_logit1, mask=has_target)
        m = tl.maximum(m0, m1)
        finite = tl.where(m == -float("inf"), 0.0, m)
        log0 = tl.maximum(m0 - finite, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        log1 = tl.maximum(m1 - finite, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        scale0, scale1 = _exp(log0), _exp(log1)
        offsets = block_v.to(tl.int64) * n + rows
        tl.store(block_max + offsets, m, mask=in_n)
        tl.store(block_e + offsets, scale0 * total0 + scale1 * total1, mask=in_n)
        if block_e_log_e is not None:
            e_log_e = scale0 * (e_log_e0 + log0 * total0) + scale1 * (e_log_e1 + log1 * total1)
            tl.store(block_e_log_e + offsets, e_log_e, mask=in_n)
        if block_e_sq is not None:
            tl.store(block_e_sq + offsets, scale0 * scale0 * e_sq0 + scale1 * scale1 * e_sq1, mask=in_n)
        if block_logit is not None:
            tl.store(block_logit + offsets, logit0 + logit1, mask=in_n)
        if block_top is not None:
            top = v_start + tl.where(m1 > m0, top1, top0)
            tl.store(block_top + offsets, top.to(tl.int32), mask=in_n)


@_kernel
def fold_kernel(
    row_max,
    row_e,
    row_e_log_e,
    row_e_sq,
    row_logit,
    row_top,
    block_max,
    block_e,
    block_e_log_e,
    block_e_sq,
    block_logit,
    block_top,
    n,
    blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Fold the statistics of blocks, [blocks, n], into those of rows, [n], in the order of the vocabulary."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = rows < n
    m = tl.load(row_max + rows, mask=in_n, other=0.0)
    e = tl.load(row_e + rows, mask=in_n, other=0.0)
    if block_e_log_e is not None:
        e_log_e = tl.load(row_e_log_e + rows, mask=in_n, other=0.0)
    if block_e_sq is not None:
        e_sq = tl.load(row_e_sq + rows, mask=in_n, other=0.0)
    if block_logit is not None:
        logit = tl.load(row_logit + rows, mask=in_n, other=0.0)
    if block_top is not None:
        top = tl.load(row_top + rows, mask=in_n, other=-1)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        mask = (block < blocks)[:, None] & in_n[None, :]
        offsets = block.to(tl.int64)[:, None] * n + rows[None, :]
        part_m = tl.load(block_max + offsets, mask=mask, other=-float("inf"))  # [BLOCK_B, BLOCK_N]
        part_e = tl.load(block_e + offsets, mask=mask, other=0.0)
        group_m = tl.max(part_m, 0)
        new = tl.maximum(m, group_m)
        finite = tl.where(new == -float("inf"), 0.0, new)
        log_part = tl.maximum(part_m - finite[None, :], LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        log_old = tl.maximum(m - finite, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
        scale, old_scale = _exp(log_part), _exp(log_old)
        if block_e_log_e is not None:
            part = tl.load(block_e_log_e + offsets, mask=mask, other=0.0)
            # a sum of e log e moves to the new maximum before the sum of e does
            moved = tl.sum(scale * (part + log_part * part_e), 0)
            e_log_e = old_scale * (e_log_e + log_old * e) + moved
        if block_e_sq is not None:
            part = tl.load(block_e_sq + offsets, mask=mask, other=0.0)
            e_sq = old_scale * old_scale * e_sq + tl.sum(scale * scale * part, 0)
        if block_logit is not None:
            logit += tl.sum(tl.load(block_logit + offsets, mask=mask, other=0.0), 0)
        if block_top is not None:
            part = tl.load(block_top + offsets, mask=mask, other=0)
            first = tl.min(tl.where((part_m == group_m[None, :]) & mask, part, NO_COLUMN), 0)
            top = tl.where(group_m > m, first.to(tl.int64), top)
        e = old_scale * e + tl.sum(scale * part_e, 0)
        m = new
    tl.store(row_max + rows, m, mask=in_n)
    tl.store(row_e + rows, e, mask=in_n)
    if block_e_log_e is not None:
        tl.store(row_e_log_e + rows, e_log_e, mask=in_n)
    if block_e_sq is not None:
        tl.store(row_e_sq + rows, e_sq, mask=in_n)
    if block_logit is not None:
        tl.store(row_logit + rows, logit, mask=in_n)
    if block_top is not None:
        tl.store(row_top + rows, top, mask=in_n)


@triton.jit
def _grad_half(
    z,
    head,
    out,
    token,
    cols,
    row,
    col,
    START: tl.constexpr,
    n,
    v,
    factor,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """d loss / d raw logits of half a block, START columns into the block: stored into out = (grad, stride), returned.

    token = (target, max z, log sum e, and the upstream gradients p_scale, d_target, entropy_scale), [BLOCK_N] each.
    """
    grad, stride = out
    target, m, log_e, p_scale, d_target, entropy_scale = token
    z = _final_logits(z, head, cols, v, HAS_SOFTCAP, EXACT_TANH)
    log_p = (z - m[:, None]) - log_e[:, None]
    g = _exp(log_p)
    if ENTROPY:
        g *= p_scale[:, None] - entropy_scale[:, None] * tl.where(log_p == -float("inf"), LOG_ZERO, log_p)
    else:
        g *= p_scale[:, None]
    g = tl.where(cols[None, :] == target[:, None], g + d_target[:, None], g)
    if HAS_SOFTCAP:
        g *= _slope(z, head[3]) * factor
    _store(grad, stride, g, row, col + START, n, v, DESCRIPTOR)
    return g


@_kernel
def grads_kernel(
    hidden,
    weight,
    bias,
    targets,
    row_max,
    row_log_e,
    d_logps,
    d_lse,
    d_entropy,
    row_entropy,
    grad,
    block_d_bias,
    n,
    v,
    d,
    v_start,
    weight_start,
    hidden_stride,
    weight_stride,
    grad_stride,
    in_scale,
    out_scale,
    factor,
    PROGRAMS: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT_TANH: tl.constexpr,
    GRAD_DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """d loss / d raw logits of a tile, [n, v] in the dtype of `grad`, and its sums over the rows of each block.

    v is in units of UNIT columns.
    """
    HALF: tl.constexpr = BLOCK_V // 2
    ENTROPY: tl.constexpr = d_entropy is not None
    v = v * UNIT
    operands = (hidden, weight, d, weight_start, hidden_stride, weight_stride)
    head = (bias, v_start, in_scale, out_scale)
    out = (grad, grad_stride)
    blocks = tl.cdiv(n, BLOCK_N) * tl.cdiv(v, BLOCK_V)
    for index in tl.range(tl.program_id(0), blocks, PROGRAMS, flatten=FLATTEN):
        block_n, block_v = _block_of(index, n, v, BLOCK_N, BLOCK_V, GROUP)
        z0, z1 = _raw_logits(operands, block_n, block_v, n, v, SOURCE, BLOCK_N, BLOCK_V, BLOCK_D)  # [BLOCK_N, HALF]
        row, col = block_n * BLOCK_N, block_v * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        cols0 = col + tl.arange(0, HALF)
        cols1 = cols0 + HALF
        in_n = rows < n
        m = tl.load(row_max + rows, mask=in_n, other=0.0)  # [BLOCK_N], as all vectors below
        log_e = tl.load(row_log_e + rows, mask=in_n, other=0.0)
        d_target = tl.load(d_logps + rows, mask=in_n, other=0.0)
        target = (tl.load(targets + rows, mask=in_n, other=-1) - v_start).to(tl.int32)
        p_scale = -d_target
        if d_lse is not None:
            p_scale += tl.load(d_lse + rows, mask=in_n, other=0.0)
        entropy_scale = p_scale
        if ENTROPY:
            entropy_scale = tl.load(d_entropy + rows, mask=in_n, other=0.0)
            p_scale -= entropy_scale * tl.load(row_entropy + rows, mask=in_n, other=0.0)
        if not HAS_SOFTCAP:
            p_scale, d_target, entropy_scale = p_scale * factor, d_target * factor, entropy_scale * factor
        token = (target, m, log_e, p_scale, d_target, entropy_scale)
        g0 = _grad_half(
            z0, head, out, token, cols0, row, col, 0, n, v, factor, HAS_SOFTCAP, EXACT_TANH, ENTROPY, GRAD_DESCRIPTOR
        )
        g1 = _grad_half(
            z1, head, out, token, cols1, row, col, HALF, n, v, factor, HAS_SOFTCAP, EXACT_TANH, ENTROPY, GRAD_DESCRIPTOR
        )
        if block_d_bias is not None:  # rows beyond n are undefined
            sums = block_d_bias + block_n.to(tl.int64) * v
            tl.store(sums + cols0, tl.sum(tl.where(in_n[:, None], g0, 0.0), 0), mask=cols0 < v)
            tl.store(sums + cols1, tl.sum(tl.where(in_n[:, None], g1, 0.0), 0), mask=cols1 < v)


@_kernel
def kept_grads_kernel(
    kept,
    e_scale,
    targets,
    d_target,
    grad,
    block_d_bias,
    n,
    v,
    v_start,
    kept_width,
    kept_stride,
    grad_stride,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """As `grads_kernel`, from the e that `sums_kernel` kept for this tile, [n, v] with rows kept_stride apart.

    e_scale [blocks of kept_width columns, n] multiplies e, d_target [n] is added at the targets. Each block of this
    kernel is within one of kept_width columns. v and kept_stride are in units of UNIT columns.
    """
    v, kept_stride = v * UNIT, kept_stride * UNIT
    blocks_v = tl.cdiv(v, BLOCK_V)
    block_n, block_v = tl.program_id(0) // blocks_v, tl.program_id(0) % blocks_v
    row, col = block_n * BLOCK_N, block_v * BLOCK_V
    rows, cols = row + tl.arange(0, BLOCK_N), col + tl.arange(0, BLOCK_V)
    in_n, in_v = rows < n, cols < v
    block = kept + row.to(tl.int64) * kept_stride + col
    offsets = tl.arange(0, BLOCK_N)[:, None] * kept_stride + tl.arange(0, BLOCK_V)[None, :]
    e = tl.load(block + offsets, mask=in_n[:, None] & in_v[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_V]
    scale = tl.load(e_scale + (col // kept_width).to(tl.int64) * n + rows, mask=in_n, other=0.0)  # [BLOCK_N]
    target_grad = tl.load(d_target + rows, mask=in_n, other=0.0)
    target = (tl.load(targets + rows, mask=in_n, other=-1) - v_start).to(tl.int32)
    g = e * scale[:, None]
    g = tl.where(cols[None, :] == target[:, None], g + target_grad[:, None], g)
    if block_d_bias is not None:
        tl.store(block_d_bias + block_n.to(tl.int64) * v + cols, tl.sum(g, 0), mask=in_v)
    _store(grad, grad_stride, g, row, col, n, v, DESCRIPTOR=False)


@_kernel
def target_logit_kernel(
    hidden, weight, targets, out, d, hidden_stride, weight_stride, weight_step, BLOCK_D: tl.constexpr
):
    """Raw logit of each token's target, [n] fp32: a row of hidden times a row of the head."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, d, BLOCK_D):
        offsets = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * hidden_stride + offsets, mask=offsets < d, other=0.0)
        w = tl.load(weight + target * weight_stride + offsets * weight_step, mask=offsets < d, other=0.0).to(h.dtype)
        total += h.to(tl.float32) * w.to(tl.float32)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _row_logits(
    hidden, weight, weight_step, cols, v, d, OPERAND: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Raw logits [BLOCK_V] of one row of hidden states; `weight` [BLOCK_V, 1] points to the rows of the head."""
    ks = tl.arange(0, BLOCK_D)
    z = tl.zeros((BLOCK_V,), tl.float32)
    for k in range(0, d, BLOCK_D):
        mask = (cols < v)[:, None] & (k + ks < d)[None, :]
        w = tl.load(weight + (k + ks)[None, :] * weight_step, mask=mask, other=0.0).to(OPERAND)
        h = tl.load(hidden + k + ks, mask=k + ks < d, other=0.0)
        z += tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], 1)
    return z


@_kernel
def far_rows_kernel(
    hidden,
    weight,
    bias,
    targets,
    row_max,
    row_e,
    reference,
    total,
    v,
    d,
    hidden_stride,
    weight_stride,
    weight_step,
    total_stride,
    in_scale,
    out_scale,
    min_logp,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Where |log p(target)| > -min_logp: total = sum of e * slope * weight over other columns, reference = row_max.

    One program per row; almost always it exits at once. On entry `reference` is the target's logit. It can exceed
    row_max by rounding only, which is much for logits as large as 1e9: their last place is 64.
    """
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(row_max + row)
    if tl.abs(tl.load(reference + row) - m - tl.log(tl.load(row_e + row))) > -min_logp:
        tl.store(reference + row, m)
        head = (bias, 0, in_scale, out_scale)
        target = tl.load(targets + row)
        hidden += row * hidden_stride
        total += row * total_stride
        ks = tl.arange(0, BLOCK_D)
        for k in range(0, d, BLOCK_D):
            tl.store(total + k + ks, tl.zeros((BLOCK_D,), tl.float32), mask=k + ks < d)
        # The largest of these very logits, which are rounded in another order than the logits of row_max.
        largest = -float("inf")
        for start in range(0, v, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            offsets = cols.to(tl.int64)[:, None] * weight_stride
            z = _row_logits(hidden, weight + offsets, weight_step, cols, v, d, OPERAND, BLOCK_V, BLOCK_D)
            z = _final_logits(z[None, :], head, cols, v, HAS_SOFTCAP, True)
            largest = tl.maximum(largest, tl.max(tl.where((cols < v)[None, :], z, -float("inf"))))
        sum_e = 0.0
        for start in range(0, v, BLOCK_V):
            tl.debug_barrier()  # threads read what other threads have added to `total`
            cols = start + tl.arange(0, BLOCK_V)
            offsets = cols.to(tl.int64)[:, None] * weight_stride
            z = _row_logits(hidden, weight + offsets, weight_step, cols, v, d, OPERAND, BLOCK_V, BLOCK_D)
            z = _final_logits(z[None, :], head, cols, v, HAS_SOFTCAP, True)
            e = _exp(z - largest)
            sum_e += tl.sum(tl.where((cols < v)[None, :], e, 0.0))
            if HAS_SOFTCAP:
                e *= _slope(z, out_scale)
            e = tl.reshape(tl.where(((cols < v) & (cols != target))[None, :], e, 0.0), (BLOCK_V, 1))
            for k in range(0, d, BLOCK_D):
                mask = (cols < v)[:, None] & (k + ks < d)[None, :]
                w = tl.load(weight + offsets + (k + ks)[None, :] * weight_step, mask=mask, other=0.0).to(OPERAND)
                old = tl.load(total + k + ks, mask=k + ks < d, other=0.0)
                tl.store(total + k + ks, old + tl.sum(w.to(tl.float32) * e, 0), mask=k + ks < d)
        # p = e / sum_e of these logits, whatever the rounding of row_e.
        e_ratio = tl.load(row_e + row) / sum_e
        tl.debug_barrier()
        for k in range(0, d, BLOCK_D):
            out = total + k + ks
            tl.store(out, tl.load(out, mask=k + ks < d, other=0.0) * e_ratio, mask=k + ks < d)


@_kernel
def target_rows_kernel(
    total,
    weight,
    targets,
    d_target,
    total_scale,
    out,
    scale,
    d,
    total_stride,
    weight_stride,
    weight_step,
    out_stride,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_target * weight[target] + total_scale * total, [n, D] into the dtype of `out`; the factors are [n].

    With `scale`, each row is divided by a power of 2, stored there, so that its largest element is about 2**10.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK_D)
    w = tl.load(weight + target * weight_stride + offsets * weight_step, mask=offsets < d, other=0.0).to(OPERAND)
    sums = tl.load(total + row * total_stride + offsets, mask=offsets < d, other=0.0)
    x = tl.load(d_target + row) * w.to(tl.float32) + tl.load(total_scale + row) * sums
    if scale is not None:
        power = tl.floor(tl.log2(tl.max(tl.abs(x), 0))) - 10.0
        power = tl.minimum(tl.maximum(power, -100.0), 100.0)  # a row of zeros has -inf
        tl.store(scale + row, tl.exp2(power))
        x *= tl.exp2(-power)
    tl.store(out + row * out_stride + offsets, x.to(out.dtype.element_ty), mask=offsets < d)


@_kernel
def scale_kernel(x, factor, count: tl.int64, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """x *= factor, in place; skipped where the factor is 1. `count` is in units of UNIT elements."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < count * UNIT
        scaled = tl.load(x + offsets, mask=mask).to(tl.float32) * scale
        tl.store(x + offsets, scaled.to(x.dtype.element_ty), mask=mask)
