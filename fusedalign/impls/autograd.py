"""The autograd of impls that make their own gradients: which path serves, what is kept, what the backward computes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedalign.impls.base import Impl
from fusedalign.impls.rows import RowSums, TokenGrads, grads_of_token_loss, head_grads, of_each_part
from fusedalign.problem import OUTPUTS, Problem, TokenLogps, TokenLoss, beside

#: Gradients of hidden, of each tensor of the head, and of bias; None where not needed.
Grads = tuple[Tensor | None, tuple[Tensor | None, ...] | None, Tensor | None]
#: What a sweep keeps for the backward.
Keep = Literal["nothing", "jacobian", "head"]
#: Which of hidden, weight and bias need a gradient.
Needs = tuple[bool, bool, bool]


class Jacobian(NamedTuple):
    """d logps / d hidden of N tokens: `rows` [N, D], times `scale` [N] fp32 where there is one.

    With half-precision operands rows are fp16 divided by a power of 2, whichever half the operands are: rounded to bf16
    they would add as much error again as the rounding of the gradient that is made of them.
    """

    rows: Tensor
    scale: Tensor | None

    @classmethod
    def empty(cls, problem: Problem) -> Jacobian:
        """To be written."""
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


class KeptHead(NamedTuple):
    """What an impl keeps for a trained head: exponentials of logits, in memory that will be the head's gradient."""

    d_weight: Tensor
    """[V, D] in the head's dtype, to be overwritten by the gradient"""
    largest: Tensor
    """as the impl likes"""
    target: Tensor
    """[N] final logits of the targets, in the logit dtype"""


class State(NamedTuple):
    """What the backward of `token_logps` needs of the forward; None where it does not."""

    jacobian: Jacobian | None
    head: KeptHead | None
    max: Tensor | None
    log_e: Tensor | None
    entropy: Tensor | None


#: A scalar times a tensor, in place: what a backward asks of an impl that only scales.
Scale = Callable[[Tensor, Tensor], Tensor]


