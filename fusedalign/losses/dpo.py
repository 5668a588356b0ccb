"""Direct preference optimisation and the losses that share its inputs: a policy and a reference model, on pairs.

A loss type is one function below, with its name, what it needs and its source in the decorator and docstring.
Everything else, the error for unknown names included, follows from the table that the decorator fills.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.checks import check_finite, check_plain, check_positive, check_share, values_within
from fusedalign.losses.common import (
    MAX_EXPONENT,
    PreferenceLoss,
    as_float,
    check_label_smoothing,
    check_logps,
    check_loss_type,
    check_shape,
    check_unused,
    nonzero,
    smoothed_logistic,
)


@dataclass(frozen=True)
class _Terms:
    """The inputs of a loss type, all [B], named as in the documentation."""

    c: Tensor
    """chosen, policy"""
    r: Tensor
    """rejected, policy"""
    c0: Tensor
    """chosen, reference"""
    r0: Tensor
    """rejected, reference"""
    chosen_score: Tensor
    """a, or its f-divergence score"""
    rejected_score: Tensor
    """b, or its f-divergence score"""
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def a(self) -> Tensor:
        return self.c - self.c0

    @property
    def b(self) -> Tensor:
        return self.r - self.r0

    @property
    def d(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def mean_d(self) -> Tensor:
        """Each score divided by the length of its own completion; 0 for an empty one."""
        assert self.chosen_lengths is not None
        assert self.rejected_lengths is not None
        return self.chosen_score / nonzero(self.chosen_lengths) - self.rejected_score / nonzero(self.rejected_lengths)


@dataclass(frozen=True)
class _LossType:
    function: Callable[[_Terms], Tensor]
    uses: frozenset[str]
    """names of the arguments of `dpo_loss` that it uses, in addition to the common ones"""
    smoothing_below: float
    smoothing_above_zero: bool


_LOSS_TYPES: dict[str, _LossType] = {}


def _loss_type(*uses: str, smoothing_below: float = 1.0, smoothing_above_zero: bool = False) -> Callable:
    """Register a function, under its own name, as a loss type that uses the options `uses`."""

    def register(function: Callable[[_Terms], Tensor]) -> Callable[[_Terms], Tensor]:
        _LOSS_TYPES[function.__name__] = _LossType(function, frozenset(uses), smoothing_below, smoothing_above_zero)
        return function

    return register


@_loss_type("f_divergence_type")
def sigmoid(t: _Terms) -> Tensor:
    """-log s(beta d). Rafailov et al., arXiv:2305.18290, equation 7."""
    return -F.logsigmoid(t.beta * t.d)


@_loss_type("f_divergence_type")
def hinge(t: _Terms) -> Tensor:
    """max(0, 1 - beta d). SLiC, arXiv:2305.10425; with a reference as in RSO, arXiv:2309.06657."""
    return torch.relu(1 - t.beta * t.d)


@_loss_type("f_divergence_type", "chosen_lengths", "rejected_lengths")
def ipo(t: _Terms) -> Tensor:
    """(mean d - 1 / (2 beta))**2. Azar et al., arXiv:2310.12036, equation 17, averaged over tokens."""
    return (t.mean_d - 1 / (2 * t.beta)).square()


@_loss_type("f_divergence_type", "label_smoothing", smoothing_above_zero=True)
def exo_pair(t: _Terms) -> Tensor:
    """KL of (s(beta d), s(-beta d)) from (1 - eps, eps). Ji et al., arXiv:2402.00856, equation 16."""
    x, eps = t.beta * t.d, t.label_smoothing
    chosen_term = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-eps))
    return chosen_term + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(eps))


@_loss_type()
def nca_pair(t: _Terms) -> Tensor:
    """-log s(beta a) - log s(-beta a) / 2 - log s(-beta b) / 2. Chen et al., arXiv:2402.05369."""
    a, b = t.beta * t.a, t.beta * t.b
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


@_loss_type("f_divergence_type", "label_smoothing", smoothing_below=0.5)
def robust(t: _Terms) -> Tensor:
    """[-(1 - eps) log s(beta d) + eps log s(-beta d)] / (1 - 2 eps). Chowdhury et al., arXiv:2403.00409."""
    x, eps = t.beta * t.d, t.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


@_loss_type()
def bco_pair(t: _Terms) -> Tensor:
    """-log s(beta a) - log s(-beta b). Jung et al., arXiv:2404.04656, without the reward shift."""
    return -F.logsigmoid(t.beta * t.a) - F.logsigmoid(-t.beta * t.b)


@_loss_type()
def sppo_hard(t: _Terms) -> Tensor:
    """(a - 1 / (2 beta))**2 + (b + 1 / (2 beta))**2. Wu et al., arXiv:2405.00675, equation 4.7 with P of 1 and 0."""
    return (t.a - 0.5 / t.beta).square() + (t.b + 0.5 / t.beta).square()


@_loss_type("label_smoothing")
def aot(t: _Terms) -> Tensor:
    """Logistic loss of sort(c - r) - sort(c0 - r0) over the batch. Melnyk et al., arXiv:2406.05882."""
    sorted_margin = (t.c - t.r).sort().values - (t.c0 - t.r0).sort().values
    return smoothed_logistic(t.beta * sorted_margin, t.label_smoothing)


@_loss_type("label_smoothing")
def aot_unpaired(t: _Terms) -> Tensor:
    """Logistic loss of sort(a) - sort(b) over the batch. Melnyk et al., arXiv:2406.05882."""
    return smoothed_logistic(t.beta * (t.a.sort().values - t.b.sort().values), t.label_smoothing)


@_loss_type()
def apo_zero(t: _Terms) -> Tensor:
    """1 - s(beta a) + s(beta b). D'Oosterlinck et al., arXiv:2408.06266, equation 7."""
    return (-t.beta * t.a).sigmoid() + (t.beta * t.b).sigmoid()


