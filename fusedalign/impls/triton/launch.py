"""From tensors to kernel launches: block shapes for the GPU at hand, scratch memory, strides; no arithmetic."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedalign.impls.rows import RowSums, TokenGrads
from fusedalign.impls.triton import kernels
from fusedalign.problem import Problem

#: Triton runs its kernels on the CPU, in Python: for tests and debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: What e = 1 is kept as, see `kernels`.
KEPT_ONE: float = kernels.KEPT_ONE.value


_ONE_BLOCK_EACH = 2**30


@dataclass(frozen=True)
class Blocks:
    """Shape of the logits' blocks and how they are scheduled."""

    n: int
    v: int
    d: int
    warps: int
    stages: int
    group: int = 8
    """rows of blocks that are worked on together"""
    programs: int | None = None
    """None: one program a block; else as many as stay, each taking one block after another"""
    descriptor: bool = False
    """operands through tensor descriptors, where shapes and alignment allow them"""
    flatten: bool = False
    """one pipeline over all blocks of a program: the next one's operands are on their way while this one ends"""


@functools.cache
def blocks_for(device: torch.device, *, stores: bool = False) -> Blocks:
    """A fixed choice for each generation, so that no training step waits for a search; n and v are equal in both uses.

    Shared memory of a program: stages * (n + v) * d * 2 bytes and, where blocks are stored, n * v: at most 227 KiB
    (Hopper and later data-centre GPUs), 163 KiB (A100) or 99 KiB (consumer Ampere, Ada and Blackwell).
    """
    if device.type != "cuda":
        return Blocks(16, 32, 16, warps=4, stages=2, group=2, programs=3, descriptor=True)
    properties: Any = torch.cuda.get_device_properties(device)
    shared = 65536 if torch.version.hip else properties.shared_memory_per_block_optin
    if shared >= 220 * 1024 and torch.cuda.get_device_capability(device) >= (9, 0):
        many = properties.multi_processor_count
        return Blocks(128, 256, 64, warps=8, stages=4, programs=many, descriptor=True, flatten=stores)
    if shared >= 160 * 1024:
        return Blocks(128, 256, 32, warps=8, stages=3)
    return Blocks(128, 128, 32, warps=4, stages=3)


def half_block(device: torch.device) -> int:
    """Columns of what is kept by one largest logit."""
    return blocks_for(device).v // 2


@dataclass(frozen=True)
class Tile:
    """Some tokens of a problem against some columns of its vocabulary, as operands of the product."""

    problem: Problem
    hidden: Tensor
    """[n, D] in the operand dtype, rows contiguous"""
    weight: Tensor
    """[v, D], likewise"""
    tokens: slice
    vocab: slice

    @property
    def n(self) -> int:
        """Tokens."""
        return self.hidden.shape[0]

    @property
    def v(self) -> int:
        """Columns."""
        return self.weight.shape[0]


def _source(tile: Tile, blocks: Blocks) -> tuple[Any, Any, int, int, str]:
    """What `kernels._logits` takes: two operands, their row strides, and how it is to read them."""
    hidden, weight = tile.hidden, tile.weight
    if hidden.dtype.itemsize == 4:  # the library's fp32 product: tensor cores have none
        z = torch.mm(hidden, weight.t())
        return z, None, z.stride(0), 0, "memory"
    if not hidden.is_cuda:  # Triton's interpreter multiplies the bits of bf16; in fp32 the same products are exact
        hidden, weight = hidden.float(), weight.float()
    if blocks.descriptor and all(_describable(x) for x in (hidden, weight)):
        a = TensorDescriptor.from_tensor(hidden, [blocks.n, blocks.d])
        b = TensorDescriptor.from_tensor(weight, [blocks.v, blocks.d])
        return a, b, 0, 0, "descriptor"
    return hidden, weight, hidden.stride(0), weight.stride(0), "pointer"


