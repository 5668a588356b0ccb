"""Fused trainers with log-probabilities from full logits: the oracle where stock TRL refuses."""

import functools
import types

from fusedalign.trl import trainers
from fusedalign.trl.forward import FusedOutput


def add_plain_head(
    model,
    outputs=("log_probs",),
    *,
    options,
    loss_hint=None,
    mean_positions=None,
    mixed=None,
    layouts=None,
    device=None,
):
    """Replacement for `fusedalign.trl.forward.add_lm_head` that uses the model's own forward and head."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, num_items_in_batch=None, layout=None, **kwargs):
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        all_logits = original(*args, **kwargs | {"use_cache": False}).logits.float()
        logits, targets = all_logits[:, :-1], labels[:, 1:]
        logps, mask = logits.log_softmax(-1), targets != -100
        fields = {
            "log_probs": logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
            "entropy": -(logps.exp() * logps).sum(-1),
            "mean_logits": logits.mean(-1),
            "log_sum_sq_probs": (2 * logps).logsumexp(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
        fields = {name: x.where(mask, 0) for name, x in fields.items() if name in ("log_probs", *outputs)}
        if mean_positions is not None:
            fields["row_mean_logits"] = all_logits[:, mean_positions].mean((1, 2)).detach()
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedOutput(loss=-fields["log_probs"].sum() / count, label_mask=mask, **fields)

    model.forward = types.MethodType(forward, model)


def with_plain_head(cls):
    """A subclass of the Fused trainer `cls` that uses `add_plain_head`."""

    class Plain(cls):
        def __init__(self, *args, **kwargs):
            before = trainers.add_lm_head
            trainers.add_lm_head = add_plain_head
            try:
                super().__init__(*args, **kwargs)
            finally:
                trainers.add_lm_head = before

    return Plain
