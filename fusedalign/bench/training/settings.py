"""The choices of `fusedalign bench trl`: trainings, models, mixes of lengths, the rows of a table; jobs and figures."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from typing import Any

#: No mix has longer rows, so no row is truncated.
MAX_LENGTH = 4096
STEPS = 12
SHORTEST = 4
"""tokens of a prompt or an answer"""


@dataclass(frozen=True)
class Training:
    """A trainer and its configuration."""

    trainer: str
    """the name of TRL's class without its ending "Trainer" """
    about: str
    pairs: bool = True
    """whether an example has two answers to a prompt"""
    lora: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether the loss uses a reference model, which can be precomputed."""
        return self.trainer in ("DPO", "KTO")


TRAININGS = {
    "sft": Training("SFT", "SFT", pairs=False),
    "sft-lora": Training("SFT", "SFT with LoRA", pairs=False, lora=True),
    "dpo": Training("DPO", "DPO, all weights"),
    "dpo-lora": Training("DPO", "DPO with LoRA", lora=True),
    "orpo": Training("ORPO", "ORPO", config={"max_completion_length": None}),
    "simpo": Training("CPO", "SimPO", config={"loss_type": "simpo", "cpo_alpha": 0.0}),
    "kto": Training("KTO", "KTO", pairs=False),
}


@dataclass(frozen=True)
class Size:
    """A Qwen3 model with random weights."""

    about: str
    config: dict[str, Any]
    shrink: int = 1
    """divisor of the lengths of a mix"""


_QWEN3 = {
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
    "max_position_embeddings": 2 * MAX_LENGTH,
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_TINY = {
    "vocab_size": 997,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SIZES = {
    "0.6b": Size("Qwen3-0.6B", _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072}),
    "1.7b": Size("Qwen3-1.7B", _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144}),
    "tiny": Size("tiny Qwen3", _QWEN3 | _TINY, shrink=32),
}


@dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths, in tokens."""

    median: int
    sigma: float
    """standard deviation of the logarithm; 0: all lengths are equal"""
    cap: int

    def draw(self, generator: random.Random, shrink: int = 1) -> int:
        """Draw a length, divided by `shrink`."""
        length = self.median * generator.lognormvariate(0.0, self.sigma)
        return max(SHORTEST, int(min(self.cap, length) / shrink))

    def __str__(self) -> str:
        return f"{self.median} / {self.sigma:g} / {self.cap}"


@dataclass(frozen=True)
class Mix:
    """The lengths of prompts and answers, and the number of rows of a step."""

    about: str
    prompt: LogNormal
    chosen: LogNormal
    """without the EOS token, like `rejected`"""
    rejected: LogNormal
    rows: int = 16
    """prompts with an answer per step: half as many pairs"""

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {getattr(self, part)}" for part in ("prompt", "chosen", "rejected"))
        return f"{parts} ({self.about})"


_CHOSEN, _REJECTED = LogNormal(280, 0.8, 1024), LogNormal(240, 0.8, 1024)
_HALF = LogNormal(1023, 0.0, 1023)
MIXES = {
    "chat": Mix("short prompts", LogNormal(150, 1.0, 1024), _CHOSEN, _REJECTED),
    "long": Mix("retrieval, code, many turns", LogNormal(1400, 0.6, 3000), _CHOSEN, _REJECTED),
}
EQUAL = "equal"
ALL_MIXES = MIXES | {EQUAL: Mix("2048 a row, half of them prompt", LogNormal(1024, 0.0, 1024), _HALF, _HALF, 8)}


@dataclass(frozen=True)
class Side:
    """A row of a table: a trainer class and its options."""

    title: str
    about: str
    fused: bool = True
    packed: bool = False
    liger: bool = False
    """Liger's kernels for RMSNorm, RoPE and SwiGLU, in the model and its reference"""
    precomputed: bool = False

    def serves(self, training: Training) -> bool:
        """Whether the training has this row."""
        return training.has_reference or not self.precomputed


STOCK, STOCK_LIGER = "trl", "trl-liger"
SIDES = {
    STOCK: Side("TRL", "stock TRL", fused=False),
    STOCK_LIGER: Side("TRL + Liger", "stock TRL, Liger's RMSNorm, RoPE and SwiGLU", fused=False, liger=True),
    "padded": Side("padded", "the Fused trainer, packed=False"),
    "packed": Side("packed", "the Fused trainer, packed=True", packed=True),
    "packed-liger": Side("packed + Liger", "the same with liger_kernels=True", packed=True, liger=True),
    "precomputed": Side(
        "precomputed",
        "the same with precompute_ref_log_probs=True (DPO and KTO)",
        packed=True,
        liger=True,
        precomputed=True,
    ),
}


#: Configurations of accelerate that TRL ships; the first is for one process too.
ENGINES = ("multi_gpu", "fsdp2")


@dataclass(frozen=True)
class Job:
    """One training to measure, by the names in the dictionaries above."""

    training: str
    size: str
    mix: str
    side: str
    steps: int = STEPS
    """measured steps, after the first"""
    impl: str = "auto"
    device: str = "cpu"
    step_rows: int | None = None
    """prompts with an answer per step of each rank; None: as the mix says"""
    engine: str = ENGINES[0]
    ranks: int = 1

    @property
    def all_steps(self) -> int:
        """The first step, the measured ones, and one that is profiled."""
        return self.steps + 2

    @property
    def batch(self) -> int:
        """Examples per step of each rank: rows, or pairs."""
        rows = self.step_rows or ALL_MIXES[self.mix].rows
        return rows // 2 if TRAININGS[self.training].pairs else rows


@dataclass(frozen=True)
class Measured:
    """The figures of one training, or the reason why there are none."""

    ms: tuple[float, ...] = ()
    """of each step, the first included, from the end of the previous step: data loading counts"""
    tokens: tuple[int, ...] = ()
    """of the rows of each step, without padding; a prompt counts once per answer"""
    slots: tuple[int, ...] = ()
    """token positions that a model computed in each step, with padding, the reference and KTO's third forward"""
    losses: tuple[float, ...] = ()
    """of each step, the profiled one included"""
    gpu_ms: float | None = None
    """time that the GPU was busy in one more step; None on a CPU, like the next two"""
    peak_bytes: int | None = None
    """of the device in a step after the first, model and optimizer included; of several ranks the largest"""
    pass_bytes: int | None = None
    """peak of forward and backward beyond what is held between steps, gradients included"""
    precompute_seconds: float | None = None
    """of all reference log-probabilities, before the first step; None if they are not precomputed"""
    reason: str = ""
    """why there are no figures"""

    @property
    def first_ms(self) -> float | None:
        """Of the first step, which includes compilation."""
        return self.ms[0] if self.ms else None

    @property
    def median_ms(self) -> float | None:
        """Of the later steps."""
        return statistics.median(self.ms[1:]) if self.ms else None

    @property
    def slowest_ms(self) -> float | None:
        """Of the later steps."""
        return max(self.ms[1:]) if self.ms else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all later steps together."""
        return sum(self.tokens[1:]) / sum(self.ms[1:]) * 1e3 if self.ms else None

    @property
    def slots_per_step(self) -> float | None:
        """The mean of the later steps."""
        return statistics.mean(self.slots[1:]) if self.slots else None
