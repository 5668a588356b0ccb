"""Our own kernels for NVIDIA GPUs: blocks of logits live in registers, products of whole tiles are the library's.

Costs in units of U = 2*N*D*V FLOPs, one product of all hidden states with the head:

* no gradient: each block of logits is folded into softmax sums where it is made, 1U and no tile in memory;
* frozen head: the same kernel also writes p / p_target of a tile, whose product with the head sums up to J = d logps /
  d hidden; the backward is `grad[:, None] * J`, 2U in all;
* a sum over tokens (`token_loss_sum`): the first sweep keeps e = exp(logit - max) of as many tokens as there is room
  for, in the memory of the head's gradient until that is written, and in the workspace. The others' logits are made
  again: between 3U and 4U;
* anything else: the backward makes the tiles again, vocabulary-major, and writes each tile of dW once, 4U; it is spared
  that for the tokens whose e the forward has kept in the memory of the head's gradient, which it makes early: 3U there.

Logits and their sums are fp32. What enters a product is in the operand dtype; fp32 products are the library's. The sum
of dH over the vocabulary, `[N, D]` in fp32, is part of the workspace, and is made even where it fills more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedalign.impls import autograd
from fusedalign.impls.autograd import Grads, Jacobian, KeepMode, KeptExps, OwnGradients
from fusedalign.impls.head_grads import Accumulators, GradTarget, grad_targets, in_head_order
from fusedalign.impls.logits import slope, transform_
from fusedalign.impls.softmax import (
    SoftmaxStats,
    TokenGrads,
    ones_upstream,
    scale_for_fp16,
    scaled_,
    token_loss_grads,
)
from fusedalign.impls.tiles import TileSizes, slices
from fusedalign.impls.triton.dry import TOKENS_AT_ONCE, prepare_path
from fusedalign.impls.triton.launch import (
    INTERPRETED,
    KEPT_ONE,
    BlockStats,
    ExpTiles,
    Rows,
    Tile,
    blocks_for,
    far_rows,
    half_block,
    is_operand,
    kept_logit_grads,
    logit_grads,
    scale_,
    target_logits,
    target_rows,
)
from fusedalign.problem import DEFAULT_WORKSPACE, NeedsGrad, Problem, SplitHead, TokenLogps, TokenLoss

#: J is summed with weights p / p_target; where log p_target is below this they might leave the range of bf16 and fp32,
#: and those rows are summed again, slowly and relative to the largest logit. So are rows where rounding puts it as far
#: above 0.
_LEAST_LOGP = -60.0


def _on_device(problem: Problem) -> torch.cuda.device:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(problem.hidden)


# ---------------------------------------------------------------------------------------------------------- dry runs


def _sweep_and_gradients(problem: Problem, keep: KeepMode) -> None:
    """A sweep and, of what it has kept of a head, the gradients of log-probabilities."""
    stats, kept = IMPL.sweep(problem, keep)
    if isinstance(kept, KeptExps):
        grads = TokenGrads(stats.max, stats.log_e(), stats.e)
        IMPL.two_pass_grads(problem, grads, problem.requires_grad, kept=kept)


def _dry_gradients(
    problem: Problem, needs: NeedsGrad, keeps_exps: bool, lse: bool, entropy: bool, round_hidden: bool
) -> None:
    stats, kept = IMPL.sweep(problem, "exps") if keeps_exps else (SoftmaxStats(problem), None)
    x = stats.e
    grads = TokenGrads(stats.max, stats.log_e(), x, x if lse else None, (x, x) if entropy else None)
    exps = kept if isinstance(kept, KeptExps) else None
    IMPL.two_pass_grads(problem, grads, needs, kept=exps, round_hidden=round_hidden)


def _dry_one_pass(problem: Problem, needs: NeedsGrad, z_loss: bool, token_loss: TokenLoss) -> None:
    """One whose loss may be any: with a derivative by lse too, unless it is known to have none."""
    IMPL.one_pass(problem, lambda logps, lse: (logps, logps, lse if z_loss else None), needs)
    if z_loss and not hasattr(token_loss, "z_loss"):
        IMPL.one_pass(problem, lambda logps, lse: (logps, logps, None), needs)


# -------------------------------------------------------------------------------------------------------------- forward


def _fold_all(problem: Problem, rows: SoftmaxStats) -> None:
    plan = _plan(problem, token_bytes=_copy_bytes(problem))
    for tokens in plan.token_slices(problem):
        left = Rows(problem, tokens, _operand(problem.hidden[tokens], problem))
        for vocab in plan.vocab_slices(problem):
            weight = _operand(problem.weight[vocab], problem)
            sums = BlockStats(problem, len(left), len(weight))
            sums.add(Tile(left, weight, vocab), rows)
            sums.fold(rows, tokens)


@dataclass(frozen=True)
class _RowsOfHead:
    """weight[target], and softmax @ weight of all other columns, of some tokens."""

    problem: Problem
    tokens: slice
    slope: Tensor | None
    """of the softcap at the target, [n]"""
    total: Tensor
    """[n, D] fp32: sum of weights p / p_reference and slopes, times rows of the head"""
    p_reference: Tensor
    """of the target; of the largest logit where the target's is far below that"""
    logps: Tensor
    lost: Tensor | None
    """a bool: whether any of these sums is wrong; None where `far_rows` has made such sums again"""

    def combine(self, grads: TokenGrads, out: Tensor, scale: Tensor | None = None) -> None:
        """`out` = the gradient of hidden, [n, D], for a loss of logps and lse alone.

        `scale` [n], if given, receives the power of 2 by which each row of `out` has been divided.
        """
        p = self.problem
        factor = p.scale / p.temperature
        of_target = grads.d_target(self.logps) * factor
        of_target = of_target if self.slope is None else of_target * self.slope
        of_total = grads.p_scale() * self.p_reference * factor
        weight, targets = _rows_of_targets(p, self.tokens)
        target_rows(self.total, weight, targets, of_target, of_total, out, scale, p.operand_dtype)


