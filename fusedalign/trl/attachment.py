"""`attach(trainer)`: a built TRL trainer computes its log-probabilities with this package; the loss stays TRL's own.

TRL gives every model of these trainers a forward that runs the backbone and passes the last hidden states to one
autograd function, `stock.fused_head()`. Attaching replaces it by a switch. The switch calls `linear_logps` while an
attached trainer takes a step and one of its models runs its forward, and TRL's own function otherwise: other trainers
in the process keep TRL's head, even with the same model. The shift, the masks, mixture-of-experts terms and the
metrics remain TRL's. Where FSDP2 or ZeRO-3 shards the head, its layer gathers it, not TRL's forward.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusedalign.checks import is_dtensor
from fusedalign.engines import call_gathered, gathered, sharded_layers
from fusedalign.head import LMHead
from fusedalign.ops import linear_logps
from fusedalign.trl import stock
from fusedalign.trl.forward import OUTPUT_NAMES, fused_by, our_names
from fusedalign.trl.layouts import MASKED, Layouts, check_packed, decide, lay_out_nothing, models_of, wrap_backbone
from fusedalign.trl.options import HeadOptions, mixed_precision
from fusedalign.trl.refusals import (
    refuse_adapters,
    refuse_arguments,
    refuse_experts,
    refuse_head_unit,
    refuse_numbers,
    unwrapped,
)
from fusedalign.trl.trainers import Fused, loss_hint

_PACKABLE = (trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer)
SUPPORTED = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")


@dataclass
class _Attachment:
    """One attached trainer: the options of its head, and what `detach` has to undo."""

    options: HeadOptions
    loss_hint: str | None
    device: torch.device
    """on which the models run"""
    handles: list[RemovableHandle] = field(default_factory=list)
    """of the hooks that mark the models' forwards"""
    collator: Any = None
    """the trainer's own collator, where packing has replaced it"""
    backbones: list[Callable[[], None]] = field(default_factory=list)
    """functions that undo packing in the models; they hold no reference to the trainer, so it can be collected"""


#: The methods of a trainer that call its models for log-probabilities.
_STEPS = ("training_step", "prediction_step", "compute_loss", "compute_ref_log_probs")

#: The attachment whose trainer is in one of `_STEPS`, in this thread or task.
_stepping: ContextVar[_Attachment | None] = ContextVar("fusedalign_stepping_attachment", default=None)
#: The marked models that run their forward in this thread or task, innermost last, each with its active attachment.
_forwards: ContextVar[tuple[tuple[_Mark, _Attachment | None], ...]] = ContextVar("fusedalign_forwards", default=())
_attached: weakref.WeakKeyDictionary[Any, _Attachment] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
"""held while trainers are attached or detached, since that may install or remove the switch"""


def _active() -> _Attachment | None:
    """The attachment that computes the log-probabilities of the innermost running forward; None: TRL does."""
    forwards = _forwards.get()
    return forwards[-1][1] if forwards else None


