"""Synthetic hidden states, heads and targets, and statistics that compare them with a trained model.

Speed can depend on the data: an implementation may skip tiles with small probabilities, and bf16 rounds large logits
coarsely. So "trained" data imitate a trained model; "random" data are Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedalign.bench.cases import KINDS, Case

_HEAD_CHUNK = 16384  # rows of the head that are in fp32 at a time
_LOGITS_CHUNK = 2**26  # fp32 logits in memory at a time


class Data(NamedTuple):
    """The inputs of an LM head."""

    hidden: Tensor
    """[N, D]"""
    weight: Tensor
    """[V, D]"""
    targets: Tensor
    """[N] int64"""
    softcap: float | None


@dataclass(frozen=True)
class Statistics:
    """Statistics of the softmax of [N, V] logits, as means over tokens."""

    entropy: float
    """nats"""
    likely: float
    """vocabulary entries with p > 2^-12"""
    tail: float
    """probability mass of the other entries"""
    tiles_12: float
    """share of tiles of 128 tokens x 256 columns, in natural order, with any p > 2^-12"""
    tiles_14: float
    """the same with p > 2^-14"""
    tiles_16: float
    """the same with p > 2^-16"""


#: Gemma-3-270M on technical English, its entropy (2.0) and tokens (101) averaged with those of earlier synthetic data.
TARGET = Statistics(entropy=1.85, likely=80, tail=0.04, tiles_12=0.63, tiles_14=0.85, tiles_16=0.94)


def make_data(kind: str, case: Case, *, dtype: torch.dtype, device: str, seed: int) -> Data:
    """Generate the inputs of a case, reproducibly for one `seed` and device.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"data must be one of {', '.join(KINDS)}, got {kind!r}")
    g = torch.Generator(device).manual_seed(seed)
    return (_trained if kind == "trained" else _random)(case, g, dtype)


def _random(case: Case, g: torch.Generator, dtype: torch.dtype) -> Data:
    """Logits with a standard deviation of 2, targets uniform."""
    n, d, v = case.tokens, case.hidden_size, case.vocab
    weight = torch.empty(v, d, dtype=dtype, device=g.device)
    for rows in weight.split(_HEAD_CHUNK):
        rows.copy_(torch.randn(rows.shape, generator=g, device=g.device) * 2 / d**0.5)
    hidden = torch.randn(n, d, generator=g, device=g.device).to(dtype)
    return Data(hidden, weight, torch.randint(0, v, (n,), generator=g, device=g.device), case.softcap)


_EXPONENT, _SHIFT = 1.52, 10.0  # Zipf-Mandelbrot: p of the token of frequency rank r ~ (r + shift) ** -exponent
_TOP = 4.0  # logit of the most frequent token: logits then span about -14 to 14, which a softcap of 30 changes little
_CANDIDATES, _FIRST, _STEP = 8, 10.2, 1.27  # each context raises eight tokens, by 10.2, 8.9, ... nats
# Noise of the logits in nats per vocabulary entry, so that the share of tiles with a likely token hardly depends on V.
_NOISE = 1.9 / 256000
_DISORDER = 3.0  # noise on log ranks, in nats: token ids are only roughly sorted by frequency
_UNUSED, _SUNK = 0.05, 6.0  # the last 5% of a vocabulary (reserved, other scripts) have logits lower by 6 nats


