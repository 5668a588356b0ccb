"""Alignment losses without logits. Importing this package needs torch and nothing else."""

from fusedalign import losses
from fusedalign.impls import explain
from fusedalign.losses import *  # noqa: F403 (its `__all__`)
from fusedalign.modules import LinearCrossEntropyLoss
from fusedalign.ops import linear_cross_entropy, linear_logps
from fusedalign.problem import Problem, TokenLogps

__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyLoss",
    "Problem",
    "TokenLogps",
    "__version__",
    "explain",
    "linear_cross_entropy",
    "linear_logps",
]
__all__ += losses.__all__
