"""Hidden states and log-probabilities of packed batches, from a causal LM of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fusedalign.head import LMHead, lm_head
from fusedalign.ops import linear_logps
from fusedalign.packing.attention import installed
from fusedalign.packing.backbone import Selection, packed_output
from fusedalign.packing.batch import PackedBatch
from fusedalign.packing.proof import enable
from fusedalign.problem import TokenLogps
from fusedalign.sequence import shift_labels


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Last hidden states of packed tokens.

    Args:
        model: a causal LM of transformers. Its attention function is replaced at the first call, see `enable`; other
            calls of the model give the same results as before.
        batch: from `pack_rows`, `pack_answers`, `pack_padded` or `pack_documents`, on any device.

    Returns:
        [S, D], the input of the LM head. `batch.spread` pads them.

    Raises:
        LayoutError: a ValueError; this model would give wrong results on packed batches, with the reason.

    Example::

        batch = pack_answers(prompts, chosen, rejected)
        hidden = packed_hidden(model, batch)
    """
    if not installed(model):
        enable(model)
    hidden: Tensor = packed_output(model, batch).last_hidden_state[0]
    return hidden


def packed_logps(
    model: Any, batch: PackedBatch, labels: Tensor | None = None, *, outputs: Iterable[str] = (), **options: Any
) -> TokenLogps:
    """Per-token log-probabilities of a packed batch, in the padded layout.

    Args:
        model, batch: as in `packed_hidden`.
        labels: [B, L] int64 on the CPU, unshifted, -100 where a token does not count; default: every token but the
            first of each row.
        outputs, options: as in `fusedalign.linear_logps`.

    Returns:
        `TokenLogps` of [B, L]: [b, t] belongs to the label at [b, t + 1]; zero where nothing counts. Differentiable.

    Raises:
        LayoutError: as `packed_hidden`.
        ValueError: labels of another shape, or on padding.
    """
    if labels is None:
        ids = batch.input_ids.cpu()[0][batch.token_index]
        labels = ids.masked_fill(~batch.valid, -100)
    if labels.shape != batch.valid.shape:
        raise ValueError(f"labels must have shape {tuple(batch.valid.shape)}, got {tuple(labels.shape)}")
    targets = shift_labels(labels.cpu())
    hidden = packed_hidden(model, batch)
    head = lm_head(model)
    weight = head.weight[0] if isinstance(head.weight, tuple) else head.weight
    selection = Selection(hidden.to(weight.device), batch, targets)
    out = head_logps(head, head.expand(selection.hidden), selection.targets, outputs=outputs, **options)
    logps, *others = (None if x is None else selection.scatter(x) for x in out)
    assert logps is not None
    return TokenLogps(logps, *others)


def head_logps(head: LMHead, hidden: Tensor, targets: Tensor, **options: Any) -> TokenLogps:
    """`linear_logps` with the weight, bias, scale and softcap of `head`, from hidden states of `head.expand`."""
    return linear_logps(hidden, head.weight, targets, bias=head.bias, scale=head.scale, softcap=head.softcap, **options)
