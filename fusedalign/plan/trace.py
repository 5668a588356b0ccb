"""The memory of a model's layers, observed by running them over tensors without memory.

Each kind of layer of the real architecture runs forward and backward once under `FakeTensorMode`, where operators
return tensors of the right shapes and dtypes and compute nothing. A mode on top of it counts the live storages. So the
tensors that autograd saves, fp32 copies included, come from the model's own code, for any architecture. Attention
allocates the buffers of FlashAttention on packed batches.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fusedalign.plan.shape import Layer, Trace
from fusedalign.plan.simulation import GradientSeed, LiveStorages, gpu_autocast, packed_attention

#: Tokens of the short forward that finds the layers with attention.
_PROBE_TOKENS = 8


class LayersError(ValueError):
    """The layers of a model cannot run without memory; the message says why."""


def trace(model: Any, tokens: int, *, keys: int | None = None, mixed: bool = True) -> Trace:
    """Measure the memory of the backbone of a causal LM for a packed batch.

    Args:
        model: a causal LM of transformers, or the `PeftModel` around one, on the meta device, with the dtypes and
            `requires_grad` flags of the training. Its layers cannot be used afterwards.
        tokens: of the batch, S.
        keys: of attention: those of all segments, each with a copy of its prefix; default: `tokens`.
        mixed: whether to run under autocast to bf16, as TRL's trainers do.

    Raises:
        LayersError: the layers are not found, do not use transformers' attention functions, or need numbers.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal_lm.base_model
    if backbone is causal_lm:
        raise LayersError(f"expected a model whose base_model is its backbone, got {type(causal_lm).__name__}")
    backbone, name, layers = _decoder_layers(backbone)
    layer_kinds = [_kind(layer) for layer in layers]
    kinds = list(dict.fromkeys(layer_kinds))
    samples = [layers[layer_kinds.index(kind)] for kind in kinds]
    order = tuple(kinds.index(kind) for kind in layer_kinds)
    setattr(backbone, name, nn.ModuleList(samples))
    try:
        with _quiet(), FakeTensorMode(), packed_attention(causal_lm, keys or tokens) as callers:
            _materialise(backbone)
            backbone.train()
            _check_attention(backbone, samples, callers, mixed)
            return _trace(backbone, samples, order, tokens, mixed)
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
    """Suppress the libraries' log messages about this unusual use of a model."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def _decoder_layers(backbone: nn.Module) -> tuple[Any, str, nn.ModuleList]:
    """The module that owns the list of decoder layers, the name of the list, and the list."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    candidates = [
        (owner, name, child)
        for owner in backbone.modules()
        for name, child in owner.named_children()
        if isinstance(owner, PreTrainedModel) and isinstance(child, nn.ModuleList) and child
        if isinstance(child[0], GradientCheckpointingLayer)
    ]
    if not candidates:
        raise LayersError(f"expected decoder layers that can be checkpointed, got none in {type(backbone).__name__}")
    # In a vision-language model the language model has most of the weights.
    return max(candidates, key=lambda candidate: sum(p.numel() for p in candidate[2].parameters()))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """A key that is equal for layers with the same memory."""
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), parameters


def _materialise(module: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake CPU tensors."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                child._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, b in child._buffers.items():
            if b is not None:
                child._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _check_attention(backbone: Any, samples: list[nn.Module], callers: set[nn.Module], mixed: bool) -> None:
    """Raise LayersError for a layer without attention; other sequence mixers may loop over all tokens."""
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    with torch.no_grad(), gpu_autocast(mixed):
        backbone(input_ids=ids, position_ids=ids, use_cache=False)
    for layer in samples:
        if callers.isdisjoint(layer.modules()):
            raise LayersError(
                "expected decoder layers with attention by transformers' attention functions, got "
                f"{type(layer).__name__} of {type(backbone).__name__} without it"
            )


def _trace(backbone: Any, samples: list[nn.Module], order: tuple[int, ...], tokens: int, mixed: bool) -> Trace:
    """Run the backbone with one layer of each kind, then each of these layers by itself."""
    for layer in samples:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = functools.partial(_checkpoint, mixed)  # type: ignore[assignment]
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    before: list[int] = []

    def record(layer: nn.Module, args: Any, kwargs: Any) -> None:
        before.append(live.bytes)
        calls.setdefault(layer, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)))

    # Also if the embeddings are frozen, as transformers does for gradient checkpointing with adapters.
    embeddings = backbone.get_input_embeddings()
    hooks = [embeddings.register_forward_hook(lambda _, __, x: x.requires_grad_())]
    hooks += [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in samples]
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with LiveStorages() as live:
        with gpu_autocast(mixed):
            hidden = backbone(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        total = live.bytes
    for hook in hooks:
        hook.remove()
    if len(calls) < len(samples):
        raise LayersError(f"expected a forward that calls every decoder layer, got {type(backbone).__name__}")
    layers = tuple(_measure_layer(layer, *calls[layer], mixed) for layer in samples)
    after = total - before[0] - sum(layer.checkpoint for layer in layers)
    return Trace(tokens, hidden.shape[-1], hidden.dtype.itemsize, layers, order, before[0], after)


def _measure_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mixed: bool) -> Layer:
    """Run forward and backward of one layer by itself; its inputs are not counted."""
    first, *other_args = args if args else (kwargs.pop("hidden_states"),)
    hidden = first.requires_grad_()
    layer.gradient_checkpointing = False  # type: ignore[assignment]

    def run(x: Tensor) -> Tensor:
        out = layer(x, *other_args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]

    with LiveStorages() as live, torch.no_grad(), gpu_autocast(mixed):
        out = run(hidden)
    forward_peak = live.peak
    del out
    with LiveStorages() as live:
        with gpu_autocast(mixed):
            out = run(hidden)
            with_casts = live.bytes
        kept, casts = live.bytes, with_casts - live.bytes
        seed = GradientSeed.apply(out)
        del out
        seed.backward()
        backward_peak = live.peak
    grads = _drop_gradients(layer)
    hidden.grad = None
    with LiveStorages() as live:
        with gpu_autocast(mixed):
            out = _checkpoint(mixed, run, hidden)
        checkpoint_bytes = live.bytes
        seed = GradientSeed.apply(out)
        del out
        live.peak = live.bytes
        seed.backward()
        recompute_peak = live.peak
    _drop_gradients(layer)
    return Layer(kept, checkpoint_bytes, forward_peak, backward_peak, recompute_peak, grads, casts)


def _drop_gradients(module: nn.Module) -> int:
    """Set all gradients to None; returns their bytes."""
    total = 0
    for p in module.parameters():
        total += 0 if p.grad is None else p.grad.untyped_storage().nbytes()
        p.grad = None
    return total


def _checkpoint(mixed: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer as transformers does."""

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), gpu_autocast(mixed)  # for the forward, already under autocast, and recompute

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
