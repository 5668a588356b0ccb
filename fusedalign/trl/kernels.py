"""Liger Kernel's RMSNorm, RoPE and MLP in the models of a trainer: Liger's own public functions, without its losses.

Liger binds its forwards to the layers of a model and replaces names in transformers' module of the model's classes
(`modeling_qwen3.apply_rotary_pos_emb`), which all models of that architecture in the process share.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedalign.commandline import one_line
from fusedalign.impls import adapter

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")

#: Part of the name of Liger's class -> the activation that it computes.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SwiGLU": F.silu,
    "BlockSparseTop2MLP": F.silu,
    "Experts": F.silu,
    "GEGLU": functools.partial(F.gelu, approximate="tanh"),
    "ReLUSquared": lambda x: F.relu(x).square(),
}


def _load() -> Mapping[str, Callable[..., None]]:
    """Model type -> Liger's function that puts its kernels into a model of that type."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


_find = adapter.lazy_library("liger_kernel", "pip install 'liger-kernel>=0.8.5'", _load)


def check_liger_kernels(wanted: Any, name: str, args: Any) -> None:
    """Refuse settings of the trainer `name` under which no model can have Liger's kernels.

    Raises:
        TypeError: `wanted` is no bool.
        ValueError: no device that runs Triton, no Liger Kernel, or `use_liger_kernel` too.
    """
    if not isinstance(wanted, bool):
        raise TypeError(f"liger_kernels must be True or False, got {wanted!r}")
    if not wanted:
        return
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            f"{name} needs use_liger_kernel=False with liger_kernels=True, got both: leave out use_liger_kernel, "
            "which changes the layers of the policy alone"
        )
    device = torch.accelerator.current_accelerator(check_available=True) if args is None else args.device
    if getattr(device, "type", "cpu") in ("cpu", "mps") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"liger_kernels=True needs a GPU, where Liger's Triton kernels run, got the device {device or 'cpu'}: "
            "leave it out (for tests TRITON_INTERPRET=1 runs them on a CPU)"
        )
    if (reason := _find().reason) is not None:
        raise ValueError(f"liger_kernels=True needs Liger Kernel, got none: {reason}")


def add_liger_kernels(model: Any) -> None:
    """Put Liger's kernels into a model; the head, the loss and `model.forward` stay as they are.

    Args:
        model: of transformers, its layers with adapters or not, but not a `PeftModel` around it.

    Raises:
        ValueError: Liger has no kernels for the architecture, they do not fit this model, or it is on several devices.
    """
    kind, functions = model.config.model_type, _find().library
    known = any(cls.__module__.startswith("transformers.models.") for cls in type(model).__mro__)  # else remote code
    if not known or kind not in functions:
        raise ValueError(
            f"liger_kernels=True needs an architecture that Liger Kernel has kernels for, got {type(model).__name__} "
            f"with model_type {kind!r}: leave it out; there are {', '.join(sorted(functions))}"
        )
    devices = dict.fromkeys(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:  # Liger's forwards would replace those that move tensors between devices
        raise ValueError(
            f"liger_kernels=True needs a model on one device, got one on {', '.join(map(str, devices))}: "
            "pass device_map=None in model_init_kwargs, or leave liger_kernels out"
        )
    before = dict(_activations(model))
    accepted = inspect.signature(functions[kind]).parameters
    try:
        functions[kind](model=model, **{loss: False for loss in _LOSSES if loss in accepted})
    except Exception as error:  # of any type, with a version of transformers that Liger does not know
        raise ValueError(
            f"liger_kernels=True needs a model that Liger Kernel can change, got {type(model).__name__} and "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    if not liger_parts(model):
        raise ValueError(f"liger_kernels=True needs a model that Liger Kernel changes, got {type(model).__name__}")
    _check_activations(model, before)


def liger_parts(model: nn.Module) -> list[str]:
    """Names of Liger's functions and classes in a model's layers and in the modules of their classes."""
    layers = list(model.modules())
    objects: list[Any] = [x for layer in layers for x in (vars(layer).get("forward"), type(layer))]
    for name in {type(layer).__module__ for layer in layers}:
        if name.startswith("transformers."):
            objects += vars(sys.modules[name]).values()
    names = {f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', type(x).__qualname__)}" for x in objects}
    return sorted(name for name in names if name.startswith("liger_kernel."))


def _activations(model: nn.Module) -> list[tuple[str, Any]]:
    """The name and activation of each layer that has one."""
    layers = ((name, vars(layer).get("_modules", {}) | vars(layer)) for name, layer in model.named_modules())
    pairs = ((name, parts.get("act_fn", parts.get("activation_fn"))) for name, parts in layers)
    return [(name, activation) for name, activation in pairs if callable(activation)]


def _check_activations(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raise ValueError if a layer's activation is not the one that Liger computes; Liger does not check."""
    x = torch.linspace(-6, 6, 49, device="cpu")
    after = dict(_activations(model))
    for name, activation in before.items():
        replaced = after.get(name) is not activation
        forward = vars(model.get_submodule(name)).get("forward")
        liger = type(after.get(name)).__name__ if replaced else getattr(forward, "__qualname__", "")
        computed = next((f for part, f in _ACTIVATIONS.items() if part in liger), None) if "Liger" in liger else None
        if computed is not None and not torch.allclose(activation(x), computed(x), rtol=0, atol=1e-5):
            raise ValueError(
                f"liger_kernels=True needs the activation of {liger.partition('.')[0]}, which Liger Kernel computes in "
                f"{type(model).__name__}, got {getattr(activation, '__name__', type(activation).__name__)} in {name}: "
                "leave it out"
            )
