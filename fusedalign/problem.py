"""The records that pass between `ops` and every implementation: a checked `Problem` goes in, `TokenLogps` comes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: The optional per-token outputs, in the order in which `TokenLogps` holds them after `logps`.
OUTPUTS = ("entropy", "lse", "mean_logit", "log_sum_sq_probs", "is_top1")

#: Bytes that an impl may use for its tiles beyond inputs, results and saved tensors, when the caller names no number.
DEFAULT_WORKSPACE = 256 * 2**20

#: (logps [N], lse [N]) -> losses [N] and their derivatives by logps and by lse (None: zero): a loss summed over tokens,
#: so that the gradient can be taken in the forward. The first is differentiable too. The lse may be None where the
#: problem's outputs do not ask for it. One that weighs the NLL of all tokens alike may say so in an attribute
#: `nll_weight`, a scalar tensor or None, for the libraries that have a function for just that.
TokenLoss = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class TokenLogps(NamedTuple):
    """Per-token results of the head; every field has the shape of `targets`, those not asked for are None.

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


class Tiling(NamedTuple):
    """What the caller wishes of tiles and memory, None: as the impl sees fit. It changes no result beyond rounding."""

    workspace: int | None = None
    """bytes"""
    token_chunk: int | None = None
    """tokens a tile"""
    vocab_chunk: int | None = None
    """vocabulary columns a tile"""
    keep_head: bool = True
    """whether a forward may hold memory of the head's size until its backward, which saves products"""


@dataclass(frozen=True, eq=False)
class Parts:
    """A head of several tensors that stand side by side, of which a few rows at a time are ever put together.

    It answers as the `[V, D]` tensor that `torch.cat(tensors, 1)` would be, as far as impls ask.
    """

    tensors: tuple[Tensor, ...]
    """[V, D1], [V, D2], ..., in any dtypes"""
    dtype: torch.dtype
    """of rows"""

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where each tensor stands."""
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
        """Rows are always a copy."""
        return False

    def __getitem__(self, rows: slice) -> Tensor:
        return self._beside([x[rows] for x in self.tensors])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Rows; `dim` is 0."""
        return self._beside([x.index_select(dim, index) for x in self.tensors])

    def _beside(self, rows: list[Tensor]) -> Tensor:
        """[n, D] of contiguous rows, each on a boundary of 16 bytes, as tensor cores like it."""
        n, d = len(rows[0]), self.shape[1]
        unit = 16 // self.dtype.itemsize
        out = rows[0].new_empty((n, -(-d // unit) * unit), dtype=self.dtype)[:, :d]
        for columns, part in zip(self.columns, rows, strict=True):
            out[:, columns] = part
        return out


def beside(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | Parts:
    """A head of these tensors: one alone stays as it is."""
    return tensors[0] if len(tensors) == 1 else Parts(tensors, dtype)


@dataclass(frozen=True)
class Problem:
    """One head and N tokens that all count: checked by `ops`, without ignored positions, ready for an impl.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature; no tanh where softcap is None.
    """

    hidden: Tensor
    """[N, D] fp64/fp32/bf16/fp16"""
    weight: Tensor | Parts
    """[V, D], any of these dtypes"""
    targets: Tensor
    """[N] int64 in [0, V), contiguous"""
    operand_dtype: torch.dtype
    """What enters the head's product: autocast's dtype where that is on, else the wider of hidden's and the head's.

    The head's is that of its first part.
    """
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    outputs: frozenset[str] = frozenset()
    filter_eps: float | None = None
    """None asks for dense, exact gradients."""
    tiling: Tiling = Tiling()  # noqa: RUF009 (immutable)
    expected_loss: TokenLoss | None = None
    """The loss that is likely to be made of logps alone, times any number. It changes no result beyond rounding."""
    head_sums: tuple[Tensor | None, ...] = ()
    """For gradients: of each tensor of the head, contiguous memory of its shape and dtype to which its gradient is to
    be added; None, or nothing at all: the gradient is to be made."""

    @property
    def head(self) -> tuple[tuple[slice, Tensor], ...]:
        """The tensors of the head, each with the columns of hidden that it multiplies."""
        if isinstance(self.weight, Parts):
            return tuple(zip(self.weight.columns, self.weight.tensors, strict=True))
        return ((slice(None), self.weight),)

    @property
    def logit_dtype(self) -> torch.dtype:
        """The dtype of logits and of every sum over them: fp32, or fp64 for fp64 operands; never a half precision."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of `TokenLogps`: fp64 where hidden is, else fp32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What enters the head's product: autocast's dtype where that is on, else the wider of the two.

    `weight` is the head or, of several parts, the first.
    """
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if wider != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return wider