def _describable(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and (x.stride(0) * x.element_size()) % 16 == 0 and x.stride(1) == 1


def _logits_options(tile: Tile, blocks: Blocks) -> tuple[dict[str, Any], tuple[int]]:
    """Arguments that `sums_kernel` and `grads_kernel` share, and the grid."""
    p = tile.problem
    hidden, weight, hidden_stride, weight_stride, source = _source(tile, blocks)
    count = triton.cdiv(tile.n, blocks.n) * triton.cdiv(tile.v, blocks.v)
    # A program's stride from block to block is a constant of the kernel. The number of blocks differs with every shape,
    # so it must not be that constant.
    programs = blocks.programs or _ONE_BLOCK_EACH
    options = {
        "hidden": hidden,
        "weight": weight,
        "bias": None if p.bias is None else p.bias[tile.vocab].contiguous(),
        "targets": p.targets[tile.tokens],
        "n": tile.n,
        "v": tile.v,
        "d": tile.hidden.shape[1],
        "v_start": tile.vocab.start,
        "hidden_stride": hidden_stride,
        "weight_stride": weight_stride,
        "before": p.scale / p.temperature if p.softcap is None else p.scale / p.softcap,
        "after": 1.0 if p.softcap is None else p.softcap / p.temperature,
        "SOURCE": source,
        "HAS_BIAS": p.bias is not None,
        "HAS_SOFTCAP": p.softcap is not None,
        "PROGRAMS": programs,
        "BLOCK_N": blocks.n,
        "BLOCK_V": blocks.v,
        "BLOCK_D": blocks.d,
        "GROUP": blocks.group,
        "FLATTEN": blocks.flatten,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return options, (min(count, programs),)


def _target_of_stores(out: Tensor, blocks: Blocks) -> tuple[Any, bool]:
    """A [n, v] tile as the kernels store into it, and whether through a descriptor."""
    if blocks.descriptor and _describable(out):
        return TensorDescriptor.from_tensor(out, [blocks.n, blocks.v // 2]), True
    return out, False


class BlockSums:
    """Softmax sums of n tokens in each block of `columns` columns from a tile's first on, [blocks, n], until folded."""

    def __init__(self, problem: Problem, n: int, columns: int) -> None:
        self.outputs, self.n, hidden = problem.outputs, n, problem.hidden
        self.block_v = blocks_for(hidden.device).v
        self.count = triton.cdiv(columns, self.block_v)

        def part(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return hidden.new_empty((self.count, n), dtype=dtype) if wanted else None

        outputs = problem.outputs
        self.parts = (
            part(),
            part(),
            part("entropy" in outputs),
            part("log_sum_sq_probs" in outputs),
            part("mean_logit" in outputs),
            part("is_top1" in outputs, torch.int32),
        )

    def add(
        self,
        tile: Tile,
        rows: RowSums,
        *,
        start: int = 0,
        kept: Tensor | None = None,
        kept_max: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Make the sums of a tile's blocks, of which the first column is the `start`-th here, and its targets' logits.

        `kept` [n, v] with `kept_max` [halves of blocks, n] or `reference` [n]: see `KEEP` of `kernels.sums_kernel`.
        """
        blocks = blocks_for(tile.hidden.device, stores=kept is not None)
        options, grid = _logits_options(tile, blocks)
        first = start // self.block_v
        names = ("block_max", "block_e", "block_e_log_e", "block_e_sq", "block_logit", "block_top")
        target, described = (None, False) if kept is None else _target_of_stores(kept, blocks)
        kernels.sums_kernel[grid](
            **options,
            **{name: None if x is None else x[first:] for name, x in zip(names, self.parts, strict=True)},
            **self._flags(),
            target_logit=rows.target[tile.tokens],
            kept=target,
            kept_max=kept_max,
            reference=reference,
            kept_stride=0 if kept is None else kept.stride(0),
            KEEP="no" if kept is None else "half" if reference is None else "reference",
            KEPT_DESCRIPTOR=described,
        )

    def fold(self, rows: RowSums, tokens: slice) -> None:
        """Into the tokens' running sums."""
        block_n = 32
        sums = (rows.max, rows.e, rows.e_log_e, rows.e_sq, rows.logit, rows.top)
        kernels.fold_kernel[(triton.cdiv(self.n, block_n),)](
            *(None if x is None else x[tokens] for x in sums),
            *self.parts,
            self.n,
            self.count,
            **self._flags(),
            BLOCK_N=block_n,
            BLOCK_B=32,
        )

    def _flags(self) -> dict[str, bool]:
        return {
            "ENTROPY": "entropy" in self.outputs,
            "SQUARES": "log_sum_sq_probs" in self.outputs,
            "MEAN": "mean_logit" in self.outputs,
            "TOP": "is_top1" in self.outputs,
        }


def logit_grads(tile: Tile, grads: TokenGrads, out: Tensor, *, d_bias: bool) -> Tensor | None:
    """d loss / d raw logits of a tile into `out`, [n, v] with contiguous rows; `grads` are those of the tile's tokens.

    Returns:
        Their sums over the tokens, [v] fp32, if `d_bias`.
    """
    blocks = blocks_for(tile.hidden.device, stores=True)
    if d_bias:  # whose sums across warps take shared memory too
        blocks = replace(blocks, stages=blocks.stages - 1)
    options, grid = _logits_options(tile, blocks)
    d_entropy, entropy = grads.entropy or (None, None)
    sums = _d_bias_parts(tile, blocks.n) if d_bias else None
    target, described = _target_of_stores(out, blocks)
    kernels.grads_kernel[grid](
        **options,
        row_max=grads.max,
        row_log_e=grads.log_e,
        d_logps=grads.logps.contiguous(),
        d_lse=None if grads.lse is None else grads.lse.contiguous(),
        d_entropy=None if d_entropy is None else d_entropy.contiguous(),
        row_entropy=entropy,
        grad=target,
        block_d_bias=sums,
        grad_stride=out.stride(0),
        factor=tile.problem.scale / tile.problem.temperature,
        LSE=grads.lse is not None,
        ENTROPY=grads.entropy is not None,
        D_BIAS=d_bias,
        GRAD_DESCRIPTOR=described,
    )
    return None if sums is None else sums.sum(0)


def kept_logit_grads(
    tile: Tile, kept: Tensor, of_e: Tensor, of_target: Tensor, out: Tensor, *, d_bias: bool
) -> Tensor | None:
    """As `logit_grads`, from what `BlockSums.add` kept: e * of_e [halves, n], and of_target [n] more at the targets."""
    block_v = half_block(tile.hidden.device)
    block_n = 16 if INTERPRETED else 32
    sums = _d_bias_parts(tile, block_n) if d_bias else None
    kernels.kept_grads_kernel[(triton.cdiv(tile.v, block_v) * triton.cdiv(tile.n, block_n),)](
        kept,
        of_e,
        tile.problem.targets[tile.tokens],
        of_target,
        out,
        sums,
        tile.n,
        tile.v,
        tile.vocab.start,
        block_v,
        kept.stride(0),
        out.stride(0),
        D_BIAS=d_bias,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=4,
    )
    return None if sums is None else sums.sum(0)


def _d_bias_parts(tile: Tile, block_n: int) -> Tensor:
    return tile.hidden.new_empty((triton.cdiv(tile.n, block_n), tile.v), dtype=torch.float32)


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Raw logits of the targets, [n] fp32; `hidden` [n, D] in the operand dtype, `weight` [V, D] in any."""
    out = hidden.new_empty(len(hidden), dtype=torch.float32)
    d = hidden.shape[1]
    strides = (hidden.stride(0), weight.stride(0), weight.stride(1))
    kernels.target_logit_kernel[(len(hidden),)](
        hidden, weight, targets, out, d, *strides, BLOCK_D=min(1024, triton.next_power_of_2(d))
    )
    return out


def target_rows(
    total: Tensor,
    weight: Tensor,
    targets: Tensor,
    of_target: Tensor,
    of_total: Tensor,
    out: Tensor,
    scale: Tensor | None,
    operand: torch.dtype,
) -> None:
    """`out * scale = of_target * weight[targets] + of_total * total`, [n, D]; weight rounded to `operand`.

    The factors are [n] fp32. `scale` [n] fp32, if given, receives a power of 2 for each row that brings its largest
    element to about 2**10.
    """
    d = total.shape[1]
    strides = (total.stride(0), weight.stride(0), weight.stride(1), out.stride(0))
    factors = of_target.contiguous(), of_total.contiguous()
    kernels.target_rows_kernel[(len(total),)](
        total,
        weight,
        targets,
        *factors,
        out,
        scale,
        d,
        *strides,
        OPERAND=_TRITON[operand],
        SCALED=scale is not None,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=8,
    )


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x` times a scalar in place; where that is 1, the GPU finds out and does nothing."""
    flat = x.view(-1)
    block = 64 if INTERPRETED else 8192
    kernels.scale_kernel[(triton.cdiv(len(flat), block),)](flat, factor, len(flat), BLOCK=block, num_warps=8)
    return x


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
