"""Shared by the adapters to other libraries: operands in the form that those take, results in ours."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fusedalign.commandline import one_line
from fusedalign.problem import OUTPUTS, Problem, SplitHead, TokenLogps


class Library(NamedTuple):
    """An optional library, or the reason why it is missing."""

    library: Any
    reason: str | None


def lazy_library(module: str, install: str, load: Callable[[], Any]) -> Callable[[], Library]:
    """A function that calls `load` once; an exception of a missing or broken `module` becomes the reason."""

    @functools.cache
    def find() -> Library:
        try:
            if importlib.util.find_spec(module) is None:
                return Library(None, f"{module} is not installed: {install}")
            return Library(load(), None)
        except Exception as error:  # a broken installation can raise anything, however deep inside
            return Library(None, f"{module} cannot be imported ({type(error).__name__}: {one_line(error)})")

    return find


def as_tensor(weight: Tensor | SplitHead) -> Tensor:
    """The head, once `split_head_refusal` has found that it is one tensor."""
    assert isinstance(weight, Tensor)
    return weight


def split_head_refusal(problem: Problem) -> str | None:
    """Why no library serves a split head; None where the head is one tensor."""
    return None if isinstance(problem.weight, Tensor) else "it takes a head of one tensor, not of several side by side"


def logit_scale(problem: Problem) -> float:
    """The factor of raw logits without a temperature.

    softcap * tanh(scale * x / softcap) / temperature is the same with scale / temperature in place of scale, softcap /
    temperature in place of softcap, and no temperature.
    """
    return float(problem.scale) / float(problem.temperature)


def softcap(problem: Problem) -> float | None:
    """The softcap that belongs to `logit_scale`."""
    return None if problem.softcap is None else float(problem.softcap) / float(problem.temperature)


def is_power_of_2(x: float) -> bool:
    """Whether multiplying by `x` rounds nothing."""
    return abs(math.frexp(x)[0]) == 0.5


def operands(problem: Problem, scale: float) -> tuple[Tensor, Tensor]:
    """Hidden states times `scale`, and the head, both [*, D] contiguous in the operand dtype; differentiable.

    A head in another dtype is copied, as autocast does for `torch.nn.functional.linear`.
    """
    hidden = problem.hidden
    if scale != 1.0:
        hidden = hidden.to(problem.logit_dtype) * scale  # rounded once
    weight = as_tensor(problem.weight)
    return hidden.to(problem.operand_dtype).contiguous(), weight.to(problem.operand_dtype).contiguous()


def empty_result(problem: Problem) -> TokenLogps:
    """Empty results, connected to the graph: libraries refuse calls without tokens."""
    empty = problem.hidden[:, 0].to(problem.result_dtype) + as_tensor(problem.weight)[:0].sum()
    if problem.bias is not None:
        empty = empty + problem.bias[:0].sum()
    return TokenLogps(empty, *(empty if name in problem.outputs else None for name in OUTPUTS))


def to_logps(nll: Tensor, problem: Problem) -> Tensor:
    """logps from a library's losses. A loss below 0 by rounding becomes 0, with its gradient."""
    nll = nll.to(problem.result_dtype)
    return -(nll + (nll.detach().clamp(min=0) - nll.detach()))
