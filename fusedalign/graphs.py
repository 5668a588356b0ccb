"""What `torch.compile` sees of the head: custom operators with fake implementations, opaque and without graph breaks.

They do in a graph what `ops` does outside of one, with all tokens, ignored ones too, at their interface: a graph must
know the shapes of an operator's results. Their bodies run the same paths of the same impls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.compaction import TokenIndex, compact
from fusedalign.impls import autograd, impl_names, resolve
from fusedalign.impls.autograd import Grads, OwnGradients
from fusedalign.impls.pytorch import IMPL as PYTORCH
from fusedalign.losses.common import check_loss_type
from fusedalign.losses.sft import LOSS_TYPES, SFTTokenLoss, mean_over, token_losses
from fusedalign.problem import MemoryOptions, NeedsGrad, Problem, Spec, TokenLogps, Upstream

#: The names of impls that have operators here.
NAMES = ("auto", *impl_names("own"))

#: The numbers of a `Spec`. A schema carries them one by one: a list of floats would be part of the graph.
_NUMBERS = [field.name for field in dataclasses.fields(Spec) if "float" in str(field.type)]
_NO_NUMBER = -1.0  # stands for None: optional numbers are >= 0
_OPTIONAL = {field.name for field in dataclasses.fields(Spec) if str(field.type) == "float | None"}
_PACKED = [*(f"float {name}" for name in _NUMBERS), "SymInt[] sizes", "ScalarType operand_dtype", "str names"]


class Call(NamedTuple):
    """The arguments of a call that are not tensors, and which of its tensors need a gradient."""

    spec: Spec
    ignore_index: int
    impl: str
    needs: NeedsGrad

    def pack(self) -> tuple[Any, ...]:
        """The arguments of an operator, in the order of `_PACKED`."""
        numbers = (_NO_NUMBER if x is None else x for x in (getattr(self.spec, name) for name in _NUMBERS))
        *limits, keep_head = self.spec.memory
        # Not int(x): the tracer has to see plain integers.
        flags = (1 if flag else 0 for flag in (keep_head, *self.needs))
        sizes = [self.ignore_index, *(x or 0 for x in limits), *flags]
        return *numbers, sizes, self.spec.operand_dtype, " ".join([self.impl, *sorted(self.spec.outputs)])

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Call:
        """From what `pack` returns."""
        *values, sizes, operand_dtype, names = packed
        numbers = dict(zip(_NUMBERS, values, strict=True))
        numbers |= {name: None for name in _OPTIONAL if numbers[name] == _NO_NUMBER}
        ignore_index, workspace, token_chunk, vocab_chunk, keep_head, *needs = sizes
        impl, *outputs = names.split()
        memory = MemoryOptions(workspace or None, token_chunk or None, vocab_chunk or None, bool(keep_head))
        spec = Spec(operand_dtype, outputs=frozenset(outputs), memory=memory, **numbers)
        return cls(spec, ignore_index, impl, NeedsGrad(*map(bool, needs)))


def _operator(name: str, *arguments: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """An operator of hidden, weight, targets, bias, `arguments`, and the packed call; it returns tensors."""
    tensors = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
    return _operator_with(name, ", ".join([tensors, *arguments, *_PACKED]))


def _operator_with(name: str, arguments: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    schema = f"({arguments}) -> Tensor[]"
    return lambda f: torch.library.custom_op(f"fusedalign::{name}", f, mutates_args=(), schema=schema)


def _problem(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, call: Call
) -> tuple[Problem, TokenIndex, OwnGradients]:
    needs = call.needs
    hidden, weight = hidden.detach().requires_grad_(needs.hidden), weight.detach().requires_grad_(needs.weight)
    problem, token_index = compact(hidden, weight, targets, bias, call.spec, call.ignore_index)
    impl = resolve(call.impl, problem)
    # "auto" may find an impl that brings its own autograd.
    return problem, token_index, impl if isinstance(impl, OwnGradients) else PYTORCH


def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, call: Call) -> TokenLogps:
    """As `ops.linear_logps`; arguments are checked already."""
    out = _logps(hidden, weight, targets, bias, *call.pack())[: len(TokenLogps._fields)]
    fields = dict(zip(TokenLogps._fields, out, strict=True))
    return TokenLogps(**{name: x for name, x in fields.items() if _is_asked(name, call)})


def _is_asked(output: str, call: Call) -> bool:
    return output == "logps" or output in call.spec.outputs


@_operator("linear_logps")
def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    """The fields of `TokenLogps`, then those of `autograd.Saved` that `_saved_tensors` names; empty where absent."""
    call = Call.unpack(packed)
    problem, token_index, impl = _problem(hidden, weight, targets, bias, call)
    with torch.no_grad():
        if any(call.needs):
            # The backward's operator may not write into its arguments, so nothing is kept in a gradient's memory.
            out, saved = autograd.forward(impl, problem, call.needs, keep_exps=False)
        else:
            out, saved = impl.sweep(problem, "nothing")[0].results(problem), autograd.Saved()
    results = (*out, *_saved_tensors(saved))
    dtypes = [t.dtype for t in _logps_fake(hidden, weight, targets, bias, *packed)]
    return [
        targets.new_empty(0, dtype=dtype) if x is None else token_index.scatter(x)
        for x, dtype in zip(results, dtypes, strict=True)
    ]


def _saved_tensors(saved: autograd.Saved) -> tuple[Tensor | None, ...]:
    """The Jacobian, its scale, max, log_e and entropy."""
    return *(saved.jacobian or (None, None)), saved.max, saved.log_e, saved.entropy


@_logps.register_fake
def _logps_fake(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *packed: Any) -> list[Tensor]:
    call = Call.unpack(packed)
    outputs, logit_dtype = call.spec.outputs, call.spec.logit_dtype
    result_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def tokens(exists: bool, dtype: torch.dtype) -> Tensor:
        return targets.new_empty(targets.shape if exists else (0,), dtype=dtype)

    frozen, half = call.needs.hidden_alone, call.spec.operand_dtype.itemsize == 2
    recomputes = any(call.needs) and (not frozen or bool(outputs & {"entropy", "lse"}))
    return [
        *(tokens(_is_asked(x, call), torch.bool if x == "is_top1" else result_dtype) for x in TokenLogps._fields),
        hidden.new_empty(hidden.shape if frozen else (0,), dtype=torch.float16 if half and frozen else logit_dtype),
        tokens(frozen and half, torch.float32),
        tokens(recomputes, logit_dtype),
        tokens(recomputes, logit_dtype),
        tokens(recomputes and "entropy" in outputs, logit_dtype),
    ]


@_operator("linear_logps_backward", "Tensor[] saved", "Tensor[] upstream")
def _logps_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor],
    *packed: Any,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed; `saved` and `upstream` empty where absent."""
    call = Call.unpack(packed)
    problem, token_index, impl = _problem(hidden, weight, targets, bias, call)
    rows, row_scale, maximum, log_e, entropy = (None if x.numel() == 0 else token_index.gather(x) for x in saved)
    jacobian = None if rows is None else autograd.Jacobian(rows, row_scale)
    state = autograd.Saved(jacobian, max=maximum, log_e=log_e, entropy=entropy)
    d_outputs = Upstream(*(None if x.numel() == 0 else token_index.gather(x) for x in upstream))
    with torch.no_grad():
        grads = autograd.backward(impl, problem, state, call.needs, d_outputs)
    return _as_results(grads, call.needs, token_index, hidden, weight, bias)


