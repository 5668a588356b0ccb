"""What the adapters to other libraries share: operands as those libraries take them, and results as ours come."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fusedalign.problem import Parts, Problem, TokenLogps


class Found(NamedTuple):
    """An optional library, or why there is none."""

    library: Any
    reason: str | None


def finder(module: str, install: str, load: Callable[[], Any]) -> Callable[[], Found]:
    """A function that calls `load` once; what a missing or broken `module` raises becomes the reason."""

    @functools.cache
    def find() -> Found:
        try:
            if importlib.util.find_spec(module) is None:
                return Found(None, f"{module} is not installed: {install}")
            return Found(load(), None)
        except Exception as error:  # a broken installation can raise anything, however deep inside
            text = " ".join(str(error).split())
            return Found(None, f"{module} cannot be imported ({type(error).__name__}: {text})")

    return find


def whole(weight: Tensor | Parts) -> Tensor:
    """The head, which `refusal_of_parts` has let pass."""
    assert isinstance(weight, Tensor)
    return weight


def refusal_of_parts(problem: Problem) -> str | None:
    """Why no library serves a head of several tensors; None where it is one."""
    return None if isinstance(problem.weight, Tensor) else "it takes a head of one tensor, not of several side by side"


def factor(problem: Problem) -> float:
    """What raw logits are multiplied with: softcap * tanh(scale * x / softcap) / temperature is the same with scale /
    temperature in place of scale, softcap / temperature in place of softcap, and no temperature.
    """
    return float(problem.scale) / float(problem.temperature)


def softcap(problem: Problem) -> float | None:
    """The softcap that goes with `factor`."""
    return None if problem.softcap is None else float(problem.softcap) / float(problem.temperature)


def is_power_of_2(x: float) -> bool:
    """Whether multiplying by `x` rounds nothing."""
    return abs(math.frexp(x)[0]) == 0.5


def operands(problem: Problem, by: float) -> tuple[Tensor, Tensor]:
    """Hidden states times `by`, and the head, both [*, D] contiguous in the operand dtype; differentiable.

    A head in another dtype is copied, as autocast does for `torch.nn.functional.linear`.
    """
    hidden = problem.hidden
    if by != 1.0:
        hidden = hidden.to(problem.logit_dtype) * by  # rounded once
    return hidden.to(problem.operand_dtype).contiguous(), whole(problem.weight).to(problem.operand_dtype).contiguous()


def of_no_tokens(problem: Problem) -> TokenLogps:
    """Empty results that are still connected to the graph: libraries refuse to be called with nothing."""
    empty = problem.hidden[:, 0].to(problem.result_dtype) + whole(problem.weight)[:0].sum()
    if problem.bias is not None:
        empty = empty + problem.bias[:0].sum()
    return TokenLogps(empty, *(empty if name in problem.outputs else None for name in TokenLogps._fields[1:]))


def logps_of(nll: Tensor, problem: Problem) -> Tensor:
    """The one place where the sign is flipped. A loss that rounding has made negative becomes 0, with its gradient."""
    nll = nll.to(problem.result_dtype)
    return -(nll + (nll.detach().clamp(min=0) - nll.detach()))
