"""Odds ratio preference optimisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.checks import check_positive
from fusedalign.losses.common import PreferenceLoss, check_logps

#: Nearest to 0 that a mean log-probability is taken: log(1 - p) and its gradient 1 / (1 - p) stay finite in fp32.
_NEAREST_ZERO = -1e-30


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float = 0.1) -> PreferenceLoss:
    """The odds-ratio term of ORPO; the caller adds the NLL of prompt and chosen completion.

    With c, r the inputs and odds(x) = e**x / (1 - e**x)::

        -beta log s(log odds(c) - log odds(r))

    Args:
        chosen_mean_logps: [B], log p of the chosen completion *averaged* over its tokens, nats, <= 0.
        rejected_mean_logps: [B], of the rejected completion.
        beta: > 0, weight of the term (lambda in the paper; 0.1 to 1 there).

    Returns:
        `PreferenceLoss` with rewards beta * c and beta * r. Computed in fp32 at least; finite, with a finite gradient,
        up to and including c = -0.0.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not [B] like the first, or beta is out of its range.

    Source:
        Hong et al., arXiv:2403.07691, equations 4 and 7. TRL returns the term with the opposite sign, and infinities
        where a log-probability rounds to 0.

    Example:
        >>> half, third = torch.tensor([0.5]).log(), torch.tensor([1 / 3]).log()
        >>> round(orpo_loss(half, third, beta=1.0).losses.item(), 4)  # odds 1 and 1/2: -log(2/3)
        0.4055
    """
    chosen, rejected = check_logps(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    check_positive(beta=beta)
    losses = -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def _log_odds(logps: Tensor) -> Tensor:
    return logps - log1mexp(logps.clamp(max=_NEAREST_ZERO))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e**x) for x < 0, exact at both ends, value and gradient.

    Two branches that meet at -log 2, after Maechler 2012, "Accurately computing log(1 - exp(-|a|))". Each is computed
    on inputs of its own half, since a NaN of the other branch would reach the gradient.
    """
    near = x > -math.log(2)
    return torch.where(near, (-x.where(near, -1.0).expm1()).log(), (-x.where(~near, -1.0).exp()).log1p())