class OwnGradients(Impl):
    """An impl that makes its own gradients: the arithmetic is its own, the autograd is here."""

    @abstractmethod
    def sweep(self, problem: Problem, keep: Keep) -> tuple[RowSums, Jacobian | KeptHead | None]:
        """The softmax sums of all tokens, and what is to be kept: the first where asked for, the second if it likes."""

    @abstractmethod
    def two_pass_grads(self, problem: Problem, grads: TokenGrads, needs: Needs, head: KeptHead | None = None) -> Grads:
        """The gradients of any loss, from logits that are computed again where `head` does not save that."""

    @abstractmethod
    def one_pass(self, problem: Problem, token_loss: TokenLoss, needs: Needs) -> tuple[RowSums, Tensor, Grads] | None:
        """The sums of all tokens, a loss summed over these and its gradients, at once; None where there is no room.

        The gradient of hidden has the dtype `early_dtype(hidden.dtype)`.
        """

    def scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x` times a scalar in place, for nothing where that is 1."""
        return x.mul_(factor)

    def token_logps(self, problem: Problem) -> TokenLogps:
        """`TokenLogps` of [N] tokens, by the cheapest path that gives the gradients which are needed."""
        needs = _needs(problem)
        if not any(needs):
            return self.sweep(problem, "nothing")[0].results(problem)
        if problem.expected_loss is not None and _may_expect(problem, needs):
            with torch.no_grad():
                made = self.one_pass(problem, problem.expected_loss, needs)
            if made is not None:
                sums, _, grads = made
                tensors = problem.hidden, problem.bias, *_tensors(problem)
                return TokenLogps(*_ExpectedLoss.apply(self, problem, sums, grads, _sources(problem), *tensors))
        tensors = problem.hidden, problem.bias, *_tensors(problem)
        return TokenLogps(*_TokenLogps.apply(self, problem, _sources(problem), *tensors))

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`, a scalar: in one pass where the impl can."""
        needs = _needs(problem)
        early = (
            any(needs) and len(problem.targets) and (problem.tiling.keep_head or not needs[1]) and holds_early(problem)
        )
        with torch.no_grad():
            made = self.one_pass(replace(problem, outputs=frozenset()), token_loss, needs) if early else None
        if made is None:
            out = self.token_logps(problem)
            return token_loss(out.logps, out.lse)[0].sum()
        return ready(self.scale_, problem, *made[1:])


def ready(scale: Scale, problem: Problem, loss: Tensor, grads: Grads) -> Tensor:
    """`loss`, a scalar whose gradients exist already: the backward scales them."""
    return _Ready.apply(scale, loss, grads, _sources(problem), problem.hidden, problem.bias, *_tensors(problem))


def early_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of hidden states of `dtype` waits for the factor of the loss.

    fp32 for fp16, in which gradients would underflow before GradScaler multiplies them by 65536, or overflow before the
    user's factor makes them small.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def holds_early(problem: Problem) -> bool:
    """Whether the gradients of head and bias may be made before the factor of the loss is known: not fp16 ones.

    They are made in their final dtype, since a wider one would take too much memory for the head; see `early_dtype`.
    """
    return not any(x is not None and x.requires_grad and x.dtype == torch.float16 for x in _parameters(problem))


def loss_and_grads(impl: OwnGradients, problem: Problem, token_loss: TokenLoss, needs: Needs) -> tuple[Tensor, Grads]:
    """What `token_loss_sum` gives, and its gradients, without autograd around it; not for gradients in fp16."""
    with torch.no_grad():
        early, alone = any(needs) and len(problem.targets), replace(problem, outputs=frozenset())
        made = impl.one_pass(alone, token_loss, needs) if early else None
        if made is not None:
            return made[1:]
        sums, _ = impl.sweep(problem, "nothing")
        loss, grads = grads_of_token_loss(sums, slice(None), token_loss, problem.result_dtype)
        return loss, _two_pass_grads(impl, problem, grads, needs)


def forward(impl: OwnGradients, problem: Problem, needs: Needs, *, keep_head: bool = True) -> tuple[TokenLogps, State]:
    """The results, and what `backward` needs beside the problem itself."""
    keep_head = keep_head and problem.tiling.keep_head
    keep: Keep = "jacobian" if needs == (True, False, False) else "head" if needs[1] and keep_head else "nothing"
    sums, kept = impl.sweep(problem, keep)
    out = sums.results(problem)
    jacobian, head = (kept, None) if isinstance(kept, Jacobian) else (None, kept)
    if jacobian is not None and out.entropy is None and out.lse is None:
        return out, State(jacobian, None, None, None, None)
    # A kept Jacobian answers for logps alone: gradients of entropy and lse, if there are any, call for more.
    return out, State(jacobian, head, sums.max, sums.log_e(), sums.entropy() if out.entropy is not None else None)


def backward(
    impl: OwnGradients,
    problem: Problem,
    state: State,
    needs: Needs,
    d_logps: Tensor | None,
    d_entropy: Tensor | None = None,
    d_lse: Tensor | None = None,
) -> Grads:
    """The gradients of `forward` by hidden, weight and bias; those given are [N], None where zero."""
    d_hidden = None
    if state.jacobian is not None and d_logps is not None:
        rows, scale = state.jacobian
        by = d_logps if scale is None else d_logps * scale
        d_hidden = torch.mul(rows, by[:, None], out=torch.empty_like(rows, dtype=problem.hidden.dtype))
        d_logps = None
    if d_logps is None and d_entropy is None and d_lse is None:
        return d_hidden, None, None
    assert state.max is not None
    assert state.log_e is not None
    dtype = problem.logit_dtype
    grads = TokenGrads(
        max=state.max,
        log_e=state.log_e,
        logps=torch.zeros_like(state.log_e) if d_logps is None else d_logps.to(dtype),
        lse=None if d_lse is None else d_lse.to(dtype),
        entropy=None if d_entropy is None or state.entropy is None else (d_entropy.to(dtype), state.entropy),
    )
    more, d_weight, d_bias = _two_pass_grads(impl, problem, grads, needs, state.head)
    return more if d_hidden is None or more is None else d_hidden.add_(more), d_weight, d_bias


def _two_pass_grads(
    impl: OwnGradients, problem: Problem, grads: TokenGrads, needs: Needs, head: KeptHead | None = None
) -> Grads:
    """Zeros where there is no token: tiles of nothing are nobody's business."""
    if len(problem.targets):
        return impl.two_pass_grads(problem, grads, needs, head)
    pair = zip((problem.hidden, problem.bias), needs[::2], strict=True)
    d_hidden, d_bias = (torch.zeros_like(x) if x is not None and needed else None for x, needed in pair)
    if not needs[1]:
        return d_hidden, None, d_bias
    d_weight = of_each_part(problem, (g.memory if g.adds else g.memory.zero_() for g in head_grads(problem)))
    return d_hidden, d_weight, d_bias


def _first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a backward so that differentiating the gradients that it returns raises.

    PyTorch's `once_differentiable` is not enough: its error node depends on copies of the upstream gradients alone, so
    `torch.autograd.grad(penalty, hidden)` never reaches it and silently leaves out the head. Here the error node
    depends on `ctx.sources` and on the upstream gradients.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Tensor | None) -> tuple:
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in upstream):
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
    @_first_order
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
    trained = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    out = function(replace(problem, **{name: _FirstOrderInput.apply(sources, x) for name, x in trained.items()}))
    outputs: Any = (None if x is None else _FirstOrderOutput.apply(sources, x) for x in out)
    return TokenLogps(*outputs)


