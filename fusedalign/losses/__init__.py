"""Losses as pure functions of log-probabilities; they import torch alone."""

from fusedalign.losses.common import PreferenceLoss
from fusedalign.losses.cpo import alphapo_rewards, cpo_loss, simpo_loss, tpo_loss
from fusedalign.losses.dpo import dpo_loss, ld_logps, wpo_weights
from fusedalign.losses.kto import kto_kl, kto_loss
from fusedalign.losses.orpo import orpo_loss
from fusedalign.losses.sft import sft_loss

__all__ = [
    "PreferenceLoss",
    "alphapo_rewards",
    "cpo_loss",
    "dpo_loss",
    "kto_kl",
    "kto_loss",
    "ld_logps",
    "orpo_loss",
    "sft_loss",
    "simpo_loss",
    "tpo_loss",
    "wpo_weights",
]
