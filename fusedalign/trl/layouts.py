"""How a trainer's rows are laid out for its models: packed, right-padded without a mask, or as TRL pads and masks them.

`decide(trainer, packed)` decides when a trainer is built, once its models are on their device. From then on
`LayoutCollator` lays out each batch on the CPU, where lengths are known without a GPU synchronisation. The tensors that
TRL passes to the model and reads from it stay padded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fusedalign.packing import (
    LayoutError,
    LayoutMismatchError,
    PackedBatch,
    Proof,
    RightPadded,
    enable,
    enable_sharded,
    enable_unmasked,
    pack_documents,
    pack_padded,
)
from fusedalign.packing.attention import Layout, install, installed
from fusedalign.packing.backbone import embeddings_device, packed_arguments, packed_output, unmasked_arguments
from fusedalign.packing.batch import GPU_MULTIPLE
from fusedalign.trl.refusals import is_sharded, unwrapped

_logger = logging.getLogger(__name__)

PACKED, UNMASKED, MASKED = "packed", "right-padded without a mask", "padded with a mask"

#: Default of `packed` in the Fused trainers.
PACKED_DEFAULT = "auto"

#: Name of the layout in a batch, and of the argument of the model's forward.
KEY = "layout"

#: Layout of a batch that a packing trainer must leave padded.
UNPACKABLE = "padded"

#: Arguments of a model's forward that its layout replaces, or that do not depend on it.
_LAYOUT_ARGUMENTS = frozenset(
    [
        *("input_ids", "attention_mask", "position_ids", "use_cache", "output_router_logits", "return_dict", "labels"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # from TRL's padding_free
    ]
)


@dataclass
class Layouts:
    """The decision for a trainer; its models' forwards and its collator share this record."""

    groups: int = 1
    """answers to a prompt: rows i, i + B/groups, ... of a batch of B begin alike"""
    kind: str = MASKED
    reason: str = "not decided yet"
    must_pack: bool = False
    """whether a batch that cannot be packed is an error"""
    multiple: int = 1

    def __str__(self) -> str:
        return f"batches: {self.kind} ({self.reason})"

    def of(self, batch: Mapping[str, Any]) -> Any:
        """The layout of a model's padded arguments on any device; None: the model runs them with their mask.

        Args:
            batch: `input_ids` [B, L] with `attention_mask`, or with the `position_ids` of packed documents; optional
                `labels` [B, L], unshifted.

        Returns:
            `UNPACKABLE` where the batch cannot be packed and that is no error.

        Raises:
            ValueError: with `must_pack`: as `pack_padded`, padding that predicts a label, or position_ids that do not
                count the tokens of each row.
        """
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if self.kind == PACKED:
            if mask is None and positions is not None:
                return pack_documents(batch["input_ids"], positions, multiple=self.multiple)
            mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
            try:
                _check_labels(batch.get("labels"), mask)
                packed = pack_padded(batch["input_ids"], mask, groups=self._groups(mask), multiple=self.multiple)
                _check_positions(positions, packed)
                return packed
            except ValueError:
                if self.must_pack:
                    raise
                return UNPACKABLE
        if self.kind != UNMASKED or positions is not None or mask is None or mask.ndim != 2:
            return None
        return RightPadded() if (mask.diff(dim=1) <= 0).all() else None

    @torch.compiler.disable
    def for_call(self, model: Any, layout: Any, arguments: Mapping[str, Any]) -> Layout | None:
        """The layout for one forward of a model, from the layout in the batch and the padded arguments.

        Rows without a layout that are to be packed are packed here, which synchronises with the GPU. If the model's
        attention function has been changed since, ours is installed around it.

        Raises:
            ValueError: with `must_pack`: arguments that packed rows do not support.
        """
        if self.kind == MASKED:
            return None
        ids = arguments.get("input_ids")
        foreign = sorted(name for name, x in arguments.items() if x is not None and name not in _LAYOUT_ARGUMENTS)
        if ids is None or foreign:
            if self.kind == PACKED and self.must_pack:
                names = ", ".join(foreign) or "no input_ids"
                raise ValueError(f"packed=True needs batches of text, whose model takes input_ids alone, got {names}")
            return None
        if isinstance(layout, PackedBatch) and layout.token_index.shape != ids.shape:
            layout = None  # it belongs to other rows
        if layout is None and self.kind == PACKED:
            layout = self.of(arguments)
        if layout is None or layout == UNPACKABLE:
            return None
        if not installed(model):
            install(model)
        return layout

    def _groups(self, mask: Tensor) -> int:
        return self.groups if len(mask) % self.groups == 0 else 1


