"""Launches kernels, and compiles all kernels of a path in parallel before their first launch.

Triton compiles a kernel at its first launch, one to three seconds each, one after another. A dry run of a path over
tensors without memory (`device="meta"`) records which kernels it launches. These are compiled by one thread per
processor, and the next launch waits for them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

_log = logging.getLogger("fusedalign")

#: Launches of a dry run: signature -> the kernel and its arguments.
_Launches = dict[Hashable, tuple[Any, tuple, dict[str, Any]]]
_dry_run: ContextVar[_Launches | None] = ContextVar("fusedalign_dry_run", default=None)
#: Elementwise operations with boolean results.
_COMPARISONS = {f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "isnan")}
#: Keys of paths that had their dry run, and signatures that have been submitted for compilation.
_prepared: set[Hashable] = set()
_submitted: set[Hashable] = set()
_compiling: list[Future] = []
_lock = threading.Lock()


def launch(kernel: Any, programs: int, *args: Any, **kwargs: Any) -> None:
    """Run `programs` of a kernel after pending compilations; in a dry run only record the launch."""
    launches = _dry_run.get()
    if launches is not None:
        launches.setdefault(_signature(kernel, args, kwargs), (kernel, args, kwargs))
        return
    if _compiling:
        wait_for_all()
    kernel[(programs,)](*args, **kwargs)


def prepare(key: Hashable, device: torch.device, dry_run: Callable[[], object]) -> None:
    """Start to compile every kernel that `dry_run` launches on `device`, once per `key`.

    A kernel that fails to compile raises at its launch.
    """
    if key in _prepared or _dry_run.get() is not None:
        return
    _prepared.add(key)
    try:
        launches = launches_of(dry_run)
    except Exception as error:  # a PyTorch version may lack a meta kernel
        _log.info("kernels will be compiled when they are launched: their dry run failed (%s)", error)
        return
    with _lock:
        new = {key: launch for key, launch in launches.items() if (device, key) not in _submitted}
        _submitted.update((device, key) for key in new)
        if new:
            _compiling.extend(_compile_all(device, new))


def launches_of(dry_run: Callable[[], object]) -> _Launches:
    """Record the launches of `dry_run`; no kernel runs."""
    launches: _Launches = {}
    token = _dry_run.set(launches)
    try:
        with torch.no_grad(), NoArithmetic():
            dry_run()
    finally:
        _dry_run.reset(token)
    return launches


class NoArithmetic(TorchDispatchMode):
    """Infers the shapes of elementwise, in-place and a few other operations itself.

    For meta tensors PyTorch would load parts of its compiler to infer them, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to skip it, PyTorch would load the compiler."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("out") is not None:
            return kwargs["out"]
        name = function._schema.name
        if name.endswith("_"):
            return args[0]
        if name.endswith("_like"):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=args[0].device)
        if name == "aten::mm":
            return torch.empty((args[0].shape[0], args[1].shape[1]), dtype=args[0].dtype, device=args[0].device)
        if name == "aten::any":
            return torch.empty((), dtype=torch.bool, device=args[0].device)
        if torch.Tag.pointwise in function.tags:
            largest = max((x for x in args if isinstance(x, Tensor)), key=Tensor.numel)
            dtype = torch.bool if name in _COMPARISONS else largest.dtype
            return torch.empty(largest.shape, dtype=dtype, device=largest.device)
        return function(*args, **kwargs)


def _signature(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """The key by which Triton tells compiled variants of a kernel apart."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    return kernel.__name__, tuple(
        (p.name, (type(x), x) if p.is_constexpr else _type(x, p)) for p in kernel.params for x in (values[p.name],)
    )


def _type(x: Any, parameter: Any) -> Hashable:
    """The type of a non-constant argument, with the properties that Triton specialises on."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape)
    if isinstance(x, Tensor):
        return x.dtype, not parameter.do_not_specialize_on_alignment and x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x.bit_length() > 31, not parameter.do_not_specialize and (x == 1, x % 16 == 0)
    return (type(x),)


def _compile_all(device: torch.device, launches: _Launches) -> list[Future]:
    """Compile and load kernels in threads; in a single one with older versions of Triton."""
    with torch.cuda.device(device):
        for kernel, *_ in launches.values():
            kernel.device_caches[torch.cuda.current_device()]  # creates the cache, before other threads use it
    workers = os.cpu_count() if hasattr(triton, "AsyncCompileMode") else 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fusedalign-compile")
    try:
        return [pool.submit(_compile, device, *launch) for launch in launches.values()]
    finally:
        pool.shutdown(wait=False)


def _compile(device: torch.device, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    with torch.cuda.device(device):
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        getattr(compiled, "run", None)  # loads it; some versions of Triton compile a C launcher here


def wait_for_all() -> None:
    """Wait for all pending compilations."""
    with _lock:
        futures = list(_compiling)
    wait(futures)
    with _lock:
        _compiling[:] = [future for future in _compiling if future not in futures]
