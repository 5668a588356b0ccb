"""The records of a plan: a model, one of its layers, and a step."""

from __future__ import annotations

from dataclasses import dataclass

from fusedalign import methods


@dataclass(frozen=True)
class Layer:
    """Bytes of one decoder layer for the tokens of a batch, beyond its weights and its input."""

    kept: int
    """saved by a forward with gradients, including the output"""
    checkpoint: int
    """saved by a forward under gradient checkpointing: the output"""
    forward_peak: int
    """peak of a forward without gradients"""
    backward_peak: int
    """peak of the backward: saved tensors, and gradients of weights, input and output"""
    recompute_peak: int
    """peak of the backward under gradient checkpointing, which includes the recomputed forward"""
    grads: int
    """gradients of its weights"""
    casts: int
    """half-precision copies of its weights, which autocast caches until the end of the model's forward"""


@dataclass(frozen=True)
class Trace:
    """The memory of a backbone for one batch, in bytes."""

    tokens: int
    width: int
    """of the last hidden states, D"""
    item: int
    """bytes per element of the last hidden states"""
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    """for each layer the index of its kind"""
    before: int
    """saved before the first layer: embeddings, positions"""
    after: int
    """saved after the last layer: a norm, the last hidden states"""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in order."""
        return tuple(self.kinds[kind] for kind in self.order)


@dataclass(frozen=True)
class Model:
    """The weights of a causal LM, from its configuration."""

    name: str
    parameters: int
    item: int
    """bytes per parameter"""
    vocab: int
    width: int
    """of the head's input, D"""
    adapters: int = 0
    """parameters of LoRA, in fp32; the others are frozen then"""
    tied: bool = False
    """whether head and embedding share their weight"""

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.adapters or self.parameters

    @property
    def trained_item(self) -> int:
        """Bytes per trained parameter."""
        return ADAPTER_ITEM if self.adapters else self.item

    @property
    def head(self) -> int:
        """Parameters of the LM head, V x D."""
        return self.vocab * self.width


#: PEFT keeps adapters in fp32, whatever the dtype of the model.
ADAPTER_ITEM = 4

PAIRED = ("dpo", "cpo", "simpo", "orpo")
METHODS = tuple(methods.METHODS)
ITEM = {"bfloat16": 2, "float32": 4}
"""bytes of a weight, by the dtype that it is loaded in"""


@dataclass(frozen=True)
class Optimiser:
    """An optimiser, by its name in transformers' `--optim`."""

    state_bytes: float | None
    """per parameter; None: two values in the dtype of the parameter"""
    about: str


OPTIMISERS = {
    "adamw_torch_fused": Optimiser(None, "two averages in the weights' dtype"),
    # One fp32 scale per block of 256 values.
    "adamw_bnb_8bit": Optimiser(2 * (1 + 4 / 256), "two averages of 8 bits, and a scale for 256 of them"),
    "sgd": Optimiser(0.0, "no averages"),
}
DEFAULT_OPTIMISER = next(iter(OPTIMISERS))


@dataclass(frozen=True)
class Step:
    """The settings of a training step; the defaults are those of TRL."""

    method: str = "dpo"
    batch: int = 8
    """rows, or pairs"""
    length: int = 1024
    """tokens per row"""
    prompt: int = 0
    """tokens of the prompt among them"""
    tokens: int | None = None
    """of the packed batch; None: all rows are full"""
    dtype: str = "float32"
    """of the weights; matrix products are in bf16 in any case"""
    lora_r: int = 0
    """0: all weights are trained"""
    checkpointing: bool = True
    precomputed: bool = False
    """whether the log-probabilities of the reference are computed before the training"""
    optimiser: str = DEFAULT_OPTIMISER
    accumulation: int = 1
    """micro-batches per step"""

    @property
    def pairs(self) -> bool:
        """Whether a row of the data set has two answers to a prompt."""
        return self.method in PAIRED

    @property
    def rows(self) -> int:
        """Prompts with an answer per micro-batch."""
        return self.batch * (2 if self.pairs else 1)

    @property
    def padded(self) -> int:
        """Token positions of the padded micro-batch."""
        return self.rows * self.length

    @property
    def packed(self) -> int:
        """Tokens of the packed micro-batch, S; the prompt of a pair counts once."""
        if self.tokens is not None:
            return self.tokens
        return self.padded - (self.batch * self.prompt if self.pairs else 0)

    @property
    def keys(self) -> int:
        """Keys of attention in the packed micro-batch; those of a prompt are copied for the second answer of a pair."""
        return self.packed + round(self._share(self.batch * self.prompt if self.pairs else 0))

    @property
    def scored(self) -> int:
        """Tokens of the packed micro-batch that reach the head, N."""
        answers = self.rows * (self.length - self.prompt)
        # The NLL term of ORPO includes the prompt of the chosen row.
        return max(1, round(self._share(answers + (self.batch * self.prompt if self.method == "orpo" else 0))))

    def _share(self, tokens: int) -> float:
        """Scale `tokens` of a batch of full rows to the actual number of packed tokens."""
        full = self.padded - (self.batch * self.prompt if self.pairs else 0)
        return tokens * self.packed / full

    @property
    def live_reference(self) -> bool:
        """Whether the log-probabilities of the reference are computed in each step."""
        return self.method in methods.WITH_REFERENCE and not self.precomputed
