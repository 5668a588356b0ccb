"""The base class of impls: `ops` calls an object of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fusedalign.problem import Problem, TokenLogps, TokenLoss


class Impl(ABC):
    """An implementation of the primitive. Each module of `fusedalign.impls.MODULES` has one, called `IMPL`."""

    about: str
    """in a few words, for `fusedalign env`"""
    package: str | None = None
    """the distribution that it needs in addition to torch"""
    interpreted: bool = False
    """whether it runs in an interpreter for debugging, which "auto" never selects"""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, whatever the problem; None where it can."""
        return None

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """Why it cannot serve `problem` as asked; None where it can."""

    def caveat(self, problem: Problem) -> str | None:
        """What is not exact, so that "auto" skips it; None where it serves `problem` exactly.

        Asked before `supports`. It loads a library only where `supports` would otherwise say yes.
        """
        return None

    @abstractmethod
    def token_logps(self, problem: Problem, loss_hint: TokenLoss | None = None) -> TokenLogps:
        """`TokenLogps` of [N] tokens: `logps`, and the outputs that `problem.outputs` names.

        `loss_hint` is the likely loss, of logps alone, times any number; it changes no result beyond
        rounding, and an impl may ignore it.
        """

    def token_loss_sum(self, problem: Problem, token_loss: TokenLoss) -> Tensor:
        """Sum over [N] tokens of `token_loss(logps, lse)`, a scalar; by default of `token_logps`."""
        out = self.token_logps(problem)
        return token_loss(out.logps, out.lse)[0].sum()

    def prepare(self, problem: Problem) -> None:
        """Start to compile, in the background, what calls of this kind will launch; only shapes and dtypes matter."""
        return None