@_loss_type()
def apo_down(t: _Terms) -> Tensor:
    """s(beta a) + 1 - s(beta (a - b)). D'Oosterlinck et al., arXiv:2408.06266, equation 8."""
    return (t.beta * t.a).sigmoid() + (-t.beta * (t.a - t.b)).sigmoid()


@_loss_type("f_divergence_type", "discopop_tau")
def discopop(t: _Terms) -> Tensor:
    """-(1 - m) log s(x) + m e**-x, x = beta d, m = s(x / tau). Lu et al., arXiv:2406.08414, equation 5."""
    x = t.beta * t.d
    exponential = (F.logsigmoid(x / t.discopop_tau) - x).clamp(max=MAX_EXPONENT).exp()  # m e**-x without inf * 0
    return -F.logsigmoid(x) * (-x / t.discopop_tau).sigmoid() + exponential


@_loss_type("chosen_lengths")
def sft(t: _Terms) -> Tensor:
    """Token mean of -log p over the chosen completions of the batch, the same number for every pair."""
    assert t.chosen_lengths is not None
    return (-t.c.sum() / nonzero(t.chosen_lengths.sum())).expand_as(t.c)


@_loss_type("f_divergence_type", "chosen_lengths", "rejected_lengths")
def sigmoid_norm(t: _Terms) -> Tensor:
    """-log s(beta mean d): "sigmoid" on scores per token. Tulu 3, arXiv:2411.15124; SimPO with a reference."""
    return -F.logsigmoid(t.beta * t.mean_d)


#: The names that `loss_type` may have.
LOSS_TYPES = tuple(_LOSS_TYPES)

