"""From hidden states and an LM head to log-probabilities: check, compact, choose an impl, call it, scatter back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor

from fusedalign import graphs
from fusedalign.checks import check_finite, check_nonnegative, check_plain, check_positive
from fusedalign.compaction import TokenIndex, compact
from fusedalign.impls import check_name, resolve
from fusedalign.impls.base import Impl
from fusedalign.losses.sft import LOSS_TYPES, SFTTokenLoss, check_num_items
from fusedalign.private import is_compiler_loaded, is_mapped, transform_names
from fusedalign.problem import (
    OUTPUTS,
    MemoryOptions,
    NeedsGrad,
    Problem,
    Spec,
    SplitHead,
    TokenLogps,
    as_head,
    operand_dtype,
)
from fusedalign.sharding import Loss, local_part, parallel_problem, shared_failures

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_logps(
    hidden: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    impl: str = "auto",
    filter_eps: float | None = None,
    workspace: int | Literal["auto"] = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    keep_head: bool = True,
    loss_hint: str | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenLogps:
    """Per-token log-probabilities of `targets` under an LM head, without the `[tokens, vocab]` logits.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature, in that order; logits are fp32
    (fp64 for fp64 inputs) whatever the inputs' dtype, gradients are dense. Only tokens that are not ignored are
    projected. Under autocast the product's operands take autocast's dtype, as in `torch.nn.functional.linear`.

    Args:
        hidden: [..., D] fp64/fp32/bf16/fp16, the input of the LM head.
        weight: [V, D], the head; its dtype may differ from that of `hidden`, the product then takes the wider one. Or a
            tuple of its column blocks [V, D1], [V, D2], ..., D1 + D2 + ... = D: they are concatenated a tile of rows
            at a time, and each has a gradient of its own, in its own dtype, or none. The product's dtype depends on
            the first one's. `fusedalign.head` describes adapters this way. `torch.compile` breaks its graph here.
        targets: [...] int64, aligned with `hidden`: `hidden[..., t, :]` predicts `targets[..., t]`. See
            `fusedalign.sequence.shift_labels` for unshifted labels. On the device of `hidden`, or on the CPU,
            which avoids a device synchronisation.
        bias: [V] or None.
        scale: finite factor of the raw logits (Cohere's logit_scale, 1 / logits_scaling of Granite).
        softcap: > 0 or None (Gemma 2's final_logit_softcapping).
        temperature: > 0. These three, and their quotients, must be finite in fp32.
        ignore_index: targets of this value take no part; every output is exactly 0 there.
        outputs: further fields of `TokenLogps` to compute: "entropy", "lse", "mean_logit", "log_sum_sq_probs",
            "is_top1".
        impl: "auto", or the name of one impl, which then serves or raises. See `fusedalign.explain`.
        filter_eps: None for exact gradients; gradients of probabilities below it may be dropped by an impl that can.
        workspace: bytes that the tiles may take beyond inputs, results and what the backward keeps. "auto": 256 MiB
            and, where "triton" then saves products of a scalar loss (`linear_cross_entropy`), up to half of the free
            memory. Gradients round differently in another workspace: name a number where runs must agree bit by bit
            (under `torch.use_deterministic_algorithms` "auto" is 256 MiB).
        token_chunk: tokens a tile, instead of what `workspace` gives.
        vocab_chunk: vocabulary columns a tile; default: from the workspace.
        keep_head: False where many forwards precede their backwards, as in pipeline parallelism: no memory of the
            head's size is then held from a forward to its backward, which computes the logits again. Where autograd
            would add the head's gradient to an existing `.grad`, the backward of "triton" and "pytorch" does so
            itself, outside of `torch.compile`, without a tensor of the head's size. It changes no result beyond
            rounding.
        loss_hint: "nll" or "dft" where the loss is likely to be that of `fusedalign.losses.sft_loss`, times any number.
            The gradients of a trained head may then be computed in the forward, in 3 products as in
            `linear_cross_entropy`, which takes the same workspace, and are held until the backward. That compares the
            upstream gradient (one wait for the device) and computes them again if the loss is another one, so the hint
            changes no result beyond rounding. None: nothing is known of the loss. It is ignored where it gains
            nothing: with a frozen head, keep_head=False, a head in fp16, a sharded head, under torch.compile, by impls
            other than "pytorch".
        process_group: of the ranks that share a head: `weight` and `bias` are this rank's rows, consecutive in the
            order of the ranks, of any number on each. All ranks have the same hidden states and targets, and compute
            the same loss; the gradient of hidden is whole on each. Found by itself where `weight` is a DTensor sharded
            on dimension 0. Waits once more for the device; "triton" and "pytorch" serve. See docs/distributed.md.

    Returns:
        `TokenLogps` of [...] tensors; `logps`, `entropy` and `lse` are differentiable (once) by hidden, weight, bias.
        A gradient of a gradient raises RuntimeError, except with "reference", which has it.

    Raises:
        ValueError: a shape, device, target, option or name that does not fit; one line says what was expected.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> out = linear_logps(hidden, weight, torch.tensor([[1, 2, -100], [4, 5, 6]]), outputs=["entropy"])
        >>> out.logps.shape, round(out.entropy[0, 0].exp().item())
        (torch.Size([2, 3]), 50)
    """
    weight, bias, group = local_part(weight, bias, process_group)
    with shared_failures(group):
        head, call = _check(
            hidden,
            weight,
            targets,
            bias,
            impl=impl,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            outputs=_check_outputs(outputs),
            filter_eps=filter_eps,
            memory=_check_memory(keep_head, workspace=workspace, token_chunk=token_chunk, vocab_chunk=vocab_chunk),
            is_shard=group is not None,
        )
        if loss_hint is not None and loss_hint not in LOSS_TYPES:
            raise ValueError(f"loss_hint must be one of {', '.join(LOSS_TYPES)}, or None, got {loss_hint!r}")
    if group is None and _is_in_graph(head, impl):
        return graphs.linear_logps(hidden, head, targets.to(hidden.device), bias, call)
    with torch.autocast(hidden.device.type, enabled=False):
        problem, token_index, chosen = _problem(hidden, head, targets, bias, call, group)
        # Assume the mean: it is the usual reduction, and then the backward needs no scaling.
        hint = None if loss_hint is None else SFTTokenLoss(loss_hint, 0.0, "mean", len(problem.targets))
        out = _outside_of_graphs(lambda: chosen.token_logps(problem, hint))
    return TokenLogps(**{name: token_index.scatter(x) for name, x in out._asdict().items() if x is not None})


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    loss_type: str = "nll",
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    impl: str = "auto",
    filter_eps: float | None = None,
    workspace: int | Literal["auto"] = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    keep_head: bool = True,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The scalar training loss of an LM head; its gradients are computed in the forward where that is cheaper.

    Equal to `sft_loss` of `linear_logps`, plus z_loss * lse**2 for each token, in 3 products of the head's size instead
    of 4: nothing is recomputed in the backward, which only scales. With a bf16 or fp16 head that needs a gradient this
    takes a workspace with room for one more tensor of the head's size (the low-order half of its gradient while that is
    summed); with less, the 4-product path serves. It also serves a trained fp16 head, whose gradient could leave the
    range of fp16 before the backward brings the factor of the loss (GradScaler's, for one).

    Args:
        hidden, weight, targets, bias, scale, softcap, temperature, ignore_index, impl, filter_eps, workspace,
            token_chunk, vocab_chunk, keep_head, process_group: as in `linear_logps`; without keep_head, and with a
            process group, the gradients of a trained head are computed in the backward, in 4 products.
        loss_type: "nll" or "dft", see `fusedalign.losses.sft_loss`.
        z_loss: >= 0, weight of the squared log-sum-exp of each token.
        reduction: "mean" or "sum" over the tokens that are not ignored.
        num_items: what "mean" divides by, instead of the number of these tokens; for gradient accumulation and data
            parallelism, the number in the whole window. See `fusedalign.losses.sft_loss`.

    Returns:
        A scalar in fp32 (fp64 where hidden is); 0, still connected to the graph, where every token is ignored.
        Differentiable (once) by hidden, weight and bias, as `linear_logps` is.

    Raises:
        ValueError, TypeError: as `linear_logps`, and for an unknown loss_type or reduction.

    Source:
        z-loss: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5. dft: arXiv:2508.05629.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> loss = linear_cross_entropy(hidden, weight, torch.ones(2, 3, dtype=torch.int64))
        >>> round(loss.exp().item())
        50
    """
    weight, bias, group = local_part(weight, bias, process_group)
    with shared_failures(group):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum' (per-token values: linear_logps), got {reduction!r}")
        if reduction == "sum" and num_items is not None:
            raise ValueError(f"num_items must be None with reduction='sum', which divides by nothing, got {num_items}")
        check_nonnegative(z_loss=z_loss)
        num_items = None if num_items is None else check_num_items(num_items)
        head, call = _check(
            hidden,
            weight,
            targets,
            bias,
            impl=impl,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            outputs=frozenset(["lse"] if z_loss else []),
            filter_eps=filter_eps,
            memory=_check_memory(keep_head, workspace=workspace, token_chunk=token_chunk, vocab_chunk=vocab_chunk),
            is_shard=group is not None,
        )
    if group is None and _is_in_graph(head, impl):
        tensors, loss = (hidden, head, targets.to(hidden.device), bias), (loss_type, z_loss, reduction, num_items)
        return graphs.linear_cross_entropy(*tensors, call, *loss)
    with torch.autocast(hidden.device.type, enabled=False):
        problem, _, chosen = _problem(
            hidden, head, targets, bias, call, group, (loss_type, z_loss, reduction, num_items)
        )
        items = len(problem.targets) if num_items is None else num_items
        token_loss = SFTTokenLoss(loss_type, z_loss, reduction, items)
        return _outside_of_graphs(lambda: chosen.token_loss_sum(problem, token_loss))


def _problem(
    hidden: Tensor,
    head: Tensor | SplitHead,
    targets: Tensor,
    bias: Tensor | None,
    call: graphs.Call,
    group: ProcessGroup | None,
    loss: Loss | None = None,
) -> tuple[Problem, TokenIndex, Impl]:
    """The problem of the tokens that are not ignored, and the impl that serves it."""
    tensors = hidden, head, targets, bias, call.spec, call.ignore_index
    if group is not None:
        return parallel_problem(*tensors, impl=call.impl, needs=call.needs, group=group, loss=loss)
    problem, token_index = compact(*tensors)
    return problem, token_index, resolve(call.impl, problem)


def _is_in_graph(head: Tensor | SplitHead, impl: str) -> TypeGuard[Tensor]:
    """Whether `torch.compile` traces this call, and its operators serve it."""
    return torch.compiler.is_compiling() and impl in graphs.NAMES and isinstance(head, Tensor)


def _check(
    hidden: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    bias: Tensor | None,
    *,
    impl: str,
    ignore_index: int,
    is_shard: bool,
    **options: Any,
) -> tuple[Tensor | SplitHead, graphs.Call]:
    """The head and the record of a call, after a check of all arguments; targets are checked later, by `compact`.

    `options` are the fields of `Spec` but operand_dtype.
    """
    parts = weight if isinstance(weight, tuple) else (weight,)
    _check_tensors(hidden, parts, targets, bias, is_shard)
    dtype = operand_dtype(hidden, parts[0])
    spec = Spec(dtype, **options)
    _check_head(spec)
    _check_options(ignore_index, spec.filter_eps)
    check_name(impl)
    head = as_head(parts, dtype)
    needs = NeedsGrad(False, False, False)
    if torch.is_grad_enabled():
        needs = NeedsGrad(hidden.requires_grad, head.requires_grad, bias is not None and bias.requires_grad)
    _check_transforms(impl, targets, any(needs))
    if torch.compiler.is_exporting():
        _check_export(impl, head)
    return head, graphs.Call(spec, ignore_index, impl, needs)


def _outside_of_graphs(function: Callable[[], Any]) -> Any:
    """Call a function that `torch.compile` of the model around it must not trace.

    It would unroll the loops over tiles into one graph and take minutes to compile that. A compiler that is not loaded
    traces nothing, and loading it would cost a second.
    """
    return torch.compiler.disable(function)() if is_compiler_loaded() else function()


def _check_tensors(
    hidden: Tensor, parts: tuple[Tensor, ...], targets: Tensor, bias: Tensor | None, is_shard: bool
) -> None:
    if not parts:
        raise ValueError("weight must have one part at least, got an empty tuple")
    names = ["weight"] if len(parts) == 1 else [f"weight[{i}]" for i in range(len(parts))]
    named = {"hidden": hidden, **dict(zip(names, parts, strict=True)), "targets": targets}
    named |= {} if bias is None else {"bias": bias}
    check_plain(**named)
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if name == "targets" and x.dtype != torch.int64:
            raise TypeError(f"targets must be int64, got {x.dtype}")
        if name != "targets" and x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != hidden.device and not (name == "targets" and x.device.type == "cpu"):
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {x.device}")
        if x.device.type == "meta":
            raise ValueError(f"{name} must hold data, got a meta tensor: load the model's weights onto a device first")
    if hidden.ndim < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape [..., D] with D > 0, got {tuple(hidden.shape)}")
    d, v = hidden.shape[-1], parts[0].shape[:1]
    shapes = [tuple(x.shape) for x in parts]
    if (
        any(x.ndim != 2 or x.shape[:1] != v for x in parts)
        or sum(shape[1] for shape in shapes) != d
        or (v[0] == 0 and not is_shard)
    ):
        if len(parts) == 1:
            raise ValueError(f"weight must have shape [V, {d}] to match hidden, got {shapes[0]}")
        raise ValueError(f"weight must have parts [V, D1], [V, D2], ... of {d} columns to match hidden, got {shapes}")
    if targets.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        raise ValueError(f"targets must have shape {expected} to match hidden, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != v:
        raise ValueError(f"bias must have shape ({v[0]},) to match weight, got {tuple(bias.shape)}")


def _check_head(spec: Spec) -> None:
    scale, softcap, temperature = spec.scale, spec.softcap, spec.temperature
    check_finite(scale=scale, softcap=1.0 if softcap is None else softcap)
    check_positive(temperature=temperature)
    quotients = {"scale / temperature": (scale, temperature)}
    if softcap is not None:
        if not softcap > 0:
            raise ValueError(f"softcap must be > 0 or None, got {softcap}")
        check_positive(softcap=softcap)
        quotients |= {"scale / softcap": (scale, softcap), "temperature / softcap": (temperature, softcap)}
    for name, (dividend, divisor) in quotients.items():
        if not abs(dividend / divisor) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be finite in fp32, got {dividend} / {divisor}")


def _check_options(ignore_index: int, filter_eps: float | None) -> None:
    integer = isinstance(ignore_index, int) or hasattr(ignore_index, "__index__")
    if not integer or isinstance(ignore_index, Tensor):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    if filter_eps is not None:
        check_nonnegative(filter_eps=filter_eps)


def _check_transforms(impl: str, targets: Tensor, needs_gradient: bool) -> None:
    """Refuse `torch.func` transforms over impls with autograd functions of their own: all but "reference"."""
    if torch.compiler.is_compiling():  # it cannot trace this check, and handles transforms itself
        return
    transforms = transform_names()
    if transforms and impl != "reference" and (needs_gradient or set(transforms) != {"Jvp"}):
        raise ValueError(
            f"impl={impl!r} cannot do this: torch.func's transforms cannot look into its backward; impls that can: "
            "reference; or take gradients with torch.autograd, and give hidden leading dimensions instead of vmap"
        )
    if "Vmap" in transforms and is_mapped(targets):
        raise ValueError("targets must be the same in all of vmap, got mapped ones: use leading dimensions instead")


def _check_export(impl: str, head: Tensor | SplitHead) -> None:
    """Refuse what an exported graph, which has no graph breaks, cannot contain."""
    if impl not in graphs.NAMES:
        raise ValueError(f"impl={impl!r} cannot do this: torch.export; impls that can: {', '.join(graphs.NAMES)}")
    if not isinstance(head, Tensor):
        raise ValueError("weight must be one tensor under torch.export, got several parts: merge the adapters first")


def _check_outputs(outputs: Iterable[str]) -> frozenset[str]:
    names = [outputs] if isinstance(outputs, str) else list(outputs)
    for name in names:
        if name not in OUTPUTS:
            raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}, got {name!r}")
    return frozenset(names)


def _check_memory(keep_head: bool, workspace: int | Literal["auto"], **chunks: int | None) -> MemoryOptions:
    if not isinstance(keep_head, bool):
        raise ValueError(f"keep_head must be True or False, got {keep_head!r}")
    limits = {name: (value, None) for name, value in chunks.items()} | {"workspace": (workspace, "auto")}
    for name, (value, default) in limits.items():
        if value != default and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive integer or {default!r}, got {value!r}")
    return MemoryOptions(None if workspace == "auto" else workspace, **chunks, keep_head=keep_head)
