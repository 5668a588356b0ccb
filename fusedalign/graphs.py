"""What `torch.compile` sees of the head: custom operators with fake implementations, opaque and without graph breaks.

They do what `ops` does outside of a graph, with all tokens, ignored ones too, at their interface: a graph must know the
shapes of what an operator returns. Their bodies are the same paths of the same impls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fusedalign.compaction import Places, compact
from fusedalign.impls import autograd, impl_names, resolve
from fusedalign.impls.autograd import Grads, Needs, OwnGradients
from fusedalign.impls.pytorch import IMPL as PYTORCH
from fusedalign.losses.common import check_loss_type
from fusedalign.losses.sft import LOSS_TYPES, ScalarLoss, mean_over, token_losses
from fusedalign.problem import OUTPUTS, Problem, Tiling, TokenLogps

#: The names of impls that have operators here.
NAMES = ("auto", *impl_names("own"))


class Options(NamedTuple):
    """Everything of a call that is no tensor."""

    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    operand_dtype: torch.dtype
    outputs: frozenset[str]
    filter_eps: float | None
    tiling: Tiling
    impl: str
    needs: tuple[bool, bool, bool]
    """which of hidden, weight and bias need a gradient"""

    def packed(self) -> tuple[float, float, float, float, list[int], torch.dtype, str]:
        """As an operator's schema can carry it: floats one by one, a list of them would be part of the graph."""
        *tiles, keep_head = self.tiling
        flags = (1 if x else 0 for x in (keep_head, *self.needs))
        return (
            self.scale,
            self.softcap or 0.0,
            self.temperature,
            -1.0 if self.filter_eps is None else self.filter_eps,
            [self.ignore_index, *(x or 0 for x in tiles), *flags],
            self.operand_dtype,
            " ".join([self.impl, *sorted(self.outputs)]),
        )


def _unpacked(
    scale: float,
    softcap: float,
    temperature: float,
    filter_eps: float,
    sizes: Sequence[int],
    operand_dtype: torch.dtype,
    names: str,
) -> Options:
    ignore_index, workspace, token_chunk, vocab_chunk, keep_head, *needs = sizes
    impl, *outputs = names.split()
    return Options(
        scale=scale,
        softcap=softcap or None,
        temperature=temperature,
        ignore_index=ignore_index,
        operand_dtype=operand_dtype,
        outputs=frozenset(outputs),
        filter_eps=None if filter_eps < 0 else filter_eps,
        tiling=Tiling(workspace or None, token_chunk or None, vocab_chunk or None, bool(keep_head)),
        impl=impl,
        needs=cast(tuple[bool, bool, bool], tuple(map(bool, needs))),
    )


def _operator(name: str, more: str = "") -> Callable[[Callable], torch.library.CustomOpDef]:
    """An operator of hidden, weight, targets, bias, `more`, and what `Options.packed` gives; it returns tensors."""
    packed = "float scale, float softcap, float temperature, float filter_eps, SymInt[] sizes, ScalarType operand_dtype"
    tensors = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
    arguments = ", ".join(x for x in (tensors, more, packed, "str names") if x)
    return _operator_of(name, arguments)


def _operator_of(name: str, arguments: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    schema = f"({arguments}) -> Tensor[]"
    return lambda f: torch.library.custom_op(f"fusedalign::{name}", f, mutates_args=(), schema=schema)


def _problem(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options
) -> tuple[Problem, Places, OwnGradients]:
    o = options._asdict()
    impl, needs = o.pop("impl"), o.pop("needs")
    hidden, weight = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    problem, places = compact(hidden, weight, targets, bias=bias, **o)
    chosen = resolve(impl, problem)
    # "auto" may find an impl that brings its own autograd.
    return problem, places, chosen if isinstance(chosen, OwnGradients) else PYTORCH


# --------------------------------------------------------------------------------------------------------- linear_logps


def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options) -> TokenLogps:
    """As `ops.linear_logps`; arguments are checked already."""
    out = _logps(hidden, weight, targets, bias, *options.packed())
    fields = [x if name == "logps" or name in options.outputs else None for name, x in zip(_FIELDS, out, strict=False)]
    return TokenLogps(*fields)  # type: ignore[arg-type]


_FIELDS = ("logps", *OUTPUTS)


