"""Kahneman-Tversky optimisation: desirable and undesirable completions that need not come in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedalign.checks import check_finite, check_nonnegative, check_plain, check_positive, values_within
from fusedalign.losses.common import PreferenceLoss, check_logps, check_loss_type, check_shape

LOSS_TYPES = ("kto", "apo_zero_unpaired")


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float | None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> PreferenceLoss:
    """Raise desirable completions and lower undesirable ones, relative to a reference model and a common baseline.

    With x = logps - ref_logps and s the logistic function::

        kto                desirable: w_d (1 - s(beta (x - kl)))   undesirable: w_u (1 - s(beta (kl - x)))
        apo_zero_unpaired  desirable: w_d (1 - s(beta x))          undesirable: w_u s(beta x)

    Take the mean of `losses` over the batch; the weights do not enter its denominator. Either side may be absent.

    Args:
        logps: [B], log p(completion | prompt) of the policy, *summed* over its tokens, nats.
        ref_logps: [B], of the reference model.
        desirable: [B] bool.
        kl: scalar, the baseline from `kto_kl`; taken as a constant, and as 0 where it is negative. None for
            "apo_zero_unpaired", which has none. NaN and infinity raise; the value of a tensor on a GPU or in a graph
            is not read: there they make all losses NaN.
        beta: > 0.
        desirable_weight: >= 0, w_d.
        undesirable_weight: >= 0, w_u. The paper keeps (w_d n_d) / (w_u n_u) between 1 and 4/3 for n_d, n_u completions.
        loss_type: "kto" or "apo_zero_unpaired".

    Returns:
        `PreferenceLoss` with `losses` [B] in the order of the input, and as chosen and rejected rewards beta * x of the
        desirable ones, [number of them], and of the others. Computed in fp32 at least.

    Raises:
        TypeError: logps are not floating-point, or `desirable` is not bool.
        ValueError: a shape differs, a number is out of its range, an unknown loss_type, kl is missing or not wanted.

    Source:
        Ethayarajh et al., arXiv:2402.01306, equation 7; D'Oosterlinck et al., arXiv:2408.06266, for the second.

    Example:
        >>> x, desirable = torch.tensor([0.0, 0.0]), torch.tensor([True, False])
        >>> kto_loss(x, x, desirable, 0.0).losses.tolist()
        [0.5, 0.5]
    """
    policy, reference = check_logps(logps=logps, ref_logps=ref_logps)
    check_shape("desirable", desirable, "logps", logps)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}")
    check_loss_type(loss_type, LOSS_TYPES)
    check_positive(beta=beta)
    check_nonnegative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    x = policy - reference
    rewards = beta * x
    gain = x - _baseline(kl, loss_type, x)
    losses = (-beta * torch.where(desirable, gain, -gain)).sigmoid()  # 1 - s(y) = s(-y)
    # Not torch.where of the two weights, which would round them to torch's default dtype.
    losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    return PreferenceLoss(losses, rewards[desirable].detach(), rewards[~desirable].detach())


def _baseline(kl: Tensor | float | None, loss_type: str, like: Tensor) -> Tensor:
    if loss_type == "apo_zero_unpaired":
        if kl is not None:
            raise ValueError(f"kl must be None with loss_type='apo_zero_unpaired', which has no baseline, got {kl}")
        return like.new_zeros(())
    if kl is None:
        raise ValueError("kl must be a scalar with loss_type='kto' (see kto_kl), got None")
    if not isinstance(kl, Tensor):
        check_finite(kl=kl)
        return like.new_tensor(max(float(kl), 0.0))
    check_plain(kl=kl)
    if kl.numel() != 1:
        raise ValueError(f"kl must be a scalar, got shape {tuple(kl.shape)}")
    return values_within("kl", kl.detach().reshape(()).to(like.dtype)).to(like.device).clamp(min=0)


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's baseline: how far the policy is from the reference on completions that do not belong to their prompts.

    max(0, mean(kl_logps - ref_kl_logps)). With several ranks, gather both inputs first: the mean is over all of them,
    and only then is it held at 0.

    Args:
        kl_logps: [B], log p(completion of another prompt | prompt) of the policy, *summed* over its tokens, nats.
        ref_kl_logps: [B], of the reference model.

    Returns:
        A scalar without gradient, >= 0, in fp32 at least; 0 for an empty batch.

    Raises:
        TypeError, ValueError: as `kto_loss`.

    Source:
        Ethayarajh et al., arXiv:2402.01306, and TRL's KTOTrainer.

    Example:
        >>> kto_kl(torch.tensor([-4.0, -1.0]), torch.tensor([-5.0, -4.0])).item()
        2.0
    """
    policy, reference = check_logps(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    return ((policy - reference).detach().sum() / max(len(policy), 1)).clamp(min=0)
