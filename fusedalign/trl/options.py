"""The user's options of a trainer's head: the one place of their names and defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch

from fusedalign.head import LMHead
from fusedalign.impls import check_name, explain, resolve
from fusedalign.problem import MemoryOptions, Problem, as_head


class HeadOptions(NamedTuple):
    """Options of `fusedalign.linear_logps`."""

    impl: str = "auto"
    """ "auto", or the name of an impl"""
    filter_eps: float | None = None
    """None: exact gradients"""
    workspace: int | Literal["auto"] = "auto"
    """bytes of the tiles"""

    @classmethod
    def of(cls, options: dict[str, Any]) -> HeadOptions:
        """The options among some keywords. ValueError for an unknown impl."""
        head_options = cls(**{name: options[name] for name in cls._fields if name in options})
        check_name(head_options.impl)
        return head_options

    def check(
        self, head: LMHead, outputs: Iterable[str] = (), *, mixed: torch.dtype | None = None, device: Any = None
    ) -> None:
        """Raise ValueError if no impl supports the options.

        Args:
            head: of the model.
            outputs: names of `linear_logps`.
            mixed: the dtype of mixed precision; None: operands have the head's.
            device: of the head when it is used; default: its device now.
        """
        resolve(self.impl, self._problem(_without_rows(head, device), outputs, mixed))

    def automatic(
        self, head: LMHead, outputs: Iterable[str] = (), *, mixed: torch.dtype | None = None, device: Any = None
    ) -> str | None:
        """The name of the impl that "auto" takes for a head, None without one; arguments as in `check`."""
        verdicts = explain(self._problem(_without_rows(head, device), outputs, mixed))
        able = (verdict for verdict in verdicts if verdict.auto and verdict.reason is None)
        return next((verdict.impl for verdict in able if verdict.caveat is None), None)

    def prepare(
        self, head: LMHead, outputs: Iterable[str] = (), *, mixed: torch.dtype | None = None, trains: bool = True
    ) -> None:
        """Let the impl compile its kernels for a head in the background; the head must be on its final device.

        Args:
            head, outputs, mixed: as in `check`.
            trains: whether any call will need gradients.
        """
        if not trains:
            parts = head.weight if isinstance(head.weight, tuple) else (head.weight,)
            bias = None if head.bias is None else head.bias.detach()
            head = head._replace(weight=tuple(x.detach() for x in parts), bias=bias)
        problem = self._problem(head, outputs, mixed, trains)
        resolve(self.impl, problem).prepare(problem)

    def _problem(
        self, head: LMHead, outputs: Iterable[str], mixed: torch.dtype | None, trains: bool = False
    ) -> Problem:
        """A problem without tokens."""
        parts = head.weight if isinstance(head.weight, tuple) else (head.weight,)
        dtype = mixed if mixed and parts[0].dtype != torch.float64 else parts[0].dtype
        hidden = parts[0].new_empty((0, sum(x.shape[1] for x in parts)), dtype=dtype).requires_grad_(trains)
        return Problem(
            hidden,
            as_head(parts, dtype),
            hidden.new_empty(0, dtype=torch.int64),
            dtype,
            head.bias,
            scale=head.scale,
            softcap=head.softcap,
            outputs=frozenset(outputs),
            filter_eps=self.filter_eps,
            memory=MemoryOptions(workspace=None if self.workspace == "auto" else self.workspace),
        )


def _without_rows(head: LMHead, device: Any) -> LMHead:
    """A head for an empty vocabulary, on `device` or on its own."""
    parts = head.weight if isinstance(head.weight, tuple) else (head.weight,)
    return head._replace(weight=tuple(x.new_empty((0, x.shape[-1]), device=device or x.device) for x in parts))


def mixed_precision(args: Any) -> torch.dtype | None:
    """The dtype of mixed precision of a trainer's arguments, or of `accelerate launch`; None: full precision."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name, False) or getattr(args, "mixed_precision", None) == name:
            return dtype
    return None
