"""Launches kernels, and compiles them before their first launch: all that a path needs, side by side.

Triton compiles a kernel where it is first launched, one to three seconds each, one after another. A dry run of a path
over tensors without memory (`device="meta"`) tells which kernels it launches. These are compiled by as many threads as
there are processors, and the next launch waits for them.
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

#: Launches of a dry run: what a kernel is compiled for -> the kernel and its arguments.
_Launches = dict[Hashable, tuple[Any, tuple, dict[str, Any]]]
_dry_run: ContextVar[_Launches | None] = ContextVar("fusedalign_dry_run", default=None)
#: Elementwise operations with results of truth.
_TESTS = {f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "isnan")}
#: What needs no second dry run, and what no second compilation.
_prepared: set[Hashable] = set()
_submitted: set[Hashable] = set()
_compiling: list[Future] = []
_lock = threading.Lock()


def launch(kernel: Any, programs: int, *args: Any, **kwargs: Any) -> None:
    """Run `programs` of a kernel, once all that is being compiled is there; in a dry run only take note of it."""
    launches = _dry_run.get()
    if launches is not None:
        launches.setdefault(_signature(kernel, args, kwargs), (kernel, args, kwargs))
        return
    if _compiling:
        wait_for_all()
    kernel[(programs,)](*args, **kwargs)


def prepare(key: Hashable, device: torch.device, dry_run: Callable[[], object]) -> None:
    """Start to compile every kernel that `dry_run` launches on `device`, where nothing with this `key` was before.

    What fails to compile raises where it is launched.
    """
    if key in _prepared or _dry_run.get() is not None:
        return
    _prepared.add(key)
    try:
        launches = launches_of(dry_run)
    except Exception as error:  # of a PyTorch that does not know one of the operations without memory
        _log.info("kernels will be compiled when they are launched: their dry run failed (%s)", error)
        return
    with _lock:
        new = {key: launch for key, launch in launches.items() if (device, key) not in _submitted}
        _submitted.update((device, key) for key in new)
        if new:
            _compiling.extend(_compile_all(device, new))


def launches_of(dry_run: Callable[[], object]) -> _Launches:
    """The launches of `dry_run`, of which none takes place."""
    launches: _Launches = {}
    token = _dry_run.set(launches)
    try:
        with torch.no_grad(), NoArithmetic():
            dry_run()
    finally:
        _dry_run.reset(token)
    return launches


class NoArithmetic(TorchDispatchMode):
    """Gives results of elementwise and in-place operations, and a few others, their shape without asking PyTorch.

    For tensors without memory PyTorch loads parts of its compiler to tell, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch would load the compiler in order to keep it out."""
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
            dtype = torch.bool if name in _TESTS else largest.dtype
            return torch.empty(largest.shape, dtype=dtype, device=largest.device)
        return function(*args, **kwargs)


def _signature(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """What Triton compiles a kernel for."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    return kernel.__name__, tuple(
        (p.name, _constant(given[p.name]) if p.is_constexpr else _type(given[p.name], p)) for p in kernel.params
    )


def _constant(x: Any) -> tuple:
    return type(x), x


def _type(x: Any, parameter: Any) -> Hashable:
    """Of an argument that is no constant, with what Triton's specialisation looks at."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape)
    if isinstance(x, Tensor):
        return x.dtype, not parameter.do_not_specialize_on_alignment and x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x.bit_length() > 31, not parameter.do_not_specialize and (x == 1, x % 16 == 0)
    return (type(x),)


def _compile_all(device: torch.device, launches: _Launches) -> list[Future]:
    """Compile and load kernels in threads; older Tritons, which know nothing of threads, in one."""
    with torch.cuda.device(device):
        for kernel, *_ in launches.values():
            kernel.device_caches[torch.cuda.current_device()]  # made where it is missing, and by one thread alone
    workers = os.cpu_count() if hasattr(triton, "AsyncCompileMode") else 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fusedalign-compile")
    try:
        return [pool.submit(_compile, device, *launch) for launch in launches.values()]
    finally:
        pool.shutdown(wait=False)


def _compile(device: torch.device, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    with torch.cuda.device(device):
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        getattr(compiled, "run", None)  # loads it, for which some Tritons compile a launcher in C


def wait_for_all() -> None:
    """For all that is being compiled."""
    with _lock:
        futures = list(_compiling)
    wait(futures)
    with _lock:
        _compiling[:] = [future for future in _compiling if future not in futures]
