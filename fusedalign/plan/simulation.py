"""Stand-ins for a GPU while layers run over tensors without memory: counted storages, its autocast, its attention."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = "fusedalign_plan"
#: Rows of padding that FlashAttention's backward adds for each sequence of a batch.
_PADDING = 128


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the live storages that operators have allocated, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), inputs)
        return out

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in inputs:  # counted already, or an input such as a weight
            return
        self._seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


class GradientSeed(torch.autograd.Function):
    """Returns a scalar; its backward allocates a gradient of the input's shape and saves nothing."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        """[...] -> []."""
        ctx.spec = x.shape, x.dtype
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """[] -> [...]."""
        shape, dtype = ctx.spec
        return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def gpu_autocast(enabled: bool) -> Iterator[None]:
    """Autocast to bf16 with the casts of CUDA, on fake CPU tensors."""
    if not enabled:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _CudaCasts():
        yield


class _CudaCasts(TorchFunctionMode):
    """Casts where autocast on CUDA differs from that on a CPU."""

    #: On CUDA these run, and save their inputs, in fp32.
    WIDE = ("layer_norm", "softmax", "log_softmax", "pow", "cumsum", "rsqrt")
    #: Products that CPU autocast does not cast to bf16.
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


@contextlib.contextmanager
def packed_attention(model: Any, keys: int) -> Iterator[set[nn.Module]]:
    """Make a model use attention over packed segments with `keys` keys in total; yields the modules that call it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    callers: set[nn.Module] = set()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        callers.add(module)
        return _FlashAttention.apply(query, key, value, keys), None

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    implementation = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield callers
    finally:
        model.set_attn_implementation(implementation)


class _FlashAttention(torch.autograd.Function):
    """Allocates the buffers of FlashAttention's variable-length kernels: queries [1, H, S, d] -> [1, S, H, d].

    Queries and keys that are views of one fused projection keep all of it alive.
    """

    @staticmethod
    def forward(ctx, query, key, value, keys):  # type: ignore[no-untyped-def]
        half = torch.bfloat16 if torch.is_autocast_enabled("cpu") else value.dtype
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        query, key, value = (x.to(half) for x in (query, key, value))
        batch, heads, tokens, _ = query.shape
        if keys != tokens:  # each segment is preceded by a copy of its prefix
            key, value = (x.new_empty((batch, x.shape[1], keys, x.shape[3])) for x in (key, value))
        out = query.new_empty((batch, tokens, heads, value.shape[3]))
        lse = query.new_empty((heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, tokens, size = query.shape
        padded_size = -(-size // 32) * 32
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        row_sums = torch.empty((heads, tokens + _PADDING), dtype=torch.float32)
        d_query_sums = torch.empty((tokens + _PADDING, heads, padded_size), dtype=torch.float32)
        if key.shape[1] != heads:  # one gradient per query head, which are then summed
            expanded = [torch.empty((batch, heads, *x.shape[2:]), dtype=x.dtype) for x in (key, value)]
            del expanded
        del row_sums, d_query_sums
        if key.shape[2] != tokens:
            d_key, d_value = (x.new_empty((batch, x.shape[1], tokens, x.shape[3])) for x in (d_key, d_value))
        q, k, v = ctx.dtypes
        return d_query.to(q), d_key.to(k), d_value.to(v), None
