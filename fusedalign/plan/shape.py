"""Records of a plan: what is known of a model, of one of its layers, and of a step."""

from __future__ import annotations

from dataclasses import dataclass

from fusedalign import methods


@dataclass(frozen=True)
class Layer:
    """Bytes of one decoder layer for the tokens of a batch, beyond its weights and its input."""

    kept: int
    """by a forward with gradients, with the layer's output"""
    checkpoint: int
    """by a forward under gradient checkpointing: its output"""
    forward_peak: int
    """at most, during a forward without gradients"""
    backward_peak: int
    """at most, during its backward: what is kept, the gradients of its weights, input and output"""
    recompute_peak: int
    """the same under gradient checkpointing, with the forward that is repeated"""
    grads: int
    """of its weights"""
    casts: int
    """copies of its weights in half precision, which autocast keeps until the model's forward ends"""


@dataclass(frozen=True)
class Trace:
    """What a backbone takes for one batch."""

    tokens: int
    width: int
    """of the last hidden states, D"""
    item: int
    """bytes of a number of them"""
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    """of each layer the index of its kind"""
    before: int
    """kept by a forward besides its layers, up to the first one: embeddings, positions"""
    after: int
    """likewise, after the last one: a norm, the last hidden states"""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """From the first to the last."""
        return tuple(self.kinds[kind] for kind in self.order)


@dataclass(frozen=True)
class Model:
    """What the configuration of a causal LM says about its weights."""

    name: str
    parameters: int
    item: int
    """bytes of each"""
    vocab: int
    width: int
    """of the head's input, D"""
    adapters: int = 0
    """parameters of LoRA, which are fp32; then nothing else is trained"""
    tied: bool = False
    """whether the head is the embedding"""

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.adapters or self.parameters

    @property
    def trained_item(self) -> int:
        """Bytes of each of them."""
        return ADAPTER_ITEM if self.adapters else self.item

    @property
    def head(self) -> int:
        """Parameters of the LM head, V x D."""
        return self.vocab * self.width


#: PEFT keeps adapters in fp32, whatever the model's dtype.
ADAPTER_ITEM = 4

PAIRED = ("dpo", "cpo", "simpo", "orpo")
METHODS = tuple(methods.METHODS)
ITEM = {"bfloat16": 2, "float32": 4}
"""bytes of a weight, by the dtype that it is loaded in"""


@dataclass(frozen=True)
class Optimiser:
    """An optimiser, by its name in transformers' `--optim`."""

    state_bytes: float | None
    """of each parameter; None: two numbers in the parameter's dtype"""
    about: str


OPTIMISERS = {
    "adamw_torch_fused": Optimiser(None, "two averages in the weights' dtype"),
    # Blocks of 256 values have an fp32 scale each.
    "adamw_bnb_8bit": Optimiser(2 * (1 + 4 / 256), "two averages of 8 bits, and a scale for 256 of them"),
    "sgd": Optimiser(0.0, "no averages"),
}
DEFAULT_OPTIMISER = next(iter(OPTIMISERS))


@dataclass(frozen=True)
class Step:
    """How one micro-batch is trained. Defaults are those of TRL."""

    method: str = "dpo"
    batch: int = 8
    """rows, or pairs"""
    length: int = 1024
    """tokens of a row"""
    prompt: int = 0
    """of these, those of the prompt"""
    tokens: int | None = None
    """of the packed batch, where they are known"""
    dtype: str = "float32"
    """of the weights; products are in bf16 in any case"""
    lora_r: int = 0
    """0: all weights are trained"""
    checkpointing: bool = True
    precomputed: bool = False
    """the reference's log-probabilities, before the training"""
    optimiser: str = DEFAULT_OPTIMISER
    accumulation: int = 1
    """micro-batches a step"""

    @property
    def pairs(self) -> bool:
        """Whether a row of the data set is two answers to a prompt."""
        return self.method in PAIRED

    @property
    def rows(self) -> int:
        """Rows of prompt and answer a micro-batch."""
        return self.batch * (2 if self.pairs else 1)

    @property
    def padded(self) -> int:
        """Token positions of the micro-batch with every row as long as the longest."""
        return self.rows * self.length

    @property
    def packed(self) -> int:
        """Tokens of the packed micro-batch, S: a pair's prompt stands once."""
        if self.tokens is not None:
            return self.tokens
        return self.padded - (self.batch * self.prompt if self.pairs else 0)

    @property
    def keys(self) -> int:
        """Of attention in the packed micro-batch: the second answer of a pair has a copy of its prompt's."""
        return self.packed + round(self._share(self.batch * self.prompt if self.pairs else 0))

    @property
    def scored(self) -> int:
        """Tokens that come to the head of the packed micro-batch, N."""
        answers = self.rows * (self.length - self.prompt)
        # ORPO's likelihood is that of the chosen row, prompt included.
        return max(1, round(self._share(answers + (self.batch * self.prompt if self.method == "orpo" else 0))))

    def _share(self, tokens: int) -> float:
        """As many of `packed` as `tokens` would be of a batch of full rows."""
        full = self.padded - (self.batch * self.prompt if self.pairs else 0)
        return tokens * self.packed / full

    @property
    def live_reference(self) -> bool:
        """Whether the reference's log-probabilities are made in each step."""
        return self.method in methods.WITH_REFERENCE and not self.precomputed
