"""A trained head: exponentials of the forward sweep, kept in the memory of the head's gradient and in the workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedalign.impls.autograd import Grads
from fusedalign.impls.head_grads import GradTarget
from fusedalign.impls.logits import slope
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads, scale_for_fp16
from fusedalign.impls.tiles import slices
from fusedalign.impls.triton.launch import (
    KEPT_ONE,
    BlockStats,
    ExpTiles,
    Tile,
    TokenBatch,
    block_shape,
    half_block,
    is_operand,
    kept_logit_grads,
    logit_grads,
)
from fusedalign.impls.triton.plan import WorkspacePlan, columns_per_fold, half_block_count, plan_grads, plan_tiles
from fusedalign.impls.triton.products import GradSums, as_operand
from fusedalign.problem import NeedsGrad, Problem


@dataclass
class ExpSlot:
    """A group of tokens and the memory that holds their exponentials between sweep and gradients, if any."""

    batch: TokenBatch
    span: int
    """vocabulary columns of a tile of the sweep; where exponentials are kept, of a tile of gradients too"""
    memory: Tensor | None = None
    """flat: room for all tokens, tile after tile"""
    column_bytes: int = 0
    """bytes of `memory` per vocabulary column; a row of dW where the memory is that of dW"""
    block_max: Tensor | None = None
    """[half blocks, n]: largest logits, which the exponentials are relative to"""
    e_scale: Tensor | None = None
    """[half blocks, n]: d loss / d raw logit / e, written over `block_max`"""
    d_target: Tensor | None = None
    """[n]: d loss / d raw logit of the targets"""

    def sweep(self, problem: Problem, stats: SoftmaxStats) -> None:
        """Complete these tokens' statistics, and keep their exponentials."""
        n, v = len(self.batch), problem.weight.shape[0]
        if self.memory is not None:
            self.block_max = self.memory.new_empty((half_block_count(problem), n), dtype=torch.float32)
        for group in slices(v, columns_per_fold(problem, n, self.span)):
            partials = BlockStats(stats, n, group.stop - group.start)
            for vocab in self._launches(problem, group):
                tile = Tile(self.batch, as_operand(problem.weight[vocab], problem), vocab)
                keep = None
                if self.memory is not None and self.block_max is not None:
                    keep = ExpTiles(self._tiles(self.memory, vocab), self.block_max[self._half_blocks(vocab) :])
                partials.add(tile, start=vocab.start - group.start, keep=keep)
            partials.fold(self.batch.tokens)

    def _launches(self, problem: Problem, group: slice) -> Iterator[slice]:
        """Full tiles of a group of columns in one launch, then the last one; one by one where a launch copies them."""
        columns = group.stop - group.start
        full_tiles = columns // self.span * self.span
        copies = problem.operand_dtype.itemsize == 4 or not is_operand(problem.weight, problem)
        step = self.span if copies or not full_tiles else full_tiles
        return (slice(group.start + s.start, group.start + s.stop) for s in slices(columns, step))

    def _tiles(self, memory: Tensor, vocab: slice) -> Tensor:
        """The tiles of some columns, [tiles, n, span]."""
        columns = vocab.stop - vocab.start
        span = min(self.span, columns)
        # A tile starts where its part of dW will: that is written while later tiles are still needed. Columns are cut
        # at whole blocks, of even size, so these divisions are exact.
        start, stride = (x * self.column_bytes // memory.itemsize for x in (vocab.start, self.span))
        return memory[start:].as_strided((columns // span, len(self.batch), span), (stride, span, 1))

    def _half_blocks(self, vocab: slice) -> int:
        """The index in `block_max` of the first column."""
        return vocab.start // half_block(self.batch.hidden.device)

    def prepare(self, problem: Problem, target: Tensor | None, grads: TokenGrads) -> None:
        """Compute `e_scale` and `d_target`; `target` [N] are final logits. Kept tiles are 0 at the targets."""
        if self.block_max is None or target is None:
            return
        grads, factor = grads[self.batch.tokens], problem.scale / problem.temperature
        log_p_max = self.block_max.sub_(grads.max).sub_(grads.log_e)
        self.e_scale = log_p_max.exp_().mul_(grads.p_scale() * (factor / KEPT_ONE))
        target = target[self.batch.tokens]
        d_target = grads.d_target(target - grads.max - grads.log_e) * factor
        cap_slope = slope(problem, target)
        self.d_target = d_target if cap_slope is None else d_target * cap_slope

    def logit_grads(self, tile: Tile, grads: TokenGrads, out: Tensor, *, d_bias: bool) -> Tensor | None:
        """d loss / d raw logits of a tile into `out`, as `launch.logit_grads`, from kept exponentials if there are any.

        The memory of the tile's exponentials may be overwritten afterwards.
        """
        if self.memory is None or self.e_scale is None or self.d_target is None:
            return logit_grads(tile, grads[self.batch.tokens], out, d_bias=d_bias)
        exps, e_scale = self._tiles(self.memory, tile.vocab)[0], self.e_scale[self._half_blocks(tile.vocab) :]
        return kept_logit_grads(tile, exps, e_scale, self.d_target, out, d_bias=d_bias)


def exp_slots(problem: Problem, d_weight: Tensor | None, *, workspace: bool) -> list[ExpSlot]:
    """Divide the tokens: first those kept in the memory of dW, then in the workspace if allowed, then those not kept.

    A split head has no `d_weight`: its gradients are several tensors. e is kept as fp16 (2**-12 of rounding, below that
    of the gradient's operands), as fp32 where operands are.
    """
    n, v, plan = len(problem.hidden), problem.weight.shape[0], plan_grads(problem)
    dtype, hidden, slots = _exp_dtype(problem), as_operand(problem.hidden, problem), []
    row_bytes = 0 if d_weight is None else _row_bytes(d_weight)
    in_d_weight, in_workspace = _slot_sizes(problem, plan, row_bytes, workspace)
    end = in_d_weight + in_workspace

    def batch(start: int, stop: int) -> TokenBatch:
        return TokenBatch(problem, slice(start, stop), hidden[start:stop])

    if in_d_weight and d_weight is not None:
        memory = d_weight.view(-1).view(torch.uint8)
        memory = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        slots.append(ExpSlot(batch(0, in_d_weight), plan.vocab, memory, row_bytes))
    if in_workspace:
        memory = hidden.new_empty(in_workspace * v, dtype=dtype)
        slots.append(ExpSlot(batch(in_d_weight, end), plan.vocab, memory, in_workspace * dtype.itemsize))
    if end < n:
        slots.append(ExpSlot(batch(end, n), plan_tiles(problem, cut_tokens=False).vocab))
    return slots


def keeps_all(problem: Problem) -> bool:
    """Whether the memory of dW and the workspace keep the exponentials of all tokens."""
    row_bytes = _row_bytes(problem.weight) if isinstance(problem.weight, Tensor) else 0
    return sum(_slot_sizes(problem, plan_grads(problem), row_bytes, workspace=True)) == len(problem.hidden)


def _exp_dtype(problem: Problem) -> torch.dtype:
    return torch.float16 if problem.operand_dtype.itemsize == 2 else torch.float32


def _row_bytes(weight: Tensor) -> int:
    return weight.shape[1] * weight.itemsize


def _slot_sizes(problem: Problem, plan: WorkspacePlan, row_bytes: int, workspace: bool) -> tuple[int, int]:
    """Numbers of tokens kept in the memory of dW and in the workspace."""
    n, v, dtype = len(problem.hidden), problem.weight.shape[0], _exp_dtype(problem)
    in_d_weight = row_bytes // dtype.itemsize
    # The next tokens start 16-byte aligned.
    in_d_weight = n if n <= in_d_weight else in_d_weight - in_d_weight % 8
    max_bytes = 4 * half_block_count(problem)
    spare = plan.spare - in_d_weight * max_bytes
    in_workspace = max(0, min(n - in_d_weight, spare // (v * dtype.itemsize + max_bytes)))
    if not workspace or in_workspace < n // 8:  # too few tokens would not fill the GPU
        in_workspace = 0
    elif in_d_weight + in_workspace < n:
        in_workspace -= in_workspace % block_shape(problem.hidden.device).n
    return in_d_weight, in_workspace


def sweep_all(problem: Problem, slots: list[ExpSlot], stats: SoftmaxStats) -> None:
    """Complete the statistics of all tokens."""
    for slot in reversed(slots):  # tokens that are not kept first: one long launch, during which others are queued
        slot.sweep(problem, stats)


def grads_of_slots(
    problem: Problem,
    slots: list[ExpSlot],
    grads: TokenGrads,
    needs: NeedsGrad,
    targets: list[GradTarget] | None,
    *,
    target: Tensor | None = None,
    round_hidden: bool = True,
) -> Grads:
    """The gradients of hidden, weight and bias, one tile of all tokens after another.

    `target` [N] are the final logits of the targets, needed where exponentials are kept; `targets` as in `GradSums`.
    """
    grads, undo = scale_for_fp16(problem, grads)
    for slot in slots:
        slot.prepare(problem, target, grads)
    sums, hidden = GradSums(problem, needs, undo, targets), as_operand(problem.hidden, problem)
    for vocab in sums.plan.vocab_slices(problem):
        weight = as_operand(problem.weight[vocab], problem)
        d_logits = sums.tile[:, : len(weight)]
        d_bias = weight.new_zeros(len(weight), dtype=torch.float32) if needs.bias else None
        for slot in slots:
            tile = Tile(slot.batch, weight, vocab)
            slot_d_bias = slot.logit_grads(tile, grads, d_logits[slot.batch.tokens], d_bias=needs.bias)
            if d_bias is not None and slot_d_bias is not None:
                d_bias += slot_d_bias
        sums.add(vocab, d_logits, hidden, weight, d_bias)
    return sums.results(round_hidden=round_hidden)
