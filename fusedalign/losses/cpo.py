"""Preference losses without a reference model: CPO, SimPO, AlphaPO and TPO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedalign.checks import check_finite, check_nonnegative, check_positive
from fusedalign.losses.common import (
    MAX_EXPONENT,
    PreferenceLoss,
    check_label_smoothing,
    check_logps,
    check_loss_type,
    check_unused,
    smoothed_logistic,
)

#: loss_type -> (margin c - r, beta, label_smoothing) -> loss
_LOSS_TYPES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": lambda margin, beta, eps: smoothed_logistic(beta * margin, eps),
    "hinge": lambda margin, beta, eps: torch.relu(1 - beta * margin),
    "ipo": lambda margin, beta, eps: (margin - 1 / (2 * beta)).square(),
}
LOSS_TYPES = tuple(_LOSS_TYPES)

_DEFAULT_TPO_L_GAMMA = 0.5

#: Below it AlphaPO's reward is that of SimPO to the last bit of fp64, and the division by alpha would be 0 / 0 in fp32.
_LEAST_ALPHA = 1e-20


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Contrastive preference optimisation: raise the chosen completion over the rejected one, without a reference.

    With c = chosen_logps, r = rejected_logps, s the logistic function and eps = label_smoothing::

        sigmoid  -(1 - eps) log s(beta (c - r)) - eps log s(-beta (c - r))
        hinge    max(0, 1 - beta (c - r))
        ipo      (c - r - 1/(2 beta))**2,  of means: pass logps averaged over tokens

    The caller adds nll_weight times the NLL of the chosen completion (`sft_loss`; the paper's weight is 1), which keeps
    the policy near the data.

    Args:
        chosen_logps: [B], log p(chosen completion | prompt), nats, summed over its tokens (averaged for "ipo").
        rejected_logps: [B], the same for the rejected completion.
        beta: > 0.
        loss_type: one of the above.
        label_smoothing: in [0, 1), "sigmoid" only.

    Returns:
        `PreferenceLoss` with rewards beta * c and beta * r. Computed in fp32 at least.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not [B] like the first, a number out of its range, an unknown loss_type, or
            label_smoothing with a loss type that would ignore it.

    Source:
        Xu et al., arXiv:2401.08417, equation 3 (sigmoid); SLiC, arXiv:2305.10425 (hinge); Azar et al.,
        arXiv:2310.12036, equation 17 (ipo). As TRL's CPOTrainer, which only warns of an ignored label_smoothing.

    Example:
        >>> out = cpo_loss(torch.tensor([-10.0]), torch.tensor([-30.0]), beta=0.1)
        >>> round(out.losses.item(), 4)  # log(1 + e**-2)
        0.1269
    """
    chosen, rejected = check_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_loss_type(loss_type, _LOSS_TYPES)
    check_positive(beta=beta)
    check_unused("label_smoothing", label_smoothing, 0.0, ["sigmoid"], [loss_type])
    check_label_smoothing(label_smoothing, loss_type=loss_type)
    losses = _LOSS_TYPES[loss_type](chosen - rejected, beta, label_smoothing)
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def simpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """SimPO: the average log-probability as reward, and a margin by which the chosen one must win.

    With c, r the inputs and x = beta (c - r) - gamma::

        -(1 - eps) log s(x) - eps log s(-x)

    Args:
        chosen_mean_logps: [B], log p of the chosen completion *averaged* over its tokens, nats.
        rejected_mean_logps: [B], of the rejected completion.
        beta: > 0; the paper uses 2 to 10.
        gamma: >= 0, the margin itself, in units of reward (not divided by beta); the paper uses 0.3 to 1.6 and more.
        label_smoothing: in [0, 1).

    Returns:
        `PreferenceLoss` with rewards beta * c and beta * r. Computed in fp32 at least.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not [B] like the first, or a number is out of its range.

    Source:
        Meng et al., arXiv:2405.14734, equation 6. TRL's `loss_type="simpo"` also adds an NLL term by default
        (`cpo_alpha=1`), which the paper does not have.

    Example:
        >>> out = simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=1.0)
        >>> round(out.losses.item(), 4)  # log(1 + 1/e)
        0.3133
    """
    chosen, rejected = check_logps(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    check_positive(beta=beta)
    check_nonnegative(gamma=gamma)
    check_label_smoothing(label_smoothing, loss_type="simpo")
    losses = smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing)
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def alphapo_rewards(mean_logps: Tensor, *, alpha: float = 0.25) -> Tensor:
    """AlphaPO's reward shape: pass it to `simpo_loss` (or `cpo_loss`) in place of log-probabilities.

    With p = exp(mean_logps)::

        (1 - p**-alpha) / alpha, in the limit alpha -> 0: mean_logps

    Args:
        mean_logps: [B], log p of a completion *averaged* over its tokens, nats.
        alpha: any finite number; 0 is SimPO.

    Returns:
        [B] in fp32 at least. The exponent -alpha * mean_logps is held at 40, where TRL overflows.

    Raises:
        TypeError, ValueError: as `simpo_loss`.

    Source:
        Gupta et al., arXiv:2501.03884, and TRL's CPOTrainer.

    Example:
        >>> round(alphapo_rewards(torch.tensor([-2.0]), alpha=0.5).item(), 4)  # (1 - e) / 0.5
        -3.4366
    """
    (logps,) = check_logps(mean_logps=mean_logps)
    check_finite(alpha=alpha)
    return logps if abs(alpha) < _LEAST_ALPHA else -(-alpha * logps).clamp(max=MAX_EXPONENT).expm1() / alpha


def tpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.01,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = _DEFAULT_TPO_L_GAMMA,
) -> PreferenceLoss:
    """Triple preference optimisation: a contrast of pairs, to which the caller adds the NLL of a gold completion.

    ``sigmoid``, ``hinge`` and ``ipo`` are those of `cpo_loss`; ``tpo-l`` is `simpo_loss`, on averaged logps. The
    caller adds tpo_alpha (by default 1 in TRL) times `sft_loss` of the gold completion.

    Args:
        chosen_logps: [B], log p(chosen completion | prompt), nats, summed over its tokens; averaged for "ipo" and
            "tpo-l".
        rejected_logps: [B], of the rejected completion.
        beta: > 0.
        loss_type: one of the above.
        label_smoothing: in [0, 1), "sigmoid" and "tpo-l".
        gamma: >= 0, the margin of "tpo-l", in units of reward.

    Returns:
        `PreferenceLoss` with rewards beta times the inputs. Computed in fp32 at least.

    Raises:
        TypeError, ValueError: as `cpo_loss`, and for a gamma with a loss type that has no margin.

    Source:
        Saeidi et al., arXiv:2405.16681, and TRL's experimental TPOTrainer for the variants.

    Example:
        >>> round(tpo_loss(torch.tensor([-10.0]), torch.tensor([-30.0]), beta=0.1).losses.item(), 4)
        0.1269
    """
    check_loss_type(loss_type, (*LOSS_TYPES, "tpo-l"))
    check_unused("gamma", gamma, _DEFAULT_TPO_L_GAMMA, ["tpo-l"], [loss_type])
    if loss_type == "tpo-l":
        return simpo_loss(chosen_logps, rejected_logps, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return cpo_loss(chosen_logps, rejected_logps, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
