"""From tensors to kernel launches: block shapes for the GPU at hand, scratch memory, strides; no arithmetic."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedalign.impls.softmax import SoftmaxStats, TokenGrads
from fusedalign.impls.triton import ahead, kernels
from fusedalign.problem import Problem, SplitHead

#: Whether Triton runs its kernels on the CPU, in Python: for tests and debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: The value that kept exponentials have for e = 1, see `kernels`.
KEPT_ONE: float = kernels.KEPT_ONE.value

#: A stride between the blocks of a program that exceeds every number of blocks: each program has one block.
_ONE_BLOCK_EACH = 2**30
#: A span that exceeds every vocabulary: all columns are in the first tile.
_ALL_COLUMNS = 2**30

#: Up to this cap the fast tanh's error of 6e-8 is below the fp32 rounding of a logit near the cap.
_LARGE_SOFTCAP = 64.0

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class BlockShape:
    """Shape of the blocks of logits and how they are scheduled."""

    n: int
    v: int
    d: int
    warps: int
    stages: int
    group: int = 8
    """rows of blocks that are processed together"""
    programs: int | None = None
    """number of persistent programs, each looping over blocks; None: one program per block"""
    descriptor: bool = False
    """operands through tensor descriptors, where shapes and alignment allow it"""
    flatten: bool = False
    """one software pipeline over all blocks of a program: a block ends while the next one's operands load"""


@functools.cache
def block_shape(device: torch.device) -> BlockShape:
    """A fixed choice per GPU generation, so that no training step waits for autotuning.

    Shared memory of a program: stages * (n + v) * d * 2 bytes and, where blocks are stored, n * v: at most 227 KiB
    (Hopper and later data-centre GPUs), 163 KiB (A100) or 99 KiB (consumer Ampere, Ada and Blackwell).
    """
    if device.type == "meta":  # a dry run
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return BlockShape(16, 32, 16, warps=4, stages=2, group=2, programs=3, descriptor=True)
    properties: Any = torch.cuda.get_device_properties(device)
    shared = 65536 if torch.version.hip else properties.shared_memory_per_block_optin
    if shared >= 220 * 1024 and torch.cuda.get_device_capability(device) >= (9, 0):
        programs = properties.multi_processor_count
        return BlockShape(128, 256, 64, warps=8, stages=3, programs=programs, descriptor=True, flatten=True)
    if shared >= 160 * 1024:
        return BlockShape(128, 256, 32, warps=8, stages=3)
    return BlockShape(128, 128, 32, warps=4, stages=3)


def half_block(device: torch.device) -> int:
    """Columns of half a block: kept exponentials are relative to the largest logit in these."""
    return block_shape(device).v // 2


class HeadArgs(NamedTuple):
    """The kernels' arguments that turn raw logits into final ones."""

    bias: Tensor | None
    in_scale: float
    """applied to raw logits and bias, within the tanh of a softcap"""
    out_scale: float
    """applied to the tanh"""
    HAS_SOFTCAP: bool

    @classmethod
    def of(cls, problem: Problem) -> HeadArgs:
        """The arguments for a problem."""
        p, bias = problem, None if problem.bias is None else problem.bias.contiguous()
        if p.softcap is None:
            return cls(bias, p.scale / p.temperature, 1.0, False)
        return cls(bias, p.scale / p.softcap, p.softcap / p.temperature, True)