def _rows_of_head(problem: Problem, rows: SoftmaxStats) -> Iterator[tuple[slice, _RowsOfHead]]:
    """For some tokens after others; `rows` holds their sums by then."""
    d, v = problem.hidden.shape[1], problem.weight.shape[0]
    item = problem.operand_dtype.itemsize
    of_target = 0 if isinstance(problem.weight, Tensor) else d * item
    token_bytes = 4 * d + of_target + _copy_bytes(problem) + _block_bytes(problem, v)
    plan = _plan(problem, token_bytes=token_bytes, logit_bytes=item)
    for tokens in plan.token_slices(problem):
        hidden, targets = _operand(problem.hidden[tokens], problem), problem.targets[tokens]
        left = Rows(problem, tokens, hidden)
        bias = None if problem.bias is None else problem.bias[targets]
        reference = transform_(problem, target_logits(hidden, *_rows_of_targets(problem, tokens)), bias)
        total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        memory = hidden.new_empty((len(hidden), plan.vocab))
        sums = BlockStats(problem, len(hidden), v)
        for vocab in plan.vocab_slices(problem):
            weight = _operand(problem.weight[vocab], problem)
            kept = memory[:, : len(weight)]
            sums.add(Tile(left, weight, vocab), rows, start=vocab.start, keep=ExpTiles(kept[None], reference=reference))
            _add_product(total, kept, weight)
        sums.fold(rows, tokens)
        del sums, memory, kept  # before the next tokens' are made
        lost = None
        if isinstance(problem.weight, Tensor):
            far_rows(left, rows, reference, total, _LEAST_LOGP)
        else:  # `far_rows` reads heads of one tensor only
            lost = ((reference - rows.max[tokens] - rows.log_e(tokens)).abs() > -_LEAST_LOGP).any()
        p_reference = (reference - rows.max[tokens]).exp() / rows.e[tokens]
        cap_slope = slope(problem, rows.target[tokens])
        yield tokens, _RowsOfHead(problem, tokens, cap_slope, total, p_reference, rows.logps(tokens), lost)
        del total  # before the next tokens' is made


