"""`FusedSFTTrainer`, `FusedDPOTrainer`, `FusedKTOTrainer`: TRL's trainers with this package's head from the start.

TRL's trainers put a fused head on their models while they are built, through a function that their module imports by
name, and refuse adapters on the head just before. For the time of the construction this package's function stands under
that name, so it is in place before mixed precision wraps the models and before the reference is precomputed. All the
rest, the loss above all, is TRL's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import trl

from fusedalign.trl.forward import EXPERTS, add_lm_head
from fusedalign.trl.options import HeadOptions, mixed_precision
from fusedalign.trl.preparation import prepared
from fusedalign.trl.refusals import refuse_adapters, refuse_arguments, refuse_experts, refuse_numbers, refuse_sharded


class Fused:
    """What the Fused trainers share; comes before TRL's class among the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = HeadOptions.of(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in HeadOptions._fields}
        signature = inspect.signature(super().__init__)
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        default = trl.SFTConfig.loss_type if isinstance(self, trl.SFTTrainer) else None
        refuse_arguments(type(self).__name__, arguments, default)
        refuse_numbers(arguments.get("args"))
        self._adapt(arguments)
        self.head_options = options
        with self._head_in_place(arguments.get("args")):
            super().__init__(*bound.args, **bound.kwargs)
        refuse_adapters(self)
        refuse_experts(self, EXPERTS, "set its router_aux_loss_coef to 0")
        refuse_sharded(self)

    def _adapt(self, arguments: dict[str, Any]) -> None:
        """Change the constructor's arguments, where TRL's class does not take what it is given."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **named: Any) -> Any:
        """TRL's of SFT, DPO, KTO and TPO, for rows of every shape; with one end, and something left to train on."""
        stock: Any = super()
        return prepared(stock._prepare_dataset, dataset, processing_class, args, *rest, **named)

    @contextlib.contextmanager
    def _head_in_place(self, args: Any) -> Iterator[None]:
        stock = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("trl."))
        module: Any = sys.modules[stock.__module__]
        hint, mixed = loss_hint(type(self), args), mixed_precision(args)
        ours = {
            "add_fused_lm_head": functools.partial(add_lm_head, options=self.head_options, loss_hint=hint, mixed=mixed),
            "BaseTunerLayer": _NoAdapter,  # of which TRL asks whether the head is one, in order to refuse it
        }
        before = {name: getattr(module, name) for name in ours if hasattr(module, name)}
        for name in before:
            setattr(module, name, ours[name])
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(module, name, value)


class _NoAdapter:
    """No head is an instance of this."""


def loss_hint(cls: type, args: Any) -> str | None:
    """The `loss_hint` for a trainer of this class: its loss, where that is TRL's own of SFT."""
    if not issubclass(cls, trl.SFTTrainer) or cls.compute_loss is not trl.SFTTrainer.compute_loss:
        return None
    return getattr(args, "loss_type", trl.SFTConfig.loss_type)


class FusedSFTTrainer(Fused, trl.SFTTrainer):
    """`trl.SFTTrainer` without logits: its arguments and configuration, and those of `HeadOptions` as keywords.

    Raises:
        TypeError, ValueError: as TRL's; a head that cannot be read; what would need the logits.

    Example::

        FusedSFTTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=dataset, impl="auto").train()
    """


class FusedDPOTrainer(Fused, trl.DPOTrainer):
    """`trl.DPOTrainer` without logits, reference and precomputed reference included; see `FusedSFTTrainer`."""


class FusedKTOTrainer(Fused, trl.KTOTrainer):
    """`trl.KTOTrainer` without logits, its KL term included; see `FusedSFTTrainer`."""
