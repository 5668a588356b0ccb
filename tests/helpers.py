"""Problems, oracles and budgets that the tests of the primitive share."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedalign import linear_logps
from fusedalign.impls import MODULES
from fusedalign.problem import OUTPUTS

DIFFERENTIABLE = ("logps", "entropy", "lse")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
IMPLS = sorted(MODULES)
#: (leading dims, D, V): nothing divides anything, batches above 1.
RAGGED = [((2, 5), 7, 11), ((3, 17), 23, 252), ((2, 3, 9), 33, 507), ((2, 2, 2, 5), 16, 123), ((65,), 48, 1001)]
HEADS = [{}, {"softcap": 5.0}, {"scale": 0.3, "temperature": 0.7}, {"scale": 2.0, "softcap": 3.0, "temperature": 1.7}]


def leaf(x: Tensor | None, requires_grad: bool = True) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_(bool(requires_grad))


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    head: dict = field(default_factory=dict)
    """scale, softcap, temperature"""

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Case(self.hidden.to(dtype), self.weight.to(dtype), self.targets, bias, self.head)

    def leaves(self, hidden: bool = True, weight: bool = True, bias: bool = True) -> Case:
        return Case(
            leaf(self.hidden, hidden), leaf(self.weight, weight), self.targets, leaf(self.bias, bias), self.head
        )

    def logps(self, **options):
        return linear_logps(self.hidden, self.weight, self.targets, bias=self.bias, **self.head, **options)

    def grads(self) -> dict[str, Tensor | None]:
        """The gradients that have arrived, by name."""
        return {name: getattr(getattr(self, name), "grad", None) for name in ("hidden", "weight", "bias")}

    @property
    def valid(self) -> Tensor:
        return self.targets != -100


def make_case(leading, d, v, *, dtype=torch.float32, device="cpu", seed=0, bias=True, ignored=0.3, **head) -> Case:
    """Logits of a few nats' spread; a share of the targets is ignored, but never all of them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*leading, d, generator=g)
    weight = torch.randn(v, d, generator=g) * 2 / d**0.5
    targets = torch.randint(0, v, tuple(leading), generator=g)
    drop = torch.rand(tuple(leading), generator=g) < ignored
    drop.view(-1)[0] = False
    b = torch.randn(v, generator=g) if bias else None
    case = Case(hidden, weight, targets.masked_fill(drop, -100), b, head).to(dtype)
    return Case(case.hidden.to(device), case.weight.to(device), case.targets.to(device), _to(case.bias, device), head)


def _to(x, device):
    return None if x is None else x.to(device)


def upstream(case: Case, names=DIFFERENTIABLE) -> dict[str, Tensor]:
    """Different upstream gradients for every token and output."""
    g = torch.Generator().manual_seed(99)
    kwargs = {"generator": g, "dtype": torch.float64}
    return {name: torch.randn(case.targets.shape, **kwargs).to(case.hidden.device) for name in names}


def run(case: Case, names=DIFFERENTIABLE, needs=(True, True, True), outputs=OUTPUTS, **options) -> dict[str, Tensor]:
    """Outputs and gradients of `linear_logps` on fresh leaves; the keys of gradients start with d.

    `names` get an upstream gradient; `needs` says which of hidden, weight and bias require one.
    """
    case = case.leaves(*needs)
    out = case.logps(outputs=outputs, **options)
    sum((getattr(out, k) * g.to(out.logps.dtype)).sum() for k, g in upstream(case, names).items()).backward()
    return _collect(out._asdict(), case)


def run_eager(case: Case, names=DIFFERENTIABLE) -> dict[str, Tensor]:
    """What people write today: `F.linear` in the inputs' dtype, then fp32 log-softmax. Its error sets the budgets."""
    case = case.leaves()
    scale, softcap = case.head.get("scale", 1.0), case.head.get("softcap")
    logits = F.linear(case.hidden, case.weight, case.bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / case.head.get("temperature", 1.0)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    all_logps, valid = logits.log_softmax(-1), case.valid
    fields = {
        "logps": all_logps.gather(-1, case.targets.clamp(min=0)[..., None]).squeeze(-1),
        "entropy": -(all_logps.exp() * all_logps).sum(-1),
        "lse": logits.logsumexp(-1),
        "mean_logit": logits.detach().mean(-1),
        "log_sum_sq_probs": (2 * all_logps.detach()).logsumexp(-1),
    }
    fields = {k: x.where(valid, 0) for k, x in fields.items()}
    sum((fields[k] * g.to(logits.dtype)).sum() for k, g in upstream(case, names).items()).backward()
    return _collect(fields, case)


def _collect(fields, case) -> dict[str, Tensor]:
    grads = {f"d{name}": g for name, g in case.grads().items() if g is not None}
    return {k: x.detach() for k, x in (fields | grads).items() if x is not None}


def error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item()


def assert_within_budget(case: Case, got: dict[str, Tensor], names=DIFFERENTIABLE) -> None:
    """Each error against fp64 is at most twice that of eager code in the same dtype, plus rounding of the result.

    Rounding: half a unit in the last place of the dtype that the quantity comes in, at its largest value, and the usual
    sqrt(terms) units of fp32 (fp64) for the sums inside, ours and the oracle's. `is_top1` must be equal.
    """
    terms = case.hidden.shape[-1] + case.weight.shape[0] + case.targets.numel()
    exact, eager = run(case.to(torch.float64), names, impl="reference"), run_eager(case, names)
    for name, x in got.items():
        if name == "is_top1":
            assert torch.equal(x, exact[name])
            continue
        size = max(exact[name].abs().max().item(), 1e-30)
        inner = torch.finfo(torch.float64 if case.hidden.dtype == torch.float64 else torch.float32).eps
        rounding = size * torch.finfo(x.dtype).eps / 2 + max(size, 1) * terms**0.5 * inner
        budget = 2 * error(eager[name], exact[name]) + rounding
        assert torch.isfinite(x).all(), name
        assert error(x, exact[name]) <= budget, f"{name}: {error(x, exact[name]):.2e} > {budget:.2e}"


class Allocations(TorchDispatchMode):
    """Records the elements and dtype of every new storage that an operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and _storage(x) not in given:
                self.made.append((x.untyped_storage().nbytes() // x.element_size(), x.dtype))
        return out

    def largest(self, *dtypes: torch.dtype) -> int:
        """Elements of the largest tensor made, of these dtypes (default: of any)."""
        return max((n for n, dtype in self.made if not dtypes or dtype in dtypes), default=0)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
