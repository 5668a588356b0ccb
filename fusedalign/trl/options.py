"""What a user may say about the head of a trainer: the one place of these names and their defaults."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fusedalign.head import LMHead, lm_head
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

    def check(self, model: nn.Module, device: Any = None) -> LMHead:
        """The head of `model`, once it is known that it can be read and that an impl can serve it as asked.

        Args:
            model: as `lm_head` takes it.
            device: where the head will be; default: where it is.

        Raises:
            TypeError, ValueError: as `lm_head`; or no impl does what the options ask for.
        """
        head = lm_head(model)
        weight = head.weight[0] if isinstance(head.weight, tuple) else head.weight
        device = weight.device if device is None else device
        hidden, targets = weight.new_empty((0, weight.shape[-1]), device=device), weight.new_empty(0, device=device)
        tiling = Tiling(workspace=self.workspace)
        problem = Problem(hidden, hidden, targets.long(), weight.dtype, filter_eps=self.filter_eps, tiling=tiling)
        resolve(self.impl, problem)
        return head
