"""The paths of the impl: the forward sweep, gradients in two passes, and loss with gradients in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedalign.impls.autograd import Grads, Jacobian, KeepMode, KeptExps, early_dtype
from fusedalign.impls.head_grads import Accumulators, GradTarget, grad_targets
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads, ones_upstream, token_loss_grads
from fusedalign.impls.triton.dry import prepare_path
from fusedalign.impls.triton.frozen import any_lost, sweep_head_rows
from fusedalign.impls.triton.kept import ExpSlot, exp_slots, grads_of_slots, keeps_all, sweep_all
from fusedalign.impls.triton.launch import BlockStats, Tile, TokenBatch
from fusedalign.impls.triton.plan import copy_bytes, plan_tiles
from fusedalign.impls.triton.products import as_operand
from fusedalign.impls.triton.workspace import fit_workspace
from fusedalign.problem import NeedsGrad, Problem, TokenLoss


def sweep(problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | KeptExps | None]:
    """The softmax statistics of all tokens, and what is kept for the backward."""
    prepare_sweep(problem, keep)
    stats = SoftmaxStats(problem)
    if keep == "exps" and len(problem.targets) and isinstance(problem.weight, Tensor):
        d_weight = torch.empty_like(problem.weight, memory_format=torch.contiguous_format)
        slots = exp_slots(problem, d_weight, workspace=False)
        sweep_all(problem, slots, stats)
        block_max = slots[0].block_max
        return stats, None if block_max is None else KeptExps(d_weight, block_max, stats.target)
    if keep != "jacobian":
        _accumulate_stats(problem, stats)
        return stats, None
    return stats, _jacobian(problem, stats) if len(problem.targets) else Jacobian.empty(problem)


def prepare_sweep(problem: Problem, keep: KeepMode) -> None:
    """Compile what a sweep launches and, if it keeps exponentials, the gradients of log-probabilities."""

    def dry_run(p: Problem) -> None:
        stats, kept = sweep(p, keep)
        if isinstance(kept, KeptExps):
            grads = TokenGrads(stats.max, stats.log_e(), stats.e)
            two_pass_grads(p, grads, p.requires_grad, kept=kept)

    prepare_path(problem, ("sweep", keep), dry_run)


def _accumulate_stats(problem: Problem, stats: SoftmaxStats) -> None:
    """Softmax statistics of all tokens; no tile of logits is stored."""
    plan = plan_tiles(problem, token_bytes=copy_bytes(problem))
    for tokens in plan.token_slices(problem):
        batch = TokenBatch(problem, tokens, as_operand(problem.hidden[tokens], problem))
        for vocab in plan.vocab_slices(problem):
            weight = as_operand(problem.weight[vocab], problem)
            partials = BlockStats(stats, len(batch), len(weight))
            partials.add(Tile(batch, weight, vocab))
            partials.fold(tokens)


def _jacobian(problem: Problem, stats: SoftmaxStats) -> Jacobian:
    """d logps / d hidden; completes `stats`."""
    if problem.operand_dtype == torch.float16:  # its range is too small for weights relative to the target's
        _accumulate_stats(problem, stats)
    else:
        jacobian, lost = Jacobian.empty(problem), []
        for head_rows in sweep_head_rows(problem, stats):
            tokens = head_rows.tokens
            scale = None if jacobian.scale is None else jacobian.scale[tokens]
            head_rows.combine(ones_upstream(stats, tokens), jacobian.rows[tokens], scale)
            lost.append(head_rows.lost)
            del head_rows
        if not any_lost(lost):
            return jacobian
        del jacobian
    needs = NeedsGrad(True, False, False)
    d_hidden, _, _ = two_pass_grads(problem, ones_upstream(stats), needs, round_hidden=False)
    assert d_hidden is not None
    jacobian = Jacobian.empty(problem)
    jacobian.write(slice(None), d_hidden)
    return jacobian


def two_pass_grads(
    problem: Problem,
    grads: TokenGrads,
    needs: NeedsGrad,
    *,
    kept: KeptExps | None = None,
    accumulators: Accumulators = (),
    round_hidden: bool = True,
) -> Grads:
    """Gradients of hidden, weight, bias (None where not needed); each tile of dW is computed in full and written once.

    That of hidden has its dtype or, with round_hidden=False, is fp32. `kept` is overwritten.
    """
    _prepare_two_pass(problem, grads, needs, keeps_exps=kept is not None, round_hidden=round_hidden)
    if kept is None or grads.entropy is not None:  # an entropy's gradient needs the logits themselves
        batch = TokenBatch(problem, slice(0, len(problem.hidden)), as_operand(problem.hidden, problem))
        slots = [ExpSlot(batch, problem.weight.shape[0])]
        targets = _weight_targets(problem, needs, None if kept is None else kept.d_weight, accumulators)
        return grads_of_slots(problem, slots, grads, needs, targets, round_hidden=round_hidden)
    slots = exp_slots(problem, kept.d_weight, workspace=False)
    slots[0].block_max = kept.block_max
    targets = _weight_targets(problem, needs, kept.d_weight)
    return grads_of_slots(problem, slots, grads, needs, targets, target=kept.target, round_hidden=round_hidden)


def _prepare_two_pass(
    problem: Problem, grads: TokenGrads, needs: NeedsGrad, *, keeps_exps: bool, round_hidden: bool
) -> None:
    """Compile what gradients like these launch."""
    has_lse, has_entropy = grads.lse is not None, grads.entropy is not None

    def dry_run(p: Problem) -> None:
        stats, kept = sweep(p, "exps") if keeps_exps else (SoftmaxStats(p), None)
        x = stats.e
        dry_grads = TokenGrads(stats.max, stats.log_e(), x, x if has_lse else None, (x, x) if has_entropy else None)
        exps = kept if isinstance(kept, KeptExps) else None
        two_pass_grads(p, dry_grads, needs, kept=exps, round_hidden=round_hidden)

    prepare_path(problem, ("two_pass", needs, keeps_exps, has_lse, has_entropy, round_hidden), dry_run)


def one_pass(problem: Problem, token_loss: TokenLoss, needs: NeedsGrad) -> tuple[SoftmaxStats, Tensor, Grads] | None:
    """The softmax statistics, the summed loss, and its gradients by hidden, weight and bias (None where not needed)."""
    if needs.weight:
        problem = fit_workspace(problem, keeps_all)
    _prepare_one_pass(problem, token_loss, needs)
    if needs.weight:
        return _one_pass_trained(problem, token_loss, needs)
    if needs.bias or problem.operand_dtype == torch.float16:
        return None
    return _one_pass_frozen(problem, token_loss)


def _prepare_one_pass(problem: Problem, token_loss: TokenLoss, needs: NeedsGrad) -> None:
    """Compile what a loss launches that has a derivative by lse (only where it may have one) and that has none."""
    z_loss = bool(getattr(token_loss, "z_loss", True))
    unknown = z_loss and not hasattr(token_loss, "z_loss")

    def dry_run(p: Problem) -> None:
        one_pass(p, lambda logps, lse: (logps, logps, lse if z_loss else None), needs)
        if unknown:
            one_pass(p, lambda logps, lse: (logps, logps, None), needs)

    prepare_path(problem, ("one_pass", needs, z_loss), dry_run)


def _one_pass_trained(problem: Problem, token_loss: TokenLoss, needs: NeedsGrad) -> tuple[SoftmaxStats, Tensor, Grads]:
    stats, d_weight = SoftmaxStats(problem), None
    if isinstance(problem.weight, Tensor):
        d_weight = torch.empty_like(problem.weight, memory_format=torch.contiguous_format)
    slots = exp_slots(problem, d_weight, workspace=True)
    sweep_all(problem, slots, stats)
    loss, upstream = token_loss_grads(stats, slice(0, len(problem.hidden)), token_loss, problem.result_dtype)
    round_hidden = early_dtype(problem.hidden.dtype) == problem.hidden.dtype
    targets = _weight_targets(problem, needs, d_weight)
    grads = grads_of_slots(problem, slots, upstream, needs, targets, target=stats.target, round_hidden=round_hidden)
    return stats, loss, grads


def _one_pass_frozen(problem: Problem, token_loss: TokenLoss) -> tuple[SoftmaxStats, Tensor, Grads] | None:
    stats, dtype = SoftmaxStats(problem), early_dtype(problem.hidden.dtype)
    d_hidden = torch.empty_like(problem.hidden, dtype=dtype, memory_format=torch.contiguous_format)
    loss, lost = d_hidden.new_zeros((), dtype=problem.result_dtype), []
    for head_rows in sweep_head_rows(problem, stats):
        tokens = head_rows.tokens
        chunk_loss, upstream = token_loss_grads(stats, tokens, token_loss, problem.result_dtype)
        loss += chunk_loss
        head_rows.combine(upstream, d_hidden[tokens])
        lost.append(head_rows.lost)
        del head_rows
    return None if any_lost(lost) else (stats, loss, (d_hidden, None, None))


def _weight_targets(
    problem: Problem, needs: NeedsGrad, d_weight: Tensor | None, accumulators: Accumulators = ()
) -> list[GradTarget] | None:
    """Where the gradients of the head are written: `d_weight` if there is one; None where they are not needed."""
    if not needs.weight:
        return None
    return grad_targets(problem, accumulators) if d_weight is None else [GradTarget(slice(None), d_weight)]