def _check_labels(labels: Tensor | None, attention_mask: Tensor) -> None:
    """Raise ValueError where the token before a label is padding, which packed rows leave out."""
    if labels is None or labels.shape != attention_mask.shape:
        return
    if ((labels[:, 1:] != -100) & (attention_mask[:, :-1] == 0)).any():
        raise ValueError("packed rows need labels of -100 for a first token after padding, got another label there")


def _check_positions(position_ids: Tensor | None, packed: PackedBatch) -> None:
    """Raise ValueError where position_ids are not the positions of packed rows."""
    if position_ids is None:
        return
    expected = packed.position_ids[0][packed.token_index]
    if (position_ids.cpu().expand_as(expected) != expected)[packed.valid].any():
        raise ValueError("packed rows count positions from their first token, got other position_ids")


def backbone_output(model: Any, layout: Layout | None, arguments: Mapping[str, Any]) -> Any:
    """The output record of a model's backbone for padded arguments, run in `layout`."""
    if isinstance(layout, PackedBatch):
        router = {name: x for name, x in arguments.items() if name == "output_router_logits"}
        device = arguments["input_ids"].device
        if device.type != "cuda":
            return _packed_output_without_graph(model, layout, **router)
        # An engine can keep its shards of the embeddings on the CPU.
        offloads = embeddings_device(model).type == "cpu"
        return packed_output(model, layout, device=device if offloads else None, **router)
    return model.base_model(**{**arguments, **_unmasked(arguments, layout), "use_cache": False})


#: Off CUDA attention loops over segments, so every batch would need a new graph.
_packed_output_without_graph = torch.compiler.disable(packed_output)


def _unmasked(arguments: Mapping[str, Any], layout: RightPadded | None) -> dict[str, Any]:
    return {} if layout is None else unmasked_arguments(arguments["input_ids"], layout)


