"""What every public function asks of its arguments: numbers that fp32 can hold, and tensors that are plain memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedalign.private import is_fake, is_transformed

_LIMITS = torch.finfo(torch.float32)  # nothing is computed in less, and its range is enough for fp64 too
_PLAIN = (Tensor, torch.nn.Parameter)


def check_finite(**numbers: Any) -> None:
    """For each: a number of Python, of numpy or of a graph, finite in fp32.

    Raises:
        TypeError: anything else, a bool too, and tensors: a gradient by them would be lost.
        ValueError: NaN, infinite, or beyond the range of fp32.
    """
    for name, value in numbers.items():
        _check_is_number(name, value)
        if not -_LIMITS.max <= value <= _LIMITS.max:
            beyond = f" in fp32 (at most {_LIMITS.max:.1e})" if -math.inf < value < math.inf else ""
            raise ValueError(f"{name} must be finite{beyond}, got {value}")


def check_positive(**numbers: Any) -> None:
    """As `check_finite`, and > 0 by so much that 1 / number is finite in fp32 too."""
    for name, value in numbers.items():
        _check_is_number(name, value)
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
        check_finite(**{name: value})
        if not value >= _LIMITS.tiny:
            raise ValueError(f"{name} must be at least {_LIMITS.tiny:.1e}, so that fp32 holds 1 / {name}, got {value}")


def check_nonnegative(**numbers: Any) -> None:
    """As `check_finite`, and >= 0."""
    for name, value in numbers.items():
        _check_is_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
        check_finite(**{name: value})


def check_share(**numbers: Any) -> None:
    """Those in [0, 1]; else as `check_finite`."""
    for name, value in numbers.items():
        _check_is_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_is_number(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    # Arrays, unlike numbers, have elements to set, also those without dimensions.
    several = isinstance(value, Tensor) or hasattr(value, "__setitem__")
    if several or isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


# -------------------------------------------------------------------------------------------------------------- tensors


def values_within(name: str, x: Tensor, least: float = -_LIMITS.max) -> Tensor:
    """Floating-point `x`, after a check that no value is NaN, infinite or below `least`.

    On the CPU such a value raises. On other devices, where a look at values would wait for the device, and in graphs it
    becomes NaN, so that no plausible number is made of it.

    Raises:
        ValueError: see above.
    """
    fits = (x >= least) & (x <= _LIMITS.max)  # neither holds for NaN
    if not has_values(x):
        return x.where(fits, math.nan)
    if not fits.all():
        bound = "" if least == -_LIMITS.max else f" and >= {least:g}"
        raise ValueError(f"{name} must be finite{bound}, got {x[~fits].flatten()[0].item()}")
    return x


def has_values(x: Tensor) -> bool:
    """Whether a look at the values of `x` waits for no device and breaks no graph or transform."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in _PLAIN:
        return False
    return not is_transformed(x)


def check_plain(**tensors: Any) -> None:
    """Refuse tensors that are more, or less, than memory with strides; check nothing else.

    Our kernels and backwards use the memory itself. A DTensor's memory is this rank's shard, so gradients would be
    those of a shard, or unwritten memory.

    Raises:
        TypeError: a DTensor, a nested, sparse or masked tensor, or any other that brings its own arithmetic.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        what = _more_than_memory(name, x)
        if what is not None:
            raise TypeError(f"{name} must be a plain tensor, got {what}")


def _more_than_memory(name: str, x: Tensor) -> str | None:
    """What `x` is and what to pass instead, None where it is memory with strides."""
    if x.is_nested:
        return f"a nested tensor: pass torch.nested.to_padded_tensor({name}, 0.0), with padding masked"
    if x.layout != torch.strided:
        return f"one with layout {x.layout}: pass {name}.to_dense()"
    if is_ordinary(x) or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return None
    kind = type(x).__name__
    if is_dtensor(x):
        gather = f"{name}.full_tensor"
        return (
            f"a {kind} with placements {tuple(getattr(x, 'placements', ()))}: pass {gather}() where all ranks hold the "
            f"same tokens, {gather}(grad_placements=[Partial()]) where each holds its own, or attach() to TRL's "
            "trainer under FSDP2"
        )
    return f"a {kind}, which brings its own arithmetic: pass the tensor that it stands for"


def is_dtensor(x: Any) -> bool:
    """Whether `x` is sharded or replicated over a device mesh."""
    return isinstance(x, Tensor) and hasattr(x, "placements") and hasattr(x, "device_mesh")


def is_row_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor with some of its rows on each rank of a mesh of one dimension, in the ranks' order."""
    if not is_dtensor(x) or x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0):
        return False
    ranks = x.device_mesh.mesh.tolist()
    return bool(ranks == sorted(ranks))


def is_ordinary(x: Tensor) -> bool:
    """Whether `x` is of PyTorch's own two classes, or a stand-in for one of them while a graph is traced."""
    return type(x) in _PLAIN or is_fake(x)
