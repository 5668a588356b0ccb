"""The reference of DPO and KTO: a copy of the model as it was given, or a precomputed one with a complete cache key.

For a model that is passed as an instance TRL loads the reference from the name in its configuration, which differs if
the instance has been changed. It copies an adapter only if it is called "default", and not all of its parameters. It
caches a precomputed reference under a hash of data and weights only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model, is_peft_model
from datasets.fingerprint import Hasher, generate_random_fingerprint
from torch import nn

from fusedalign.engines import deep_copy, is_partitioned
from fusedalign.reports import package_version
from fusedalign.trl import stock
from fusedalign.trl.digests import plain, weights_digest
from fusedalign.trl.forward import fused_by
from fusedalign.trl.kernels import liger_parts
from fusedalign.trl.refusals import unwrapped


def needs_copy(arguments: dict[str, Any]) -> bool:
    """Whether TRL would load the reference by name although these constructor arguments have an instance as model."""
    model, precomputed = arguments["model"], getattr(arguments.get("args"), "precompute_ref_log_probs", False)
    if not isinstance(model, nn.Module) or is_peft_model(model) or precomputed:
        return False
    return arguments.get("ref_model") is None and arguments.get("peft_config") is None


def shard_reference(original: Any, model: Any, accelerator: Any) -> Any:
    """Called instead of TRL's `prepare_fsdp`, `original`: shard a reference as accelerate shards the policy.

    TRL makes the whole model one unit, which is gathered for all of its forward, and takes each rank's weights, which
    are empty on all ranks but the first under `fsdp_cpu_ram_efficient_loading`.
    """
    if accelerator.state.fsdp_plugin.fsdp_version != 2:
        return original(model, accelerator)
    sharded: Any = fsdp2_prepare_model(accelerator, model.requires_grad_(False))
    sharded.set_reshard_after_forward(True)  # there is no backward that would shard its last units again
    return sharded.eval()


def reference_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the same device, frozen and in eval mode, without the fused heads of earlier trainers.

    Raises:
        ValueError: the model cannot be copied, or its copy would run modules of the original.
    """
    instead = "pass another instance of it as ref_model"
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"expected a model with its weights in memory, got an offloaded {type(model).__name__}: {instead}"
        )
    try:
        reference = deep_copy(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"expected a model that can be copied, got {type(model).__name__} ({reason}): {instead}"
        ) from error
    if fused_by(reference) in ("trl", "fusedalign"):  # an earlier trainer's, bound to that trainer's model
        del reference.forward
        vars(reference).pop("_original_forward", None)  # accelerate's, under mixed precision
    originals = {id(module) for module in model.modules()}
    for name, module in reference.named_modules():
        if _refers_to(vars(module).get("forward"), originals):
            where = ".".join(filter(None, (name, "forward")))
            raise ValueError(f"expected a model that can be copied, got a {where} bound to the model itself: {instead}")
    return reference.requires_grad_(False).eval()


