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

#: Triton runs its kernels on the CPU, in Python: for tests and debugging.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: What e = 1 is kept as, see `kernels`.
KEPT_ONE: float = kernels.KEPT_ONE.value


_ONE_BLOCK_EACH = _ALL_COLUMNS = 2**30

#: Up to here the fast tanh's 6e-8 is less than fp32 rounds a logit near the cap.
_LARGE_SOFTCAP = 64.0


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
def blocks_for(device: torch.device) -> Blocks:
    """A fixed choice for each generation, so that no training step waits for a search.

    Shared memory of a program: stages * (n + v) * d * 2 bytes and, where blocks are stored, n * v: at most 227 KiB
    (Hopper and later data-centre GPUs), 163 KiB (A100) or 99 KiB (consumer Ampere, Ada and Blackwell).
    """
    if device.type == "meta":  # of a dry run
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return Blocks(16, 32, 16, warps=4, stages=2, group=2, programs=3, descriptor=True)
    properties: Any = torch.cuda.get_device_properties(device)
    shared = 65536 if torch.version.hip else properties.shared_memory_per_block_optin
    if shared >= 220 * 1024 and torch.cuda.get_device_capability(device) >= (9, 0):
        many = properties.multi_processor_count
        return Blocks(128, 256, 64, warps=8, stages=3, programs=many, descriptor=True, flatten=True)
    if shared >= 160 * 1024:
        return Blocks(128, 256, 32, warps=8, stages=3)
    return Blocks(128, 128, 32, warps=4, stages=3)


def half_block(device: torch.device) -> int:
    """Columns of what is kept by one largest logit."""
    return blocks_for(device).v // 2


