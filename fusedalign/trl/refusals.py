"""Refusals, before the first step, of settings that would build the logits or give wrong results silently."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

from accelerate.utils import is_peft_model

from fusedalign.checks import check_finite, check_nonnegative, check_positive, check_share, is_dtensor
from fusedalign.losses.common import check_label_smoothing

#: Numbers of TRL's configurations that enter a loss -> their check, made where they are present and not None.
_NUMBERS: dict[str, Callable[..., None]] = {
    "max_length": check_nonnegative,  # with a negative one SFT would cut tokens off the end of each row
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
#: Configurations that still have a loss with beta=0.
_BETA_MAY_BE_ZERO = {"ORPOConfig", "GRPOConfig", "RLOOConfig"}


def refuse_arguments(name: str, arguments: Mapping[str, Any], loss_type: Any = None) -> None:
    """Raise ValueError for a trainer's constructor arguments that need the logits.

    `loss_type` is the one that TRL uses with plain `TrainingArguments`.
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
    for argument, remedy in (
        ("compute_loss_func", "it is given the logits; override compute_loss of a subclass instead"),
        ("model_init", "each of its models would come without the fused head; pass the model"),
    ):
        if arguments.get(argument) is not None:
            raise ValueError(f"{name} needs {argument}=None, got a function: {remedy}")
    for argument in ("train_dataset", "eval_dataset"):
        dataset: Any = arguments.get(argument)
        if hasattr(dataset, "__len__") and not isinstance(dataset, dict) and len(dataset) == 0:
            raise ValueError(f"{argument} must have at least one row, got none")


def refuse_numbers(args: Any) -> None:
    """Raise ValueError for a number of a trainer's configuration with which no loss can train, such as NaN.

    TypeError if it is no number. Numbers that the loss type in use ignores are checked too.
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
        limit = 0.5 if "robust" in args.loss_type else 1.0
        check_label_smoothing(args.label_smoothing, below=limit, loss_type=args.loss_type)


def refuse_adapters(trainer: Any) -> None:
    """Raise ValueError for PEFT's adapters that hold the model's original forward, or need its logits."""
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind in ("ADAPTION_PROMPT", "CPT"):
            raise ValueError(
                f"{type(trainer).__name__} has no way for {kind}, whose model calls the forward with logits: "
                "use LoRA or prompt tuning"
            )


def refuse_experts(trainer: Any, names: Iterable[str], remedy: str) -> None:
    """Raise ValueError if the experts of a mixture are balanced by another loss than Mixtral's.

    `names` are the fields of a configuration that may hold the number of experts.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    if not getattr(trainer, "aux_loss_enabled", False):
        return
    model = unwrapped(trainer, trainer.model)
    config = model.config.get_text_config()
    own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", load_balancing_loss_func)
    is_mixtrals = {*inspect.signature(own).parameters} == {*inspect.signature(load_balancing_loss_func).parameters}
    has_count = any(getattr(config, name, None) is not None for name in names)
    if not (is_mixtrals and has_count and hasattr(config, "num_experts_per_tok")):
        raise ValueError(
            f"{type(trainer).__name__} needs experts that are balanced as Mixtral's are, with one of "
            f"{', '.join(names)} in the configuration, got {type(model).__name__}: {remedy}"
        )


def refuse_head_unit(trainer: Any) -> None:
    """Raise ValueError if the first FSDP would make the head, or a part of it, a unit of its own.

    Its parameters are then one flat shard, from which no head can be read.
    """
    plugin = copy.copy(getattr(trainer.accelerator.state, "fsdp_plugin", None))
    if plugin is None or plugin.fsdp_version != 1:
        return
    plugin.set_auto_wrap_policy(trainer.model)
    policy = plugin.auto_wrap_policy
    if is_peft_model(trainer.model):  # as transformers sets it when the training starts
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(trainer.model)
    if policy is None:
        return
    own = set(unwrapped(trainer, trainer.model).get_output_embeddings().parameters())
    for name, module in trainer.model.named_modules():
        parameters = set(module.parameters())
        numel = sum(x.numel() for x in parameters)
        if parameters and parameters <= own and policy(module=module, recurse=False, nonwrapped_numel=numel):
            raise ValueError(
                f"{type(trainer).__name__} needs the head in the unit of the whole model under the first FSDP, got a "
                f"policy that makes {name} a unit of its own: leave its class out of transformer_layer_cls_to_wrap, or "
                "raise min_num_params, or LoRA off the head, or use FSDP2 (fsdp_version: 2), which can have it"
            )


def refuse_uneven_batches(trainer: Any) -> None:
    """Raise ValueError if the last batches of the ranks would differ in their rows.

    The trainers of pairs gather a number of each row from all ranks, for which these must have as many.
    """
    accelerator, args = trainer.accelerator, trainer.args
    if accelerator.num_processes == 1 or accelerator.even_batches:
        return
    evals = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    datasets = [(trainer.train_dataset, args.train_batch_size), *((x, args.eval_batch_size) for x in evals.values())]
    for dataset, batch_size in datasets:
        rows = batch_size if accelerator.split_batches else batch_size * accelerator.num_processes
        if isinstance(dataset, Sized) and not args.dataloader_drop_last and len(dataset) % rows:
            raise ValueError(
                f"{type(trainer).__name__} needs last batches of one size on all ranks, got even_batches=False with "
                f"{len(dataset)} rows, {rows} in the batches of a step: leave even_batches out of accelerator_config, "
                "or set dataloader_drop_last=True"
            )


def refuse_data_in_memory(dataset: Any, trainer: Any) -> None:
    """Raise ValueError if several ranks would exchange a precomputed reference through files that they do not share.

    The first rank writes it next to the files of the data set; for one in memory that is a folder of its process.
    """
    if trainer.accelerator.num_processes > 1 and not getattr(dataset, "cache_files", True):
        raise ValueError(
            f"{type(trainer).__name__} needs a data set in files for precompute_ref_log_probs on several ranks, got "
            "one in memory: pass load_from_disk(folder) after save_to_disk(folder), load_dataset's, or ref_logps"
        )


def unwrapped(trainer: Any, model: Any) -> Any:
    """A trainer's model without the wrappers of PEFT, `torch.compile` and parallel schemes."""
    return base_of(trainer.accelerator.unwrap_model(model, keep_torch_compile=False))


def base_of(model: Any) -> Any:
    """The model inside of a `PeftModel`, with its adapters; another model unchanged."""
    return model.get_base_model() if is_peft_model(model) else model


def is_sharded(trainer: Any) -> bool:
    """Whether the weights are not whole on this rank: FSDP, ZeRO-3, tensor parallelism, or none were loaded."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    is_zero3 = trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3
    return trainer.is_fsdp_enabled or is_zero3 or any(is_dtensor(p) or p.is_meta for p in trainer.model.parameters())
