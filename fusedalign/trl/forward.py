"""The forward that the Fused trainers give their models: TRL's contract of a fused head, with this package's head.

`model(..., labels=labels, fused_lm_head=True)` returns log-probabilities instead of logits, as after TRL's
`add_fused_lm_head`; without that argument the model is as it was. The head is read at every call, by `lm_head`, so any
head serves that `lm_head` can read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from fusedalign.head import LMHead, lm_head
from fusedalign.ops import linear_logps
from fusedalign.packing import PackedBatch
from fusedalign.packing.attention import Layout
from fusedalign.packing.backbone import Selection
from fusedalign.sequence import shift_labels as shifted
from fusedalign.trl.layouts import Layouts, backbone_output
from fusedalign.trl.options import HeadOptions

#: TRL's name of each per-token output -> ours, in the order in which TRL's own function returns them.
OUTPUT_NAMES = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


#: What configurations call the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class FusedOutput(FusedCausalLMOutput):
    """TRL's record, and what the trainers ask for whose stock forms keep the logits."""

    row_mean_logits: Tensor | None = None
    """[B]: the mean logit of each row over the vocabulary and all positions, padding too, or over the tokens of packed
    rows; no gradient."""


def our_names(outputs: Iterable[str]) -> list[str]:
    """Those of `linear_logps`, for TRL's names of outputs."""
    return [ours for theirs, ours in OUTPUT_NAMES.items() if theirs in outputs]


def add_lm_head(
    model: PreTrainedModel,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    options: HeadOptions,
    mean_positions: slice | None = None,
    loss_hint: str | None = None,
    mixed: torch.dtype | None = None,
    layouts: Layouts | None = None,
) -> None:
    """Give `model` the forward described above.

    Args:
        model: a causal LM of transformers, its layers with adapters or not, but not a `PeftModel` around it.
        outputs: which fields of TRL's `FusedCausalLMOutput` to fill, beside `loss`, `log_probs` and `label_mask`.
        options: of the head.
        mean_positions: the positions over which `row_mean_logits` averages; None: it is not wanted.
        loss_hint: as in `linear_logps`.
        mixed: the dtype of mixed precision, if there is any.
        layouts: how the trainer's rows are laid out; default: with a mask.

    Raises:
        TypeError, ValueError: the head cannot be read, see `lm_head`, the model's backbone cannot be told, or no impl
            does what the options ask for.
    """
    options.check(lm_head(model), our_names(outputs), mixed=mixed)
    if model.base_model is model:
        raise TypeError(f"expected a model whose base_model is its backbone, got {type(model).__name__}")
    layouts = Layouts() if layouts is None else layouts
    instead = vars(model).get("forward")  # of the instance, where somebody has put one there

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def fusedalign_forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            more = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            original = types.MethodType(type(self).forward, self) if instead is None else instead
            return original(*args, **kwargs, **{name: x for name, x in more.items() if x is not None})
        config = self.config.get_text_config()
        kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # Aligned targets instead of shifted hidden states, which would be a copy of them.
        targets = shift_labels if shift_labels is not None or labels is None else shifted(labels)
        if targets is None:
            raise ValueError("fused_lm_head=True needs labels or shift_labels, got neither")
        targets = targets.long()  # a collator of one's own may give fewer bits
        layout = layouts.for_call(self, layout, kwargs if labels is None else {**kwargs, "labels": labels})
        copy, arrived = _copied_to_host(targets)
        backbone = backbone_output(self, layout, kwargs)
        if arrived is not None:  # long before the hidden states, for which nobody waits
            arrived.synchronize()
        score = _score_packed if isinstance(layout, PackedBatch) else _score
        hidden = backbone.last_hidden_state
        out = score(_read(self), hidden, copy, outputs, mean_positions, options, loss_hint, layout)
        out["label_mask"] = (targets != -100).to(out["log_probs"].device)
        if shift_labels is None:  # TRL's fields have no place for the last position
            out = {name: x if x.ndim < 2 else x[:, :-1] for name, x in out.items()}
        count = out["label_mask"].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -out["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            counts = layout.row_counts if isinstance(layout, PackedBatch) else kwargs.get("attention_mask")
            aux_loss = _router_loss(config, backbone.router_logits, counts)
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedOutput(loss=loss, aux_loss=aux_loss, **out)

    model.forward = types.MethodType(fusedalign_forward, model)


def _copied_to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy `x` from a GPU: the copy, and when it may be read. In a graph and without a GPU `x` itself."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return x, None
    copy = x.to("cpu", non_blocking=True)
    return copy, torch.cuda.current_stream(x.device).record_event()


@torch.compiler.disable
def _read(model: Any) -> LMHead:
    """Reading a head is no work for a graph."""
    return lm_head(model)


def _first(head: LMHead) -> Tensor:
    """[V, D], whatever an adapter has put beside it."""
    return head.weight[0] if isinstance(head.weight, tuple) else head.weight


def _score(
    head: LMHead,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple[str, ...],
    mean_positions: slice | None,
    options: HeadOptions,
    loss_hint: str | None,
    layout: Layout | None = None,
) -> dict[str, Tensor]:
    """TRL's per-token fields, [B, T], and `row_mean_logits`, [B], where it is wanted."""
    # A model that is split over devices can end on another one than that of its head.
    device = _first(head).device
    hidden, targets = head.expand(hidden.to(device)), targets if targets.device.type == "cpu" else targets.to(device)
    of_head = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, **options._asdict()}
    wanted = {theirs: ours for theirs, ours in OUTPUT_NAMES.items() if theirs in outputs}
    out = linear_logps(hidden, head.weight, targets, outputs=tuple(wanted.values()), loss_hint=loss_hint, **of_head)
    fields = {"log_probs": out.logps}
    fields |= {theirs: getattr(out, ours) for theirs, ours in wanted.items()}
    if mean_positions is not None:
        with torch.no_grad():
            fields["row_mean_logits"] = _row_mean_logits(head, hidden[:, mean_positions], of_head)
    return fields


