"""Alignment losses without logits. Importing this package needs torch and nothing else."""

from fusedalign.impls import explain
from fusedalign.losses import PreferenceLoss, dpo_loss, sft_loss
from fusedalign.ops import linear_cross_entropy, linear_logps
from fusedalign.problem import Problem, TokenLogps

__version__ = "0.1.0"

__all__ = [
    "PreferenceLoss",
    "Problem",
    "TokenLogps",
    "__version__",
    "dpo_loss",
    "explain",
    "linear_cross_entropy",
    "linear_logps",
    "sft_loss",
]
