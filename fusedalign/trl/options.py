"""What a user may say about the head of a trainer: the one place of these names and their defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fusedalign.impls import check_name, resolve
from fusedalign.problem import Problem, Tiling


class HeadOptions(NamedTuple):
    """As in `fusedalign.linear_logps`."""

    impl: str = "auto"
    filter_eps: float | None = None
    workspace: int | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> HeadOptions:
        """From keywords, those that are no option left out of it and an unknown impl refused."""
        made = cls(**{name: options[name] for name in cls._fields if name in options})
        check_name(made.impl)
        return made

    def check(self, weight: Tensor, device: Any = None) -> None:
        """Raises ValueError where no impl does what the options ask for.

        Args:
            weight: [V, D], the head.
            device: where it will be; default: where it is.
        """
        device = weight.device if device is None else device
        hidden, targets = weight.new_empty((0, weight.shape[-1]), device=device), weight.new_empty(0, device=device)
        tiling = Tiling(workspace=self.workspace)
        problem = Problem(hidden, hidden, targets.long(), weight.dtype, filter_eps=self.filter_eps, tiling=tiling)
        resolve(self.impl, problem)