@_operator("linear_logps")
def _logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *packed: Any,
) -> list[Tensor]:
    """The fields of `TokenLogps`, then the kept Jacobian, its scale, max, log_e and the entropy; empty where absent."""
    options = _unpacked(*packed)
    problem, places, chosen = _problem(hidden, weight, targets, bias, options)
    with torch.no_grad():
        if any(options.needs):
            # The backward's operator may not write into what it is given, so nothing is kept in a gradient's memory.
            out, state = autograd.forward(chosen, problem, options.needs, keep_head=False)
        else:
            out, state = chosen.sweep(problem, "nothing")[0].results(problem), autograd.State(*[None] * 5)
    made = (*out, *(state.jacobian or (None, None)), *state[2:])
    kinds = [t.dtype for t in _logps_fake(hidden, weight, targets, bias, *options.packed())]
    return [targets.new_empty(0, dtype=k) if x is None else places.scatter(x) for x, k in zip(made, kinds, strict=True)]


@_logps.register_fake
def _logps_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *packed: Any,
) -> list[Tensor]:
    options = _unpacked(*packed)
    inner = torch.float64 if options.operand_dtype == torch.float64 else torch.float32

    def tokens(wanted: bool, dtype: torch.dtype) -> Tensor:
        return targets.new_empty(targets.shape if wanted else (0,), dtype=dtype)

    def field(name: str) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return tokens(name == "logps" or name in options.outputs, torch.bool if name == "is_top1" else wide)

    frozen, half = options.needs == (True, False, False), options.operand_dtype.itemsize == 2
    recomputes = any(options.needs) and (not frozen or bool(options.outputs & {"entropy", "lse"}))
    return [
        *(field(name) for name in _FIELDS),
        hidden.new_empty(hidden.shape if frozen else (0,), dtype=torch.float16 if half and frozen else inner),
        tokens(frozen and half, torch.float32),
        tokens(recomputes, inner),
        tokens(recomputes, inner),
        tokens(recomputes and "entropy" in options.outputs, inner),
    ]


