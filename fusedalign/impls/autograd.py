"""The autograd of impls that make their own gradients: which path serves, what is kept, what the backward computes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedalign import private
from fusedalign.impls.base import Impl
from fusedalign.impls.head_grads import Accumulators, grad_targets, in_head_order
from fusedalign.impls.softmax import SoftmaxStats, TokenGrads, token_loss_grads
from fusedalign.problem import NeedsGrad, Problem, Spec, TokenLogps, TokenLoss, Upstream, as_head, with_tensors

#: Gradients of hidden, of each tensor of the head, and of bias; None where not needed.
Grads = tuple[Tensor | None, tuple[Tensor | None, ...] | None, Tensor | None]
#: What a sweep keeps for the backward: a frozen head's Jacobian, or exponentials in the memory of the head's gradient.
KeepMode = Literal["nothing", "jacobian", "exps"]
#: A scalar times a tensor, in place.
Scale = Callable[[Tensor, Tensor], Tensor]


class Jacobian(NamedTuple):
    """d logps / d hidden of N tokens: `rows` [N, D], times `scale` [N] fp32 where there is one.

    With half-precision operands rows are fp16 divided by a power of 2, whichever half the operands are: rounded to bf16
    they would add as much error again as the rounding of the gradient computed from them.
    """

    rows: Tensor
    scale: Tensor | None

    @classmethod
    def empty(cls, problem: Problem) -> Jacobian:
        """One whose rows are to be written."""
        hidden, half = problem.hidden, problem.operand_dtype.itemsize == 2
        rows = hidden.new_empty(hidden.shape, dtype=torch.float16 if half else problem.logit_dtype)
        return cls(rows, hidden.new_empty(len(hidden), dtype=torch.float32) if half else None)

    def write(self, tokens: slice, x: Tensor) -> None:
        """The rows of some tokens, [n, D] fp32 or wider; becomes scratch."""
        if self.scale is not None:
            power = x.abs().amax(-1).log2_().floor_().sub_(10).clamp_(-100, 100)  # the largest element to about 2**10
            self.scale[tokens] = power.exp2()
            x *= power.neg_().exp2_()[:, None]
        self.rows[tokens] = x

    def select(self, tokens: slice) -> Jacobian:
        """The Jacobian of some tokens."""
        return Jacobian(self.rows[tokens], None if self.scale is None else self.scale[tokens])

    def times(self, d_logps: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of hidden in `dtype`, [N, D], from that of logps, [N]."""
        scale = d_logps if self.scale is None else d_logps * self.scale
        return torch.mul(self.rows, scale[:, None], out=torch.empty_like(self.rows, dtype=dtype))


class KeptExps(NamedTuple):
    """Exponentials of logits that a sweep keeps for a trained head, in the memory of the head's gradient."""

    d_weight: Tensor
    """[V, D] in the head's dtype, to be overwritten by the gradient"""
    block_max: Tensor
    """running maxima per block of columns; opaque to this module"""
    target: Tensor
    """[N] final logits of the targets, in the logit dtype"""


class Saved(NamedTuple):
    """What the backward of `token_logps` needs of the forward; None where it does not."""

    jacobian: Jacobian | None = None
    kept: KeptExps | None = None
    max: Tensor | None = None
    log_e: Tensor | None = None
    entropy: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        """The tensors, for `save_for_backward`."""
        jacobian, kept = self.jacobian or (None,) * 2, self.kept or (None,) * 3
        return *jacobian, *kept, self.max, self.log_e, self.entropy

    @classmethod
    def of(cls, flat: Iterable[Tensor | None]) -> tuple[Saved, list[Tensor | None]]:
        """From the tensors of `flat()`, and what follows them."""
        rows, scale, d_weight, block_max, target, maximum, log_e, entropy, *others = flat
        jacobian = None if rows is None else Jacobian(rows, scale)
        kept = None
        if d_weight is not None and block_max is not None and target is not None:
            kept = KeptExps(d_weight, block_max, target)
        return cls(jacobian, kept, maximum, log_e, entropy), others


