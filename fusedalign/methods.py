"""The training methods: a row for each command that trains, and the trainers without a command. Imports no TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """What a command trains with, and the columns that its data set must have."""

    trainer: str
    """name of the class in TRL; this package's class has "Fused" before it"""
    config: str
    """name of the configuration class in TRL"""
    columns: tuple[tuple[str, ...], ...]
    """alternative sets of columns; the first set that a data set has is used"""
    about: str
    defaults: dict[str, Any] = field(default_factory=dict)
    """values of the configuration that differ from TRL's defaults"""
    example: str = ""
    """flags for the usage text, where the method has a line of its own"""


_PAIRS = (("chosen", "rejected"),)
METHODS = {
    "sft": Method(
        "SFTTrainer",
        "SFTConfig",
        (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), ("text",), ("chosen",)),
        "supervised fine-tuning",
        example="--learning_rate 1e-4",
    ),
    "dpo": Method(
        "DPOTrainer", "DPOConfig", _PAIRS, "direct preference optimisation, fifteen losses", example="--beta 0.2"
    ),
    "kto": Method(
        "KTOTrainer", "KTOConfig", (("prompt", "completion", "label"), *_PAIRS), "good and bad answers, unpaired"
    ),
    "cpo": Method("CPOTrainer", "CPOConfig", _PAIRS, "contrastive preference optimisation, no reference model"),
    "simpo": Method(
        "CPOTrainer",
        "CPOConfig",
        _PAIRS,
        "simple preference optimisation: CPO with the loss simpo and without its NLL; AlphaPO with --alpha",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    ),
    "orpo": Method("ORPOTrainer", "ORPOConfig", _PAIRS, "SFT and an odds ratio at once, no reference model"),
}
#: The methods with a reference model, which take `ref_logps`.
WITH_REFERENCE = ("dpo", "kto")
#: TRL's trainers that have a Fused form in `fusedalign.trl`; TPO has no command.
TRAINERS = tuple(dict.fromkeys([*(method.trainer for method in METHODS.values()), "TPOTrainer"]))
