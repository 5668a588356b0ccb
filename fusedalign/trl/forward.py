"""The forward that the Fused trainers give their models: TRL's contract of a fused head, with this package's head.

`model(..., labels=labels, fused_lm_head=True)` returns log-probabilities instead of logits, as after TRL's
`add_fused_lm_head`; without that argument the model's own forward runs. The head is read at every call, by `lm_head`,
so every head that `lm_head` can read is supported.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedalign.checks import is_dtensor
from fusedalign.engines import call_gathered, gathered, sharded_layers
from fusedalign.head import LMHead, lm_head
from fusedalign.packing import PackedBatch
from fusedalign.packing.attention import Layout
from fusedalign.packing.backbone import Selection
from fusedalign.packing.model import head_logps
from fusedalign.sequence import shift_labels as shifted
from fusedalign.trl import stock
from fusedalign.trl.layouts import Layouts, backbone_output
from fusedalign.trl.options import HeadOptions

#: TRL's name of each per-token output -> ours, in the order in which TRL's own function returns them.
OUTPUT_NAMES = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}

#: Names of the number of experts in configurations.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

#: The forwards that `add_lm_head` has made.
_fused_forwards: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class FusedOutput(stock.FusedCausalLMOutput):
    """TRL's record, with a field for the trainers that log mean logits."""

    row_mean_logits: Tensor | None = None
    """[B]: the mean logit of each row over the vocabulary and all positions, padding too, or over the tokens of packed
    rows; no gradient."""


