"""What would build the logits after all, or go wrong in silence: refused before the first step, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a trainer's constructor arguments that ask for the logits."""
    args: Any = arguments.get("args")
    if getattr(args, "label_smoothing_factor", 0.0) and getattr(args, "loss_type", None) == "nll":
        raise ValueError(
            f"{name} needs label_smoothing_factor=0, got {args.label_smoothing_factor}, which takes the logits: "
            "in a loop of your own fusedalign.sft_loss has label_smoothing"
        )
    if getattr(args, "use_liger_kernel", False) and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError(
            f"{name} needs liger_kernel_config without fused_linear_cross_entropy, got True: it replaces "
            "the forward; leave it out, Liger's other kernels stay"
        )
    for argument, instead in (
        ("compute_loss_func", "it is given the logits; override compute_loss of a subclass instead"),
        ("model_init", "each of its models would come without the fused head; pass the model"),
    ):
        if arguments.get(argument) is not None:
            raise ValueError(f"{name} needs {argument}=None, got a function: {instead}")


def refuse_sharded(trainer: Any) -> None:
    """Raises ValueError for a Fused trainer whose head will not be whole on each rank."""
    if trainer.is_fsdp_enabled:
        raise ValueError(
            f"{type(trainer).__name__} needs a head that is whole on each rank, got FSDP: "
            "attach() to TRL's own trainer, whose forward gathers it, or use DDP"
        )
    refuse_zero3(trainer)


def refuse_zero3(trainer: Any) -> None:
    """Raises ValueError under ZeRO-3, whose parameters are gone by the backward."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3:
        raise ValueError("expected a head that is whole on each rank, got DeepSpeed ZeRO-3: use stage 2 or stock TRL")
