"""The records that pass between `ops` and every implementation: a checked `Problem` goes in, `TokenLogps` comes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Bytes that an impl may use for its tiles beyond inputs, results and saved tensors, when the caller names no number.
DEFAULT_WORKSPACE = 256 * 2**20

#: (logps [N], lse [N]) -> losses [N] and their derivatives by logps and by lse (None: zero): a loss summed over tokens,
#: so that the gradient can be taken in the forward. The first is differentiable too. The lse may be None where the
#: problem's outputs do not ask for it. A loss that weighs the NLL of all tokens alike may have an attribute
#: `nll_weight`, a scalar tensor or None, for libraries that have a function for exactly that.
TokenLoss = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class TokenLogps(NamedTuple):
    """Per-token results of the head; every field has the shape of `targets`, outputs not asked for are None.

    `p` is the softmax of the final logits (after bias, scale, softcap and temperature), V the vocabulary size. Floating
    fields are fp32, or fp64 where `hidden` is. At ignored positions every field is exactly 0 (False).
    """

    logps: Tensor
    """log p(target), nats, <= 0; differentiable."""
    entropy: Tensor | None = None
    """-sum_v p_v log p_v, nats; differentiable."""
    lse: Tensor | None = None
    """log sum_v exp(logit_v); differentiable (z-loss)."""
    mean_logit: Tensor | None = None
    """mean_v logit_v; no gradient."""
    log_sum_sq_probs: Tensor | None = None
    """log sum_v p_v**2, nats; no gradient."""
    is_top1: Tensor | None = None
    """bool: whether the target is the first of the largest logits; False where `logps` is NaN; no gradient."""


#: The optional per-token outputs.
OUTPUTS = TokenLogps._fields[1:]


class Upstream(NamedTuple):
    """Upstream gradients of the differentiable fields of `TokenLogps`, by name; None where zero."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    @classmethod
    def of(cls, grads: Sequence[Tensor | None]) -> Upstream:
        """From the gradients of all fields of `TokenLogps`, in their order."""
        by_name = dict(zip(TokenLogps._fields, grads, strict=True))
        return cls(*(by_name[name] for name in cls._fields))


class FullLogits(NamedTuple):
    """What the definitions of the outputs are written in."""

    logits: Tensor
    """[N, V] final logits"""
    logps: Tensor
    """[N, V] log-softmax of `logits`"""
    targets: Tensor
    """[N] int64"""

    def target_logps(self) -> Tensor:
        """log p(target), [N]."""
        return self.logps.gather(-1, self.targets[:, None]).squeeze(-1)


def _entropy(full: FullLogits) -> Tensor:
    # A column masked by a bias of -inf has p = 0: clamped, it contributes 0 * -1e4 instead of 0 * -inf.
    return -(full.logps.exp() * full.logps.clamp(min=-1e4)).sum(-1)


#: Each optional output by its definition, from the logits in full: the oracle of the tests.
DEFINITIONS: dict[str, Callable[[FullLogits], Tensor]] = {
    "entropy": _entropy,
    "lse": lambda full: full.logits.logsumexp(-1),
    "mean_logit": lambda full: full.logits.detach().mean(-1),
    "log_sum_sq_probs": lambda full: (2 * full.logps.detach()).logsumexp(-1),
    "is_top1": lambda full: (full.logits.max(-1).indices == full.targets) & ~full.target_logps().isnan(),
}


