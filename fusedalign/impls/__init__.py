"""The table of impls, and the choice among them.

Each module has an `IMPL`, an object of the class `base.Impl`. It is imported when it is first considered, so that a
missing or broken package affects only the impl that needs it. The table itself needs no torch.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from fusedalign.impls.base import Impl
    from fusedalign.problem import Problem

_log = logging.getLogger("fusedalign")


class Support(NamedTuple):
    """One row of `explain()`."""

    impl: str
    about: str
    reason: str | None
    """None: can serve. Else why it cannot."""
    auto: bool
    """Whether `impl="auto"` considers it."""
    caveat: str | None = None
    """None: exactly, as far as is known. Else what is not exact, so that "auto" skips it."""
    package: str | None = None
    """The distribution that it needs in addition to torch."""


class Entry(NamedTuple):
    """What must be known of an impl before it is imported."""

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


def considered() -> tuple[str, ...]:
    """The impls that "auto" tries."""
    return impl_names("own", "adapter")


def check_name(name: str) -> None:
    """Raises ValueError, listing the valid names, unless `name` is "auto" or an impl's."""
    if name not in ("auto", *MODULES):
        raise ValueError(f"impl must be one of {', '.join(['auto', *MODULES])}, got {name!r}")


def explain(problem: Problem | None = None) -> list[Support]:
    """Every impl and why it can or cannot run here or, with a problem, serve that problem and how exactly."""
    return [check(name, problem) for name in MODULES]


def resolve(name: str, problem: Problem) -> Impl:
    """The impl to use: the named one or nothing; for "auto" the first that serves the problem exactly.

    The choice of "auto" is logged (level INFO of the logger "fusedalign"), once for each set of reasons.

    Raises:
        ValueError: unknown name, or what was asked for cannot be done; says why and which impl can.
    """
    check_name(name)
    if name == "auto":
        return _resolve_auto(problem)
    if (reason := check(name, problem).reason) is None:
        return _load(name)
    able = [v.impl for v in explain(problem) if v.reason is None]
    raise ValueError(f"impl={name!r} cannot do this: {reason}; impls that can: {', '.join(able) or 'none'}")


def _resolve_auto(problem: Problem) -> Impl:
    skipped: list[str] = []
    for candidate in considered():
        verdict = check(candidate, problem, caveat_first=True)
        if verdict.auto and verdict.reason is None and verdict.caveat is None:
            _log_once(f"impl='auto' takes {candidate}" + (f" ({'; '.join(skipped)})" if skipped else ""))
            return _load(candidate)
        if verdict.auto:
            skipped.append(f"{candidate}: {verdict.reason or f'not exact: {verdict.caveat}'}")
    raise ValueError(f"impl='auto' found no impl for this ({'; '.join(skipped)})")


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


def _load(name: str) -> Impl:
    impl: Impl = importlib.import_module(MODULES[name].module).IMPL
    return impl


def check(name: str, problem: Problem | None, *, caveat_first: bool = False) -> Support:
    """Whether an impl is available or, with a problem, serves that.

    With `caveat_first` an impl with a caveat is not asked further, so that it need not load the library it adapts.
    """
    try:
        impl = _load(name)
    except Exception as error:  # a broken optional package can raise anything on import
        return Support(name, "", f"cannot be imported ({type(error).__name__}: {error})", name in considered())
    verdict = Support(name, impl.about, None, name in considered() and not impl.interpreted, package=impl.package)
    if problem is None:
        return verdict._replace(reason=impl.unavailable())
    if caveat_first and not verdict.auto:
        return verdict
    verdict = verdict._replace(caveat=impl.caveat(problem))
    if caveat_first and verdict.caveat is not None:
        return verdict
    return verdict._replace(reason=impl.supports(problem))