def _refers_to(function: Any, modules: set[int]) -> bool:
    """Whether a function refers to one of these modules (ids): by its closure, `functools` or as its bound instance."""
    queue: list[Any] = [function]
    seen: set[int] = set()
    while queue:
        x = queue.pop()
        if id(x) in modules:
            return True
        if not callable(x) or id(x) in seen or isinstance(x, nn.Module):
            continue
        seen.add(id(x))
        queue += [getattr(x, name, None) for name in ("__self__", "__func__", "__wrapped__")]
        if isinstance(x, functools.partial):
            queue += [x.func, *x.args, *x.keywords.values()]
        for cell in getattr(x, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                queue.append(cell.cell_contents)
    return False


#: Prefixes of `init_lora_weights` that change the weights of the model itself.
_CHANGING_THE_MODEL = ("pissa", "corda", "olora", "loftq", "lora_ga")


def check_adapters(arguments: dict[str, Any]) -> None:
    """Raise ValueError for adapters with which TRL's reference would not be the model as it was given."""
    model, config = arguments["model"], arguments.get("peft_config")
    if arguments.get("ref_model") is not None:
        return
    if not isinstance(model, str) and is_peft_model(model):  # `is_peft_model` fails on a name
        names, active = ", ".join(model.peft_config), _active_adapters(model)
        if "ref" in model.peft_config:
            raise ValueError(
                "expected no adapter called 'ref', the name of the reference, which TRL copies from 'default', got "
                f"{names}: delete or rename it"
            )
        if active != ["default"]:
            raise ValueError(
                "expected the adapter 'default' to be active, of which TRL makes the reference, got "
                f"{' and '.join(active)} of {names}: load the one to train by "
                "PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        config = model.peft_config["default"]
    initialisation = getattr(config, "init_lora_weights", None)
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGING_THE_MODEL):
        raise ValueError(
            "expected adapters that leave the model's weights, which are the reference, got "
            f"init_lora_weights={initialisation!r}, which changes them: pass ref_model, merge the adapter "
            "first (fusedalign merge), or use another initialisation"
        )


def _active_adapters(model: Any) -> list[str]:
    from peft.tuners.tuners_utils import BaseTuner

    tuner = model.base_model  # with prompt learning: the model of transformers itself
    return list(tuner.active_adapters) if isinstance(tuner, BaseTuner) else [model.active_adapter]


def complete_reference_adapter(model: nn.Module) -> None:
    """Copy every tensor of the adapter "default" to TRL's copy of it, "ref".

    TRL leaves out tensors with names that end in the adapter's name: LoRA's of an embedding, all of IA3 and VeRA.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        parts = name.split(".")
        source = ".".join("default" if part == "ref" else part for part in parts)
        if "ref" in parts and source in tensors:
            tensor.data.copy_(tensors[source].data)


#: Fields of the configurations that do not change the log-probabilities of a frozen model. All others, also of future
#: versions, are in the key: a field too many costs a recomputation, a field too few gives wrong numbers silently.
WITHOUT_INFLUENCE = (
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_strategy", "save_steps",
    "save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "resume_from_checkpoint",
    "ignore_data_skip", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "do_train", "do_eval", "do_predict", "num_train_epochs",
    "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
    "data_seed", "local_rank", "gradient_accumulation_steps", "average_tokens_across_devices", "beta",
    "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
    "discopop_tau", "desirable_weight", "undesirable_weight",
)  # fmt: skip

_PACKAGES = ("fusedalign", "trl", "transformers", "torch", "accelerate", "peft", "liger-kernel")


class KeyedReference:
    """A DPO or KTO trainer of TRL whose cache of a precomputed reference also depends on `reference_key`."""

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        stock_trainer: Any = super()
        key, training = reference_key(trainer), trainer.model.training
        trainer.model.eval()  # TRL keeps the mode in which the model was passed: dropout may be on
        try:
            with stock.extended_reference_key(trainer, key):
                return stock_trainer._precompute_ref_logps(*args, **kwargs)
        finally:
            trainer.model.train(training)


def keyed(cls: Any) -> Any:
    """`cls`, one of TRL's trainers, with `KeyedReference` if it can precompute a reference."""
    if not hasattr(cls, "_precompute_ref_logps"):
        return cls
    return type(cls.__name__, (KeyedReference, cls), {"__doc__": cls.__doc__})


def reference_key(trainer: Any) -> str:
    """A hash of what the log-probabilities of a reference depend on, without data and the weights that TRL hashes."""
    settings = trainer.args.to_dict()
    model = unwrapped(trainer, trainer.ref_model or trainer.model)
    adapters = getattr(trainer.model, "peft_config", {})
    parts = {
        "settings": {name: settings[name] for name in sorted(settings.keys() - set(WITHOUT_INFLUENCE))},
        "trainer": f"{type(trainer).__module__}.{type(trainer).__qualname__}",
        "head": getattr(trainer, "head_options", None),
        "liger": liger_parts(model),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": model.config.to_dict(),
        "attention": [config._attn_implementation for config in (model.config, model.config.get_text_config())],
        # TRL's hash of the weights does not see what ZeRO-3 has partitioned.
        "weights": weights_digest(model) if any(map(is_partitioned, model.parameters())) else None,
        "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
        "collator": _hash_of_object(getattr(trainer.data_collator, "collator", trainer.data_collator)),
        "layout": getattr(getattr(trainer, "layouts", None), "kind", None),
        "precision": [trainer.accelerator.mixed_precision, torch.get_float32_matmul_precision()],
        "device": trainer.accelerator.device.type,
        "packages": package_versions(),
    }
    return hashlib.sha256(json.dumps(parts, default=plain).encode()).hexdigest()


def _hash_of_object(x: Any) -> str:
    try:
        return str(Hasher.hash(x))
    except Exception:  # it cannot be pickled: a random hash, as in `datasets`, never matches
        return str(generate_random_fingerprint())


def package_versions() -> dict[str, str | None]:
    """The versions of the packages that compute log-probabilities; None: not installed."""
    return {name: package_version(name) for name in _PACKAGES}