class NeedsGrad(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    """any tensor of the head"""
    bias: bool

    @property
    def hidden_alone(self) -> bool:
        """Whether the head is frozen, and hidden states are not."""
        return self.hidden and not self.weight and not self.bias


class MemoryOptions(NamedTuple):
    """The caller's limits on tiles and memory; None: the impl decides. They change no result beyond rounding."""

    workspace: int | None = None
    """bytes"""
    token_chunk: int | None = None
    """tokens a tile"""
    vocab_chunk: int | None = None
    """vocabulary columns a tile"""
    keep_head: bool = True
    """whether a forward may hold memory of the head's size until its backward, which saves products"""


@dataclass(frozen=True, eq=False)
class SplitHead:
    """An LM head split into column blocks. Rows are concatenated a tile at a time; the whole head never is.

    It answers as the `[V, D]` tensor `torch.cat(tensors, 1)` would, as far as impls ask.
    """

    tensors: tuple[Tensor, ...]
    """[V, D1], [V, D2], ..., in any dtypes"""
    dtype: torch.dtype
    """of concatenated rows"""

    @property
    def columns(self) -> tuple[slice, ...]:
        """The columns of each tensor in the whole head."""
        ends = list(itertools.accumulate(x.shape[1] for x in self.tensors))
        return tuple(map(slice, [0, *ends[:-1]], ends))

    @property
    def shape(self) -> torch.Size:
        """[V, D]"""
        return torch.Size([len(self.tensors[0]), sum(x.shape[1] for x in self.tensors)])

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor does."""
        return any(x.requires_grad for x in self.tensors)

    def is_contiguous(self) -> bool:
        """Always False: rows are copies."""
        return False

    def __getitem__(self, rows: slice) -> Tensor:
        return self._concatenate([x[rows] for x in self.tensors])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Rows of the head; `dim` is 0."""
        return self._concatenate([x.index_select(dim, index) for x in self.tensors])

    def _concatenate(self, blocks: list[Tensor]) -> Tensor:
        """[n, D], padded so that every row starts 16-byte aligned (required for TMA and fast tensor-core loads)."""
        n, d = len(blocks[0]), self.shape[1]
        unit = 16 // self.dtype.itemsize
        out = blocks[0].new_empty((n, -(-d // unit) * unit), dtype=self.dtype)[:, :d]
        for columns, block in zip(self.columns, blocks, strict=True):
            out[:, columns] = block
        return out


def as_head(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | SplitHead:
    """The head with these column blocks; a single one is returned as it is."""
    return tensors[0] if len(tensors) == 1 else SplitHead(tensors, dtype)


@dataclass(frozen=True)
class Spec:
    """The arguments of a call that are not tensors, checked by `ops`; see `Problem` for the formula."""

    operand_dtype: torch.dtype
    """What enters the head's product: autocast's dtype where that is on, else the wider of hidden's and the head's.

    The head's is that of its first tensor.
    """
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    outputs: frozenset[str] = frozenset()
    filter_eps: float | None = None
    """None asks for dense, exact gradients."""
    memory: MemoryOptions = MemoryOptions()  # noqa: RUF009 (immutable)

    @property
    def logit_dtype(self) -> torch.dtype:
        """The dtype of logits and of every sum over them: fp32, or fp64 for fp64 operands; never a half precision."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def logit_scale(self) -> float:
        """d final logit / d raw logit without a softcap."""
        return self.scale / self.temperature


@dataclass(frozen=True, init=False)
class Problem(Spec):
    """One head and N tokens: checked by `ops`, without ignored positions, ready for an impl.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature; no tanh where softcap is None.

    Args:
        hidden, weight, targets, bias: below.
        operand_dtype, args, options: the fields of `Spec`, in their order or by name.
    """

    hidden: Tensor
    """[N, D] fp64/fp32/bf16/fp16"""
    weight: Tensor | SplitHead
    """[V, D], any of these dtypes"""
    targets: Tensor
    """[N] int64 in [0, V), contiguous"""
    bias: Tensor | None
    """[V]"""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | SplitHead,
        targets: Tensor,
        operand_dtype: torch.dtype,
        bias: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        _, *names = Spec.__dataclass_fields__
        if len(args) > len(names):
            raise TypeError(f"Problem takes at most {5 + len(names)} positional arguments, got {5 + len(args)}")
        super().__init__(operand_dtype, **dict(zip(names, args, strict=False)), **options)
        vars(self).update(hidden=hidden, weight=weight, targets=targets, bias=bias)

    @property
    def spec(self) -> Spec:
        """The problem without its tensors."""
        return Spec(**{name: getattr(self, name) for name in Spec.__dataclass_fields__})

    @property
    def head(self) -> tuple[tuple[slice, Tensor], ...]:
        """The tensors of the head, each with the columns of hidden that it multiplies."""
        if isinstance(self.weight, SplitHead):
            return tuple(zip(self.weight.columns, self.weight.tensors, strict=True))
        return ((slice(None), self.weight),)

    @property
    def requires_grad(self) -> NeedsGrad:
        """The flags of the tensors, whatever the grad mode."""
        bias = self.bias is not None and self.bias.requires_grad
        return NeedsGrad(self.hidden.requires_grad, self.weight.requires_grad, bias)

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of `TokenLogps`: fp64 where hidden is, else fp32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


def with_tensors(
    spec: Spec, hidden: Tensor, weight: Tensor | SplitHead, targets: Tensor, bias: Tensor | None = None
) -> Problem:
    """The problem of a spec and tensors."""
    return Problem(hidden, weight, targets, bias=bias, **vars(spec))


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """`Spec.operand_dtype` for hidden states and a head, or the first tensor of a split one."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if wider != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return wider
