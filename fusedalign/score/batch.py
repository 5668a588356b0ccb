"""Log-probabilities of one batch of sequences, from a causal LM of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedalign.head import LMHead, lm_head
from fusedalign.ops import linear_logps
from fusedalign.packing import LayoutError, enable, pack_padded
from fusedalign.packing.attention import installed
from fusedalign.packing.backbone import Selection, packed_output
from fusedalign.packing.batch import GPU_MULTIPLE
from fusedalign.problem import TokenLogps
from fusedalign.sequence import shift_labels

#: Bytes of the logits of a tile where ranks are counted.
_RANK_TILE = 64 * 2**20


class SequenceLogps(NamedTuple):
    """What a model says of the sequences of a batch."""

    tokens: TokenLogps
    """[B, L] each: [b, t] belongs to the label at [b, t + 1]; zero where nothing counts"""
    ranks: Tensor | None
    """[B, L] int64: how many tokens are likelier than the label; 0 where nothing counts; None if not asked for"""
    logps: Tensor
    """[B] fp32, the sum over the labels that count, nats; differentiable"""
    counts: Tensor
    """[B] int64, labels that count"""
    is_greedy: Tensor
    """[B] bool: whether each of them is the likeliest one; True where none counts"""

    @property
    def mean_logps(self) -> Tensor:
        """[B], nats a token; 0 where no label counts"""
        return self.logps / self.counts.clamp(min=1)


class SelectedLogps(NamedTuple):
    """The same of the N labels that count, row after row; on the model's device."""

    tokens: TokenLogps
    ranks: Tensor | None
    slots: Tensor
    """[N] int64: where each stands in the flattened [B, L]"""


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
    """Per-token and per-sequence log-probabilities of a batch, without its logits.

    The mode of the model (`eval`) and `torch.no_grad` are the caller's; adapters that are active count.

    Args:
        model: a causal LM of transformers, or a `PeftModel` around one.
        input_ids: [B, L] int64, padded on either side.
        labels: [B, L] int64, unshifted, -100 where a token does not count; default: every token but the first of each
            row.
        attention_mask: [B, L], 0 on padding; default: no padding.
        packed: True runs the rows without padding, or raises; False keeps the padding; "auto" packs where the model
            can.
        groups: rows i, i + B/groups, ... are answers to one prompt, which is computed once where rows are packed.
        ranks: whether to count the tokens that are likelier than each label, which costs another product with the head.
        outputs: as in `fusedalign.linear_logps`; "is_top1" is always there.
        options: more of `fusedalign.linear_logps`, such as `impl` or `temperature`.

    Raises:
        LayoutError (a ValueError): packed=True, and this model would go wrong in packed batches.
        ValueError: shapes that differ, labels on padding, padding within a row.

    Example::

        out = sequence_logps(model, batch["input_ids"], labels, attention_mask=batch["attention_mask"])
        out.logps, out.mean_logps, out.tokens.logps
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        place = attention_mask.to(input_ids.device).long().cumsum(1) * (attention_mask.to(input_ids.device) != 0)
        labels = input_ids.masked_fill(place < 2, -100)
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

    def spread(values: Tensor) -> Tensor:
        flat = values.new_zeros(input_ids.numel()).index_copy(0, selected.slots, values)
        return flat.view(input_ids.shape)

    fields = (None if x is None else spread(x) for x in selected.tokens)
    logps, *others = fields
    assert logps is not None
    tokens = TokenLogps(logps, *others)
    counted = spread(torch.ones_like(selected.slots, dtype=torch.bool))
    assert tokens.is_top1 is not None
    return SequenceLogps(
        tokens,
        None if selected.ranks is None else spread(selected.ranks),
        logps.sum(1),
        counted.sum(1),
        (tokens.is_top1 | ~counted).all(1),
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
    """`sequence_logps` of the labels that count, one after another; `model` is what `causal_lm` gives."""
    targets = shift_labels(labels.cpu())
    device = model.get_input_embeddings().weight.device
    if packed:
        if not installed(model):
            enable(model)
        multiple = GPU_MULTIPLE if device.type == "cuda" else 1
        batch = pack_padded(input_ids, attention_mask, groups=groups, multiple=multiple)
        selection = Selection(packed_output(model, batch).last_hidden_state[0], batch, targets)
        hidden, slots, counted = selection.hidden, selection.slots, selection.targets
    else:
        mask = attention_mask.to(device)
        output = model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=mask,
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        places = (targets != -100).flatten().nonzero()[:, 0]
        if not attention_mask.cpu().bool().flatten()[places].all():
            raise ValueError("labels must be -100 where the token before them is padding, got labels on padding")
        slots, counted = places.to(output.device), targets.flatten()[places]
        hidden = output.flatten(0, 1).index_select(0, slots)
    head = lm_head(model)
    first = head.weight[0] if isinstance(head.weight, tuple) else head.weight
    hidden, slots = hidden.to(first.device), slots.to(first.device)
    expanded = head.expand(hidden)
    tokens = linear_logps(
        expanded, head.weight, counted, bias=head.bias, scale=head.scale, softcap=head.softcap, **options
    )
    return SelectedLogps(tokens, count_likelier(head, expanded, counted) if ranks else None, slots)


def causal_lm(model: Any) -> Any:
    """The causal LM of transformers that a `PeftModel` holds, adapters in its layers, or the model itself.

    Raises:
        ValueError: prompt learning, whose virtual tokens are not in the model within.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in configs.values()):
        raise ValueError("expected adapters in the model's layers, got prompt learning, which adds virtual tokens")
    return model.get_base_model()


def packing_refusal(model: Any, *, training: bool = True) -> str | None:
    """Why a causal LM cannot run packed rows; None: it can, and is ready to. `training` is as in `packing.enable`."""
    if installed(model):
        return None
    try:
        enable(model, training=training)
    except LayoutError as error:
        return str(error)
    return None


@torch.no_grad()
def count_likelier(head: LMHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N] int64: how many logits are larger than that of the target. Scale, softcap and temperature do not matter.

    Args:
        head: its scale is above 0.
        hidden: [N, D], as `head.expand` gives it.
        targets: [N] int64, on any device.
    """
    parts: Sequence[Tensor] = head.weight if isinstance(head.weight, tuple) else (head.weight,)
    targets = targets.to(hidden.device)
    vocab, likelier = parts[0].shape[0], torch.zeros_like(targets)
    rows = max(1, _RANK_TILE // (4 * max(1, len(hidden))))

    def logits(start: int) -> Tensor:
        weight = torch.cat([part[start : start + rows].to(hidden.dtype) for part in parts], 1)
        product = _product(hidden, weight)
        return product if head.bias is None else product + head.bias[start : start + rows].float()

    own = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, rows):
        inside = (targets >= start) & (targets < start + rows)
        column = (targets - start).clamp(0, min(rows, vocab - start) - 1)
        own = torch.where(inside, logits(start).gather(1, column[:, None])[:, 0].float(), own)
    for start in range(0, vocab, rows):
        tile = logits(start)
        column = torch.arange(start, start + tile.shape[1], device=tile.device)
        likelier += ((tile > own[:, None]) & (column != targets[:, None])).sum(1)
    return likelier


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden @ weight.T` in fp32 at least, which only CUDA gives of half-precision operands."""
    if hidden.dtype.itemsize > 2:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T
