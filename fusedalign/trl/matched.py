"""KTO's matched and mismatched rows: their layouts, and one forward for both where that is less work.

For its KL term KTO scores each prompt a second time, with another row's completion. TRL runs these rows in a second
forward. Packed together, each prompt is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.packing import PackedBatch, pack_padded
from fusedalign.packing.attention import Layout
from fusedalign.sequence import completion_labels
from fusedalign.trl.layouts import PACKED, UNPACKABLE, Layouts

#: Cost of a token with a gradient, in forwards: one, another under gradient checkpointing, and two for the backward.
_COST_WITH_GRADIENT = 4


@dataclass(frozen=True)
class KTOLayouts:
    """The layouts of a batch of KTO."""

    matched: Layout | None
    mismatched: Layout | None
    both: PackedBatch | None = None
    """all matched rows, then all mismatched ones"""

    def to(self, device: Any, non_blocking: bool = False) -> KTOLayouts:
        """With the model's tensors on `device`."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> KTOLayouts:
        """With the model's tensors in pinned memory."""
        return self._moved(lambda x: x.pin_memory() if isinstance(x, PackedBatch) else x)

    def _moved(self, move: Callable[[Any], Any]) -> KTOLayouts:
        layouts = (self.matched, self.mismatched, self.both)
        return KTOLayouts(*(None if layout is None else move(layout) for layout in layouts))

    def joined(self, with_gradient: bool) -> PackedBatch | None:
        """`both` where one forward over it is less work than two, else None."""
        if not isinstance(self.matched, PackedBatch) or not isinstance(self.mismatched, PackedBatch):
            return None
        cost = _COST_WITH_GRADIENT if with_gradient else 1
        assert self.both is not None
        added_tokens = self.both.tokens - self.matched.tokens
        return self.both if cost * added_tokens < self.mismatched.tokens else None


def lay_out_kto(layouts: Layouts, batch: Mapping[str, Any]) -> KTOLayouts | None:
    """The layouts of a batch of TRL's collator for KTO."""
    matched = layouts.of(batch)
    if "KL_input_ids" not in batch:
        return None if matched in (None, UNPACKABLE) else KTOLayouts(matched, None)
    mismatched = layouts.of({name: batch[f"KL_{name}"] for name in ("input_ids", "attention_mask")})
    if UNPACKABLE in (matched, mismatched) or matched is None is mismatched:
        return None
    both = None
    if layouts.kind == PACKED:
        both = pack_padded(*_stacked(batch, "input_ids", "attention_mask"), groups=2, multiple=layouts.multiple)
    return KTOLayouts(matched, mismatched, both)


def _stacked(batch: Mapping[str, Any], *names: str) -> list[Tensor]:
    """Matched rows, then mismatched ones, padded with zeros to one width."""
    stacked = []
    for name in names:
        parts = (batch[name], batch[f"KL_{name}"])
        width = max(x.shape[1] for x in parts)
        stacked.append(torch.cat([F.pad(x, (0, width - x.shape[1])) for x in parts]))
    return stacked


class MatchedModel:
    """Stands for a model in TRL's two calls for a batch, its matched and mismatched rows, in any order.

    Where one forward computes both, the first call runs it and the second returns its part of the output.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any], layouts: KTOLayouts, *, may_join: bool = True) -> None:
        self.model, self.batch, self.layouts = model, batch, layouts
        self.with_gradient = torch.is_grad_enabled()
        self.both = layouts.joined(self.with_gradient) if may_join else None
        self.output: Any = None

    def __call__(self, **arguments: Any) -> Any:
        """The model's output for the matched or the mismatched rows."""
        ids, batch = arguments.get("input_ids"), self.batch
        is_mismatched = ids is batch.get("KL_input_ids")
        if ids is None or not arguments.get("fused_lm_head") or not (is_mismatched or ids is batch["input_ids"]):
            return self.model(**arguments)
        if self.both is None:
            layout = self.layouts.mismatched if is_mismatched else self.layouts.matched
            return self.model(**arguments, layout=layout)
        if self.output is None:
            self.output = self._run_both()
        count, width = len(batch["input_ids"]), ids.shape[1] - 1
        part = slice(count, None) if is_mismatched else slice(count)
        fields = {field.name: getattr(self.output, field.name) for field in dataclasses.fields(self.output)}
        per_token = {name: x[part, :width] for name, x in fields.items() if isinstance(x, Tensor) and x.ndim == 2}
        return dataclasses.replace(self.output, **per_token)

    def _run_both(self) -> Any:
        ids, attention_mask, completion_mask = _stacked(self.batch, "input_ids", "attention_mask", "completion_mask")
        with torch.set_grad_enabled(self.with_gradient):  # TRL disables gradients for mismatched rows
            return self.model(
                input_ids=ids,
                attention_mask=attention_mask,
                labels=completion_labels(ids, completion_mask),
                layout=self.both,
                use_cache=False,
                fused_lm_head=True,
            )