def _any_row_is_lost(lost: list[Tensor | None]) -> bool:
    """Whether any sum of `_rows_of_head` is wrong; a wait for the GPU where the head has several parts."""
    flags = [x for x in lost if x is not None and not x.is_meta]
    return bool(flags) and bool(torch.stack(flags).any())


def _rows_of_targets(problem: Problem, tokens: slice) -> tuple[Tensor, Tensor]:
    """Rows of the head, and which of them are those of the tokens' targets."""
    targets = problem.targets[tokens]
    if isinstance(problem.weight, Tensor):
        return problem.weight, targets
    return problem.weight.index_select(0, targets), torch.arange(len(targets), device=targets.device)


# ------------------------------------------------------------------------------------------------------------ gradients


def _one_pass_with_head(
    problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
) -> tuple[SoftmaxStats, Tensor, Grads]:
    rows, everything, d_weight = SoftmaxStats(problem), slice(0, len(problem.hidden)), None
    if isinstance(problem.weight, Tensor):
        d_weight = torch.empty_like(problem.weight, memory_format=torch.contiguous_format)
    stores = _swept(problem, _exp_slots(problem, d_weight, workspace=True), rows)
    loss, grads = token_loss_grads(rows, everything, token_loss, problem.result_dtype)
    keeps_dtype = autograd.early_dtype(problem.hidden.dtype) == problem.hidden.dtype
    targets = _targets(problem, needs, d_weight)
    d_inputs = _grads(problem, stores, grads, needs, targets, target=rows.target, round_hidden=keeps_dtype)
    return rows, loss, d_inputs


def _targets(
    problem: Problem, needs: NeedsGrad, d_weight: Tensor | None, accumulators: Accumulators = ()
) -> list[GradTarget] | None:
    """Where the gradients of the head go: into `d_weight` if there is one; None where they are not needed."""
    if not needs.weight:
        return None
    return grad_targets(problem, accumulators) if d_weight is None else [GradTarget(slice(None), d_weight)]


def _swept(problem: Problem, stores: list[_ExpSlot], rows: SoftmaxStats) -> list[_ExpSlot]:
    """The stores, once they have made their tokens' sums."""
    for store in reversed(stores):  # first those that are not kept: a long launch, during which the next ones queue up
        store.sweep(problem, rows)
    return stores


def _grads(
    problem: Problem,
    stores: list[_ExpSlot],
    grads: TokenGrads,
    needs: NeedsGrad,
    d_weight: list[GradTarget] | None,
    *,
    target: Tensor | None = None,
    round_hidden: bool = True,
) -> Grads:
    """The gradients, from what the stores have kept; where they have, `target` are the final logits of the targets."""
    grads, undo = scale_for_fp16(problem, grads)
    for store in stores:
        store.prepare(problem, target, grads)
    sums, hidden = _GradSums(problem, needs, undo, d_weight), _operand(problem.hidden, problem)
    for vocab in sums.plan.vocab_slices(problem):
        weight = _operand(problem.weight[vocab], problem)
        grad = sums.tile[:, : len(weight)]
        d_bias = weight.new_zeros(len(weight), dtype=torch.float32) if needs.bias else None
        for store in stores:
            part = store.logit_grads(Tile(store.rows, weight, vocab), grads, grad[store.tokens], d_bias=needs.bias)
            if d_bias is not None and part is not None:
                d_bias += part
        sums.add(vocab, grad, hidden, weight, d_bias)
    return sums.results(round_hidden=round_hidden)