#: f_divergence_type -> the score that replaces a log-ratio x; near 0 each is x plus a constant.
_F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda x, coef: x,
    "forward_kl": lambda x, coef: 1 - (-x).clamp(max=MAX_EXPONENT).exp(),
    "js_divergence": lambda x, coef: math.log(2) + F.logsigmoid(x),
    "alpha_divergence": lambda x, coef: (
        x if coef == 1 else ((coef - 1) * x).clamp(max=MAX_EXPONENT).expm1() / (coef - 1)
    ),
}
_DEFAULT_ALPHA_COEF = 0.5
_DEFAULT_DISCOPOP_TAU = 0.05


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = _DEFAULT_ALPHA_COEF,
    discopop_tau: float = _DEFAULT_DISCOPOP_TAU,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> PreferenceLoss:
    """Raise the chosen completion over the rejected one, relative to a reference model.

    With a = chosen_logps - ref_chosen_logps, b = rejected_logps - ref_rejected_logps, d = a - b, s the logistic
    function, eps = label_smoothing, and "mean d" with each score divided by the length of its own completion::

        sigmoid       -log s(beta d)
        hinge         max(0, 1 - beta d)
        ipo           (mean d - 1/(2 beta))**2
        exo_pair      s(x) (log s(x) - log(1 - eps)) + s(-x) (log s(-x) - log eps),  x = beta d
        nca_pair      -log s(beta a) - log s(-beta a)/2 - log s(-beta b)/2
        robust        [-(1 - eps) log s(beta d) + eps log s(-beta d)] / (1 - 2 eps)
        bco_pair      -log s(beta a) - log s(-beta b)
        sppo_hard     (a - 1/(2 beta))**2 + (b + 1/(2 beta))**2
        aot           -(1 - eps) log s(x) - eps log s(-x),  x = beta (sort(c - r) - sort(c0 - r0)) over the batch
        aot_unpaired  the same of x = beta (sort(a) - sort(b))
        apo_zero      1 - s(beta a) + s(beta b)
        apo_down      s(beta a) + 1 - s(beta d)
        discopop      -(1 - m) log s(x) + m exp(-x),  x = beta d, m = s(x / discopop_tau)
        sft           -sum(chosen_logps) / sum(chosen_lengths)
        sigmoid_norm  -log s(beta mean d)

    Args:
        chosen_logps: [B], log p(chosen completion | prompt) of the policy, *summed* over its tokens, nats.
        rejected_logps: [B], the same for the rejected completion.
        ref_chosen_logps: [B], of the reference model; no gradient is wanted through it.
        ref_rejected_logps: [B], of the reference model.
        beta: > 0, strength of the pull towards the reference.
        loss_type: one of the above, or several; their losses are added.
        loss_weights: one finite number a loss type; default all 1.
        label_smoothing: exo_pair in (0, 1), robust in [0, 0.5), aot and aot_unpaired in [0, 1); the others take 0 only.
        f_divergence_type: "reverse_kl" (scores a, b), "forward_kl" (1 - exp(-a)), "js_divergence" (log 2 + log s(a)),
            "alpha_divergence" ((exp((al - 1) a) - 1) / (al - 1)); for sigmoid, hinge, ipo, exo_pair, robust, discopop
            and sigmoid_norm, with which only sft may be combined then. Exponents are held at 40.
        f_alpha_divergence_coef: al of "alpha_divergence"; 1 gives reverse_kl.
        discopop_tau: > 0, temperature of the blend in discopop.
        chosen_lengths: [B] >= 0, completion tokens of the chosen, for ipo, sigmoid_norm and sft.
        rejected_lengths: [B] >= 0, of the rejected, for ipo and sigmoid_norm.
        pair_weights: [B], finite, the factor of each pair's loss, detached; `wpo_weights` gives those of WPO.
            Not with aot and aot_unpaired: their losses belong to positions in a sorted batch and not to pairs.

    Returns:
        `PreferenceLoss` with rewards beta * a and beta * b. Computed in fp32 at least.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: an input is not [B] like the first, a number is out of its range, an unknown name, lengths are
            missing, or an option has been set that no loss type uses. Lengths and pair weights out of their range raise
            on the CPU; on a GPU and in a graph, where values are not read, that pair's loss is NaN.

    Source:
        Each loss type: see `docs/losses.md` and the functions of this module. f-divergences: Wang et al.,
        arXiv:2309.16240. TRL's trainer ignores label_smoothing where it has no meaning, this function raises; TRL
        leaves forward_kl's exponent free and holds alpha_divergence's at 80.

    Example:
        >>> c, r = torch.tensor([-1.0]), torch.tensor([-3.0])
        >>> round(dpo_loss(c, r, torch.tensor([-2.0]), torch.tensor([-2.0]), beta=0.5).losses.item(), 4)  # log(1 + 1/e)
        0.3133
    """
    c, r, c0, r0 = check_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    if not isinstance(loss_type, Sequence):
        raise TypeError(f"loss_type must be a name or a sequence of names, got {type(loss_type).__name__}")
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = _check_options(names, loss_weights, beta, label_smoothing, f_divergence_type, discopop_tau)
    check_finite(f_alpha_divergence_coef=f_alpha_divergence_coef)
    check_unused(
        "f_alpha_divergence_coef",
        f_alpha_divergence_coef,
        _DEFAULT_ALPHA_COEF,
        ["alpha_divergence"],
        [f_divergence_type],
    )
    chosen_n, rejected_n = _check_lengths(names, c, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    score = _F_DIVERGENCES[f_divergence_type]
    a_score, b_score = (score(x, f_alpha_divergence_coef) for x in (c - c0, r - r0))
    terms = _Terms(c, r, c0, r0, a_score, b_score, chosen_n, rejected_n, beta, label_smoothing, discopop_tau)
    weighted = [weight * _LOSS_TYPES[name].function(terms) for name, weight in zip(names, weights, strict=True)]
    losses = functools.reduce(torch.add, weighted)
    if pair_weights is not None:
        if {"aot", "aot_unpaired"} & set(names):
            raise ValueError(
                f"pair_weights must be None with {', '.join(names)}: aot's losses are not those of single pairs"
            )
        check_shape("pair_weights", pair_weights, "chosen_logps", chosen_logps)
        losses = losses * values_within("pair_weights", as_float(pair_weights.detach()))
    return PreferenceLoss(losses, (beta * terms.a).detach(), (beta * terms.b).detach())


def _check_options(
    names: list[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str,
    discopop_tau: float,
) -> list[float]:
    """The loss weights, after a check of all numbers and names."""
    if not names:
        raise ValueError("loss_type must name at least one loss, got none")
    for name in names:
        check_loss_type(name, LOSS_TYPES)
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must have one number for each of {', '.join(names)}, got {len(weights)}")
    check_finite(**{f"loss_weights[{i}]": weight for i, weight in enumerate(weights)})
    check_positive(beta=beta, discopop_tau=discopop_tau)
    if f_divergence_type not in _F_DIVERGENCES:
        raise ValueError(f"f_divergence_type must be one of {', '.join(_F_DIVERGENCES)}, got {f_divergence_type!r}")
    for name in names:
        entry = _LOSS_TYPES[name]
        if "label_smoothing" in entry.uses:
            below, above_zero = entry.smoothing_below, entry.smoothing_above_zero
            check_label_smoothing(label_smoothing, below=below, above_zero=above_zero, loss_type=name)
    for option, value, default in (
        ("label_smoothing", label_smoothing, 0.0),
        ("f_divergence_type", f_divergence_type, "reverse_kl"),
        ("discopop_tau", discopop_tau, _DEFAULT_DISCOPOP_TAU),
    ):
        # A divergence changes the score of every loss that has one: all but sft must use it.
        groups = [names]
        if option == "f_divergence_type":
            groups = [[name] for name in names if name != "sft"] or [names]
        for group in groups:
            check_unused(option, value, default, [k for k, v in _LOSS_TYPES.items() if option in v.uses], group)
    return weights


def _check_lengths(names: list[str], logps: Tensor, **lengths: Tensor | None) -> list[Tensor | None]:
    """The lengths in the dtype of `logps`, after a check of their range."""
    checked: list[Tensor | None] = []
    for argument, x in lengths.items():
        needed = [name for name in names if argument in _LOSS_TYPES[name].uses]
        if x is None and needed:
            raise ValueError(f"{argument} is needed with loss_type {', '.join(needed)}, got None")
        if x is not None:
            check_shape(argument, x, "chosen_logps", logps)
            x = values_within(argument, x.to(logps.dtype), least=0.0)
        checked.append(x)
    return checked


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO's weight of each completion: how likely the policy itself is to write it.

    exp(mean over its tokens of (logps - log_sum_sq_probs)); a pair's weight is the product of its two. Where every
    token had the probability that the policy expects of its own samples, it is 1.

    Args:
        logps: [..., T] per-token log p(target) of the policy, nats.
        log_sum_sq_probs: [..., T], log sum_v p_v**2, as `linear_logps` gives it.
        mask: [..., T] bool (or 0/1), the completion's tokens.

    Returns:
        [...], detached, in fp32 at least; 1 for an empty completion.

    Raises:
        ValueError: the shapes differ.

    Source:
        Zhou et al., arXiv:2406.11827, equation 2.

    Example:
        >>> wpo_weights(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), torch.ones(1, 2)).tolist()
        [1.0]
    """
    check_plain(logps=logps)
    check_shape("log_sum_sq_probs", log_sum_sq_probs, "logps", logps)
    check_shape("mask", mask, "logps", logps)
    mask = mask.bool()
    aligned = (as_float(logps) - as_float(log_sum_sq_probs)).detach().where(mask, 0)
    return (aligned.sum(-1) / mask.sum(-1).clamp(min=1)).clamp(max=MAX_EXPONENT).exp()


def ld_logps(logps: Tensor, mask: Tensor, shared_lengths: Tensor, *, ld_alpha: float) -> Tensor:
    """Length-desensitised sums: tokens beyond the length of the pair's shorter completion are weighted by `ld_alpha`.

    Args:
        logps: [..., T] per-token log p(target), nats.
        mask: [..., T] bool (or 0/1), the completion's tokens.
        shared_lengths: [...] integers, tokens of the shorter completion of each row's pair.
        ld_alpha: in [0, 1]; 1 is the plain sum, 0 cuts both completions to the same length.

    Returns:
        [...], in fp32 at least; `dpo_loss` takes it in place of summed logps, of policy and reference.

    Raises:
        ValueError: the shapes differ, or ld_alpha is out of its range.

    Source:
        Liu et al., arXiv:2409.06411.

    Example:
        >>> ld_logps(torch.tensor([[-1.0, -2.0, -4.0]]), torch.ones(1, 3), torch.tensor([2]), ld_alpha=0.5).tolist()
        [-5.0]
    """
    check_plain(logps=logps, shared_lengths=shared_lengths)
    check_shape("mask", mask, "logps", logps)
    if shared_lengths.shape != logps.shape[:-1]:
        expected, got = tuple(logps.shape[:-1]), tuple(shared_lengths.shape)
        raise ValueError(f"shared_lengths must have shape {expected} to match logps, got {got}")
    check_share(ld_alpha=ld_alpha)
    logps, mask = as_float(logps), mask.bool()
    shared = values_within("shared_lengths", shared_lengths.to(logps.dtype), least=0.0)
    tail = mask.cumsum(-1) > shared[..., None]
    logps = logps.where(mask, 0)
    sums = logps.where(~tail, ld_alpha * logps).sum(-1)
    return sums.where(~shared.isnan(), math.nan)  # no comparison holds for NaN
