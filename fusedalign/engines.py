"""Run a function of a layer's parameters while FSDP2 or DeepSpeed has gathered them.

These engines keep a shard of each parameter on a rank. Hooks around the forward of a layer gather its parameters, and
hooks around its backward gather them again and reduce their gradients. The forward of a head is not used here, so the
head is called with another function in its place: one gather in the forward, as for any layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fusedalign import private
from fusedalign.checks import is_dtensor
from fusedalign.head import active_copy

#: Tensors by name.
Fields = dict[str, Tensor]

Module = TypeVar("Module", bound=nn.Module)


def sharded_layers(layer: nn.Module | None) -> list[nn.Module]:
    """The modules of a layer, itself included, with hooks that gather their parameters; outermost first."""
    if layer is None:
        return []
    used = active_copy(layer)
    wrapper = [layer] if used is not layer and _is_sharded(layer) else []
    # The forward of LoRA's first factor is called as it is.
    modules = [module for name, module in used.named_modules() if "lora_A" not in name.split(".")]
    return wrapper + [module for module in modules if _is_sharded(module)]


def call_gathered(layers: list[nn.Module], function: Callable[[Tensor], Fields], hidden: Tensor) -> Fields:
    """`function(hidden)`, called while the parameters of `layers` are gathered.

    Args:
        layers: of `sharded_layers`, all of one layer.
        function: reads the parameters from the modules when it is called. Gradients reach them through its results.
        hidden: the input of the layer; engines may cast it to the dtype of mixed precision.
    """
    fields: Fields = {}

    def within(remaining: list[nn.Module], hidden: Tensor) -> Fields | None:
        if remaining:
            return _call(remaining[0], lambda x: within(remaining[1:], x), hidden)
        is_trained = _is_trained(layers)
        with contextlib.nullcontext() if is_trained else _saved_as_views(layers):
            # FSDP2 warns of views, on which its hooks can be lost.
            fields.update({name: x if x._base is None else x.clone() for name, x in function(hidden).items()})
        # An engine that is shown no result gathers nothing in the backward.
        return fields if is_trained else None

    within(layers, hidden)
    return fields


@contextlib.contextmanager
def gathered(layer: nn.Module | None) -> Iterator[None]:
    """A context with the parameters of a layer that ZeRO-3 has partitioned, for reading; all ranks must enter it."""
    with gathered_tensors([] if layer is None else layer.parameters()):
        yield


@contextlib.contextmanager
def gathered_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context with those of some tensors that ZeRO-3 has partitioned, for reading; all ranks must enter it."""
    partitioned = [x for x in tensors if is_partitioned(x)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def is_partitioned(x: Tensor) -> bool:
    """Whether `x` is a parameter that ZeRO-3 has partitioned."""
    return hasattr(x, "ds_id")


def deep_copy(model: Module) -> Module:
    """A copy of a model; what ZeRO-3 has partitioned is gathered and partitioned again, one parameter at a time."""
    copies: dict[int, Any] = {}
    for x in model.parameters():
        if is_partitioned(x):
            with gathered_tensors([x]):
                copies[id(x)] = nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad)
            partition: Any = x
            partition.convert_to_zero_parameters([copies[id(x)]])
    return copy.deepcopy(model, copies)


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule) or any(map(is_partitioned, module.parameters(recurse=False)))


def _call(layer: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call a layer with `function` in place of its forward."""
    if isinstance(layer, FSDPModule) and private.fsdp_unit(layer) == (layer,) and not _is_trained([layer]):
        layer.unshard()  # FSDP2 would gather a layer that has run in its hooks again in the backward
        fields = function(hidden)
        layer.reshard()
        return fields
    original = vars(layer).get("forward")

    def restore() -> None:
        vars(layer).pop("forward", None)
        if original is not None:
            layer.forward = original

    def forward(hidden: Tensor) -> Any:
        restore()
        return function(hidden)

    layer.forward = forward
    try:
        return layer(hidden)
    finally:
        restore()  # also where a hook has raised


def _is_trained(layers: list[nn.Module]) -> bool:
    """Whether a parameter that is gathered together with those of `layers` is trained."""
    units = [module for layer in layers for module in private.fsdp_unit(layer)]
    return any(x.requires_grad for module in units for x in module.parameters())


@contextlib.contextmanager
def _gathered_again(layers: list[nn.Module]) -> Iterator[None]:
    """A context with the parameters of `layers`, which may have been freed; all ranks must enter it."""
    freed = [x for x in layers if isinstance(x, FSDPModule) and any(map(is_dtensor, x.parameters(recurse=False)))]
    for layer in freed:
        layer.unshard()
    with gathered_tensors(x for layer in layers for x in layer.parameters()):
        yield
    for layer in freed:
        layer.reshard()


class _ParameterView(NamedTuple):
    """A view of a parameter that is saved for a backward without the memory of that parameter."""

    layers: list[nn.Module]
    owner: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """in elements"""

    def copy(self) -> Tensor:
        """The view's values, from a parameter that is gathered for the time of the copy."""
        with _gathered_again(self.layers):
            values = self.owner.get_parameter(self.name).detach().clone()
        return values.as_strided(self.size, self.stride, self.offset)


@contextlib.contextmanager
def _saved_as_views(layers: list[nn.Module]) -> Iterator[None]:
    """A context in which autograd saves no memory of the parameters of `layers`, which are gathered and frozen.

    A backward that uses them gathers them again. That of log-probabilities does not use them; that of their entropy,
    which is usually only logged, does.
    """
    named = [(layer, name, x) for layer in layers for name, x in layer.named_parameters()]

    def pack(x: Tensor) -> Tensor | _ParameterView:
        for layer, name, parameter in named:
            start = x.data_ptr() - parameter.data_ptr()
            if x.numel() and x.dtype == parameter.dtype and 0 <= start < parameter.nbytes:
                return _ParameterView(layers, layer, name, x.size(), x.stride(), start // x.itemsize)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x if isinstance(x, Tensor) else x.copy()):
        yield
