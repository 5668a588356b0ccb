"""The attention of packed batches, as an attention function of transformers.

`install(model)` gives a model an attention function for layers that are passed a layout: a `PackedBatch`, or
`RightPadded` rows, which need no mask. Without a layout the model's original function runs with its mask, so `generate`
and everything else are unchanged.

On CUDA in half precision packed batches use PyTorch's FlashAttention for sequences of uneven length
(`torch.nn.attention.varlen`, or the operator below it), else one `scaled_dot_product_attention` for each segment.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.packing.batch import PackedBatch, RightPadded

Layout = PackedBatch | RightPadded

#: Prefix of these functions' names in transformers' tables; the name of the original function follows.
PREFIX = "fusedalign_"

#: Head sizes that FlashAttention has kernels for.
_LARGEST_HEAD = 256


class LayoutError(ValueError):
    """A model cannot run in a layout; the message has the reason."""


class LayoutMismatchError(LayoutError):
    """A model runs in a layout, but its results differ from those of the padded layout."""


def install(model: Any) -> str:
    """Give a causal LM of transformers the attention function described above.

    Returns:
        The name of the original function, for `model.set_attn_implementation`.

    Raises:
        LayoutError: the model's attention function cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    original: str = model.config._attn_implementation
    if original.startswith(PREFIX):
        return _originals[original]
    name = PREFIX + re.sub(r"\W", "_", original)
    if name not in _originals:
        AttentionInterface.register(name, functools.partial(_attention, original))
        # A name without a mask function would get no mask, even without a layout.
        if original in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        _originals[name] = original
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:
        model.set_attn_implementation(original)
        raise LayoutError(f"{type(model).__name__} takes no attention function")
    if _COMPILES_NAMES:
        model.config._attn_implementation = _Name(name)
    return original


#: Whether torch.compile traces a subclass of str; without it a pickled model keeps the name of our function.
_COMPILES_NAMES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class _Name(str):
    """The name of an attention function that is pickled as the name of the original, for other processes."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (_originals[self],)

    def __deepcopy__(self, memo: Any) -> _Name:
        return self


def installed(model: Any) -> bool:
    """Whether `install` has been called for this model."""
    return str(model.config.get_text_config()._attn_implementation).startswith(PREFIX)


#: Registered name -> name of the original function, which runs without a layout.
_originals: dict[str, str] = {}

#: Shape of a mask that stands for a layout: transformers passes any 4D mask on unchanged, and no layer reads it.
_MARKER = (1, 1, 1, 1)


def marker(device: torch.device) -> Tensor:
    """The attention mask to pass to a model together with a layout."""
    return torch.ones(_MARKER, dtype=torch.bool, device=device)


#: During a proof: (window, whether attention ran by segments) of the layers that have run.
observation: ContextVar[set[tuple[int | None, bool]] | None] = ContextVar("fusedalign_observed_attention", default=None)

#: Largest window during a proof, so that its few tokens exceed a window.
PROOF_WINDOW = 3


def _attention(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers: queries [B, H, T, d], keys and values of fewer heads -> [B, T, H, d]."""
    # A graph cannot read a context variable; proofs run without graphs.
    record = None if torch.compiler.is_compiling() else observation.get()
    window = options.get("sliding_window")
    if record is not None and window is not None:
        options["sliding_window"] = min(window, PROOF_WINDOW)
    if layout is None:
        if isinstance(attention_mask, Tensor) and attention_mask.shape == _MARKER and query.shape[2] > 1:
            # Attention would include tokens of other rows.
            raise LayoutError(f"{type(module).__name__} is not handed the keyword arguments of the model's forward")
        return _function(original, module)(module, query, key, value, attention_mask, **options)
    _refuse(module, attention_mask, options)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    narrowed = options.get("sliding_window")
    if isinstance(layout, RightPadded):
        by_segments, out = False, _causal(query, key, value, scale, narrowed).transpose(1, 2)
    else:
        dtype = _compute_dtype(query, value)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        by_segments = not _has_kernel(query, value)
        out = (_segments if by_segments else _varlen)(query, key, value, layout, scale, narrowed)
    if record is not None:
        record.add((window, by_segments))
    return out.contiguous(), None


def _function(original: str, module: Any) -> Callable[..., tuple[Tensor, Any]]:
    if original == "eager":  # each modeling module has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[original]


def _refuse(module: Any, attention_mask: Any, options: dict[str, Any]) -> None:
    """Raise LayoutError for options of attention other than causality, window and scale."""
    if isinstance(attention_mask, Tensor) and attention_mask.shape != _MARKER:
        raise LayoutError(f"{type(module).__name__} changes the mask of its attention, which packed batches have not")
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise LayoutError(
                f"{type(module).__name__} has {name} in its attention, which packed batches have no way for"
            )
    if options.get("dropout"):
        raise LayoutError(f"{type(module).__name__} has dropout in its attention: set it to 0 in the model's config")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise LayoutError(f"{type(module).__name__} has attention that is not causal")


