"""Losses as pure functions of log-probabilities. They import torch and nothing else."""

from fusedalign.losses.dpo import dpo_loss
from fusedalign.losses.preference import PreferenceLoss
from fusedalign.losses.sft import sft_loss

__all__ = ["PreferenceLoss", "dpo_loss", "sft_loss"]