class Rows:
    """Some tokens of a problem as the left operand of the kernels' product, made once for many launches."""

    def __init__(self, problem: Problem, tokens: slice, hidden: Tensor) -> None:
        """`hidden` [n, D]: those of the tokens, in the operand dtype, rows contiguous."""
        self.problem, self.tokens, self.hidden = problem, tokens, hidden
        self.targets = problem.targets[tokens]
        self._options: dict[Blocks, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def options(self, blocks: Blocks) -> dict[str, Any]:
        """What every launch for these tokens is given; `weight` and `weight_start` where the head serves as it is."""
        if blocks not in self._options:
            self._options[blocks] = self._make_options(blocks)
        return self._options[blocks]

    def _make_options(self, blocks: Blocks) -> dict[str, Any]:
        p = self.problem
        after = 1.0 if p.softcap is None else p.softcap / p.temperature
        options: dict[str, Any] = {
            "bias": None if p.bias is None else p.bias.contiguous(),
            "targets": self.targets,
            "n": len(self),
            "d": self.hidden.shape[1],
            "before": p.scale / p.temperature if p.softcap is None else p.scale / p.softcap,
            "after": after,
            "HAS_BIAS": p.bias is not None,
            "HAS_SOFTCAP": p.softcap is not None,
            "EXACT_TANH": self.hidden.dtype.itemsize == 4 or after > _LARGE_SOFTCAP,
            # A program's stride from block to block is a constant of the kernel. The number of blocks differs with
            # every shape, so it must not be that constant.
            "PROGRAMS": blocks.programs or _ONE_BLOCK_EACH,
            "BLOCK_N": blocks.n,
            "BLOCK_V": blocks.v,
            "BLOCK_D": blocks.d,
            "GROUP": blocks.group,
            "FLATTEN": blocks.flatten,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        if self.hidden.dtype.itemsize == 4:
            return options | {"hidden_stride": 0, "weight_stride": 0, "weight_start": 0, "SOURCE": "memory"}
        # Triton's interpreter multiplies the bits of bf16; in fp32 the same products are exact.
        hidden = self.hidden.float() if INTERPRETED else self.hidden
        weight = p.weight if is_operand(p.weight, p) and not INTERPRETED else None  # None: tile after tile
        described = blocks.descriptor and _describable(hidden)
        described &= hidden.shape[1] * hidden.element_size() % 16 == 0 if weight is None else _describable(weight)
        if described:
            descriptor = TensorDescriptor.from_tensor(hidden, [blocks.n, blocks.d])
            options |= {"hidden": descriptor, "hidden_stride": 0, "SOURCE": "descriptor"}
        else:
            stride = hidden.stride(0) if len(hidden) > 1 else hidden.shape[1]  # of one row it may be any
            options |= {"hidden": hidden, "hidden_stride": stride, "SOURCE": "pointer"}
        return options if weight is None else options | _right(weight, options["SOURCE"], blocks)

    def launch(self, tile: Tile, blocks: Blocks) -> tuple[dict[str, Any], int]:
        """Arguments that `sums_kernel` and `grads_kernel` share, and the number of programs."""
        options, weight = self.options(blocks), tile.weight
        here: dict[str, Any] = {"v": tile.v // tile.unit, "UNIT": tile.unit, "v_start": tile.vocab.start}
        if options["SOURCE"] == "memory":  # the library's fp32 product: tensor cores have none
            z = torch.mm(self.hidden, weight.t())
            here |= {"hidden": z, "weight": None}
        elif "weight" in options:
            here["weight_start"] = tile.vocab.start
        else:
            weight = weight.float() if INTERPRETED else weight
            here |= {"weight_start": 0, **_right(weight, options["SOURCE"], blocks)}
        count = _blocks(len(self), blocks.n) * _blocks(tile.v, blocks.v)
        return options | here, min(count, options["PROGRAMS"])


def _right(weight: Tensor, source: str, blocks: Blocks) -> dict[str, Any]:
    """The right operand of the kernels' product, [v, D]."""
    if source == "descriptor":
        return {"weight": TensorDescriptor.from_tensor(weight, [blocks.v, blocks.d]), "weight_stride": 0}
    return {"weight": weight, "weight_stride": weight.stride(0)}


def is_operand(x: Tensor | SplitHead, problem: Problem) -> TypeGuard[Tensor]:
    """Whether `x` can enter a product as it is: in the operand dtype, rows contiguous."""
    return isinstance(x, Tensor) and x.dtype == problem.operand_dtype and x.stride(1) == 1 and x.stride(0) >= x.shape[1]


@dataclass(frozen=True)
class Tile:
    """Some tokens against some columns of the vocabulary."""

    rows: Rows
    weight: Tensor
    """[v, D], the rows of the head of these columns, in the operand dtype, rows contiguous"""
    vocab: slice

    @property
    def n(self) -> int:
        """Tokens."""
        return len(self.rows)

    @property
    def v(self) -> int:
        """Columns."""
        return self.weight.shape[0]

    @property
    def unit(self) -> int:
        """Of `v` for the kernels: 16 lets them read and write a row in wide pieces, and masks take fewer registers."""
        return 16 if self.v % 16 == 0 else 1


def _describable(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and (x.stride(0) * x.element_size()) % 16 == 0 and x.stride(1) == 1


def _blocks(size: int, block: int) -> int:
    """How many; `triton.cdiv` is a function for kernels, and slow here."""
    return -(-size // block)


class ExpTiles(NamedTuple):
    """Where the sums' kernel keeps what it makes on the way, see its `KEEP`."""

    tiles: Tensor
    """[tiles, n, span], rows contiguous; span is a whole number of blocks unless there is one tile"""
    largest: Tensor | None = None
    """[halves of blocks of columns, n]: is given the largest logits"""
    reference: Tensor | None = None
    """[n]: given instead of those"""

    def arguments(self, blocks: Blocks, unit: int) -> dict[str, Any]:
        """For the kernel, rows in units of `unit` columns."""
        tiles, described = self.tiles, False
        if blocks.descriptor and _describable(tiles[0]) and tiles.stride(0) * tiles.element_size() % 16 == 0:
            shape, strides = list(tiles.shape), list(tiles.stride())
            tiles, described = TensorDescriptor(tiles, shape, strides, [1, blocks.n, blocks.v // 2]), True
        return {
            "kept": tiles,
            "kept_span": self.tiles.shape[2] if len(self.tiles) > 1 else _ALL_COLUMNS,
            "kept_tile": self.tiles.stride(0) // 16 if len(self.tiles) > 1 else 0,
            "kept_stride": self.tiles.stride(1) // unit,
            "kept_max": self.largest,
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
    """Softmax sums of n tokens in each block of `columns` columns from a tile's first on, [blocks, n], until folded."""

    def __init__(self, problem: Problem, n: int, columns: int) -> None:
        self.outputs, self.n, hidden = problem.outputs, n, problem.hidden
        self.block_v = blocks_for(hidden.device).v
        self.count = _blocks(columns, self.block_v)

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

    def add(self, tile: Tile, sums: SoftmaxStats, *, start: int = 0, keep: ExpTiles | None = None) -> None:
        """Make the sums of a tile, whose first column is the `start`-th here, and the targets' logits in it."""
        blocks = blocks_for(tile.weight.device)
        options, programs = tile.rows.launch(tile, blocks)
        first = start // self.block_v
        names = ("block_max", "block_e", "block_e_log_e", "block_e_sq", "block_logit", "block_top")
        ahead.launch(
            kernels.sums_kernel,
            programs,
            **options,
            **{name: None if x is None else x[first:] for name, x in zip(names, self.parts, strict=True)},
            **self._flags(),
            target_logit=sums.target[tile.rows.tokens],
            **(_KEEP_NOTHING if keep is None else keep.arguments(blocks, tile.unit)),
        )

    def fold(self, sums: SoftmaxStats, tokens: slice) -> None:
        """Into the tokens' running sums."""
        block_n = 32
        fields = (sums.max, sums.e, sums.e_log_e, sums.e_sq, sums.logit, sums.top)
        ahead.launch(
            kernels.fold_kernel,
            _blocks(self.n, block_n),
            *(None if x is None else x[tokens] for x in fields),
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
    blocks, problem = blocks_for(out.device), tile.rows.problem
    options, programs = tile.rows.launch(tile, blocks)
    d_entropy, entropy = grads.entropy or (None, None)
    sums = _d_bias_parts(tile, blocks.n) if d_bias else None
    described = blocks.descriptor and _describable(out)
    ahead.launch(
        kernels.grads_kernel,
        programs,
        **options,
        row_max=grads.max,
        row_log_e=grads.log_e,
        d_logps=grads.logps.contiguous(),
        d_lse=None if grads.lse is None else grads.lse.contiguous(),
        d_entropy=None if d_entropy is None else d_entropy.contiguous(),
        row_entropy=entropy,
        grad=TensorDescriptor.from_tensor(out, [blocks.n, blocks.v // 2]) if described else out,
        block_d_bias=sums,
        grad_stride=out.stride(0),
        factor=problem.scale / problem.temperature,
        LSE=grads.lse is not None,
        ENTROPY=grads.entropy is not None,
        D_BIAS=d_bias,
        GRAD_DESCRIPTOR=described,
    )
    return None if sums is None else sums.sum(0)


def kept_logit_grads(
    tile: Tile, kept: Tensor, of_e: Tensor, of_target: Tensor, out: Tensor, *, d_bias: bool
) -> Tensor | None:
    """As `logit_grads`, from what `ExpTiles` has: e * of_e [halves, n], and of_target [n] more at the targets."""
    block_v = half_block(out.device)
    block_n = 16 if INTERPRETED else 32
    sums = _d_bias_parts(tile, block_n) if d_bias else None
    ahead.launch(
        kernels.kept_grads_kernel,
        _blocks(tile.v, block_v) * _blocks(tile.n, block_n),
        kept,
        of_e,
        tile.rows.targets,
        of_target,
        out,
        sums,
        tile.n,
        tile.v // tile.unit,
        tile.vocab.start,
        block_v,
        kept.stride(0) // tile.unit,
        out.stride(0),
        D_BIAS=d_bias,
        UNIT=tile.unit,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=4,
    )
    return None if sums is None else sums.sum(0)


def _d_bias_parts(tile: Tile, block_n: int) -> Tensor:
    return tile.weight.new_empty((_blocks(tile.n, block_n), tile.v), dtype=torch.float32)


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Raw logits of the targets, [n] fp32; `hidden` [n, D] in the operand dtype, `weight` [V, D] in any."""
    out = hidden.new_empty(len(hidden), dtype=torch.float32)
    d = hidden.shape[1]
    strides = (hidden.stride(0), weight.stride(0), weight.stride(1))
    block_d = min(1024, triton.next_power_of_2(d))
    ahead.launch(kernels.target_logit_kernel, len(hidden), hidden, weight, targets, out, d, *strides, BLOCK_D=block_d)
    return out


def far_rows(rows: Rows, sums: SoftmaxStats, reference: Tensor, total: Tensor, least_logp: float) -> None:
    """Make rows of `total` [n, D] again relative to the largest logit, where |log p(reference)| > -least_logp.

    That logit becomes their `reference` [n]. Selected on the device; almost always there is none.
    """
    p, tokens, weight = rows.problem, rows.tokens, rows.problem.weight
    assert isinstance(weight, Tensor)
    options = rows.options(blocks_for(total.device))
    block_d = min(64, triton.next_power_of_2(total.shape[1]))
    ahead.launch(
        kernels.far_rows_kernel,
        len(rows),
        rows.hidden,
        weight,
        options["bias"],
        rows.targets,
        sums.max[tokens],
        sums.e[tokens],
        reference,
        total,
        weight.shape[0],
        total.shape[1],
        rows.hidden.stride(0),
        weight.stride(0),
        weight.stride(1),
        total.stride(0),
        options["before"],
        options["after"],
        least_logp,
        HAS_BIAS=options["HAS_BIAS"],
        HAS_SOFTCAP=options["HAS_SOFTCAP"],
        OPERAND=_TRITON[p.operand_dtype],
        BLOCK_V=64,
        BLOCK_D=block_d,
    )


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
    ahead.launch(
        kernels.target_rows_kernel,
        len(total),
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
    block, unit = 64 if INTERPRETED else 8192, 16 if x.shape[-1] % 16 == 0 else 1
    sizes = {"count": len(flat) // unit, "UNIT": unit, "BLOCK": block}
    ahead.launch(kernels.scale_kernel, _blocks(len(flat), block), flat, factor, **sizes, num_warps=8)
    return x


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
