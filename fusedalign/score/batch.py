"""Log-probabilities of one batch of sequences, from a causal LM of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.head import LMHead, lm_head
from fusedalign.packing import LayoutError, enable, pack_padded
from fusedalign.packing.attention import installed
from fusedalign.packing.backbone import Selection, packed_output
from fusedalign.packing.batch import GPU_MULTIPLE
from fusedalign.packing.model import head_logps
from fusedalign.problem import TokenLogps
from fusedalign.sequence import shift_labels

#: Bytes of a tile of fp32 logits when ranks are counted.
_RANK_TILE = 64 * 2**20


class SequenceLogps(NamedTuple):
    """Log-probabilities of the sequences of a batch."""

    tokens: TokenLogps
    """[B, L] each: [b, t] belongs to the label at [b, t + 1]; zero where that is -100"""
    ranks: Tensor | None
    """[B, L] int64: number of tokens more likely than the label; 0 where that is -100; None unless requested"""
    logps: Tensor
    """[B] fp32, the sum over the labels, nats; differentiable"""
    counts: Tensor
    """[B] int64, number of labels"""
    is_greedy: Tensor
    """[B] bool: whether each label is the most likely token; True without labels"""

    @property
    def mean_logps(self) -> Tensor:
        """[B], nats per token; 0 without labels"""
        return self.logps / self.counts.clamp(min=1)


class SelectedLogps(NamedTuple):
    """Log-probabilities of the N labels of a batch, row after row, on the model's device."""

    tokens: TokenLogps
    ranks: Tensor | None
    slots: Tensor
    """[N] int64: indices into the flattened [B, L]"""


def sequence_logps(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    packed: bool | str = "auto",
    groups: int = 1,
    ranks: bool = False,
    outputs: Iterable[str] = (),
    **options: Any,
) -> SequenceLogps:
    """Per-token and per-sequence log-probabilities of a batch, without materializing its logits.

    The model is used in its current mode, with its active adapters; gradients are recorded unless the caller uses
    `torch.no_grad`.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one.
        input_ids: [B, L] int64, padded on either side.
        labels: [B, L] int64, unshifted, -100 for tokens that are not scored; default: all tokens but the first of each
            row.
        attention_mask: [B, L], 0 on padding; default: no padding.
        packed: True runs the rows without padding, or raises; False keeps the padding; "auto" packs if the model
            supports it.
        groups: rows i, i + B/groups, ... are answers to one prompt, which is computed once if rows are packed.
        ranks: whether to count the tokens more likely than each label, which costs two more products with the head.
        outputs: as in `fusedalign.linear_logps`; "is_top1" is always included.
        options: further options of `fusedalign.linear_logps`, such as `impl` or `temperature`.

    Raises:
        LayoutError: a ValueError; packed=True, and the model cannot run packed batches correctly.
        ValueError: shapes that differ, labels on padding, padding within a row.

    Example::

        out = sequence_logps(model, batch["input_ids"], labels, attention_mask=batch["attention_mask"])
        out.logps, out.mean_logps, out.tokens.logps
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        mask = attention_mask.to(input_ids.device)
        position = mask.long().cumsum(1) * (mask != 0)  # from 1; 0 on padding
        labels = input_ids.masked_fill(position < 2, -100)
    for name, x in {"labels": labels, "attention_mask": attention_mask}.items():
        if x.shape != input_ids.shape or x.ndim != 2:
            raise ValueError(f"{name} must be [B, L] like input_ids, {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    if bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any()):
        raise ValueError("labels must be -100 where attention_mask is 0, got labels on padding")
    if packed not in ("auto", True, False):
        raise ValueError(f"packed must be 'auto', True or False, got {packed!r}")
    model = causal_lm(model)
    if packed == "auto":
        packed = packing_refusal(model) is None
    selected = select_logps(
        model,
        input_ids,
        labels,
        attention_mask,
        packed=bool(packed),
        groups=groups,
        ranks=ranks,
        outputs=(*outputs, *({"is_top1"} - set(outputs))),
        **options,
    )

    def scatter(values: Tensor) -> Tensor:
        """[N] -> [B, L]."""
        flat = values.new_zeros(input_ids.numel()).index_copy(0, selected.slots, values)
        return flat.view(input_ids.shape)

    logps, *outputs_or_none = selected.tokens
    tokens = TokenLogps(scatter(logps), *(None if x is None else scatter(x) for x in outputs_or_none))
    is_scored = scatter(torch.ones_like(selected.slots, dtype=torch.bool))
    assert tokens.is_top1 is not None
    return SequenceLogps(
        tokens,
        None if selected.ranks is None else scatter(selected.ranks),
        tokens.logps.sum(1),
        is_scored.sum(1),
        (tokens.is_top1 | ~is_scored).all(1),
    )


def select_logps(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    *,
    packed: bool,
    groups: int = 1,
    ranks: bool = False,
    **options: Any,
) -> SelectedLogps:
    """Like `sequence_logps`, for the labels only; `model` is a result of `causal_lm`."""
    targets = shift_labels(labels.cpu())
    device = model.get_input_embeddings().weight.device
    if packed:
        if not installed(model):
            enable(model)
        multiple = GPU_MULTIPLE if device.type == "cuda" else 1
        batch = pack_padded(input_ids, attention_mask, groups=groups, multiple=multiple)
        selection = Selection(packed_output(model, batch).last_hidden_state[0], batch, targets)
        hidden, slots, targets = selection.hidden, selection.slots, selection.targets
    else:
        mask = attention_mask.to(device)
        output = model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=mask,
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        slots = (targets != -100).flatten().nonzero()[:, 0]
        if not attention_mask.cpu().bool().flatten()[slots].all():
            raise ValueError("labels must be -100 where the token before them is padding, got labels on padding")
        targets, slots = targets.flatten()[slots], slots.to(output.device)
        hidden = output.flatten(0, 1).index_select(0, slots)
    head = lm_head(model)
    head_device = head_parts(head)[0].device
    hidden = head.expand(hidden.to(head_device))
    tokens = head_logps(head, hidden, targets, **options)
    return SelectedLogps(tokens, count_likelier(head, hidden, targets) if ranks else None, slots.to(head_device))


def head_parts(head: LMHead) -> tuple[Tensor, ...]:
    """The weight of a head and those of its adapters, whose columns follow each other."""
    return head.weight if isinstance(head.weight, tuple) else (head.weight,)


def causal_lm(model: Any) -> Any:
    """The causal LM inside a `PeftModel`, with the adapters in its layers, or the model itself.

    Raises:
        ValueError: prompt learning, whose virtual tokens are not part of the inner model.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("expected adapters in the model's layers, got prompt learning, which adds virtual tokens")
    return model.get_base_model()