@_logps_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor],
    *packed: Any,
) -> list[Tensor]:
    return _fake_grads(hidden, weight, bias, Call.unpack(packed).needs)


_logps_backward.register_autograd(autograd.refuse_second_order)


def _set_up_logps(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, weight, targets, bias, *ctx.packed = inputs
    ctx.arguments = len(ctx.packed)
    ctx.has_bias = bias is not None
    saved = output[len(TokenLogps._fields) :]
    ctx.save_for_backward(hidden, weight, targets, *([bias] if ctx.has_bias else []), *saved)


def _differentiate_logps(ctx: Any, grads: list[Tensor | None]) -> tuple:
    hidden, weight, targets, *saved = ctx.saved_tensors
    bias = saved.pop(0) if ctx.has_bias else None
    call = Call.unpack(ctx.packed)
    upstream = Upstream.of(grads[: len(TokenLogps._fields)])._asdict()
    asked = (grad if _is_asked(name, call) else None for name, grad in upstream.items())
    tensors = [hidden.new_empty(0) if grad is None else grad for grad in asked]
    return _input_grads(_logps_backward(hidden, weight, targets, bias, saved, tensors, *ctx.packed), ctx)


_logps.register_autograd(_differentiate_logps, setup_context=_set_up_logps)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    call: Call,
    loss_type: str,
    z_loss: float,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """As `ops.linear_cross_entropy`; arguments are checked already."""
    # The operator below returns gradients, which are held until the backward: keep_head=False forbids that for the
    # head's, and fp16 ones may leave their range before the backward brings the factor of the loss.
    fp16 = any(x.dtype == torch.float16 for x in _needing_grad(hidden, weight, bias, call.needs))
    if fp16 or not call.spec.memory.keep_head:
        check_loss_type(loss_type, LOSS_TYPES)
        out = linear_logps(hidden, weight, targets, bias, call)
        total = token_losses(out.logps, out.lse, loss_type=loss_type, z_loss=z_loss)[0].sum()
        count = (targets != call.ignore_index).sum() if num_items is None else num_items
        return total if reduction == "sum" else mean_over(total, count)
    items = num_items
    if isinstance(items, (int, float)):
        number = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        items = targets.new_tensor(items, dtype=torch.int64 if isinstance(items, int) else number)
    return _cross_entropy(hidden, weight, targets, bias, items, z_loss, f"{loss_type} {reduction}", *call.pack())[0]


@_operator("linear_cross_entropy", "Tensor? num_items", "float z_loss", "str loss")
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    z_loss: float,
    loss: str,
    *packed: Any,
) -> list[Tensor]:
    """The loss, and its gradients by hidden, weight and bias, empty where not needed."""
    loss_type, reduction = loss.split()
    call = Call.unpack(packed)
    problem, token_index, impl = _problem(hidden, weight, targets, bias, call)
    token_loss = SFTTokenLoss(loss_type, z_loss, reduction, len(problem.targets) if num_items is None else num_items)
    total, grads = autograd.loss_and_grads(impl, problem, token_loss, call.needs)
    return [total, *_as_results(grads, call.needs, token_index, hidden, weight, bias)]


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    num_items: Tensor | None,
    z_loss: float,
    loss: str,
    *packed: Any,
) -> list[Tensor]:
    total = hidden.new_empty((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return [total, *_fake_grads(hidden, weight, bias, Call.unpack(packed).needs)]


@_operator_with("scaled_grads", "Tensor[] grads, Tensor upstream, Tensor[] sources")
def _scaled_grads(grads: Sequence[Tensor], upstream: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """`grads` times `upstream`; `sources`, which the gradients depend on, are not read."""
    return [g * upstream for g in grads]


@_scaled_grads.register_fake
def _(grads: Sequence[Tensor], upstream: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(g) for g in grads]


_scaled_grads.register_autograd(autograd.refuse_second_order)


def _set_up_cross_entropy(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, weight, _, bias, *others = inputs
    ctx.packed = others[-len(_PACKED) :]
    ctx.count, ctx.arguments = len(output) - 1, len(others)
    ctx.save_for_backward(*output[1:], *_needing_grad(hidden, weight, bias, Call.unpack(ctx.packed).needs))


def _differentiate_cross_entropy(ctx: Any, grads: list[Tensor | None]) -> tuple:
    (upstream, *_) = grads
    early_grads, sources = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    if upstream is not None:
        early_grads = _scaled_grads(list(early_grads), upstream, list(sources))
    return _input_grads(early_grads, ctx)


_cross_entropy.register_autograd(_differentiate_cross_entropy, setup_context=_set_up_cross_entropy)


def _needing_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: NeedsGrad) -> list[Tensor]:
    """Those of the three tensors that need a gradient."""
    tensors = zip((hidden, weight, bias), needs, strict=True)
    return [x for x, needed in tensors if needed and x is not None]


def _as_results(
    grads: Grads, needs: NeedsGrad, token_index: TokenIndex, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """Gradients as an operator returns them: in the inputs' shapes, zeros where None, empty where not needed."""
    d_hidden, parts, d_bias = grads
    d_hidden = None if d_hidden is None else token_index.scatter(d_hidden)
    d_weight = None if parts is None else parts[0]
    results = []
    for grad, x, needed in zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), needs, strict=True):
        if needed and x is not None:
            results.append(torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad)
        else:
            results.append(hidden.new_empty(0))
    return results


def _fake_grads(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: NeedsGrad) -> list[Tensor]:
    tensors = zip((hidden, weight, bias), needs, strict=True)
    return [x.new_empty(x.shape) if needed and x is not None else hidden.new_empty(0) for x, needed in tensors]


def _input_grads(grads: Sequence[Tensor], ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's inputs: of hidden, weight and bias, None for all others."""
    needs = Call.unpack(ctx.packed).needs
    d_hidden, d_weight, d_bias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * ctx.arguments