def attach(trainer: Any, *, packed: bool | str = False, **options: Any) -> Any:
    """Let a built trainer compute its log-probabilities with fusedalign.

    Attaching again replaces the options. `detach` undoes it.

    Args:
        trainer: an instance of TRL's SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer, or of a subclass.
        packed: True runs batches packed, "auto" on CUDA where that is proven to be right; see docs/packing.md.
            Hidden states are then padded for TRL's forward, a copy that the Fused trainers do not need.
        options: the fields of `HeadOptions`.

    Returns:
        The same trainer.

    Raises:
        TypeError: any other trainer or option; a head that TRL's own forward cannot read.
        ValueError: no impl has this name or supports the options; the trainer's settings would build the logits;
            packed=True, and trainer or model cannot pack.
        RuntimeError: another library has replaced TRL's head.

    Example::

        trainer = DPOTrainer(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)
        attach(trainer).train()
    """
    supported: tuple[Any, ...] = tuple(getattr(trl, name) for name in SUPPORTED)
    if not isinstance(trainer, supported):
        raise TypeError(f"trainer must be one of TRL's {', '.join(SUPPORTED)}, got {type(trainer).__name__}")
    base = next(cls for cls in type(trainer).__mro__ if cls in supported or cls.__module__.startswith("trl."))
    if base not in supported:  # for instance GKD: an SFTTrainer with a loss of the full logits
        raise TypeError(f"trainer must be one of TRL's {', '.join(SUPPORTED)} or your own, got {base.__name__}")
    if unknown := options.keys() - set(HeadOptions._fields):
        raise TypeError(f"options must be among {', '.join(HeadOptions._fields)}, got {', '.join(sorted(unknown))}")
    check_packed(packed)
    attachment = _Attachment(HeadOptions.of(options), loss_hint(type(trainer), trainer.args), trainer.args.device)
    if isinstance(trainer, Fused):
        raise TypeError(f"expected a trainer with TRL's head, got {type(trainer).__name__}: give it the options itself")
    if isinstance(trainer, trl.SFTTrainer):
        refuse_arguments("attach()", {"args": trainer.args, "compute_loss_func": trainer.compute_loss_func})
    refuse_numbers(trainer.args)
    refuse_adapters(trainer)
    refuse_experts(trainer, ("num_experts",), f"use Fused{type(trainer).__name__}")
    refuse_head_unit(trainer)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if isinstance(model, nn.Module)]
    for model in models:
        _check_head(model, attachment.options, trainer)
    with _lock:
        detach(trainer)
        _install_switch()
        for model in models:
            mark = _Mark(attachment, unwrapped(trainer, model))
            attachment.handles.append(model.register_forward_pre_hook(mark.enter, prepend=True))
            attachment.handles.append(model.register_forward_hook(mark.leave, always_call=True))
        for name in filter(functools.partial(hasattr, trainer), _STEPS):
            setattr(trainer, name, _Step(getattr(trainer, name), attachment))
        _attached[trainer] = attachment
        if packed is not False:
            try:
                _pack(trainer, attachment, packed)
            except Exception:
                detach(trainer)
                raise
    return trainer


def _pack(trainer: Any, attachment: _Attachment, packed: bool | str) -> None:
    """Let the models' backbones run packed under TRL's forward."""
    if not isinstance(trainer, _PACKABLE):
        raise ValueError(f"packed must be False for {type(trainer).__name__}, got {packed!r}")
    layouts = Layouts(groups=2 if isinstance(trainer, trl.DPOTrainer) else 1)
    attachment.collator = trainer.data_collator
    decide(trainer, layouts, packed, lay_out_nothing if isinstance(trainer, trl.KTOTrainer) else Layouts.of)
    for model in models_of(trainer) if layouts.kind != MASKED else ():
        attachment.backbones.append(wrap_backbone(model, layouts, lambda: _active() is attachment))


def _check_head(model: nn.Module, options: HeadOptions, trainer: Any) -> None:
    """Raise unless the model has TRL's fused forward, which can read its head, and an impl supports the options."""
    base = unwrapped(trainer, model)
    owner = fused_by(base)
    if owner != "trl":
        raise RuntimeError(f"expected TRL's own fused forward, got {owner} in its place: undo that before attach()")
    head = base.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's trainable_token_indices
        name = f"Fused{type(trainer).__name__}"
        raise TypeError(f"expected a head that TRL reads, got {type(head).__name__}: use {name} instead of attach()")
    with gathered(head):
        weight = head.weight.to_local() if is_dtensor(head.weight) else head.weight
        options.check(LMHead(weight, head.bias), mixed=mixed_precision(trainer.args), device=trainer.args.device)


def detach(trainer: Any) -> Any:
    """Give a trainer TRL's own head again, and return the trainer; does nothing where nothing is attached."""
    with _lock:
        attachment = _attached.pop(trainer, None)
        if attachment is not None:
            for handle in attachment.handles:
                handle.remove()
            for restore in attachment.backbones:
                restore()
            if attachment.collator is not None:
                trainer.data_collator = attachment.collator
            for name in _STEPS:
                step = vars(trainer).get(name)
                if isinstance(step, _Step):  # else other code has replaced it since
                    delattr(trainer, name)
                    if step.method != getattr(trainer, name, None):  # the instance had a method of its own
                        setattr(trainer, name, step.method)
        if not _attached:
            _remove_switch()
    return trainer