class OwnGradients(Impl):
    """An impl that makes its own gradients: the arithmetic is its own, the autograd is here."""

    @abstractmethod
    def sweep(self, problem: Problem, keep: KeepMode) -> tuple[SoftmaxStats, Jacobian | KeptExps | None]:
        """The softmax statistics of all tokens, and what is kept for the backward.

        `keep` says what would save most; what is kept is up to the impl.
        """

    @abstractmethod
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
        """The gradients of any loss, from logits that are computed again where `kept` does not save that.

        `kept` is used up. The head's gradients are added to the `accumulators`, where there are any. The gradient of
        hidden has its dtype or, without `round_hidden`, the logit dtype.
        """

    @abstractmethod
    def one_pass(
        self, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
    ) -> tuple[SoftmaxStats, Tensor, Grads] | None:
        """The statistics of all tokens, a loss summed over these and its gradients, at once; None without room for it.

        The gradient of hidden has the dtype `early_dtype(hidden.dtype)`.
        """

    def jacobian_grad(self, jacobian: Jacobian, d_logps: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of hidden in `dtype`, [N, D], from a kept Jacobian."""
        return jacobian.times(d_logps, dtype)

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place, skipped where the scalar is known to be 1."""
        return x.mul_(factor)

    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """`TokenLogps` of [N] tokens, by the cheapest path that gives the gradients which are needed."""
        needs = _needs_grad(problem)
        if not any(needs):
            return self.sweep(problem, "nothing")[0].results(problem)
        if loss_hint is not None and _may_use_hint(problem, needs):
            with torch.no_grad():
                results = self.one_pass(problem, loss_hint, needs)
            if results is not None:
                stats, _, grads = results
                call = _HintedCall(self, problem, _sources(problem), loss_hint, stats, grads)
                return TokenLogps(*_HintedLogps.apply(call, *_inputs(problem)))
        with torch.no_grad():
            out, saved = forward(self, problem, needs)
        sources = _sources(problem)
        if saved.jacobian is None:
            return TokenLogps(*_TokenLogps.apply(_Call(self, problem, sources, out, saved), *_inputs(problem)))
        # A function of its own: its backward does not read the head, which an engine may have freed.
        logps = _FrozenLogps.apply(_FrozenCall(self, sources, out.logps, saved.jacobian), problem.hidden)
        if saved.max is not None:
            others, saved = out._replace(logps=out.logps.new_empty(0)), saved._replace(jacobian=None)
            out = TokenLogps(*_TokenLogps.apply(_Call(self, problem, sources, others, saved), *_inputs(problem)))
        return out._replace(logps=logps)

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`, a scalar: in one pass where the impl can."""
        needs = _needs_grad(problem)
        may_keep = problem.memory.keep_head or not needs.weight
        results = None
        if any(needs) and len(problem.targets) and may_keep and holds_early(problem):
            with torch.no_grad():
                results = self.one_pass(replace(problem, outputs=frozenset()), token_loss, needs)
        if results is None:
            return super().token_loss_sum(problem, token_loss)
        _, loss, grads = results
        return precomputed_loss(self.scale_, problem, loss, grads)


def precomputed_loss(scale: Scale, problem: Problem, loss: Tensor, grads: Grads) -> Tensor:
    """`loss`, a scalar whose gradients exist already: the backward scales them."""
    call = _PrecomputedCall(scale, problem.hidden.dtype, _sources(problem), grads)
    return _PrecomputedLoss.apply(call, loss, *_inputs(problem))


def early_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of hidden states of `dtype` waits for the factor of the loss.

    fp32 for fp16, in which gradients would underflow before GradScaler multiplies them by 65536, or overflow before the
    user's factor makes them small.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def holds_early(problem: Problem) -> bool:
    """Whether the gradients of head and bias may be computed before the factor of the loss is known: not fp16 ones.

    They have their final dtype, since a wider one would take too much memory for the head; see `early_dtype`.
    """
    _, *parameters = _inputs(problem)
    return not any(x is not None and x.requires_grad and x.dtype == torch.float16 for x in parameters)


def loss_and_grads(
    impl: OwnGradients, problem: Problem, token_loss: TokenLoss, needs: NeedsGrad
) -> tuple[Tensor, Grads]:
    """The value of `token_loss_sum` and its gradients, without autograd around it; not for gradients in fp16."""
    with torch.no_grad():
        results = None
        if any(needs) and len(problem.targets):
            results = impl.one_pass(replace(problem, outputs=frozenset()), token_loss, needs)
        if results is not None:
            _, loss, grads = results
            return loss, grads
        stats, _ = impl.sweep(problem, "nothing")
        loss, upstream = token_loss_grads(stats, slice(None), token_loss, problem.result_dtype)
        return loss, _two_pass_grads(impl, problem, upstream, needs)


def forward(
    impl: OwnGradients, problem: Problem, needs: NeedsGrad, *, keep_exps: bool = True
) -> tuple[TokenLogps, Saved]:
    """The results, and what `backward` needs in addition to the problem itself."""
    keep: KeepMode = "nothing"
    if needs.hidden_alone:
        keep = "jacobian"
    elif needs.weight and keep_exps and problem.memory.keep_head:
        keep = "exps"
    stats, kept = impl.sweep(problem, keep)
    out = stats.results(problem)
    jacobian, exps = (kept, None) if isinstance(kept, Jacobian) else (None, kept)
    if jacobian is not None and out.entropy is None and out.lse is None:
        return out, Saved(jacobian)
    # The Jacobian is that of logps alone: gradients of entropy and lse need the statistics too.
    return out, Saved(jacobian, exps, stats.max, stats.log_e(), None if out.entropy is None else stats.entropy())


def backward(
    impl: OwnGradients,
    problem: Problem,
    saved: Saved,
    needs: NeedsGrad,
    upstream: Upstream,
    accumulators: Accumulators = (),
) -> Grads:
    """The gradients of `forward` by hidden, weight and bias."""
    d_hidden = None
    if saved.jacobian is not None and upstream.logps is not None:
        d_hidden = impl.jacobian_grad(saved.jacobian, upstream.logps, problem.hidden.dtype)
        upstream = upstream._replace(logps=None)
    if all(x is None for x in upstream):
        return d_hidden, None, None
    assert saved.max is not None
    assert saved.log_e is not None
    dtype = problem.logit_dtype
    d_logps, d_entropy, d_lse = (None if x is None else x.to(dtype) for x in upstream)
    grads = TokenGrads(
        max=saved.max,
        log_e=saved.log_e,
        logps=torch.zeros_like(saved.log_e) if d_logps is None else d_logps,
        lse=d_lse,
        entropy=None if d_entropy is None or saved.entropy is None else (d_entropy, saved.entropy),
    )
    d_more, d_weight, d_bias = _two_pass_grads(impl, problem, grads, needs, saved.kept, accumulators)
    return d_more if d_hidden is None or d_more is None else d_hidden.add_(d_more), d_weight, d_bias


def _two_pass_grads(
    impl: OwnGradients,
    problem: Problem,
    grads: TokenGrads,
    needs: NeedsGrad,
    kept: KeptExps | None = None,
    accumulators: Accumulators = (),
) -> Grads:
    """Like `impl.two_pass_grads`, but returns zeros when there are no tokens, so impls need not handle empty tiles."""
    if len(problem.targets):
        return impl.two_pass_grads(problem, grads, needs, kept=kept, accumulators=accumulators)
    d_hidden = torch.zeros_like(problem.hidden) if needs.hidden else None
    d_bias = torch.zeros_like(problem.bias) if needs.bias and problem.bias is not None else None
    if not needs.weight:
        return d_hidden, None, d_bias
    targets = grad_targets(problem, accumulators)
    return d_hidden, in_head_order(problem, (g.memory if g.adds else g.memory.zero_() for g in targets)), d_bias


def _first_order_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a backward so that differentiating the gradients that it returns raises.

    PyTorch's `once_differentiable` is not enough: its error node depends on copies of the upstream gradients alone, so
    `torch.autograd.grad(penalty, hidden)` never reaches it and silently leaves out the head. Here the error node
    depends on `ctx.sources` and on the upstream gradients.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor | None) -> tuple:
        if any(x is not None and private.is_batched_grad(x) for x in upstream):
            raise RuntimeError(
                "several gradients at once (is_grads_batched=True, vectorize=True) through an LM head: expected "
                "impl='reference' for that, or one call for each"
            )
        if not torch.is_grad_enabled():  # the graph of this backward is not wanted
            return backward(ctx, *upstream)
        return _FirstOrder.apply(lambda: backward(ctx, *upstream), *ctx.sources, *upstream)

    return guarded


class _FirstOrder(torch.autograd.Function):
    """The results of a function that is not recorded; differentiating them by any of `sources` raises."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[], tuple], *sources: Tensor | None) -> tuple:
        return function()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple:
        return refuse_second_order()


def refuse_second_order(*_: Any) -> tuple:
    """The backward of a gradient.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "trying to differentiate twice through an LM head: expected impl='reference' for that, which builds the logits "
        "in full; the other impls' gradients cannot be differentiated themselves"
    )


class _FirstOrderInput(torch.autograd.Function):
    """The identity; differentiating its gradient by any of `sources` raises."""

    @staticmethod
    def forward(ctx: Any, sources: list[Tensor], x: Tensor) -> Tensor:
        ctx.sources = sources
        return x.view_as(x)

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        return None, upstream


class _FirstOrderOutput(torch.autograd.Function):
    """A copy; adds its upstream gradient to `sources`, where that has a graph."""

    @staticmethod
    def forward(ctx: Any, sources: list[Tensor], x: Tensor) -> Tensor:
        ctx.sources = sources
        return x.clone()  # a view could not be changed in place by the caller

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        if upstream.requires_grad:
            ctx.sources.append(upstream)
        return None, upstream


def first_order(function: Callable[[Problem], TokenLogps], problem: Problem) -> TokenLogps:
    """Call a library's `function(problem)`; differentiating its gradients, which have no graph, raises."""
    sources = list(_sources(problem))
    if not sources:
        return function(problem)
    tensors = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    trainable = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    out = function(replace(problem, **{name: _FirstOrderInput.apply(sources, x) for name, x in trainable.items()}))
    outputs: Any = (None if x is None else _FirstOrderOutput.apply(sources, x) for x in out)
    return TokenLogps(*outputs)


def _sources(problem: Problem) -> tuple[Tensor, ...]:
    """One empty tensor for each tensor that needs a gradient, connected to it in the graph.

    Copies, because a view would keep the tensor's memory alive.
    """
    if not torch.is_grad_enabled():
        return ()
    return tuple(x[:0].clone() for x in _inputs(problem) if x is not None and x.requires_grad)


class _Call(NamedTuple):
    """The arguments of `_TokenLogps` that are not its inputs."""

    impl: OwnGradients
    problem: Problem
    sources: tuple[Tensor, ...]
    out: TokenLogps
    saved: Saved


class _FrozenCall(NamedTuple):
    """The arguments of `_FrozenLogps` that are not its input."""

    impl: OwnGradients
    sources: tuple[Tensor, ...]
    logps: Tensor
    jacobian: Jacobian


class _FrozenLogps(torch.autograd.Function):
    """The logps of a frozen head; the backward needs nothing but their Jacobian."""

    @staticmethod
    def forward(ctx: Any, call: _FrozenCall, hidden: Tensor) -> Tensor:
        ctx.impl, ctx.sources, ctx.hidden_dtype = call.impl, call.sources, hidden.dtype
        ctx.save_for_backward(*call.jacobian)
        return call.logps

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, d_logps: Tensor) -> tuple:
        return None, ctx.impl.jacobian_grad(Jacobian(*ctx.saved_tensors), d_logps, ctx.hidden_dtype)


class _TokenLogps(torch.autograd.Function):
    """`TokenLogps` as a tuple."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, hidden: Tensor, bias: Tensor | None, *weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        _set_up(ctx, call, call.out)
        ctx.save_for_backward(*call.saved.flat(), call.problem.targets, hidden, bias, *weight)
        return tuple(call.out)

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved, inputs = Saved.of(ctx.saved_tensors)
        problem = _problem(ctx.spec, inputs)
        if private.graph_is_kept():  # one backward uses up what is kept: for more, the logits are computed again
            saved = saved._replace(kept=None)
        weight = [x for _, x in problem.head]
        accumulators = () if problem.memory.keep_head else tuple(map(_accumulator, weight))
        d_hidden, d_weight, d_bias = _run_backward(ctx, problem, saved, Upstream.of(grads), accumulators)
        pairs = zip(d_weight or [None] * len(weight), accumulators or [None] * len(weight), strict=True)
        return None, d_hidden, d_bias, *(grad if total is None else None for grad, total in pairs)


class _HintedCall(NamedTuple):
    """The arguments of `_HintedLogps` that are not its inputs."""

    impl: OwnGradients
    problem: Problem
    sources: tuple[Tensor, ...]
    loss_hint: TokenLoss
    stats: SoftmaxStats
    grads: Grads


class _HintedLogps(torch.autograd.Function):
    """`TokenLogps` as a tuple, with the gradients of the loss that is expected of them.

    The backward compares the upstream gradient with that loss's: one wait for the device. If it is a multiple, the
    gradients are scaled; if not, the logits are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _HintedCall, hidden: Tensor, bias: Tensor | None, *weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        stats, problem = call.stats, call.problem
        out = stats.results(problem)
        _set_up(ctx, call, out)
        _, d_logps, _ = call.loss_hint(out.logps, out.lse)
        entropy = None if out.entropy is None else stats.entropy()
        saved = Saved(max=stats.max, log_e=stats.log_e(), entropy=entropy)
        grads = _in_input_order(call.grads, len(weight))
        ctx.save_for_backward(*grads, d_logps, *saved.flat(), problem.targets, hidden, bias, *weight)
        return tuple(out)

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        tensors = ctx.saved_tensors  # read once: saved-tensor hooks (checkpointing) may allow a single unpack
        count = len(ctx.needs_input_grad) - 1
        early_grads, d_logps, (saved, inputs) = tensors[:count], tensors[count], Saved.of(tensors[count + 1 :])
        upstream = Upstream.of(grads)
        if upstream.logps is not None and upstream.entropy is None and upstream.lse is None:
            factor, fits = _multiple_of(d_logps, upstream.logps)
            if fits:
                return None, *_scaled(ctx.impl.scale_, early_grads, factor, ctx.hidden_dtype)
        late_grads = _run_backward(ctx, _problem(ctx.spec, inputs), saved, upstream)
        return None, *_in_input_order(late_grads, count - 2)


class _PrecomputedCall(NamedTuple):
    """The arguments of `_PrecomputedLoss` that are not its inputs."""

    scale: Scale
    hidden_dtype: torch.dtype
    sources: tuple[Tensor, ...]
    grads: Grads


class _PrecomputedLoss(torch.autograd.Function):
    """A scalar whose gradients exist already; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, call: _PrecomputedCall, loss: Tensor, hidden: Tensor, bias: Tensor | None, *weight: Tensor
    ) -> Tensor:
        ctx.scale, ctx.hidden_dtype, ctx.sources, grads = call
        ctx.save_for_backward(*_in_input_order(grads, len(weight)))
        ctx.mark_dirty(loss)  # not a view of it, which could not be divided in place
        return loss

    @staticmethod
    @_first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        return None, None, *_scaled(ctx.scale, ctx.saved_tensors, upstream, ctx.hidden_dtype)


def _set_up(ctx: Any, call: _Call | _HintedCall, out: TokenLogps) -> None:
    """What the two functions that return `TokenLogps` keep on `ctx`; tensors go through `save_for_backward`."""
    ctx.set_materialize_grads(False)
    ctx.impl, ctx.spec, ctx.sources = call.impl, call.problem.spec, call.sources
    ctx.hidden_dtype = call.problem.hidden.dtype
    outputs = out._asdict().items()
    ctx.mark_non_differentiable(*(x for name, x in outputs if x is not None and name not in Upstream._fields))


def _run_backward(
    ctx: Any, problem: Problem, saved: Saved, upstream: Upstream, accumulators: Accumulators = ()
) -> Grads:
    needs = _needs_of_inputs(ctx.needs_input_grad)
    with torch.autocast(problem.hidden.device.type, enabled=False):
        return backward(ctx.impl, problem, saved, needs, upstream, accumulators)


def _inputs(problem: Problem) -> tuple[Tensor | None, ...]:
    """hidden, bias and the head's tensors: the tensor arguments of the autograd functions."""
    return problem.hidden, problem.bias, *(x for _, x in problem.head)


def _problem(spec: Spec, tensors: Iterable[Any]) -> Problem:
    """From targets and `_inputs`, as they were saved."""
    targets, hidden, bias, *weight = tensors
    return with_tensors(spec, hidden, as_head(tuple(weight), spec.operand_dtype), targets, bias)


def _in_input_order(grads: Grads, count: int) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `_inputs`, for a head of `count` tensors."""
    d_hidden, d_weight, d_bias = grads
    return d_hidden, d_bias, *(d_weight or [None] * count)


def _scaled(
    scale: Scale, grads: Iterable[Tensor | None], factor: Tensor, hidden_dtype: torch.dtype
) -> list[Tensor | None]:
    """Gradients of hidden, bias and head that exist already, times a scalar."""
    # In place, since a second copy of the head's gradient could be the memory peak; not where the graph is kept for
    # another backward, which will need the gradients unscaled.
    is_kept = private.graph_is_kept()
    d_hidden, *others = (g if g is None else g * factor if is_kept else scale(g, factor) for g in grads)
    return [d_hidden if d_hidden is None else d_hidden.to(hidden_dtype), *others]


def _may_use_hint(problem: Problem, needs: NeedsGrad) -> bool:
    """Whether gradients may be computed before the loss is known: of a trained head, at once and not in fp16.

    A frozen head has a path of 2 products for any loss.
    """
    return needs.weight and problem.memory.keep_head and len(problem.targets) > 0 and holds_early(problem)


def _multiple_of(expected: Tensor, grad: Tensor) -> tuple[Tensor, bool]:
    """A factor, on the CPU, and whether `grad` is `expected` times that, to rounding; both [N].

    One wait for the device, after which a factor of 1 is known to be one.
    """
    sizes = expected.abs()
    largest = sizes.argmax()
    factor = grad[largest] / expected[largest]
    limits = torch.finfo(expected.dtype)
    # Below the least normal number rounding is absolute; the largest must be far above it. No comparison holds for NaN.
    budget = sizes.clamp(min=limits.tiny) * (factor.abs() * 8 * limits.eps)
    fits = ((grad - factor * expected).abs() <= budget).all() & (sizes[largest] * limits.eps >= limits.tiny)
    factor, fits = torch.stack([factor, fits.to(factor.dtype)]).cpu().unbind()
    return factor, bool(fits)


def _needs_grad(problem: Problem) -> NeedsGrad:
    return problem.requires_grad if torch.is_grad_enabled() else NeedsGrad(False, False, False)


def _needs_of_inputs(needs_input_grad: tuple[bool, ...]) -> NeedsGrad:
    """From the flags of an autograd function of one record and `_inputs`."""
    _, hidden, bias, *weight = needs_input_grad
    return NeedsGrad(hidden, any(weight), bias)


def _accumulator(x: Tensor) -> Tensor | None:
    """`x.grad`, where autograd would only add a gradient of `x` to it in place.

    The backward may then do so itself, without a tensor of the size of `x`.
    """
    grad = x.grad if x.is_leaf else None
    if grad is None or type(grad) is not Tensor or grad.dtype != x.dtype or not grad.is_contiguous():
        return None
    return grad if private.only_accumulates(x) else None