def wrap_backbone(model: Any, layouts: Layouts, active: Callable[[], bool]) -> Callable[[], None]:
    """Let a model's backbone run in the layout of its rows and return padded hidden states and router logits.

    For models with a forward that is not ours.

    Args:
        model: a causal LM of transformers.
        layouts: the trainer's decision.
        active: called at each forward; where it returns False the backbone's original forward runs.

    Returns:
        A function that restores the backbone's forward.
    """
    backbone = model.base_model
    original, instance_forward = backbone.forward, vars(backbone).get("forward")

    @functools.wraps(original)
    def forward(*args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if not active():
            return original(*args, **kwargs)
        kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        layout = layouts.for_call(model, layout, kwargs)
        if not isinstance(layout, PackedBatch):
            return original(**kwargs | _unmasked(kwargs, layout))
        router = kwargs.get("output_router_logits")
        options = {} if router is None else {"output_router_logits": router}
        output = original(**packed_arguments(layout, kwargs["input_ids"].device), use_cache=False, **options)
        output.last_hidden_state = layout.spread(output.last_hidden_state[0])
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(layout.spread(x).flatten(0, 1) for x in output.router_logits)
        return output

    def restore() -> None:
        if vars(backbone).get("forward") is forward:  # else another library has wrapped it since
            del backbone.forward
            if instance_forward is not None:
                backbone.forward = instance_forward

    backbone.forward = forward
    return restore


class LayoutCollator:
    """A trainer's collator that adds its layout to each batch.

    `lay_out(layouts, batch)` makes the layout; it must not hold the trainer, since data loaders pickle their collators.
    """

    def __init__(self, collator: Any, layouts: Layouts, lay_out: LayOut) -> None:
        self.collator, self.layouts, self.lay_out = collator, layouts, lay_out

    def __call__(self, examples: list[Any]) -> Any:
        """The collator's batch with its layout under `KEY`."""
        batch = self.collator(examples)
        layout = self.lay_out(self.layouts, batch)
        if layout is not None:
            batch[KEY] = layout
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in vars(self):  # while a copy is made
            raise AttributeError(name)
        return getattr(self.collator, name)


#: A function of a trainer's decision and a batch of its collator that returns the batch's entry under `KEY`.
LayOut = Callable[[Layouts, Mapping[str, Any]], Any]


def check_packed(packed: Any) -> None:
    """Raise ValueError where `packed` is none of its three values."""
    if packed != "auto" and not isinstance(packed, bool):
        raise ValueError(f"packed must be 'auto', True or False, got {packed!r}")


def lay_out_nothing(layouts: Layouts, batch: Mapping[str, Any]) -> None:
    """For batches with the arguments of several calls: each call makes its own layout."""


def decide(
    trainer: Any, layouts: Layouts, packed: bool | str, lay_out: LayOut = Layouts.of, *, may_unmask: bool = True
) -> None:
    """Decide how a built trainer's batches are laid out, and log it in one line.

    Args:
        trainer: its models are on the device on which they train.
        layouts: the record to fill in.
        packed: "auto" packs on CUDA where that is proven to be right; True packs or raises; False does not pack.
        lay_out: for trainers with batches that are not a model's padded arguments.
        may_unmask: whether padded rows may run without their mask.

    Raises:
        ValueError: packed=True, and this trainer cannot pack.
    """
    models = models_of(trainer)
    on_cuda = trainer.accelerator.device.type == "cuda"
    layouts.must_pack = packed is True
    with trainer.accelerator.autocast():
        kind, reason = _packed(trainer, models, packed, on_cuda)
        if kind != PACKED and may_unmask:
            kind, reason = _unpacked(trainer, models, reason)
    layouts.kind, layouts.reason = kind, reason
    layouts.multiple = GPU_MULTIPLE if on_cuda else 1
    if layouts.kind != MASKED and not _dispatches(trainer):
        trainer.data_collator = LayoutCollator(trainer.data_collator, layouts, lay_out)
    _logger.info("%s, %s", type(trainer).__name__, layouts)


def models_of(trainer: Any) -> list[Any]:
    """The unwrapped policy and, if there is one, reference."""
    models = (trainer.model, getattr(trainer, "ref_model", None))
    return [unwrapped(trainer, model) for model in models if isinstance(model, nn.Module)]


def _packed(trainer: Any, models: list[Any], packed: bool | str, on_cuda: bool) -> tuple[str, str]:
    if packed is False:
        return MASKED, "packed=False"
    if packed == "auto" and not on_cuda:
        return MASKED, "packed='auto' packs on CUDA"
    try:
        if (reason := _trainer_refusal(trainer) or _rows_refusal(trainer)) is not None:
            raise LayoutError(reason)
        proofs = [_prove(trainer, model) for model in models]
    except LayoutError as error:
        if packed is True:
            raise ValueError(f"packed=True needs a model that can run packed: {error}") from error
        if isinstance(error, LayoutMismatchError):
            _logger.warning("packed batches are left out: %s", error)
        return MASKED, str(error)
    worst = max(proofs)
    sample = "a small model of its class" if is_sharded(trainer) else "a few tokens"
    reason = f"proven on {sample}, hidden states differ by {worst.difference:.1e} of {worst.allowed:.1e} allowed"
    return PACKED, reason + ("; attention takes one segment at a time" if worst.by_segments else "")


def _unpacked(trainer: Any, models: list[Any], reason: str) -> tuple[str, str]:
    try:
        if (refusal := _trainer_refusal(trainer)) is not None:
            raise LayoutError(refusal)
        for model in models:
            _prove(trainer, model, unmasked=True)
    except LayoutError as error:
        return MASKED, f"{reason}; {error}" if str(error) != reason else reason
    return UNMASKED, reason


def _prove(trainer: Any, model: Any, *, unmasked: bool = False) -> Proof:
    if is_sharded(trainer):
        return enable_sharded(model, trainer.accelerator.device, unmasked=unmasked)
    return (enable_unmasked if unmasked else enable)(model)


def _trainer_refusal(trainer: Any) -> str | None:
    """Why the trainer, not its model, rules out both layouts; None: it does not."""
    for adapter in _adapters(trainer):
        if adapter.is_prompt_learning:
            return f"{adapter.peft_type.value} puts virtual tokens before each row"
    if trainer.args.n_gpu > 1:
        return "DataParallel splits batches: launch one process for each GPU"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (
        getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False)
    ):
        return "context parallelism splits rows"
    return None


def _rows_refusal(trainer: Any) -> str | None:
    """Why the trainer needs padded rows; None: it does not."""
    if trainer.args.neftune_noise_alpha is not None:
        return "NEFTune scales its noise by the length of the padded rows"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in _adapters(trainer)):
        return "activated LoRA begins at a place of its own in each padded row"
    return None


def _adapters(trainer: Any) -> list[Any]:
    return list(getattr(trainer.model, "peft_config", {}).values())


def _dispatches(trainer: Any) -> bool:
    """Whether one process makes the batches of the training data or of any evaluation data for all processes."""
    eval_dataset = getattr(trainer, "eval_dataset", None)
    eval_datasets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    return any(dispatches(trainer, x) for x in (trainer.train_dataset, *eval_datasets))


def dispatches(trainer: Any, dataset: Any) -> bool:
    """Whether one process makes the batches of this data set and sends the others their slices, tensors only."""
    setting = trainer.accelerator.dispatch_batches
    return bool(setting) or (setting is None and isinstance(dataset, IterableDataset))
