"""Direct preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedalign.losses.preference import PreferenceLoss, check_logps, check_loss_type, check_positive

LOSS_TYPES = ("sigmoid",)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """DPO: raise the chosen completion over the rejected one, relative to a reference model.

    With a = chosen_logps - ref_chosen_logps, b = rejected_logps - ref_rejected_logps and d = a - b::

        sigmoid:  -log sigmoid(beta * d)

    Args:
        chosen_logps: [B], log p(chosen completion | prompt) of the policy, *summed* over its tokens, nats.
        rejected_logps: [B], likewise for the rejected completion.
        ref_chosen_logps: [B], likewise of the reference model; no gradient is wanted through it.
        ref_rejected_logps: [B], likewise.
        beta: > 0, strength of the pull towards the reference.
        loss_type: "sigmoid".
        label_smoothing: must be 0 with "sigmoid", which does not use it.

    Returns:
        `PreferenceLoss` with rewards beta * a and beta * b. Computed in fp32 at least, whatever comes in.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not [B] like the first, beta <= 0, unknown loss_type, or a label_smoothing that the
            loss type would ignore.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7. TRL's "sigmoid" silently ignores `label_smoothing`; this one
        raises.

    Example:
        >>> import torch
        >>> c, r = torch.tensor([-1.0]), torch.tensor([-3.0])
        >>> round(dpo_loss(c, r, torch.tensor([-2.0]), torch.tensor([-2.0]), beta=0.5).losses.item(), 4)  # log(1 + 1/e)
        0.3133
    """
    chosen, rejected, ref_chosen, ref_rejected = check_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_positive(beta=beta)
    check_loss_type(loss_type, LOSS_TYPES)
    if label_smoothing != 0.0:
        raise ValueError(f"label_smoothing must be 0 with loss_type='sigmoid', which ignores it, got {label_smoothing}")
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())