class _Step:
    """A method of a trainer that sets `_stepping` while it runs."""

    def __init__(self, method: Any, attachment: _Attachment) -> None:
        self.method, self.attachment = method, attachment
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _stepping.set(self.attachment)
        try:
            return self.method(*args, **kwargs)
        finally:
            _stepping.reset(token)


class _Mark:
    """The forward hooks of a model, which make its attachment the active one while its trainer takes a step."""

    def __init__(self, attachment: _Attachment | None, base: Any) -> None:
        self.attachment = attachment
        self.base = base
        """the model of transformers, within those of PEFT and of engines"""

    def __reduce__(self) -> tuple:
        return _Mark, (None, None)  # copies of the model (pickle, deepcopy) are not attached

    def enter(self, model: Any, *_: Any) -> None:
        """Pre-hook of the forward."""
        stepping = _stepping.get()
        attachment = stepping if stepping is self.attachment else None
        _forwards.set((*_forwards.get(), (self, attachment or _active())))
        if attachment is not None and sharded_layers(layer := self.base.get_output_embeddings()):
            self.base.get_output_embeddings = functools.partial(_ShardedHead, layer, attachment.device)

    def leave(self, model: Any, *_: Any) -> None:
        """Hook of the forward, called also if that raises."""
        if self.base is not None:
            vars(self.base).pop("get_output_embeddings", None)
        forwards = _forwards.get()
        if forwards and forwards[-1][0] is self:  # `leave` can run without `enter` if an earlier hook raised
            _forwards.set(forwards[:-1])


class _ShardedHead:
    """Takes the place of a head with sharded parameters in TRL's forward, which would gather them outside of autograd.

    TRL passes its weight on to `_Switch.apply`, which calls the layer.
    """

    bias = None

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.weight = torch.empty(0, device=device).as_subclass(_LayerWeight)
        self.weight.layer = layer


class _LayerWeight(Tensor):
    """An empty tensor with the layer that it belongs to."""

    layer: Any

    @property
    def ds_status(self) -> Any:
        """DeepSpeed's attribute, by which TRL's forward knows under ZeRO-3 that it has nothing to gather."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        return ZeroParamStatus.AVAILABLE


class _Switch:
    """Replaces TRL's autograd function; TRL only calls its `apply`."""

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
        """TRL's arguments in TRL's order; returns (logps, *fields of `OUTPUT_NAMES`), each [N] or None."""
        attachment = _active()
        if attachment is None and self.original is None:
            raise RuntimeError(
                f"expected Triton, which the head of TRL {trl.__version__} needs, or an attached trainer"
            )
        if attachment is None:
            return self.original.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
        names = our_names(outputs)

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
            out = linear_logps(
                hidden,
                weight,
                targets.long(),
                bias=bias,
                scale=scale,
                softcap=softcap,
                temperature=temperature,
                outputs=names,
                loss_hint=attachment.loss_hint,
                **attachment.options._asdict(),
            )
            return {name: getattr(out, name) for name in ("logps", *names)}

        if isinstance(weight, _LayerWeight):
            layer = weight.layer
            fields = call_gathered(sharded_layers(layer), lambda x: score(x, layer.weight, layer.bias), hidden)
        else:
            fields = score(hidden, weight, bias)
        return (fields["logps"], *(fields.get(ours) for ours in OUTPUT_NAMES.values()))

    def project_valid_tokens_only(self, device: torch.device) -> bool:
        """Replaces TRL's `use_triton`: whether to leave out ignored tokens before the head, for ours always."""
        return _active() is not None or self.use_triton(device)


def _install_switch() -> None:
    current = stock.fused_head()
    if isinstance(current, _Switch):
        return
    if current is not None and not current.__module__.startswith("trl."):
        replacement = f"{current.__module__}.{current.__qualname__}"
        raise RuntimeError(f"expected TRL's own fused head, got {replacement} in its place: undo that before attach()")
    # TRL 1.15 always leaves ignored tokens out and asks nothing.
    switch = _Switch(current, stock.use_triton())
    stock.replace_fused_head(switch, None if switch.use_triton is None else switch.project_valid_tokens_only)


def _remove_switch() -> None:
    switch = stock.fused_head()
    if isinstance(switch, _Switch):
        stock.replace_fused_head(switch.original, switch.use_triton)