@_operator("linear_logps_backward", "Tensor[] state, Tensor[] grads")
def _logps_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    state: Sequence[Tensor],
    grads: Sequence[Tensor],
    *packed: Any,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed; `state` and `grads` empty where absent."""
    options = _unpacked(*packed)
    problem, places, chosen = _problem(hidden, weight, targets, bias, options)
    rows, of_rows, *rest = (None if x.numel() == 0 else places.gather(x) for x in state)
    kept = autograd.State(None if rows is None else autograd.Jacobian(rows, of_rows), None, *rest)
    given = [None if x.numel() == 0 else places.gather(x) for x in grads]
    with torch.no_grad():
        made = autograd.backward(chosen, problem, kept, options.needs, *given)
    return _returned(made, options.needs, places, hidden, weight, bias)


@_logps_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    state: Sequence[Tensor],
    grads: Sequence[Tensor],
    *packed: Any,
) -> list[Tensor]:
    return _fake_grads(hidden, weight, bias, _unpacked(*packed).needs)


_logps_backward.register_autograd(autograd.refuse_second_order)


def _setup_logps(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, weight, targets, bias, *ctx.options = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, targets, *([bias] if ctx.has_bias else []), *output[len(_FIELDS) :])


def _backward_of_logps(ctx: Any, grads: list[Tensor | None]) -> tuple:
    hidden, weight, targets, *rest = ctx.saved_tensors
    bias = rest.pop(0) if ctx.has_bias else None
    asked = _unpacked(*ctx.options).outputs
    used = [g if name == "logps" or name in asked else None for name, g in zip(_FIELDS[:3], grads, strict=False)]
    given = [hidden.new_empty(0) if g is None else g for g in used]
    return *_grads_of(_logps_backward(hidden, weight, targets, bias, rest, given, *ctx.options), ctx), *[None] * 7


_logps.register_autograd(_backward_of_logps, setup_context=_setup_logps)


# ------------------------------------------------------------------------------------------------- linear_cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    loss_type: str,
    z_loss: float,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """As `ops.linear_cross_entropy`; arguments are checked already."""
    # The operator below returns gradients, which are held until the backward: keep_head=False forbids that for the
    # head's, and fp16 ones may have left their range before the backward brings the factor of the loss.
    needed = (x for x, needed in zip((hidden, weight, bias), options.needs, strict=True) if needed)
    fp16 = any(x is not None and x.dtype == torch.float16 for x in needed)
    if fp16 or not options.tiling.keep_head:
        check_loss_type(loss_type, LOSS_TYPES)
        out = linear_logps(hidden, weight, targets, bias, options)
        total = token_losses(out.logps, out.lse, loss_type=loss_type, z_loss=z_loss)[0].sum()
        count = (targets != options.ignore_index).sum() if num_items is None else num_items
        return total if reduction == "sum" else mean_over(total, count)
    items = num_items
    if isinstance(items, (int, float)):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        items = targets.new_tensor(items, dtype=torch.int64 if isinstance(items, int) else wide)
    how = f"{loss_type} {reduction}"
    return _cross_entropy(hidden, weight, targets, bias, items, z_loss, how, *options.packed())[0]


@_operator("linear_cross_entropy", "Tensor? num_items, float z_loss, str how")
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    z_loss: float,
    how: str,
    *packed: Any,
) -> list[Tensor]:
    """The loss, and its gradients by hidden, weight and bias, empty where not needed."""
    loss_type, reduction = how.split()
    options = _unpacked(*packed)
    problem, places, chosen = _problem(hidden, weight, targets, bias, options)
    per_token = ScalarLoss(loss_type, z_loss, reduction, len(problem.targets) if num_items is None else num_items)
    loss, made = autograd.loss_and_grads(chosen, problem, per_token, options.needs)
    return [loss, *_returned(made, options.needs, places, hidden, weight, bias)]


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    z_loss: float,
    how: str,
    *packed: Any,
) -> list[Tensor]:
    loss = hidden.new_empty((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return [
        loss,
        *_fake_grads(hidden, weight, bias, _unpacked(*packed).needs),
    ]


@_operator_of("scaled_grads", "Tensor[] grads, Tensor upstream, Tensor[] sources")
def _scaled_grads(grads: Sequence[Tensor], upstream: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """`grads` times `upstream`. They are made of `sources`, which are not looked at."""
    return [g * upstream for g in grads]


@_scaled_grads.register_fake
def _(grads: Sequence[Tensor], upstream: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(g) for g in grads]


_scaled_grads.register_autograd(autograd.refuse_second_order)


def _setup_cross_entropy(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, weight, _, bias = inputs[:4]
    ctx.options = inputs[-7:]
    needs = _unpacked(*ctx.options).needs
    sources = [x for x, needed in zip((hidden, weight, bias), needs, strict=True) if needed and x is not None]
    ctx.count = len(output) - 1
    ctx.save_for_backward(*output[1:], *sources)


def _backward_of_cross_entropy(ctx: Any, grads: list[Tensor | None]) -> tuple:
    (upstream, *_) = grads
    made, sources = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    if upstream is not None:
        made = _scaled_grads(list(made), upstream, list(sources))
    return *_grads_of(made, ctx), *[None] * 10


_cross_entropy.register_autograd(_backward_of_cross_entropy, setup_context=_setup_cross_entropy)


# ------------------------------------------------------------------------------------------------------------ gradients


def _returned(
    grads: Grads, needs: Needs, places: Places, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """As an operator returns them: of the inputs' shapes, zeros where nothing came, empty where nothing is needed."""
    d_hidden, parts, d_bias = grads
    d_hidden = None if d_hidden is None else places.scatter(d_hidden)
    d_weight = None if parts is None else parts[0]
    made = []
    for grad, x, needed in zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), needs, strict=True):
        if needed and x is not None:
            made.append(torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad)
        else:
            made.append(hidden.new_empty(0))
    return made


def _fake_grads(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> list[Tensor]:
    tensors = zip((hidden, weight, bias), needs, strict=True)
    return [x.new_empty(x.shape) if needed and x is not None else hidden.new_empty(0) for x, needed in tensors]


def _grads_of(made: list[Tensor], ctx: Any) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """In the order of an operator's first arguments: hidden, weight, targets, bias."""
    needs = _unpacked(*ctx.options).needs
    d_hidden, d_weight, d_bias = (g if needed else None for g, needed in zip(made, needs, strict=True))
    return d_hidden, d_weight, None, d_bias