def _compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """The dtype of autocast if it is enabled: autocast skips `varlen_attn`, and RoPE returns fp32."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype


@functools.cache
def varlen_attention() -> Any:
    """`torch.nn.attention.varlen.varlen_attn`; None before PyTorch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Its parameters: since PyTorch 2.11 window and scale, later `enable_gqa`."""
    return frozenset(inspect.signature(varlen_attention()).parameters)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and is_half and max(query.shape[-1], value.shape[-1]) <= _LARGEST_HEAD


def _varlen(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, scale: float, window: int | None) -> Tensor:
    """[1, H, S, d] -> [1, S, H, d], by FlashAttention's kernels for sequences of uneven length."""
    size = value.shape[-1]
    kernel_size = -(-max(query.shape[-1], size) // 8) * 8  # one size for all three, a multiple of 8
    q, k, v = (_padded_heads(x[0].transpose(0, 1), kernel_size) for x in (query, key, value))
    if batch.shared is not None:
        k, v = _WithPrefixes.apply(k, v, *batch.shared)
    run = _varlen_operator if _has_operator() else _varlen_function
    return run(q, k, v, batch, scale, window)[None, ..., :size]


@functools.cache
def _has_operator() -> bool:
    """Whether PyTorch has the operator below `varlen_attn`, with the arguments that are used here."""
    packet = getattr(torch.ops.aten, "_flash_attention_forward", None)
    names = [] if packet is None else [argument.name for argument in packet.default._schema.arguments]
    return names[:10] == _OPERATOR_ARGUMENTS and {"scale", "window_size_left", "window_size_right"} <= {*names}


_OPERATOR_ARGUMENTS = [
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
]


def _varlen_operator(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, window: int | None) -> Tensor:
    """The operator that `varlen_attn` calls; its backward takes 0.1 ms of CPU time for each layer instead of 1.3."""
    lengths = (batch.query_offsets, batch.key_offsets, batch.max_queries, batch.max_keys)
    options = {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, window is None, False, **options)[0]
    return out


def _varlen_function(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float, window: int | None) -> Tensor:
    """`varlen_attn`, with the parameters that this version of PyTorch has."""
    parameters = _varlen_parameters()
    options: dict[str, Any] = {}
    if "scale" in parameters:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise LayoutError(f"attention with a window needs PyTorch 2.11, this is {torch.__version__}")
    if "enable_gqa" in parameters and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    lengths = (batch.query_offsets, batch.key_offsets, batch.max_queries, batch.max_keys)
    out: Tensor = varlen_attention()(q, k, v, *lengths, **options)
    return out


def _padded_heads(x: Tensor, size: int) -> Tensor:
    """`x` with heads padded to `size` by zeros; without padding `F.pad` would still copy."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


class _WithPrefixes(torch.autograd.Function):
    """Keys and values of packed tokens, [S, H, d], with a copy of its prefix before each segment, [K, H, d].

    The gradient of a token is gathered from its own key, and the gradients of its copies are added to it. The backward
    of `index_select` would add all of them by atomics.
    """

    @staticmethod
    def forward(ctx, key, value, tokens, home, copy, source):
        ctx.save_for_backward(home, copy, source)
        return key.index_select(0, tokens), value.index_select(0, tokens)

    @staticmethod
    def backward(ctx, *grads):
        home, copy, source = ctx.saved_tensors
        totals = []
        for grad in grads:
            total = grad.index_select(0, home)
            totals.append(total.index_add_(0, source, grad.index_select(0, copy)))
        return (*totals, None, None, None, None)


@torch.compiler.disable  # the loop would be unrolled again for each number of segments
def _segments(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, scale: float, window: int | None
) -> Tensor:
    """[1, H, S, d] -> [1, S, H, d], one segment at a time: on any device, in any dtype."""
    outs = []
    for segment in batch.segments:
        own = slice(segment.start, segment.start + segment.length)
        prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
        k, v = key[:, :, own], value[:, :, own]
        if segment.prefix_length:
            k, v = torch.cat([key[:, :, prefix], k], 2), torch.cat([value[:, :, prefix], v], 2)
        outs.append(_causal(query[:, :, own], k, v, scale, window))
    return torch.cat(outs, 2).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last `query.shape[2]` tokens of a sequence to the whole sequence; [B, H, T, d]."""
    queries, keys = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if queries == keys and (window is None or window >= keys):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)
    if window is not None:
        mask = mask.triu_(keys - queries - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