def our_names(outputs: Iterable[str]) -> list[str]:
    """The names of `linear_logps` for TRL's names of outputs."""
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
    device: Any = None,
) -> None:
    """Give `model` the forward described above.

    Args:
        model: a causal LM of transformers, its layers with adapters or not, but not a `PeftModel` around it.
        outputs: fields of TRL's `FusedCausalLMOutput` to fill in addition to `loss`, `log_probs` and `label_mask`.
        options: of the head.
        mean_positions: the positions over which `row_mean_logits` averages; None: it is not computed.
        loss_hint: as in `linear_logps`.
        mixed: the dtype of mixed precision, if there is any.
        layouts: how the trainer's rows are laid out; default: with a mask.
        device: of the head when it is used; default: its device now.

    Raises:
        TypeError, ValueError: the head cannot be read, see `lm_head`, the model's backbone cannot be told, or no impl
            does what the options ask for.
    """
    with gathered(model.get_output_embeddings()):
        options.check(lm_head(model), our_names(outputs), mixed=mixed, device=device)
    if model.base_model is model:
        raise TypeError(f"expected a model whose base_model is its backbone, got {type(model).__name__}")
    layouts = Layouts() if layouts is None else layouts
    scoring = _Scoring(outputs, options, mean_positions, loss_hint)
    instance_forward = vars(model).get("forward")

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def fused_forward(
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
            extra = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            original = types.MethodType(type(self).forward, self) if instance_forward is None else instance_forward
            return original(*args, **kwargs, **{name: x for name, x in extra.items() if x is not None})
        config = self.config.get_text_config()
        kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        targets = _aligned_targets(labels, shift_labels)
        layout = layouts.for_call(self, layout, kwargs if labels is None else {**kwargs, "labels": labels})
        host_targets, copied = _copied_to_host(targets)
        backbone = backbone_output(self, layout, kwargs)
        if copied is not None:  # the copy was queued before the backbone: this does not wait for the hidden states
            copied.synchronize()
        score = functools.partial(
            _score_packed if isinstance(layout, PackedBatch) else _score,
            targets=host_targets,
            scoring=scoring,
            layout=layout,
        )
        if layers := _sharded_layers(self):
            fields = call_gathered(layers, lambda hidden: score(_read(self), hidden), backbone.last_hidden_state)
        else:
            fields = score(_read(self), backbone.last_hidden_state)
        fields["label_mask"] = (targets != -100).to(fields["log_probs"].device)
        if shift_labels is None:  # TRL's fields leave out the last position
            # Copies: FSDP2 warns of views, on which its hooks can be lost.
            fields = {name: x if x.ndim < 2 else x[:, :-1].clone() for name, x in fields.items()}
        count = fields["label_mask"].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -fields["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            row_counts = layout.row_counts if isinstance(layout, PackedBatch) else kwargs.get("attention_mask")
            aux_loss = _router_loss(config, backbone.router_logits, row_counts)
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedOutput(loss=loss, aux_loss=aux_loss, **fields)

    _fused_forwards.add(fused_forward)
    model.forward = types.MethodType(fused_forward, model)


@dataclass(frozen=True)
class _Scoring:
    """What a model's forward asks of its head; the fields are arguments of `add_lm_head`."""

    outputs: tuple[str, ...]
    options: HeadOptions
    mean_positions: slice | None
    loss_hint: str | None


def _aligned_targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """[B, T] int64: the target of each hidden state. Shifted hidden states would be a copy of them."""
    targets = shift_labels if shift_labels is not None or labels is None else shifted(labels)
    if targets is None:
        raise ValueError("fused_lm_head=True needs labels or shift_labels, got neither")
    return targets.long()  # a user's collator may give a narrower dtype


def _copied_to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy `x` from a GPU: the copy, and the event after it. In a graph, or on a CPU, `x` itself and None."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return x, None
    copy = x.to("cpu", non_blocking=True)
    return copy, torch.cuda.current_stream(x.device).record_event()


@torch.compiler.disable  # reading the head inspects Python objects
def _read(model: Any) -> LMHead:
    return lm_head(model)


@torch.compiler.disable
def _sharded_layers(model: Any) -> list[nn.Module]:
    return sharded_layers(model.get_output_embeddings())


def _first_weight(head: LMHead) -> Tensor:
    """[V, D], without the parts that adapters add."""
    return head.weight[0] if isinstance(head.weight, tuple) else head.weight


def _score(
    head: LMHead, hidden: Tensor, targets: Tensor, scoring: _Scoring, layout: Layout | None = None
) -> dict[str, Tensor]:
    """TRL's per-token fields, [B, T], and `row_mean_logits`, [B], where it is wanted."""
    # A model that is split over devices can end on another one than that of its head.
    device = _first_weight(head).device
    hidden, targets = head.expand(hidden.to(device)), targets if targets.device.type == "cpu" else targets.to(device)
    options = scoring.options._asdict()
    names = {theirs: ours for theirs, ours in OUTPUT_NAMES.items() if theirs in scoring.outputs}
    out = head_logps(head, hidden, targets, outputs=tuple(names.values()), loss_hint=scoring.loss_hint, **options)
    fields = {"log_probs": out.logps}
    fields |= {theirs: getattr(out, ours) for theirs, ours in names.items()}
    if scoring.mean_positions is not None:
        with torch.no_grad():
            fields["row_mean_logits"] = _row_mean_logits(head, hidden[:, scoring.mean_positions], options)
    return fields


@torch.compiler.disable  # which hidden states the head takes depends on the targets
def _score_packed(
    head: LMHead, hidden: Tensor, targets: Tensor, scoring: _Scoring, layout: PackedBatch
) -> dict[str, Tensor]:
    """As `_score`, from hidden states of packed tokens, [1, S, D]; means are over the tokens of each row."""
    packed = hidden[0].to(_first_weight(head).device)
    selection = Selection(packed, layout, targets.cpu())
    fields = _score(head, selection.hidden, selection.targets, dataclasses.replace(scoring, mean_positions=None))
    fields = {name: selection.scatter(x) for name, x in fields.items()}
    if scoring.mean_positions is not None:
        with torch.no_grad():
            fields["row_mean_logits"] = _packed_mean_logits(head, packed, layout, scoring.options._asdict())
    return fields


def _packed_mean_logits(head: LMHead, packed: Tensor, layout: PackedBatch, options: Mapping[str, Any]) -> Tensor:
    """[B]: the mean logit over the vocabulary and the tokens of each row."""
    hidden = head.expand(packed)
    if head.softcap is None:
        return _row_mean_logits(head, layout.row_means(hidden)[:, None], options)
    return layout.row_means(_row_mean_logits(head, hidden[:, None], options))


def _row_mean_logits(head: LMHead, hidden: Tensor, options: Mapping[str, Any]) -> Tensor:
    """[B]: the mean logit over the vocabulary and the positions of each row, from expanded hidden states [B, T, D]."""
    if head.softcap is not None:  # not linear: needs the logits of every position, a tile at a time
        targets = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
        mean_logit = head_logps(head, hidden, targets, outputs=["mean_logit"], **options).mean_logit
        assert mean_logit is not None
        return mean_logit.mean(-1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    parts = head.weight if isinstance(head.weight, tuple) else (head.weight,)
    mean_weight = torch.cat([_whole(part.mean(0, dtype=dtype)) for part in parts])
    with torch.autocast(hidden.device.type, enabled=False):
        means = hidden.mean(1, dtype=dtype) @ mean_weight
    return head.scale * (means if head.bias is None else means + _whole(head.bias.mean(dtype=dtype)))


def _whole(x: Any) -> Tensor:
    """The value of a mean over rows that may be sharded."""
    return x.full_tensor() if is_dtensor(x) else x


def _router_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Mixtral's load-balancing loss, which every mixture of experts of transformers shares."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = next(getattr(config, name) for name in EXPERTS if getattr(config, name, None) is not None)
    loss = load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
    assert isinstance(loss, Tensor)
    return loss


def fused_by(model: nn.Module) -> str:
    """The owner of an instance's forward: "fusedalign", "trl", else the qualified name of another forward."""
    forward: Any = model.forward
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if function in _fused_forwards:
            return "fusedalign"
        if stock.is_fused_forward(function):
            return "trl"
        forward = getattr(forward, "__wrapped__", None)
    return _own_name(model.forward)


def _own_name(function: Any) -> str:
    """A function's module and name as they were before `functools.wraps` replaced them."""
    function = getattr(function, "__func__", function)
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    module = names.get("__name__", type(function).__module__)
    return f"{module}.{getattr(code, 'co_name', type(function).__name__)}"
