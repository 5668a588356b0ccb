"""The table of impls, and the one place that chooses among them.

Each module has an `IMPL`, an object of the class `base.Impl`. It is imported when it is first considered, so that a
missing or broken package affects only the impl that needs it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Literal, NamedTuple

import torch

from fusedalign.impls.base import Impl
from fusedalign.problem import OUTPUTS, Problem

_log = logging.getLogger("fusedalign")


class Verdict(NamedTuple):
    """One row of `explain()`."""

    impl: str
    about: str
    reason: str | None
    """None: can serve. Else why it cannot."""
    auto: bool
    """Whether `impl="auto"` considers it."""
    caveat: str | None = None
    """None: exactly, as far as is known. Else what is not exact, for which "auto" passes it by."""
    package: str | None = None
    """The distribution that it needs beside torch."""


class Reach(NamedTuple):
    """What an impl serves on this machine, found by asking its `supports` and `caveat` about small problems."""

    devices: list[str]
    dtypes: list[str]
    exact: list[str]
    """those of `dtypes` that have no caveat"""
    outputs: list[str]
    """beside logps, in any of these dtypes"""
    head: list[str]
    """what it knows of bias, softcap and filter_eps"""
    caveats: list[str]
    """why some of `dtypes` are not exact"""


class Entry(NamedTuple):
    """Where an impl is, and what it is, as far as that must be known before it is imported."""

    module: str
    """has the object `IMPL`"""
    kind: Literal["own", "adapter", "oracle"]
    """own: makes its own gradients (`autograd.OwnGradients`), also in compiled graphs. adapter: calls another library.
    oracle: serves by name alone, never as "auto" """


#: All impls, in the order in which "auto" tries them.
MODULES = {
    "triton": Entry("fusedalign.impls.triton", "own"),
    "liger": Entry("fusedalign.impls.liger", "adapter"),
    "cce": Entry("fusedalign.impls.cce", "adapter"),
    "pytorch": Entry("fusedalign.impls.pytorch", "own"),
    "reference": Entry("fusedalign.impls.reference", "oracle"),
}


def impl_names(*kinds: str) -> tuple[str, ...]:
    """The names of the impls of these kinds, in their order."""
    return tuple(name for name, entry in MODULES.items() if entry.kind in kinds)


def _considered() -> tuple[str, ...]:
    """What "auto" tries."""
    return impl_names("own", "adapter")


def check_name(name: str) -> None:
    """Raises ValueError, listing the valid names, unless `name` is "auto" or an impl's."""
    if name not in ("auto", *MODULES):
        raise ValueError(f"impl must be one of {', '.join(['auto', *MODULES])}, got {name!r}")


def explain(problem: Problem | None = None) -> list[Verdict]:
    """Every impl and why it can or cannot run here or, with a problem, serve that problem and how exactly."""
    return [_judge(name, problem) for name in MODULES]


def reach(name: str) -> Reach:
    """What the impl serves on this machine."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    served = {}
    for device in devices:
        verdicts = {d: _judge(name, _probe(device, d)) for d in _DTYPES}
        if good := {d: v for d, v in verdicts.items() if v.reason is None}:
            served[device] = good

    def any_dtype(**options: Any) -> bool:
        return any(_judge(name, _probe(x, d, **options)).reason is None for x in served for d in served[x])

    best = next(iter(served.values()), {})
    heads: dict[str, Any] = {"bias": {"bias": True}, "softcap": {"softcap": 1.0}, "filter_eps": {"filter_eps": 1e-4}}
    return Reach(
        list(served),
        [_name(d) for d in best],
        [_name(d) for d, v in best.items() if v.caveat is None],
        [output for output in OUTPUTS if any_dtype(outputs=frozenset([output]))],
        [what for what, options in heads.items() if any_dtype(**options)],
        list(dict.fromkeys(v.caveat for v in best.values() if v.caveat is not None)),
    )


def auto_choices() -> dict[str, list[str]]:
    """The impls that "auto" takes on this machine's GPU, else on its CPU, each with the dtypes that it takes it for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: dict[str, list[str]] = {}
    for dtype in _DTYPES:
        verdicts = (_judge(name, _probe(device, dtype), caveat_first=True) for name in _considered())
        fit = (v.impl for v in verdicts if v.auto and v.reason is None and v.caveat is None)
        chosen.setdefault(next(fit, "none"), []).append(_name(dtype))
    return chosen


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _probe(device: str, dtype: torch.dtype, *, bias: bool = False, **options: Any) -> Problem:
    """A problem of one token, whose head takes a gradient."""
    one = torch.zeros(1, 1, device=device, dtype=dtype).requires_grad_()
    targets = torch.zeros(1, device=device, dtype=torch.int64)
    return Problem(one, one, targets, dtype, bias=one[0] if bias else None, **options)


def resolve(name: str, problem: Problem) -> Impl:
    """The impl to use: the named one or nothing; for "auto" the first that serves the problem exactly.

    The choice of "auto" is logged (level INFO of the logger "fusedalign"), once for each set of reasons.

    Raises:
        ValueError: unknown name, or what was asked for cannot be done; says why and which impl can.
    """
    check_name(name)
    if name == "auto":
        return _resolve_auto(problem)
    if (reason := _judge(name, problem).reason) is None:
        return _load(name)
    able = [v.impl for v in explain(problem) if v.reason is None]
    raise ValueError(f"impl={name!r} cannot do this: {reason}; impls that can: {', '.join(able) or 'none'}")


def _resolve_auto(problem: Problem) -> Impl:
    passed: list[str] = []
    for candidate in _considered():
        verdict = _judge(candidate, problem, caveat_first=True)
        if verdict.auto and verdict.reason is None and verdict.caveat is None:
            _log_once(f"impl='auto' takes {candidate}" + (f" ({'; '.join(passed)})" if passed else ""))
            return _load(candidate)
        if verdict.auto:
            passed.append(f"{candidate}: {verdict.reason or f'not exact: {verdict.caveat}'}")
    raise ValueError(f"impl='auto' found no impl for this ({'; '.join(passed)})")


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


def _load(name: str) -> Impl:
    impl: Impl = importlib.import_module(MODULES[name].module).IMPL
    return impl


def _judge(name: str, problem: Problem | None, *, caveat_first: bool = False) -> Verdict:
    """With `caveat_first` one that has a caveat is not asked for more, and so need not load the library it adapts."""
    try:
        impl = _load(name)
    except Exception as error:  # a broken optional package can raise anything on import
        return Verdict(name, "", f"cannot be imported ({type(error).__name__}: {error})", name in _considered())
    verdict = Verdict(name, impl.about, None, name in _considered() and not impl.interpreted, package=impl.package)
    if problem is None:
        return verdict._replace(reason=impl.unavailable())
    if caveat_first and not verdict.auto:
        return verdict
    verdict = verdict._replace(caveat=impl.caveat(problem))
    if caveat_first and verdict.caveat is not None:
        return verdict
    return verdict._replace(reason=impl.supports(problem))
