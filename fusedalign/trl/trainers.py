"""`FusedSFTTrainer`, `FusedDPOTrainer`, `FusedKTOTrainer`: TRL's trainers with this package's head from the start.

TRL's trainers put a fused head on their models while they are built, through a function that their module imports by
name, and refuse adapters on the head just before. For the time of the construction this package's function is called
instead, so its head is in place before mixed precision wraps the models and before the reference is precomputed. All
the rest, the loss above all, is TRL's.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import sys
from typing import Any

import torch
import trl
from torch.distributed.fsdp import MixedPrecisionPolicy

from fusedalign.head import lm_head
from fusedalign.trl import stock
from fusedalign.trl.construction import replaced
from fusedalign.trl.forward import EXPERTS, add_lm_head, our_names
from fusedalign.trl.kernels import add_liger_kernels, check_liger_kernels
from fusedalign.trl.layouts import (
    KEY,
    PACKED_DEFAULT,
    LayOut,
    LayoutCollator,
    Layouts,
    check_packed,
    decide,
    dispatches,
)
from fusedalign.trl.matched import MatchedModel, lay_out_kto
from fusedalign.trl.options import HeadOptions, mixed_precision
from fusedalign.trl.preparation import prepared
from fusedalign.trl.ref_cache import check_arguments, model_facts, read_cache, settings
from fusedalign.trl.ref_rows import check_data, with_reference
from fusedalign.trl.reference import (
    KeyedReference,
    check_adapters,
    complete_reference_adapter,
    needs_copy,
    reference_copy,
    shard_reference,
)
from fusedalign.trl.refusals import (
    base_of,
    is_sharded,
    refuse_adapters,
    refuse_arguments,
    refuse_data_in_memory,
    refuse_experts,
    refuse_head_unit,
    refuse_numbers,
    refuse_uneven_batches,
)

__all__ = ["FusedDPOTrainer", "FusedKTOTrainer", "FusedSFTTrainer"]


class Fused:
    """What the Fused trainers share; comes before TRL's class among the bases."""

    #: Whether TRL's constructor adds a fused head, which this package's then replaces.
    _trl_has_head = True
    #: Whether padded rows may run without their mask.
    _may_unmask = True
    #: Of the heads when they are used; None: their device when they are added.
    _head_device: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.head_options = HeadOptions.of(kwargs)
        self.liger_kernels = kwargs.pop("liger_kernels", False)
        packed = kwargs.pop("packed", PACKED_DEFAULT)
        kwargs = {name: value for name, value in kwargs.items() if name not in HeadOptions._fields}
        check_packed(packed)
        self._packed, self.layouts = packed, Layouts()
        self._heads: list[tuple[Any, tuple[str, ...]]] = []
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        default = trl.SFTConfig.loss_type if isinstance(self, trl.SFTTrainer) else None
        refuse_arguments(type(self).__name__, bound.arguments, default)
        refuse_numbers(bound.arguments.get("args"))
        check_liger_kernels(self.liger_kernels, type(self).__name__, bound.arguments.get("args"))
        self._adapt(bound.arguments)
        self._has_head = False
        trl_class = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("trl."))
        with replaced(sys.modules[trl_class.__module__], **self._replacements()):
            super().__init__(*bound.args, **bound.kwargs)
        if self._trl_has_head and not self._has_head:
            raise RuntimeError(
                f"expected {trl_class.__module__}.add_fused_lm_head to be called while {type(self).__name__} is built, "
                f"got TRL {trl.__version__} without that call: undo what has replaced {trl_class.__name__}.__init__"
            )
        refuse_adapters(self)
        refuse_experts(self, EXPERTS, "set its router_aux_loss_coef to 0")
        refuse_head_unit(self)
        if self._groups() > 1:
            refuse_uneven_batches(self)
        self._add_late_head()
        self._settle()

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; FSDP2 leaves log-probabilities in fp32 instead of rounding them to half precision."""
        parent: Any = super()
        parent.create_accelerator_and_postprocess()
        trainer: Any = self
        plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)

    def _replacements(self) -> dict[str, Any]:
        """What the module of TRL's class calls while this trainer is built, see `replaced`."""
        return stock.head_replacements(self._add_own_head)

    def _add_late_head(self) -> None:
        """Add the head, where TRL's constructor adds none."""

    def _settle(self) -> None:
        """Decide the layout of batches and start to compile for the heads, once; the models must be on their device."""
        if self._packed is None:
            return
        packed, self._packed = self._packed, None
        self.layouts.groups = self._groups()
        decide(self, self.layouts, packed, self._lay_out(), may_unmask=self._may_unmask)
        trainer: Any = self
        for model, outputs in self._heads:
            trains = model is not getattr(trainer, "ref_model", None)
            if not is_sharded(trainer):  # else the head is not on its final device
                self.head_options.prepare(lm_head(model), our_names(outputs), mixed=self._mixed, trains=trains)

    def _groups(self) -> int:
        """Answers to each prompt in a batch: all first answers, then all second ones."""
        return 1

    def _lay_out(self) -> LayOut:
        """The function that makes the layout of a batch of the collator."""
        return Layouts.of

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; without layouts for a stream given to `evaluate`: its batches are sent to other processes."""
        trainer: Any = self
        collator = trainer.data_collator
        parent: Any = super()
        if isinstance(collator, LayoutCollator) and dispatches(trainer, dataset):
            trainer.data_collator = collator.collator
        try:
            return parent._get_dataloader(dataset, *args, **kwargs)
        finally:
            trainer.data_collator = collator

    def _adapt(self, arguments: dict[str, Any]) -> None:
        """Change the constructor's arguments in place where TRL's class would refuse or misread them."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any) -> Any:
        """TRL's of SFT, DPO, KTO and TPO, for rows of every shape; answers have one EOS, and a token is left to train.

        `rest` and `options` are TRL's, which differ between trainers.
        """
        parent: Any = super()
        return prepared(parent._prepare_dataset, dataset, processing_class, args, *rest, **options)

    def _add_own_head(self, original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        """Called instead of TRL's `add_fused_lm_head`, which `original` is."""
        trainer: Any = self
        if model is base_of(trainer.model) or model is getattr(trainer, "ref_model", None):
            self._add_head(model, *args, **kwargs)
            self._has_head = True
        else:  # the model of another trainer, which a callback builds while this one is constructed
            original(model, *args, **kwargs)

    def _add_head(
        self, model: Any, outputs: tuple[str, ...] = ("log_probs",), mean_positions: slice | None = None
    ) -> None:
        """Add this package's head, and Liger's kernels where wanted, to a model of this trainer."""
        if self.liger_kernels:
            add_liger_kernels(model)
        add_lm_head(
            model,
            outputs,
            options=self.head_options,
            mean_positions=mean_positions,
            loss_hint=loss_hint(type(self), getattr(self, "args", None)),
            mixed=self._mixed,
            layouts=self.layouts,
            device=self._head_device,
        )
        self._heads.append((model, outputs))

    @property
    def _mixed(self) -> torch.dtype | None:
        return mixed_precision(getattr(self, "args", None))


class FusedWithReference(KeyedReference, Fused):
    """What the Fused trainers with a reference model share."""

    def __init__(self, *args: Any, ref_logps: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        self._ref_cache = None if ref_logps is None else read_cache(ref_logps)
        self._is_ref_checked = False
        super().__init__(*args, **kwargs)

    def _adapt(self, arguments: dict[str, Any]) -> None:
        """Make the reference the model as it was given.

        Raises:
            ValueError: no such reference can be made.
        """
        check_adapters(arguments)
        if isinstance(arguments["model"], str) and getattr(arguments.get("args"), "world_size", 1) > 1:
            arguments["args"] = _on_one_device(arguments["args"])
        if self._ref_cache is not None:
            check_arguments(arguments)
            check_data(arguments.get("train_dataset"), "train")
            if arguments.get("args") is not None:
                arguments["args"] = _with_precomputed(arguments["args"])
            if not isinstance(arguments["model"], str):
                self._check_reference(arguments["model"])
        elif needs_copy(arguments):
            arguments["ref_model"] = reference_copy(arguments["model"])

    def _replacements(self) -> dict[str, Any]:
        """With a cache TRL reads a precomputed reference, but its digest of the weights is not needed."""
        names = super()._replacements() | stock.sharding_replacements(shard_reference)
        if self._ref_cache is not None:
            names |= stock.reference_replacements(self, self._load_reference, _precomputed_config)
        return names

    def _load_reference(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Called instead of TRL's `create_model_from_path`, `original`; the first model is policy and reference."""
        model = original(*args, **kwargs)
        if not self._is_ref_checked:
            self._check_reference(model)
        return model

    def _check_reference(self, model: Any) -> None:
        assert self._ref_cache is not None
        self._ref_cache.check(model_facts(model))
        self._is_ref_checked = True

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any) -> Any:
        if self._ref_cache is not None:
            self._ref_cache.check(settings(processing_class, args))
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **options)

    def _add_head(self, model: Any, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if self._ref_cache is not None:
            if "ref" in getattr(trainer.model, "peft_config", {}):  # TRL's copy of the adapter, not needed
                trainer.model.delete_adapter("ref")
        elif trainer.ref_model is None:
            complete_reference_adapter(model)
        super()._add_head(model, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._ref_cache is not None:
            trainer: Any = self
            collator = trainer.data_collator
            return with_reference(dataset, self._ref_cache, getattr(collator, "collator", collator), name)
        refuse_data_in_memory(dataset, self)
        self._settle()  # TRL precomputes while the trainer is built
        return super()._precompute_ref_logps(dataset, name, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """TRL's; with a cache data that the trainer was not given can be evaluated after a step too."""
        trainer: Any = self
        parent: Any = super()
        if self._ref_cache is None or eval_dataset is None or isinstance(eval_dataset, str):
            return parent.evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(eval_dataset, dict):
            by_name = (self.evaluate(x, ignore_keys, f"{metric_key_prefix}_{name}") for name, x in eval_dataset.items())
            return {name: value for metrics in by_name for name, value in metrics.items()}
        dataset = self._prepare_dataset(eval_dataset, trainer.processing_class, trainer.args, "eval")
        dataset = self._precompute_ref_logps(dataset, "eval")
        trl_class: Any = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("trl."))
        transformers_trainer: Any = super(trl_class, self)
        return transformers_trainer.evaluate(dataset, ignore_keys, metric_key_prefix)


def _precomputed_config(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Called instead of the configuration's class, which `original` is."""
    return _with_precomputed(original(*args, **kwargs))


def _with_precomputed(args: Any) -> Any:
    """A copy of a trainer's configuration that lets TRL read the reference from the data set, without its model."""
    args = copy.copy(args)
    args.precompute_ref_log_probs = True
    return args


def _on_one_device(args: Any) -> Any:
    """A copy of a trainer's configuration that loads models on one device; TRL spreads the reference under FSDP."""
    args = copy.copy(args)
    args.model_init_kwargs = {"device_map": None, **(args.model_init_kwargs or {})}
    return args


def loss_hint(cls: type, args: Any) -> str | None:
    """The `loss_hint` for a trainer of this class: the name of TRL's SFT loss, None for another loss."""
    if not issubclass(cls, trl.SFTTrainer) or cls.compute_loss is not trl.SFTTrainer.compute_loss:
        return None
    return getattr(args, "loss_type", trl.SFTConfig.loss_type)


class FusedSFTTrainer(Fused, trl.SFTTrainer):
    """`trl.SFTTrainer` without logits: its arguments and configuration, and those of `HeadOptions` as keywords.

    `liger_kernels=True`, also a keyword, puts Liger Kernel's RMSNorm, RoPE and MLP into the models, see docs/trl.md.

    Raises:
        TypeError, ValueError: as TRL's; a head that cannot be read; what would need the logits.

    Example::

        FusedSFTTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=dataset, impl="auto").train()
    """


class FusedDPOTrainer(FusedWithReference, trl.DPOTrainer):
    """`trl.DPOTrainer` without logits, reference and precomputed reference included; see `FusedSFTTrainer`.

    The reference of a model that is passed as an instance is a copy of that instance (TRL loads the model of its name
    again); that of a `PeftModel` is a copy of its adapter "default". `ref_logps=PATH`, a keyword, is a reference cache
    of `fusedalign score --ref_cache`: no reference model is loaded or copied, see docs/trl.md.

    Raises:
        ValueError: also an instance that cannot be copied, or adapters that TRL would not copy; both name what to pass
            instead. A cache that is damaged, of another model, tokenizer or configuration, or without a row.
        FileNotFoundError: no such cache.
    """

    def _groups(self) -> int:
        return 2


class FusedKTOTrainer(FusedWithReference, trl.KTOTrainer):
    """`trl.KTOTrainer` without logits, its KL term included; see `FusedSFTTrainer` and `FusedDPOTrainer`."""

    def _lay_out(self) -> LayOut:
        return lay_out_kto

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's; the log-probabilities of a live reference are computed first, as those of a precomputed one."""
        layouts = inputs.pop(KEY, None)
        if layouts is None:
            return super()._compute_loss(model, inputs, return_outputs)
        is_live = not self.precompute_ref_logps
        if is_live:
            reference = self.model if self.ref_model is None else self.ref_model
            names = ("ref_logps", "ref_KL_logps")
            logps = self.compute_ref_log_probs(reference, {**inputs, KEY: layouts})
            inputs |= {name: x for name, x in zip(names, logps, strict=True) if x is not None}
        kto_model = MatchedModel(model, inputs, layouts, may_join=not self.aux_loss_enabled)
        self.precompute_ref_logps = True
        try:
            return super()._compute_loss(kto_model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = not is_live

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """TRL's; matched and mismatched rows share their prompts where they are packed."""
        if KEY not in inputs:
            return super().compute_ref_log_probs(model, inputs)
        with torch.no_grad():
            model = MatchedModel(model, inputs, inputs[KEY])
        return super().compute_ref_log_probs(model, inputs)
