"""A model's backbone over a packed batch, and the hidden states that the LM head needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedalign.compaction import send
from fusedalign.packing.attention import marker
from fusedalign.packing.batch import PackedBatch, RightPadded


def packed_output(model: Any, batch: PackedBatch, *, device: torch.device | None = None, **options: Any) -> Any:
    """The output record of the model's backbone for a packed batch; its `last_hidden_state` is [1, S, D].

    Args:
        model: a causal LM of transformers whose attention is installed (`enable`), not the `PeftModel` around it.
        batch: on any device.
        device: on which the model runs; default: that of its embeddings.
        options: more arguments of the backbone, such as `output_router_logits`.
    """
    arguments = packed_arguments(batch, device or embeddings_device(model))
    return model.base_model(**arguments, use_cache=False, **options)


def embeddings_device(model: Any) -> torch.device:
    """The device of a model's input embeddings.

    PEFT's wrapper for trained tokens would merge them into `weight`, which fails where an engine has sharded it.
    """
    parameter: Tensor = next(model.get_input_embeddings().parameters())
    return parameter.device


def packed_arguments(batch: PackedBatch, device: torch.device) -> dict[str, Any]:
    """The arguments of a backbone on `device` for a packed batch."""
    batch = batch.to(device)
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": marker(device),
        "layout": batch,
    }


def unmasked_arguments(input_ids: Tensor, layout: RightPadded) -> dict[str, Any]:
    """The arguments of a backbone in the place of the attention mask of right-padded rows, `input_ids` [B, L]."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return {"attention_mask": marker(input_ids.device), "position_ids": positions, "layout": layout}


class Selection:
    """The hidden states that predict the targets of a packed batch, one for each target, and their padded slots."""

    def __init__(self, hidden: Tensor, batch: PackedBatch, targets: Tensor) -> None:
        slots = (targets != -100).flatten().nonzero()[:, 0]
        if not batch.valid.flatten()[slots].all():
            raise ValueError("labels must be -100 where the token before them is padding, got labels on padding")
        index = send(batch.token_index.flatten()[slots], hidden.device)
        self.shape = targets.shape
        self.slots = send(slots, hidden.device)
        self.targets = targets.flatten()[slots]
        self.hidden = hidden.index_select(0, index)

    def scatter(self, values: Tensor) -> Tensor:
        """[N] -> [B, L]."""
        return values.new_zeros(self.shape.numel()).index_copy(0, self.slots, values).view(self.shape)
