"""`attach(trainer)`: a built TRL trainer computes its log-probabilities with this package; the loss stays TRL's own.

TRL gives every model of these trainers a forward that runs the backbone and hands the last hidden states to one
autograd function, `trl.trainer.utils._ChunkedLogProbFunction`. Attaching puts a switch in its place. The switch sends a
call to `linear_logps` while a model of an attached trainer is in its forward, and to TRL's own function otherwise, so
other trainers in the process are untouched. The gathers of sharded heads, the shift, the masks, mixture-of-experts
terms and the metrics all stay where TRL has them.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
import trl.trainer.utils as trl_utils
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusedalign.impls import check_name
from fusedalign.ops import linear_logps

SUPPORTED = ("SFTTrainer", "DPOTrainer")

#: TRL's name of each per-token output -> ours, in the order in which TRL's function returns them after the logps.
_OUTPUT_NAMES = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


@dataclass
class _Attachment:
    """One attached trainer: which impl serves it, and the hooks that mark its models' forwards."""

    impl: str
    handles: list[RemovableHandle] = field(default_factory=list)


#: The attachment whose model is in its forward right now, in this thread or task.
_active: ContextVar[_Attachment | None] = ContextVar("fusedalign_active_attachment", default=None)
_attached: weakref.WeakKeyDictionary[Any, _Attachment] = weakref.WeakKeyDictionary()


def attach(trainer: Any, *, impl: str = "auto") -> Any:
    """Let a built trainer compute its log-probabilities with fusedalign.

    Attaching again replaces the impl and is otherwise harmless. `detach` takes it back.

    Args:
        trainer: a `trl.SFTTrainer` or `trl.DPOTrainer`, or an instance of a subclass.
        impl: as in `fusedalign.linear_logps`.

    Returns:
        The same trainer.

    Raises:
        TypeError: any other trainer.
        ValueError: no impl has this name.
        RuntimeError: another library has replaced TRL's head, or this TRL has none that can be replaced.

    Example::

        trainer = DPOTrainer(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)
        attach(trainer).train()
    """
    supported: tuple[Any, ...] = tuple(getattr(trl, name) for name in SUPPORTED)
    if not isinstance(trainer, supported):
        raise TypeError(f"trainer must be one of TRL's {', '.join(SUPPORTED)}, got {type(trainer).__name__}")
    check_name(impl)
    detach(trainer)
    _install_switch()
    attachment = _Attachment(impl)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if isinstance(model, nn.Module):
            attachment.handles += _mark(model, attachment)
    _attached[trainer] = attachment
    return trainer


def detach(trainer: Any) -> Any:
    """Give a trainer TRL's own head back; harmless where nothing is attached. Returns the trainer."""
    attachment = _attached.pop(trainer, None)
    if attachment is not None:
        for handle in attachment.handles:
            handle.remove()
    if not _attached:
        _remove_switch()
    return trainer


def _mark(model: nn.Module, attachment: _Attachment) -> list[RemovableHandle]:
    """Make `attachment` the active one from the start of each forward of `model` to its end, also if that raises."""
    entered: list[Token] = []

    def enter(*_: Any) -> None:
        entered.append(_active.set(attachment))

    def leave(*_: Any) -> None:
        if entered:  # an exception in an earlier hook can end a forward that was never entered
            _active.reset(entered.pop())

    return [
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]


# ---------------------------------------------------------------------------------------------------------- the switch


class _Switch:
    """Stands in for TRL's autograd function, of which only `apply` is ever used."""

    def __init__(self, original: Any, use_triton: Any) -> None:
        self.original = original
        self.use_triton = use_triton

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """TRL's arguments in TRL's order; returns (logps, *fields of `_OUTPUT_NAMES`), all [N], None if not asked."""
        attachment = _active.get()
        if attachment is None and self.original is None:
            raise RuntimeError(
                f"expected Triton, which the head of TRL {trl.__version__} needs, or an attached trainer"
            )
        if attachment is None:
            return self.original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
        out = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            outputs=[ours for theirs, ours in _OUTPUT_NAMES.items() if theirs in outputs],
            impl=attachment.impl,
        )
        return (out.logps, *(getattr(out, ours) for ours in _OUTPUT_NAMES.values()))

    def project_valid_tokens_only(self, device: torch.device) -> bool:
        """Stands in for TRL's question whether to leave out ignored tokens before the head: here always."""
        return _active.get() is not None or self.use_triton(device)


def _install_switch() -> None:
    if not hasattr(trl_utils, "add_fused_lm_head"):
        raise RuntimeError(f"expected TRL >= 1.15, whose trainers have a fused head, got TRL {trl.__version__}")
    current: Any = trl_utils._ChunkedLogProbFunction  # None in TRL 1.15 without Triton
    if isinstance(current, _Switch):
        return
    if current is not None and not current.__module__.startswith("trl."):
        replacement = f"{current.__module__}.{current.__qualname__}"
        raise RuntimeError(f"expected TRL's own fused head, got {replacement} in its place: undo that before attach()")
    # TRL 1.15 always leaves ignored tokens out and asks nothing.
    switch = _Switch(current, getattr(trl_utils, "_use_triton", None))
    _patch("_ChunkedLogProbFunction", switch)
    if switch.use_triton is not None:
        _patch("_use_triton", switch.project_valid_tokens_only)


def _remove_switch() -> None:
    switch: Any = getattr(trl_utils, "_ChunkedLogProbFunction", None)
    if isinstance(switch, _Switch):
        _patch("_ChunkedLogProbFunction", switch.original)
        if switch.use_triton is not None:
            _patch("_use_triton", switch.use_triton)


def _patch(name: str, value: Any) -> None:
    setattr(trl_utils, name, value)
