"""The table of impls, and the one place that chooses among them.

An impl is a module with what `Impl` lists. It is imported when it is first considered, so that a package which it needs
and which is missing or broken costs nobody else anything.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from fusedalign.problem import Problem, TokenLogps, TokenLoss


class Impl(Protocol):
    """What `ops` calls."""

    ABOUT: str

    def unavailable(self) -> str | None:
        """Why the impl cannot run on this machine, whatever the problem; None where it can."""

    def supports(self, problem: Problem) -> str | None:
        """None where the impl serves `problem` exactly as asked, else the reason why not."""

    def token_logps(self, problem: Problem) -> TokenLogps:
        """The [N] outputs that `problem.outputs` names, and `logps`."""

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """The scalar sum of `token_loss(logps, lse)` over the tokens."""


class Verdict(NamedTuple):
    """One row of `explain()`."""

    impl: str
    about: str
    reason: str | None
    """None: can serve. Else why it cannot."""
    auto: bool
    """Whether `impl="auto"` considers it."""


#: Impl -> module, and the order in which "auto" tries them.
MODULES = {
    "triton": "fusedalign.impls.triton",
    "pytorch": "fusedalign.impls.pytorch",
    "reference": "fusedalign.impls.reference",
}
AUTO = ("triton", "pytorch")


def check_name(name: str) -> None:
    """Raises ValueError, listing the valid names, unless `name` is "auto" or an impl's."""
    if name not in ("auto", *MODULES):
        raise ValueError(f"impl must be one of {', '.join(['auto', *MODULES])}, got {name!r}")


def explain(problem: Problem | None = None) -> list[Verdict]:
    """Every impl and why it can or cannot run here or, with a problem, serve that problem."""
    return [_judge(name, problem) for name in MODULES]


def resolve(name: str, problem: Problem) -> Impl:
    """The impl to use: the named one or nothing; for "auto" the first of `AUTO` that supports the problem.

    Raises:
        ValueError: unknown name, or what was asked for cannot be done; says why and which impl can.
    """
    check_name(name)
    for candidate in AUTO if name == "auto" else (name,):
        verdict = _judge(candidate, problem)
        if verdict.reason is None and (verdict.auto or candidate == name):
            return _load(candidate)
    verdicts = explain(problem)
    if name == "auto":
        reasons = "; ".join(f"{v.impl}: {v.reason}" for v in verdicts if v.auto)
        raise ValueError(f"impl='auto' found no impl for this ({reasons})")
    reason = next(v.reason for v in verdicts if v.impl == name)
    able = [v.impl for v in verdicts if v.reason is None]
    raise ValueError(f"impl={name!r} cannot do this: {reason}; impls that can: {', '.join(able) or 'none'}")


def _load(name: str) -> Impl:
    return cast(Impl, importlib.import_module(MODULES[name]))


def _judge(name: str, problem: Problem | None) -> Verdict:
    try:
        impl = _load(name)
    except Exception as error:  # a broken optional package can raise anything on import
        return Verdict(name, "", f"cannot be imported ({type(error).__name__}: {error})", name in AUTO)
    interpreted = getattr(impl, "INTERPRETED", False)  # a debugger, which "auto" must not walk into
    reason = impl.unavailable() if problem is None else impl.supports(problem)
    return Verdict(name, impl.ABOUT, reason, name in AUTO and not interpreted)