def _trained(case: Case, g: torch.Generator, dtype: torch.dtype) -> Data:
    """Imitate a trained model: targets are sampled from its softmax, scaled to the mean entropy of `TARGET`.

    The rows of the head share a direction that encodes the log frequencies; a hidden state is that direction plus the
    rows of a few candidate tokens plus noise.
    """
    n, d, v = case.tokens, case.hidden_size, case.vocab
    device = g.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    rank_of = ((torch.arange(1, v + 1, device=device).log() + _DISORDER * normal(v)).argsort()).argsort()
    prior = _TOP - _EXPONENT * ((rank_of + _SHIFT) / _SHIFT).log()
    prior[v - int(_UNUSED * v) :] -= _SUNK

    common = F.normalize(normal(d), dim=0)
    weight = torch.empty(v, d, dtype=dtype, device=device)
    for rows, offset in zip(weight.split(_HEAD_CHUNK), prior.split(_HEAD_CHUNK), strict=True):
        rows.copy_(_with_part(normal(*rows.shape) / d**0.5, common, offset / d**0.5))

    boosts = (_FIRST - _STEP * torch.arange(_CANDIDATES, device=device)).clamp(min=0)
    uniform = torch.rand(n, _CANDIDATES, generator=g, device=device)
    ranks = (_SHIFT * (v / _SHIFT + 1) ** uniform - _SHIFT).long().clamp(0, v - 1)  # prefers frequent tokens
    candidates = rank_of.argsort()[ranks]
    # The candidates' rows are not orthogonal, which adds noise; with a small D there is more of it than wanted.
    noise = max((_NOISE * v) ** 2 - boosts.square().sum().item() / d, 0.0) ** 0.5
    hidden = noise * normal(n, d)
    for k in range(_CANDIDATES):
        hidden += boosts[k] * weight[candidates[:, k]].float()
    hidden = _with_part(hidden, common, torch.full((n,), d**0.5, device=device))

    data = Data(hidden, weight, torch.zeros(n, dtype=torch.int64, device=device), case.softcap)
    hidden = (hidden * _scale_for_entropy(data)).to(dtype)
    data = data._replace(hidden=hidden)
    draws = [torch.multinomial(z.softmax(-1), 1, generator=g) for z in logits_in_chunks(data, _LOGITS_CHUNK // v)]
    return data._replace(targets=torch.cat(draws).squeeze(-1))


def _with_part(rows: Tensor, direction: Tensor, size: Tensor) -> Tensor:
    """Replace the component of [n, D] rows along the unit vector `direction` by one of length `size` [n]."""
    return rows + (size - rows @ direction)[:, None] * direction


def _scale_for_entropy(data: Data) -> float:
    """Find by bisection the factor on the hidden states that gives a sample of tokens the mean entropy of `TARGET`."""
    sample = data._replace(hidden=data.hidden[:256], softcap=None)
    (raw,) = logits_in_chunks(sample, 256)
    low, high = 0.25, 4.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        entropy = _entropy(capped(middle * raw, data.softcap).log_softmax(-1))
        low, high = (middle, high) if entropy > TARGET.entropy else (low, middle)
    return (low * high) ** 0.5


def logits_in_chunks(data: Data, tokens: int) -> Iterator[Tensor]:
    """Yield the fp32 logits of `data`, [tokens, V] at a time."""
    for h in data.hidden.split(max(1, tokens)):
        yield capped(torch.cat([h.float() @ w.float().T for w in data.weight.split(_HEAD_CHUNK)], dim=1), data.softcap)


def _entropy(all_logps: Tensor) -> Tensor:
    """The mean entropy of [tokens, V] log-probabilities, nats."""
    return -(all_logps.exp() * all_logps).sum(-1).mean()


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits unchanged."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def statistics(data: Data, *, tokens: int = 1024) -> Statistics:
    """`Statistics` of the first `tokens` tokens."""
    columns = data.weight.shape[0] // 256 * 256 or data.weight.shape[0]
    sums = []
    for z in logits_in_chunks(data._replace(hidden=data.hidden[:tokens]), 128):
        all_logps = z.log_softmax(-1)
        p = all_logps.exp()
        likely = p > 2**-12
        tiles = p[:, :columns].amax(0).view(-1, min(256, columns)).amax(1)
        means = [_entropy(all_logps), likely.sum(-1).float().mean(), (p * ~likely).sum(-1).mean()]
        means += [(tiles > 2.0**-k).float().mean() for k in (12, 14, 16)]
        sums.append(torch.stack(means) * len(z))
    return Statistics(*(torch.stack(sums).sum(0) / min(tokens, len(data.hidden))).tolist())