def _sources(problem: Problem) -> tuple[Tensor, ...]:
    """One empty tensor for each tensor that needs a gradient, connected to it in the graph.

    Copies, because a view would keep the tensor's memory alive.
    """
    if not torch.is_grad_enabled():
        return ()
    return tuple(x[:0].clone() for x in (problem.hidden, *_parameters(problem)) if x is not None and x.requires_grad)


class _TokenLogps(torch.autograd.Function):
    """`TokenLogps` as a tuple."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: OwnGradients,
        problem: Problem,
        sources: tuple[Tensor, ...],
        hidden: Tensor,
        bias: Tensor | None,
        *weight: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.sources = sources
        out, state = forward(impl, problem, _needs_of(ctx, 3))
        ctx.mark_non_differentiable(*(x for x in out[3:] if x is not None))
        ctx.impl, ctx.problem = impl, _without_tensors(problem)
        # A backward that only scales a kept Jacobian holds on to neither hidden states nor head.
        inputs: tuple[Tensor | None, ...] = (hidden.new_empty(0), None, None)
        if state.max is None:
            weight = ()
        else:
            inputs = (hidden, bias, problem.targets)
        jacobian, head = state.jacobian or (None, None), state.head or (None, None, None)
        ctx.save_for_backward(*jacobian, *head, *state[2:], *inputs, *weight)
        return tuple(out)

    @staticmethod
    @_first_order
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple:
        rows, scale, memory, largest, target, maximum, log_e, entropy, *tensors = ctx.saved_tensors
        problem = _with_tensors(ctx.problem, *tensors)
        jacobian = None if rows is None else Jacobian(rows, scale)
        # What is kept for the head is used up by one backward; where the graph is kept, the logits are made again.
        head = None if memory is None or _graph_is_kept() else KeptHead(memory, largest, target)
        state = State(jacobian, head, maximum, log_e, entropy)
        if problem.weight is not None and not problem.tiling.keep_head:
            problem = replace(problem, head_sums=tuple(_grad_so_far(x) for x in _tensors(problem)))
        with torch.autocast(problem.hidden.device.type, enabled=False):
            d_hidden, d_weight, d_bias = backward(
                ctx.impl, problem, state, _needs_of(ctx, 3), d_logps, d_entropy, d_lse
            )
        nothing = (None,) * len(ctx.needs_input_grad[5:])
        pairs = zip(d_weight or nothing, problem.head_sums or nothing, strict=True)
        return None, None, None, d_hidden, d_bias, *(grad if added_to is None else None for grad, added_to in pairs)


class _ExpectedLoss(torch.autograd.Function):
    """`TokenLogps` as a tuple, and the gradients of the loss that is expected of them.

    The backward looks whether the upstream gradient is that loss's, times any number: one wait for the device. Where it
    is, the gradients are scaled; where it is not, the logits are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        impl: OwnGradients,
        problem: Problem,
        sums: RowSums,
        grads: Grads,
        sources: tuple[Tensor, ...],
        hidden: Tensor,
        bias: Tensor | None,
        *weight: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.sources = sources
        out = sums.results(problem)
        ctx.mark_non_differentiable(*(x for x in out[3:] if x is not None))
        ctx.impl, ctx.problem = impl, _without_tensors(problem)
        assert problem.expected_loss is not None
        _, expected, _ = problem.expected_loss(out.logps, out.lse)
        entropy = None if out.entropy is None else sums.entropy()
        d_hidden, d_weight, d_bias = grads
        made = (d_hidden, d_bias, *(d_weight or [None] * len(weight)))
        inputs = (hidden, bias, problem.targets, *weight)
        ctx.save_for_backward(*made, expected, sums.max, sums.log_e(), entropy, *inputs)
        return tuple(out)

    @staticmethod
    @_first_order
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple:
        count = len(ctx.needs_input_grad) - 5  # of hidden, bias and the head's tensors
        saved = ctx.saved_tensors  # once: hooks on saved tensors, as checkpoints have them, may unpack each but once
        made, (expected, maximum, log_e, entropy, *tensors) = saved[:count], saved[count:]
        if d_logps is not None and d_entropy is None and d_lse is None:
            factor, fits = _multiple_of(expected, d_logps)
            if fits:
                return None, None, None, None, None, *_scaled(ctx.impl.scale_, made, factor, tensors[0].dtype)
        problem = _with_tensors(ctx.problem, *tensors)
        state = State(None, None, maximum, log_e, entropy)
        needs = _needs_of(ctx, 5)
        with torch.autocast(problem.hidden.device.type, enabled=False):
            d_hidden, d_weight, d_bias = backward(ctx.impl, problem, state, needs, d_logps, d_entropy, d_lse)
        return None, None, None, None, None, d_hidden, d_bias, *(d_weight or [None] * (count - 2))


