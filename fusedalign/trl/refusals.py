"""What would build the logits after all, or go wrong in silence: refused before the first step, with what to do."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accelerate.utils import is_peft_model

from fusedalign.checks import check_finite, check_nonnegative, check_positive, check_share
from fusedalign.losses.common import check_label_smoothing

#: The numbers of TRL's configurations that enter a loss, where a configuration has them and they are not None.
_NUMBERS: dict[str, Callable[..., None]] = {
    "max_length": check_nonnegative,  # SFT would cut as many tokens off the end of each row
    "beta": check_positive,
    "ld_alpha": check_share,
    "f_alpha_divergence_coef": check_finite,
    "discopop_tau": check_positive,
    "desirable_weight": check_nonnegative,
    "undesirable_weight": check_nonnegative,
    "cpo_alpha": check_nonnegative,
    "simpo_gamma": check_nonnegative,
    "alpha": check_finite,
    "tpo_alpha": check_nonnegative,
    "tpo_l_gamma": check_nonnegative,
    "ref_model_mixup_alpha": check_share,
    "router_aux_loss_coef": check_finite,
}
#: Configurations in which a beta of 0 leaves a term out, and something else trains.
_BETA_MAY_BE_ZERO = {"ORPOConfig", "GRPOConfig", "RLOOConfig"}


def refuse_arguments(name: str, arguments: Mapping[str, Any], loss_type: Any = None) -> None:
    """Raises ValueError for a trainer's constructor arguments that ask for the logits.

    `loss_type` is that of plain `TrainingArguments`, of which TRL makes its own.
    """
    args: Any = arguments.get("args")
    if getattr(args, "label_smoothing_factor", 0.0) and getattr(args, "loss_type", loss_type) == "nll":
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
    for argument in ("train_dataset", "eval_dataset"):
        dataset: Any = arguments.get(argument)
        if hasattr(dataset, "__len__") and not isinstance(dataset, dict) and len(dataset) == 0:
            raise ValueError(f"{argument} must have at least one row, got none")


def refuse_numbers(args: Any) -> None:
    """Raises ValueError for a number of a trainer's configuration with which no loss can train, NaN above all.

    TypeError where it is no number. What the loss type in use does not look at is checked too.
    """
    checks = dict(_NUMBERS)
    if _BETA_MAY_BE_ZERO & {cls.__name__ for cls in type(args).__mro__}:
        checks["beta"] = check_nonnegative
    for name, check in checks.items():
        value = getattr(args, name, None)
        if value is not None:
            check(**{name: value})
    check_finite(**{f"loss_weights[{i}]": x for i, x in enumerate(getattr(args, "loss_weights", None) or [])})
    if hasattr(args, "label_smoothing"):
        robust = "robust" in args.loss_type
        check_label_smoothing(args.label_smoothing, below=0.5 if robust else 1.0, loss_type=args.loss_type)


def refuse_adapters(trainer: Any) -> None:
    """Raises ValueError for adapters of PEFT that keep the model's forward from before, or ask for its logits."""
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind in ("ADAPTION_PROMPT", "CPT"):
            raise ValueError(
                f"{type(trainer).__name__} has no way for {kind}, whose model calls the forward with logits: "
                "use LoRA or prompt tuning"
            )


def refuse_experts(trainer: Any, names: Iterable[str], instead: str) -> None:
    """Raises ValueError where the experts of a mixture are to be balanced, but not by Mixtral's loss.

    `names` are what may hold the number of experts in a configuration.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    if not getattr(trainer, "aux_loss_enabled", False):
        return
    model = unwrapped(trainer, trainer.model)
    config = model.config.get_text_config()
    own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", load_balancing_loss_func)
    alike = inspect.signature(own).parameters.keys() == inspect.signature(load_balancing_loss_func).parameters.keys()
    counted = any(getattr(config, name, None) is not None for name in names)
    if not (alike and counted and hasattr(config, "num_experts_per_tok")):
        raise ValueError(
            f"{type(trainer).__name__} needs experts that are balanced as Mixtral's are, with one of "
            f"{', '.join(names)} in the configuration, got {type(model).__name__}: {instead}"
        )


def unwrapped(trainer: Any, model: Any) -> Any:
    """A model of a trainer without what PEFT, `torch.compile` or a parallel scheme has put around it."""
    return base_of(trainer.accelerator.unwrap_model(model, keep_torch_compile=False))


def base_of(model: Any) -> Any:
    """A model without the `PeftModel` around it, if there is one; its adapters stay."""
    return model.get_base_model() if is_peft_model(model) else model


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