class TokenBatch:
    """Some tokens of a problem as the left operand of the kernels' product, created once for many launches."""

    def __init__(self, problem: Problem, tokens: slice, hidden: Tensor) -> None:
        """`hidden` [n, D]: the hidden states of the tokens, in the operand dtype, rows contiguous."""
        self.problem, self.tokens, self.hidden = problem, tokens, hidden
        self.targets, self.head = problem.targets[tokens], HeadArgs.of(problem)
        self.block = block_shape(hidden.device)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @functools.cached_property
    def args(self) -> dict[str, Any]:
        """Kernel arguments of every launch for these tokens; `weight` is missing where the head is copied by tiles."""
        p, hidden, block = self.problem, self.hidden, self.block
        args: dict[str, Any] = {
            **self.head._asdict(),
            "targets": self.targets,
            "n": len(self),
            "d": hidden.shape[1],
            "EXACT_TANH": hidden.dtype.itemsize == 4 or self.head.out_scale > _LARGE_SOFTCAP,
            # The stride of a program from block to block is a constant of the kernel. It must not be the number of
            # blocks, which differs with every shape.
            "PROGRAMS": block.programs or _ONE_BLOCK_EACH,
            "BLOCK_N": block.n,
            "BLOCK_V": block.v,
            "BLOCK_D": block.d,
            "GROUP": block.group,
            "FLATTEN": block.flatten,
            "num_warps": block.warps,
            "num_stages": block.stages,
        }
        if hidden.dtype.itemsize == 4:
            return args | {"hidden_stride": 0, "weight_stride": 0, "weight_start": 0, "SOURCE": "memory"}
        # Triton's interpreter multiplies the bits of bf16; in fp32 the same products are exact.
        hidden = hidden.float() if INTERPRETED else hidden
        weight = p.weight if is_operand(p.weight, p) and not INTERPRETED else None  # None: copied tile by tile
        described = block.descriptor and _describable(hidden)
        described &= hidden.shape[1] * hidden.element_size() % 16 == 0 if weight is None else _describable(weight)
        if described:
            descriptor = TensorDescriptor.from_tensor(hidden, [block.n, block.d])
            args |= {"hidden": descriptor, "hidden_stride": 0, "SOURCE": "descriptor"}
        else:
            stride = hidden.stride(0) if len(hidden) > 1 else hidden.shape[1]  # a single row may have any stride
            args |= {"hidden": hidden, "hidden_stride": stride, "SOURCE": "pointer"}
        return args if weight is None else args | _weight_args(weight, args["SOURCE"], block)

    def launch_args(self, tile: Tile) -> tuple[dict[str, Any], int]:
        """Arguments that `sums_kernel` and `grads_kernel` share, and the number of programs."""
        args, block, weight = self.args, self.block, tile.weight
        tile_args: dict[str, Any] = {"v": tile.v // tile.unit, "UNIT": tile.unit, "v_start": tile.vocab.start}
        if args["SOURCE"] == "memory":  # the library's fp32 product: tensor cores have none
            tile_args |= {"hidden": torch.mm(self.hidden, weight.t()), "weight": None}
        elif "weight" in args:
            tile_args["weight_start"] = tile.vocab.start
        else:
            weight = weight.float() if INTERPRETED else weight
            tile_args |= {"weight_start": 0, **_weight_args(weight, args["SOURCE"], block)}
        blocks = _cdiv(len(self), block.n) * _cdiv(tile.v, block.v)
        return args | tile_args, min(blocks, args["PROGRAMS"])


def _weight_args(weight: Tensor, source: str, block: BlockShape) -> dict[str, Any]:
    """The right operand of the kernels' product, [v, D]."""
    if source == "descriptor":
        return {"weight": TensorDescriptor.from_tensor(weight, [block.v, block.d]), "weight_stride": 0}
    return {"weight": weight, "weight_stride": weight.stride(0)}


def is_operand(x: Tensor | SplitHead, problem: Problem) -> TypeGuard[Tensor]:
    """Whether `x` can enter a product without a copy: in the operand dtype, rows contiguous."""
    return isinstance(x, Tensor) and x.dtype == problem.operand_dtype and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


@dataclass(frozen=True)
class Tile:
    """Some tokens against some columns of the vocabulary."""

    batch: TokenBatch
    weight: Tensor
    """[v, D], the head's rows for these columns, in the operand dtype, rows contiguous"""
    vocab: slice

    @property
    def v(self) -> int:
        """Columns."""
        return self.weight.shape[0]

    @property
    def unit(self) -> int:
        """The unit of `v` in the kernels: with 16 they access rows in wide pieces, and masks take fewer registers."""
        return 16 if self.v % 16 == 0 else 1


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe `x`, [n, D]."""
    return x.data_ptr() % 16 == 0 and (x.stride(0) * x.element_size()) % 16 == 0 and x.stride(1) == 1


def _cdiv(size: int, block: int) -> int:
    """Number of blocks; `triton.cdiv` is slow outside kernels."""
    return -(-size // block)


class ExpTiles(NamedTuple):
    """Where `sums_kernel` stores exponentials, and what they are relative to, see its `KEEP`."""

    tiles: Tensor
    """[tiles, n, span], rows contiguous; span is a whole number of blocks unless there is one tile"""
    block_max: Tensor | None = None
    """[half blocks, n]: receives the largest logits, which the exponentials are relative to"""
    reference: Tensor | None = None
    """[n]: given logits instead"""

    def args(self, block: BlockShape, unit: int) -> dict[str, Any]:
        """Kernel arguments, the stride of rows in units of `unit` columns."""
        tiles, described = self.tiles, False
        if block.descriptor and _describable(tiles[0]) and tiles.stride(0) * tiles.element_size() % 16 == 0:
            shape, strides = list(tiles.shape), list(tiles.stride())
            tiles, described = TensorDescriptor(tiles, shape, strides, [1, block.n, block.v // 2]), True
        return {
            "kept": tiles,
            "kept_span": self.tiles.shape[2] if len(self.tiles) > 1 else _ALL_COLUMNS,
            "kept_tile": self.tiles.stride(0) // 16 if len(self.tiles) > 1 else 0,
            "kept_stride": self.tiles.stride(1) // unit,
            "kept_max": self.block_max,
            "reference": self.reference,
            "KEEP": "half" if self.reference is None else "reference",
            "KEPT_DESCRIPTOR": described,
        }


_KEEP_NOTHING = {
    **dict.fromkeys(("kept", "kept_max", "reference")),
    **dict.fromkeys(("kept_span", "kept_tile", "kept_stride"), 0),
    "KEEP": "no",
    "KEPT_DESCRIPTOR": False,
}


class BlockStats:
    """Softmax statistics of n tokens within each block of `columns` columns, [blocks, n], to be folded into `stats`."""

    def __init__(self, stats: SoftmaxStats, n: int, columns: int) -> None:
        self.stats, self.n = stats, n
        self.block_v = block_shape(stats.max.device).v
        self.count = _cdiv(columns, self.block_v)
        self.buffers: dict[str, Tensor | None] = dict.fromkeys(kernels.STATS)
        for name, x in self._fields().items():
            if x is not None:  # columns fit into int32
                dtype = torch.float32 if x.is_floating_point() else torch.int32
                self.buffers[name] = x.new_empty((self.count, n), dtype=dtype)

    def _fields(self) -> dict[str, Tensor | None]:
        """The running statistics that the kernels compute, by name; None where no output needs them."""
        return {name: getattr(self.stats, name) for name in kernels.STATS}

    def add(self, tile: Tile, *, start: int = 0, keep: ExpTiles | None = None) -> None:
        """Compute the statistics of a tile that begins at column `start` of these, and the targets' logits in it."""
        args, programs = tile.batch.launch_args(tile)
        first_block = start // self.block_v
        ahead.launch(
            kernels.sums_kernel,
            programs,
            **args,
            **{f"block_{name}": None if x is None else x[first_block:] for name, x in self.buffers.items()},
            target_logit=self.stats.target[tile.batch.tokens],
            **(_KEEP_NOTHING if keep is None else keep.args(tile.batch.block, tile.unit)),
        )

    def fold(self, tokens: slice) -> None:
        """Fold all blocks into the tokens' running statistics."""
        block_n = 32
        ahead.launch(
            kernels.fold_kernel,
            _cdiv(self.n, block_n),
            **{f"row_{name}": None if x is None else x[tokens] for name, x in self._fields().items()},
            **{f"block_{name}": x for name, x in self.buffers.items()},
            n=self.n,
            blocks=self.count,
            BLOCK_N=block_n,
            BLOCK_B=32,
        )


def logit_grads(tile: Tile, grads: TokenGrads, out: Tensor, *, d_bias: bool) -> Tensor | None:
    """d loss / d raw logits of a tile into `out`, [n, v] with contiguous rows; `grads` are those of the tile's tokens.

    Returns:
        Their sums over the tokens, [v] fp32, if `d_bias`.
    """
    block, problem = tile.batch.block, tile.batch.problem
    args, programs = tile.batch.launch_args(tile)
    d_entropy, entropy = grads.entropy or (None, None)
    partials = _d_bias_partials(tile, block.n) if d_bias else None
    described = block.descriptor and _describable(out)
    ahead.launch(
        kernels.grads_kernel,
        programs,
        **args,
        row_max=grads.max,
        row_log_e=grads.log_e,
        d_logps=grads.logps.contiguous(),
        d_lse=None if grads.lse is None else grads.lse.contiguous(),
        d_entropy=None if d_entropy is None else d_entropy.contiguous(),
        row_entropy=entropy,
        grad=TensorDescriptor.from_tensor(out, [block.n, block.v // 2]) if described else out,
        block_d_bias=partials,
        grad_stride=out.stride(0),
        factor=problem.scale / problem.temperature,
        GRAD_DESCRIPTOR=described,
    )
    return None if partials is None else partials.sum(0)


def kept_logit_grads(
    tile: Tile, exps: Tensor, e_scale: Tensor, d_target: Tensor, out: Tensor, *, d_bias: bool
) -> Tensor | None:
    """As `logit_grads`, from kept exps [n, v]: exps * e_scale [half blocks, n], plus d_target [n] at the targets."""
    block_v = half_block(out.device)
    block_n = 16 if INTERPRETED else 32
    partials = _d_bias_partials(tile, block_n) if d_bias else None
    ahead.launch(
        kernels.kept_grads_kernel,
        _cdiv(tile.v, block_v) * _cdiv(len(tile.batch), block_n),
        kept=exps,
        e_scale=e_scale,
        targets=tile.batch.targets,
        d_target=d_target,
        grad=out,
        block_d_bias=partials,
        n=len(tile.batch),
        v=tile.v // tile.unit,
        v_start=tile.vocab.start,
        kept_width=block_v,
        kept_stride=exps.stride(0) // tile.unit,
        grad_stride=out.stride(0),
        UNIT=tile.unit,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=4,
    )
    return None if partials is None else partials.sum(0)


def _d_bias_partials(tile: Tile, block_n: int) -> Tensor:
    return tile.weight.new_empty((_cdiv(len(tile.batch), block_n), tile.v), dtype=torch.float32)


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Raw logits of the targets, [n] fp32; `hidden` [n, D] in the operand dtype, `weight` [V, D] in any."""
    out = hidden.new_empty(len(hidden), dtype=torch.float32)
    d = hidden.shape[1]
    strides = (hidden.stride(0), weight.stride(0), weight.stride(1))
    block_d = min(1024, triton.next_power_of_2(d))
    ahead.launch(kernels.target_logit_kernel, len(hidden), hidden, weight, targets, out, d, *strides, BLOCK_D=block_d)
    return out


def far_rows(batch: TokenBatch, stats: SoftmaxStats, reference: Tensor, total: Tensor, min_logp: float) -> None:
    """Recompute rows of `total` [n, D] relative to the largest logit, where |log p(reference)| > -min_logp.

    That logit becomes their `reference` [n]. Rows are selected on the device; almost always there are none.
    """
    tokens, weight = batch.tokens, batch.problem.weight
    assert isinstance(weight, Tensor)
    ahead.launch(
        kernels.far_rows_kernel,
        len(batch),
        hidden=batch.hidden,
        weight=weight,
        targets=batch.targets,
        row_max=stats.max[tokens],
        row_e=stats.e[tokens],
        reference=reference,
        total=total,
        v=weight.shape[0],
        d=total.shape[1],
        hidden_stride=batch.hidden.stride(0),
        weight_stride=weight.stride(0),
        weight_step=weight.stride(1),
        total_stride=total.stride(0),
        min_logp=min_logp,
        **batch.head._asdict(),
        OPERAND=_TRITON_DTYPES[batch.problem.operand_dtype],
        BLOCK_V=64,
        BLOCK_D=min(64, triton.next_power_of_2(total.shape[1])),
    )


def target_rows(
    total: Tensor,
    weight: Tensor,
    targets: Tensor,
    d_target: Tensor,
    total_scale: Tensor,
    out: Tensor,
    scale: Tensor | None,
    operand_dtype: torch.dtype,
) -> None:
    """`out * scale = d_target * weight[targets] + total_scale * total`, [n, D]; weight rounded to `operand_dtype`.

    The factors are [n] fp32. `scale` [n] fp32, if given, receives a power of 2 for each row that brings its largest
    element to about 2**10.
    """
    ahead.launch(
        kernels.target_rows_kernel,
        len(total),
        total=total,
        weight=weight,
        targets=targets,
        d_target=d_target.contiguous(),
        total_scale=total_scale.contiguous(),
        out=out,
        scale=scale,
        d=total.shape[1],
        total_stride=total.stride(0),
        weight_stride=weight.stride(0),
        weight_step=weight.stride(1),
        out_stride=out.stride(0),
        OPERAND=_TRITON_DTYPES[operand_dtype],
        BLOCK_D=triton.next_power_of_2(total.shape[1]),
        num_warps=8,
    )


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x` times a scalar in place; skipped on the device where that is 1."""
    flat = x.view(-1)
    block, unit = 64 if INTERPRETED else 8192, 16 if x.shape[-1] % 16 == 0 else 1
    sizes = {"count": len(flat) // unit, "UNIT": unit, "BLOCK": block}
    ahead.launch(kernels.scale_kernel, _cdiv(len(flat), block), flat, factor, **sizes, num_warps=8)
    return x
