"""What a model's layers keep in memory, seen by running them over tensors without memory.

Each kind of layer of the real architecture runs forward and backward once, as `FakeTensorMode` runs it: operators give
tensors of the right shapes and dtypes and compute nothing. A mode above it counts the storages that are alive. So what
autograd saves, copies in fp32 included, comes from the model's own code, whatever the architecture. Attention is that
of packed batches on a GPU, by the sizes of FlashAttention's buffers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from fusedalign.plan.shape import Layer, Trace

_ATTENTION = "fusedalign_plan"
#: Rows of padding that FlashAttention's backward adds for each sequence of a batch.
_ROWS_OF_PADDING = 128
#: Tokens of the short forward that shows which layers have attention.
_PROBE_TOKENS = 8


class LayersError(ValueError):
    """A model's layers cannot be run without memory, with the reason."""


def trace(model: Any, tokens: int, *, keys: int | None = None, mixed: bool = True) -> Trace:
    """Bytes that the backbone of a causal LM takes for a packed batch.

    Args:
        model: a causal LM of transformers, or the `PeftModel` around one, on the meta device; which parameters are
            trained, and the dtypes, are read off it. Its layers cannot be used afterwards.
        tokens: of the batch, S.
        keys: of all segments, with a copy of its prefix before each; default: `tokens`.
        mixed: whether autocast to bf16 is on, as TRL's trainers have it.

    Raises:
        LayersError: the model's layers cannot be found, have no attention by transformers' attention functions, or do
            something that needs numbers.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal_lm.base_model
    if backbone is causal_lm:
        raise LayersError(f"expected a model whose base_model is its backbone, got {type(causal_lm).__name__}")
    backbone, name, layers = _layers(backbone)
    all_kinds = [_kind(layer) for layer in layers]
    kinds = list(dict.fromkeys(all_kinds))
    ones = [layers[all_kinds.index(kind)] for kind in kinds]
    order = tuple(kinds.index(kind) for kind in all_kinds)
    setattr(backbone, name, nn.ModuleList(ones))
    try:
        with _quiet(), FakeTensorMode(), _attention_for(causal_lm, keys or tokens) as callers:
            _materialise(backbone)
            backbone.train()
            _check_attention(backbone, ones, callers, mixed)
            return _trace(backbone, ones, order, tokens, mixed)
    except LayersError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise LayersError(
            f"expected layers that run without numbers, got {type(causal_lm).__name__}: {reason}"
        ) from error
    finally:
        setattr(backbone, name, layers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of libraries about how a model is run here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _layers(backbone: nn.Module) -> tuple[Any, str, nn.ModuleList]:
    """The list of decoder layers, the model that it belongs to, and its name there."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        (owner, name, child)
        for owner in backbone.modules()
        for name, child in owner.named_children()
        if isinstance(owner, PreTrainedModel) and isinstance(child, nn.ModuleList) and child
        if isinstance(child[0], GradientCheckpointingLayer)
    ]
    if not found:
        raise LayersError(f"expected decoder layers that can be checkpointed, got none in {type(backbone).__name__}")
    # Of a model that sees, the part that reads has most of the weights.
    return max(found, key=lambda entry: sum(p.numel() for p in entry[2].parameters()))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers have in common that take the same memory."""
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), parameters


def _materialise(module: nn.Module) -> None:
    """Give parameters and buffers on the meta device the CPU as theirs; still without memory, in this mode."""
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None:
                each._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in each._buffers.items():
            if b is not None:
                each._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _check_attention(backbone: Any, kinds: list[nn.Module], callers: set[nn.Module], mixed: bool) -> None:
    """Raises LayersError for a layer whose tokens are mixed by other code, which may loop over all of them."""
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    with torch.no_grad(), _mixed(mixed):
        backbone(input_ids=ids, position_ids=ids, use_cache=False)
    for layer in kinds:
        if callers.isdisjoint(layer.modules()):
            raise LayersError(
                "expected decoder layers with attention by transformers' attention functions, got "
                f"{type(layer).__name__} of {type(backbone).__name__} without it"
            )


def _trace(backbone: Any, kinds: list[nn.Module], order: tuple[int, ...], tokens: int, mixed: bool) -> Trace:
    for layer in kinds:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = functools.partial(_checkpoint, mixed)  # type: ignore[assignment]
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    before: list[int] = []

    def record(layer: nn.Module, args: Any, kwargs: Any) -> None:
        before.append(living.bytes)
        calls.setdefault(layer, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)))

    # The embeddings of a frozen model too, as under gradient checkpointing with adapters.
    embeddings = backbone.get_input_embeddings()
    hooks = [embeddings.register_forward_hook(lambda _, __, x: x.requires_grad_())]
    hooks += [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in kinds]
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with _Living() as living:
        with _mixed(mixed):
            hidden = backbone(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        total = living.bytes
    for hook in hooks:
        hook.remove()
    if len(calls) < len(kinds):
        raise LayersError(f"expected a forward that calls every decoder layer, got {type(backbone).__name__}")
    layers = tuple(_layer(layer, *calls[layer], mixed) for layer in kinds)
    after = total - before[0] - sum(layer.checkpoint for layer in layers)
    return Trace(tokens, hidden.shape[-1], hidden.dtype.itemsize, layers, order, before[0], after)


def _layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mixed: bool) -> Layer:
    """One layer's forward and backward, alone. What it is called with is not counted."""
    first, *rest = args if args else (kwargs.pop("hidden_states"),)
    hidden = first.requires_grad_()
    layer.gradient_checkpointing = False  # type: ignore[assignment]

    def run(x: Tensor) -> Tensor:
        out = layer(x, *rest, **kwargs)
        return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]

    with _Living() as living, torch.no_grad(), _mixed(mixed):
        out = run(hidden)
    forward_peak = living.peak
    del out
    with _Living() as living:
        with _mixed(mixed):
            out = run(hidden)
            inside = living.bytes
        kept, casts = living.bytes, inside - living.bytes
        seed = _Seed.apply(out)
        del out
        seed.backward()
        backward_peak = living.peak
    grads = _forget_gradients(layer)
    hidden.grad = None
    with _Living() as living:
        with _mixed(mixed):
            out = _checkpoint(mixed, run, hidden)
        checkpoint_bytes = living.bytes
        seed = _Seed.apply(out)
        del out
        living.peak = living.bytes
        seed.backward()
        recompute_peak = living.peak
    _forget_gradients(layer)
    return Layer(kept, checkpoint_bytes, forward_peak, backward_peak, recompute_peak, grads, casts)