@dataclass
class _ExpSlot:
    """Some tokens, and where their e is kept from the sweep to the gradients; perhaps nowhere."""

    rows: Rows
    span: int
    """vocabulary columns of a tile of the sweep; those of a tile of the gradients where e is kept"""
    memory: Tensor | None = None
    """flat: room for all rows, tile after tile"""
    column_bytes: int = 0
    """of `memory` for each column of the vocabulary: where it is the head's gradient, a row of that"""
    of_e: Tensor | None = None
    """[halves of blocks of columns, n]: the largest logits, later what e is multiplied with"""
    of_target: Tensor | None = None
    """[n]: the gradient at the targets"""

    @property
    def tokens(self) -> slice:
        """Which of the problem's."""
        return self.rows.tokens

    def sweep(self, problem: Problem, sums: SoftmaxStats) -> None:
        """Make these tokens' sums, and keep their e."""
        n, v = len(self.rows), problem.weight.shape[0]
        if self.memory is not None:
            self.of_e = self.memory.new_empty((_halves(problem), n), dtype=torch.float32)
        for group in slices(v, _columns_folded_at_once(problem, n, self.span)):
            blocks = BlockStats(problem, n, group.stop - group.start)
            for vocab in self._launches(problem, group):
                tile = Tile(self.rows, _operand(problem.weight[vocab], problem), vocab)
                blocks.add(tile, sums, start=vocab.start - group.start, keep=self._keep(vocab))
            blocks.fold(sums, self.tokens)

    def _launches(self, problem: Problem, group: slice) -> Iterator[slice]:
        """All whole tiles of some columns at once, then the rest; one by one where a launch takes memory for them."""
        whole = (group.stop - group.start) // self.span * self.span
        takes_none = problem.operand_dtype.itemsize == 2 and is_operand(problem.weight, problem)
        step = whole if whole and takes_none else self.span
        return (slice(group.start + s.start, group.start + s.stop) for s in slices(group.stop - group.start, step))

    def _keep(self, vocab: slice) -> ExpTiles | None:
        """Where a launch keeps its tiles."""
        if self.memory is None or self.of_e is None:
            return None
        n, columns = len(self.rows), vocab.stop - vocab.start
        span = min(self.span, columns)
        # A tile begins where its part of the gradient will, which is written while the tiles behind it are needed yet.
        # That is at whole blocks, of even size, so these divisions are exact.
        start, stride = (x * self.column_bytes // self.memory.itemsize for x in (vocab.start, self.span))
        tiles = self.memory[start:].as_strided((columns // span, n, span), (stride, span, 1))
        return ExpTiles(tiles, self.of_e[vocab.start // half_block(tiles.device) :])

    def prepare(self, problem: Problem, target: Tensor | None, grads: TokenGrads) -> None:
        """p = e * exp(its max - lse); what was kept has no target in it."""
        if self.of_e is None or target is None:
            return
        grads, factor = grads[self.tokens], problem.scale / problem.temperature
        self.of_e.sub_(grads.max).sub_(grads.log_e).exp_().mul_(grads.p_scale() * (factor / KEPT_ONE))
        target = target[self.tokens]
        of_target = grads.d_target(target - grads.max - grads.log_e) * factor
        cap_slope = slope(problem, target)
        self.of_target = of_target if cap_slope is None else of_target * cap_slope

    def logit_grads(self, tile: Tile, grads: TokenGrads, out: Tensor, *, d_bias: bool) -> Tensor | None:
        """The gradient of a tile's logits; what was kept of the tile may be overwritten then."""
        if self.of_e is None:
            return logit_grads(tile, grads[self.tokens], out, d_bias=d_bias)
        kept = self._keep(tile.vocab)
        assert kept is not None
        assert kept.largest is not None
        assert self.of_target is not None
        return kept_logit_grads(tile, kept.tiles[0], kept.largest, self.of_target, out, d_bias=d_bias)


def _exp_slots(problem: Problem, d_weight: Tensor | None, *, workspace: bool) -> list[_ExpSlot]:
    """All tokens: the first in the memory of dW, more in the `workspace` if it may be used, the others nowhere.

    Without such memory, which the gradients of several parts would not be, there are none of the first.

    e is kept as fp16 (2**-12 of rounding, below that of the gradient's operands), as fp32 where operands are.
    """
    n, v, plan = len(problem.hidden), problem.weight.shape[0], _plan_grads(problem)
    dtype = torch.float16 if problem.operand_dtype.itemsize == 2 else torch.float32
    memory = problem.targets.new_empty(0) if d_weight is None else d_weight.view(-1)
    memory = memory.view(torch.uint8)
    flat = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
    row_bytes = 0 if d_weight is None else d_weight.shape[1] * d_weight.itemsize
    first = row_bytes // dtype.itemsize
    first = n if n <= first else first - first % 8  # what follows begins at a whole number of 16 bytes; see `kernels`
    each = v * dtype.itemsize + 4 * _halves(problem)
    more = max(0, min(n - first, (plan.left - first * 4 * _halves(problem)) // each))
    if not workspace or more < n // 8:  # too few rows would not fill the GPU
        more = 0
    elif first + more < n:
        more -= more % blocks_for(flat.device).n  # whole blocks
    hidden = _operand(problem.hidden, problem)

    def rows(start: int, stop: int) -> Rows:
        return Rows(problem, slice(start, stop), hidden[start:stop])

    stores = [_ExpSlot(rows(0, first), plan.vocab, flat, row_bytes)] if first else []
    if more:
        memory = flat.new_empty(more * v)
        stores.append(_ExpSlot(rows(first, first + more), plan.vocab, memory, more * dtype.itemsize))
    if first + more < n:
        stores.append(_ExpSlot(rows(first + more, n), _plan(problem, cut_tokens=False).vocab))
    return stores


class _GradSums:
    """dH, dW and db, made from the gradients of the logits tile after tile of the vocabulary."""

    def __init__(
        self, problem: Problem, needs: NeedsGrad, undo: Tensor | None, d_weight: list[GradTarget] | None
    ) -> None:
        hidden, self.problem = problem.hidden, problem
        self.plan, self.undo, self.dtype = _plan_grads(problem), undo, hidden.dtype
        self.tile = hidden.new_empty((len(hidden), self.plan.vocab), dtype=problem.operand_dtype)
        self.d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs.hidden else None
        self.d_weight = d_weight
        self.d_bias = torch.empty_like(problem.bias) if needs.bias and problem.bias is not None else None

    def add(self, vocab: slice, grad: Tensor, hidden: Tensor, weight: Tensor, d_bias: Tensor | None) -> None:
        """Add the part of a tile: `grad` [N, v] and `weight` [v, D] in the operand dtype, `d_bias` [v] fp32."""
        if self.d_hidden is not None:
            _add_product(self.d_hidden, grad, weight)
        for d_part in self.d_weight or ():
            _write_product(d_part, vocab, grad.t(), hidden[:, d_part.columns], self.undo)
        if self.d_bias is not None and d_bias is not None:
            self.d_bias[vocab] = scaled_(d_bias, self.undo)

    def results(self, *, round_hidden: bool = True) -> Grads:
        """Gradients of hidden, weight and bias."""
        d_hidden = None if self.d_hidden is None else scaled_(self.d_hidden, self.undo)
        if d_hidden is not None and round_hidden:
            d_hidden = d_hidden.to(self.dtype)
        parts = None if self.d_weight is None else in_head_order(self.problem, (g.memory for g in self.d_weight))
        return d_hidden, parts, self.d_bias


# --------------------------------------------------------------------------------------------------- tiles and products


@dataclass(frozen=True)
class WorkspacePlan(TileSizes):
    """Columns in whole blocks of the kernels."""

    left: int
    """bytes of the workspace that no tile takes"""


def _plan_grads(problem: Problem) -> WorkspacePlan:
    """For tiles of gradients of logits beside the fp32 sum of dH and the operands' copy of hidden states.

    It is the same for every call of one problem.
    """
    n, d = problem.hidden.shape
    item = problem.operand_dtype.itemsize
    through_fp32 = problem.operand_dtype == torch.float16 or problem.weight.dtype.itemsize < item
    through = 4 * d if through_fp32 else 0
    fixed = n * (4 * d + _copy_bytes(problem))
    return _plan(problem, cut_tokens=False, fixed=fixed, column_bytes=through, logit_bytes=item)


def _plan(
    problem: Problem,
    *,
    cut_tokens: bool = True,
    fixed: int = 0,
    token_bytes: int = 0,
    column_bytes: int = 0,
    logit_bytes: int = 0,
) -> WorkspacePlan:
    """TileSizes for a workspace of which `fixed` bytes are taken, and each token, column and logit of a tile takes so many.

    Without `cut_tokens` a tile has all tokens, whatever the caller wishes: only columns are cut.

    The kernels' block sums, the fp32 products and copies of the head's tiles are counted here. At least a quarter of
    the workspace goes to the tiles, even where what is fixed leaves less, and a quarter of what is fixed where that is
    more: each tile is a pass over the sum of dH, so too small ones would take longer than their products.
    """
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    wish, item = problem.memory, problem.operand_dtype.itemsize
    total = wish.workspace or DEFAULT_WORKSPACE
    block_v = blocks_for(problem.hidden.device).v
    budget = max(total - fixed, total // 4, fixed // 4)
    if problem.weight.dtype != problem.operand_dtype or not problem.weight.is_contiguous():
        column_bytes += d * item
    each = logit_bytes + (4 if item == 4 else 0) + 4 * (3 + len(problem.outputs)) / block_v
    tokens = max(1, n)
    if cut_tokens and wish.token_chunk:
        tokens = min(tokens, wish.token_chunk)
    elif cut_tokens:
        # Equal parts that leave room for at least 4 blocks of columns, and for columns half of all.
        enough = min(TOKENS_AT_ONCE, budget / (2 * token_bytes)) if token_bytes else n
        most = max(1, int(min(enough, budget / (token_bytes + 4 * block_v * each))))
        # A part begins at a whole number of 16 bytes then, whatever a row's length is; see `kernels`.
        most -= most % 8 if most > 8 else 0
        parts = math.ceil(tokens / most)
        tokens = math.ceil(tokens / parts)
        tokens += -tokens % 8 if parts > 1 and most >= 8 else 0
    columns = wish.vocab_chunk or int((budget - tokens * token_bytes) / (tokens * each + column_bytes))
    # Of a workspace that has better uses, stored tiles take no more than keeps a GPU busy.
    most = v if cut_tokens or not logit_bytes or wish.vocab_chunk else min(v, max(8192, 2**26 // tokens))
    columns = max(1, min(columns, math.ceil(most / block_v) * block_v) // block_v) * block_v
    columns = math.ceil(v / math.ceil(v / columns) / block_v) * block_v  # equal parts, in whole blocks
    taken = tokens * token_bytes + columns * (tokens * each + column_bytes)
    return WorkspacePlan(tokens, columns, int(total - fixed - taken))


def _columns_folded_at_once(problem: Problem, n: int, span: int) -> int:
    """Whole tiles of `span` columns whose block sums take at most a quarter of the workspace; one at least."""
    budget = (problem.memory.workspace or DEFAULT_WORKSPACE) // 4
    tiles = math.ceil(problem.weight.shape[0] / span)
    return span * max(1, min(tiles, budget // (n * _block_bytes(problem, span))))


def _halves(problem: Problem) -> int:
    """How many halves of blocks of columns there are."""
    return 2 * math.ceil(problem.weight.shape[0] / blocks_for(problem.hidden.device).v)


def _block_bytes(problem: Problem, v: int) -> int:
    """What `BlockStats` take for each token."""
    return 4 * (2 + len(problem.outputs)) * -(-v // blocks_for(problem.hidden.device).v)


def _copy_bytes(problem: Problem) -> int:
    """What `_operand` takes for the hidden states of each token."""
    return 0 if is_operand(problem.hidden, problem) else problem.hidden.shape[1] * problem.operand_dtype.itemsize


def _operand(x: Tensor, problem: Problem) -> Tensor:
    """A tile as it enters a product: in the operand dtype, rows contiguous."""
    x = x.to(problem.operand_dtype)
    return x if is_operand(x, problem) else x.contiguous()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in fp32, in the product's own epilogue."""
    if a.dtype.itemsize == 4:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


def _write_product(grad: GradTarget, vocab: slice, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """Some rows of a gradient from a @ b * factor, summed in fp32 and rounded once."""
    out = grad.memory[vocab]
    if out.dtype == a.dtype and (a.dtype == torch.float32 or (a.dtype == torch.bfloat16 and a.is_cuda)):
        torch.addmm(out, a, b, out=out) if grad.adds else torch.mm(a, b, out=out)
    else:
        half = a.dtype.itemsize == 2
        product = torch.mm(a, b, out_dtype=torch.float32) if half and a.is_cuda else torch.mm(a.float(), b.float())
        grad.write(vocab, scaled_(product, factor))


class Triton(OwnGradients):
    """The impl, see above."""

    about = "our Triton kernels, exact; NVIDIA GPUs from Ampere on"
    interpreted = INTERPRETED

    def unavailable(
        self,
    ) -> str | None:
        """None, or why this impl cannot run on this machine."""
        if INTERPRETED or torch.cuda.is_available():
            return None
        return "it needs a CUDA device, and this machine has none"

    def supports(self, problem: Problem) -> str | None:
        """None, or why this impl cannot serve `problem`."""
        if problem.filter_eps is not None:
            return "its gradients are always dense (filter_eps must be None)"
        if problem.operand_dtype == torch.float64 or problem.hidden.dtype == torch.float64:
            return "it computes in float32, bfloat16 and float16, not in float64"
        inputs = (problem.hidden, problem.bias, *(x for _, x in problem.head))
        if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
            return "its kernels know nothing of forward-mode derivatives"
        device = problem.hidden.device
        if INTERPRETED:
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, got {device}"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0 or later, got {torch.cuda.get_device_capability(device)}"
        return None

    def prepare(self, problem: Problem) -> None:
        """Start to compile, in the background, what calls of this kind launch, with gradients and without.

        Only shapes, strides and dtypes of `problem` matter, and which of its tensors need a gradient; it may have no
        tokens. The next launch waits for what is not ready then.
        """
        needs = problem.requires_grad
        with _on_device(problem):
            prepare_path(problem, ("all", needs), lambda p: _sweep_and_gradients(p, "nothing"))
            if any(needs):
                keep: KeepMode = "jacobian" if needs.hidden_alone else "exps" if needs.weight else "nothing"
                prepare_path(problem, ("sweep", keep), lambda p: _sweep_and_gradients(p, keep))

    def sweep(self, problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | KeptExps | None]:
        """The softmax sums of all tokens, and what is to be kept for the backward."""
        prepare_path(problem, ("sweep", keep), lambda p: _sweep_and_gradients(p, keep))
        rows = SoftmaxStats(problem)
        if keep == "exps" and len(problem.targets) and isinstance(problem.weight, Tensor):
            d_weight = torch.empty_like(problem.weight, memory_format=torch.contiguous_format)
            first, *_ = _swept(problem, _exp_slots(problem, d_weight, workspace=False), rows)
            return rows, None if first.of_e is None else KeptExps(d_weight, first.of_e, rows.target)
        if keep != "jacobian":
            _fold_all(problem, rows)
            return rows, None
        if not len(problem.targets):
            return rows, Jacobian.empty(problem)
        if problem.operand_dtype != torch.float16:  # whose range is too small for weights relative to the target's
            jacobian, lost = Jacobian.empty(problem), []
            for tokens, rows_of_head in _rows_of_head(problem, rows):
                scale = None if jacobian.scale is None else jacobian.scale[tokens]
                rows_of_head.combine(ones_upstream(rows, tokens), jacobian.rows[tokens], scale)
                lost.append(rows_of_head.lost)
                del rows_of_head
            if not _any_row_is_lost(lost):
                return rows, jacobian
            del jacobian
        else:
            _fold_all(problem, rows)
        # What `two_pass_grads` gives for an upstream gradient of 1, once in fp32.
        wide, _, _ = self.two_pass_grads(
            problem, ones_upstream(rows), NeedsGrad(True, False, False), round_hidden=False
        )
        assert wide is not None
        jacobian = Jacobian.empty(problem)
        jacobian.write(slice(None), wide)
        return rows, jacobian

    def two_pass_grads(
        self,
        problem: Problem,
        grads: TokenGrads,
        needs: NeedsGrad,
        *,
        kept: KeptExps | None = None,
        accumulators: Accumulators = (),
        round_hidden: bool = True,
    ) -> Grads:
        """Gradients of hidden, weight, bias (None where not needed); each tile of dW is made in full and written once.

        That of hidden comes in its dtype or, with round_hidden=False, in fp32. `kept` is used up.
        """
        asked = needs, kept is not None, grads.lse is not None, grads.entropy is not None, round_hidden
        prepare_path(problem, ("two_pass", *asked), lambda p: _dry_gradients(p, *asked))
        if kept is None or grads.entropy is not None:  # an entropy's gradient needs the logits themselves
            tokens = slice(0, len(problem.hidden))
            everything = _ExpSlot(Rows(problem, tokens, _operand(problem.hidden, problem)), problem.weight.shape[0])
            targets = _targets(problem, needs, None if kept is None else kept.d_weight, accumulators)
            return _grads(problem, [everything], grads, needs, targets, round_hidden=round_hidden)
        first, *others = _exp_slots(problem, kept.d_weight, workspace=False)
        first.of_e = kept.block_max
        targets = _targets(problem, needs, kept.d_weight)
        return _grads(problem, [first, *others], grads, needs, targets, target=kept.target)

    def one_pass(
        self, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
    ) -> tuple[SoftmaxStats, Tensor, Grads] | None:
        """The softmax sums, the summed loss, and its gradients by hidden, weight and bias (None where not needed)."""
        z_loss = bool(getattr(token_loss, "z_loss", True))
        prepare_path(problem, ("one_pass", needs, z_loss), lambda p: _dry_one_pass(p, needs, z_loss, token_loss))
        if needs.weight:
            return _one_pass_with_head(problem, token_loss, needs)
        if needs.bias or problem.operand_dtype == torch.float16:
            return None
        rows, hidden_dtype = SoftmaxStats(problem), autograd.early_dtype(problem.hidden.dtype)
        d_hidden = torch.empty_like(problem.hidden, dtype=hidden_dtype, memory_format=torch.contiguous_format)
        loss, lost = d_hidden.new_zeros((), dtype=problem.result_dtype), []
        for tokens, rows_of_head in _rows_of_head(problem, rows):
            chunk_loss, grads = token_loss_grads(rows, tokens, token_loss, problem.result_dtype)
            loss += chunk_loss
            rows_of_head.combine(grads, d_hidden[tokens])
            lost.append(rows_of_head.lost)
            del rows_of_head
        return None if _any_row_is_lost(lost) else (rows, loss, (d_hidden, None, None))

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """`TokenLogps` of [N] tokens; the hint is not used.

        Beyond what dW's memory keeps anyway, it would spare only the tokens that fit the workspace, for a wait in the
        backward.
        """
        with _on_device(problem):
            return super().token_logps(problem)

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`, a scalar, and its gradients at once."""
        with _on_device(problem):
            return super().token_loss_sum(problem, token_loss)

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place; where that is 1, the GPU finds out and does nothing."""
        return scale_(x, factor)


IMPL = Triton()