class _Ready(torch.autograd.Function):
    """A scalar whose gradients exist already; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: Scale,
        loss: Tensor,
        grads: Grads,
        sources: tuple[Tensor, ...],
        hidden: Tensor,
        bias: Tensor | None,
        *weight: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.sources, ctx.hidden_dtype = scale, sources, hidden.dtype
        d_hidden, d_weight, d_bias = grads
        ctx.save_for_backward(d_hidden, d_bias, *(d_weight or [None] * len(weight)))
        ctx.mark_dirty(loss)  # not a view of it, which could not be divided in place
        return loss

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        return None, None, None, None, *_scaled(ctx.scale, ctx.saved_tensors, upstream, ctx.hidden_dtype)


def _scaled(
    scale: Scale, grads: Iterable[Tensor | None], factor: Tensor, hidden_dtype: torch.dtype
) -> list[Tensor | None]:
    """Gradients of hidden, bias and head that exist already, times a scalar."""
    # In place, since a second copy of the head's gradient could be the memory peak; not where the graph is kept for
    # another backward, which will need the gradients unscaled.
    kept = _graph_is_kept()
    d_hidden, *others = (g if g is None else g * factor if kept else scale(g, factor) for g in grads)
    return [d_hidden if d_hidden is None else d_hidden.to(hidden_dtype), *others]


def _may_expect(problem: Problem, needs: Needs) -> bool:
    """Whether gradients may be made before the loss is known: of a trained head, at once and not in fp16.

    A frozen head has a path of 2 products for any loss.
    """
    return needs[1] and problem.tiling.keep_head and len(problem.targets) > 0 and holds_early(problem)


def _multiple_of(expected: Tensor, grad: Tensor) -> tuple[Tensor, bool]:
    """A factor, on the CPU, and whether `grad` is `expected` times that, to rounding; both [N].

    One wait for the device, after which a factor of 1 is seen to be one.
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


def _needs(problem: Problem) -> Needs:
    tensors = (problem.hidden, problem.weight, problem.bias)
    on = torch.is_grad_enabled()
    return tuple(on and x is not None and x.requires_grad for x in tensors)  # type: ignore[return-value]


def _needs_of(ctx: Any, start: int) -> Needs:
    """The same within a function whose arguments from `start` on are hidden, bias and the head's tensors."""
    hidden, bias, *weight = ctx.needs_input_grad[start:]
    return hidden, any(weight), bias


def _tensors(problem: Problem) -> Iterator[Tensor]:
    """The head's, as arguments of an autograd function."""
    return (x for _, x in problem.head)


def _parameters(problem: Problem) -> Iterator[Tensor | None]:
    """The head's tensors and the bias."""
    yield from _tensors(problem)
    yield problem.bias


def _grad_so_far(x: Tensor) -> Tensor | None:
    """`x.grad`, where autograd would do nothing with a gradient of `x` but add it to that, in place.

    A backward may then do so itself, and is spared a tensor of the size of `x`. Not under `torch.autograd.grad`, nor
    where hooks want to see the gradient. Hooks on the node that adds, as DDP has them, look at `x.grad` alone.
    """
    grad = x.grad if x.is_leaf else None
    if grad is None or type(grad) is not Tensor or grad.dtype != x.dtype or not grad.is_contiguous():
        return None
    if x._backward_hooks or x._post_accumulate_grad_hooks or _graph_is_kept():
        return None
    try:
        adds = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(x).node)
    except (AttributeError, RuntimeError):  # a PyTorch without it; torch.autograd.grad, which asks for the gradient
        return None
    return grad if adds else None


def _graph_is_kept() -> bool:
    """Whether the backward that is running keeps the graph for another one; True where PyTorch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _without_tensors(problem: Problem) -> Problem:
    """What ctx may hold: tensors go through save_for_backward."""
    return replace(problem, hidden=None, weight=None, bias=None, targets=None)  # type: ignore[arg-type]


def _with_tensors(problem: Problem, hidden: Tensor, bias: Tensor | None, targets: Tensor, *weight: Tensor) -> Problem:
    """The problem whose tensors were taken out; without a head where none was saved."""
    head = beside(weight, problem.operand_dtype) if weight else None
    return replace(problem, hidden=hidden, weight=head, bias=bias, targets=targets)  # type: ignore[arg-type]


assert TokenLogps._fields[1:] == OUTPUTS  # the autograd function returns them in this order