def _forget_gradients(module: nn.Module) -> int:
    """Set gradients to None; the bytes that they had."""
    total = 0
    for p in module.parameters():
        total += 0 if p.grad is None else p.grad.untyped_storage().nbytes()
        p.grad = None
    return total


class _Seed(torch.autograd.Function):
    """A scalar from which a gradient of the right shape arrives; it keeps nothing, as what stands above would."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.like = x.shape, x.dtype
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- counting


class _Living(TorchDispatchMode):
    """Counts the bytes of storages that operators have made and that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), old)
        return out

    def _add(self, storage: torch.UntypedStorage, old: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in old:  # of another run: an input, or a weight
            return
        self._seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def _checkpoint(mixed: bool, function: Callable[..., Any], *args: Any) -> Any:
    """As transformers checkpoints a layer."""

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _mixed(mixed)  # of the forward, which has it, and of its repetition

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def _mixed(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _CudaLists():
        yield


class _CudaLists(TorchFunctionMode):
    """Autocast on a CPU keeps functions in half precision that on a GPU run, and save, in fp32."""

    WIDE = ("layer_norm", "softmax", "log_softmax", "pow", "cumsum", "rsqrt")
    #: Products that it does not know.
    HALF = ("grouped_mm", "_grouped_mm")

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in self.WIDE:
            args = [_cast(x, torch.bfloat16, torch.float32) for x in args]
        elif name in self.HALF:
            args = [_cast(x, torch.float32, torch.bfloat16) for x in args]
        return func(*args, **(kwargs or {}))


def _cast(x: Any, from_dtype: torch.dtype, to_dtype: torch.dtype) -> Any:
    return x.to(to_dtype) if isinstance(x, Tensor) and x.dtype == from_dtype else x


# ------------------------------------------------------------------------------------------------------------ attention


@contextlib.contextmanager
def _attention_for(model: Any, keys: int) -> Iterator[set[nn.Module]]:
    """Attention of packed batches whose segments have `keys` keys in total; yields the modules that have called it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    callers: set[nn.Module] = set()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        callers.add(module)
        return _Attention.apply(query, key, value, keys), None

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield callers
    finally:
        model.set_attn_implementation(before)


class _Attention(torch.autograd.Function):
    """What FlashAttention's kernels for runs of uneven length take: [1, H, S, d] of queries -> [1, S, H, d].

    Queries and keys that share memory with a longer product (one for all three) keep that.
    """

    @staticmethod
    def forward(ctx, query, key, value, keys):  # type: ignore[no-untyped-def]
        half = torch.bfloat16 if torch.is_autocast_enabled("cpu") else value.dtype
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        query, key, value = (x.to(half) for x in (query, key, value))
        batch, heads, tokens, _ = query.shape
        if keys != tokens:  # with a copy of its prefix before each segment
            key, value = (x.new_empty((batch, x.shape[1], keys, x.shape[3])) for x in (key, value))
        out = query.new_empty((batch, tokens, heads, value.shape[3]))
        lse = query.new_empty((heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, tokens, size = query.shape
        rounded = -(-size // 32) * 32
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        sums = torch.empty((heads, tokens + _ROWS_OF_PADDING), dtype=torch.float32)
        wide = torch.empty((tokens + _ROWS_OF_PADDING, heads, rounded), dtype=torch.float32)
        if key.shape[1] != heads:  # a gradient for each head of queries, which are added up
            expanded = [torch.empty((batch, heads, *x.shape[2:]), dtype=x.dtype) for x in (key, value)]
            del expanded
        del sums, wide
        if key.shape[2] != tokens:
            d_key, d_value = (x.new_empty((batch, x.shape[1], tokens, x.shape[3])) for x in (d_key, d_value))
        q, k, v = ctx.dtypes
        return d_query.to(q), d_key.to(k), d_value.to(v), None
