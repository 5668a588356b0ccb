"""Alignment losses without logits. Needs torch and nothing else, and imports it on the first use of a name."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

#: Name -> the module that defines it; the losses are in `losses`.
_MODULES = {
    "LinearCrossEntropyLoss": "modules",
    "Problem": "problem",
    "TokenLogps": "problem",
    "explain": "impls",
    "linear_cross_entropy": "ops",
    "linear_logps": "ops",
}
_SUBMODULES = (
    *("checks", "compaction", "graphs", "head", "impls", "losses", "modules", "ops", "private", "problem"),
    *("sequence", "sharding"),
)


def __getattr__(name: str) -> Any:
    """A public name or a submodule, imported on first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"fusedalign.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fusedalign' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fusedalign.{_MODULES.get(name, 'losses')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