def packing_refusal(model: Any, *, training: bool = True) -> str | None:
    """Enable packed rows; returns why the model does not support them, or None. `training`: as in `packing.enable`."""
    if installed(model):
        return None
    try:
        enable(model, training=training)
    except LayoutError as error:
        return str(error)
    return None


@torch.no_grad()
def count_likelier(head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Count the logits larger than that of the target, [N] int64; scale, softcap and temperature do not change it.

    Args:
        head: a result of `lm_head`, with a scale above 0.
        hidden: [N, D], a result of `head.expand`.
        targets: [N] int64, on any device.
    """
    parts = head_parts(head)
    targets = targets.to(hidden.device)
    vocab, counts = parts[0].shape[0], torch.zeros_like(targets)
    width = max(1, _RANK_TILE // (4 * max(1, len(hidden))))  # columns of logits per tile

    def logits(start: int) -> Tensor:
        weight = torch.cat([part[start : start + width].to(hidden.dtype) for part in parts], 1)
        product = _product(hidden, weight)
        return product if head.bias is None else product + head.bias[start : start + width].float()

    target_logits = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, width):
        in_tile = (targets >= start) & (targets < start + width)
        column = (targets - start).clamp(0, min(width, vocab - start) - 1)
        tile_logits = logits(start).gather(1, column[:, None])[:, 0].float()
        target_logits = torch.where(in_tile, tile_logits, target_logits)
    for start in range(0, vocab, width):
        tile = logits(start)
        column = torch.arange(start, start + tile.shape[1], device=tile.device)
        counts += ((tile > target_logits[:, None]) & (column != targets[:, None])).sum(1)
    return counts


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden @ weight.T` in fp32 or wider; for half-precision operands only CUDA has a product with that result."""
    if hidden.dtype.itemsize > 2:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T