@torch.compiler.disable  # which hidden states the head takes depends on the targets
def _score_packed(
    head: LMHead,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple[str, ...],
    mean_positions: slice | None,
    options: HeadOptions,
    loss_hint: str | None,
    layout: PackedBatch,
) -> dict[str, Tensor]:
    """As `_score`, from hidden states of packed tokens, [1, S, D]; means are those over the tokens of each row."""
    device = _first(head).device
    packed = hidden[0].to(device)
    selection = Selection(packed, layout, targets.cpu())
    fields = _score(head, selection.hidden, selection.targets, outputs, None, options, loss_hint)
    fields = {name: selection.scatter(x) for name, x in fields.items()}
    if mean_positions is not None:
        with torch.no_grad():
            of_head = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, **options._asdict()}
            fields["row_mean_logits"] = _packed_mean_logits(head, packed, layout, of_head)
    return fields


def _packed_mean_logits(head: LMHead, packed: Tensor, layout: PackedBatch, of_head: dict[str, Any]) -> Tensor:
    """[B]: the mean logit over the vocabulary and the tokens of each row."""
    hidden = head.expand(packed)
    if head.softcap is None:
        return _row_mean_logits(head, layout.row_means(hidden)[:, None], of_head)
    return layout.row_means(_row_mean_logits(head, hidden[:, None], of_head))


def _row_mean_logits(head: LMHead, hidden: Tensor, of_head: dict[str, Any]) -> Tensor:
    """[B]: the mean logit over the vocabulary and the positions of each row."""
    if head.softcap is not None:  # then there is no way around the logits of every position; a tile at a time
        targets = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
        mean_logit = linear_logps(hidden, head.weight, targets, outputs=["mean_logit"], **of_head).mean_logit
        assert mean_logit is not None
        return mean_logit.mean(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = head.weight if isinstance(head.weight, tuple) else (head.weight,)
    mean_row = torch.cat([part.mean(0, dtype=wide) for part in parts])
    with torch.autocast(hidden.device.type, enabled=False):
        means = hidden.mean(1, dtype=wide) @ mean_row
    return head.scale * (means if head.bias is None else means + head.bias.mean(dtype=wide))


def _router_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss, which is Mixtral's in every mixture of experts of transformers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = next(getattr(config, name) for name in EXPERTS if getattr(config, name, None) is not None)
    loss = load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
    assert isinstance(loss, Tensor)
    return loss


def fused_by(model: nn.Module) -> str:
    """Whose forward an instance has: "fusedalign", "trl", else the name of what stands in their place."""
    forward: Any = model.forward
    while forward is not None:
        name, where = _code(forward)
        if (name, where) == ("fusedalign_forward", __name__):
            return "fusedalign"
        if name == "_fused_forward" and where.startswith("trl."):
            return "trl"
        forward = getattr(forward, "__wrapped__", None)
    return ".".join(reversed(_code(model.forward)))


def _code(function: Any) -> tuple[str, str]:
    """A function's own name and module, whatever `functools.wraps` has written over them."""
    function = getattr(function, "__func__", function)
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return str(getattr(code, "co_name", type(function).__name__)), str(names.get("__name__", type(function).__module__))
