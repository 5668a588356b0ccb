"""Alignment losses without logits. Importing this package needs torch and nothing else."""

from fusedalign.impls import explain
from fusedalign.losses import (
    PreferenceLoss,
    alphapo_rewards,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    ld_logps,
    orpo_loss,
    sft_loss,
    simpo_loss,
    tpo_loss,
    wpo_weights,
)
from fusedalign.modules import LinearCrossEntropyLoss
from fusedalign.ops import linear_cross_entropy, linear_logps
from fusedalign.problem import Problem, TokenLogps

__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyLoss",
    "PreferenceLoss",
    "Problem",
    "TokenLogps",
    "__version__",
    "alphapo_rewards",
    "cpo_loss",
    "dpo_loss",
    "explain",
    "kto_kl",
    "kto_loss",
    "ld_logps",
    "linear_cross_entropy",
    "linear_logps",
    "orpo_loss",
    "sft_loss",
    "simpo_loss",
    "tpo_loss",
    "wpo_weights",
]
