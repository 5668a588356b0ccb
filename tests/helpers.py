"""Problems, oracles and error budgets shared by the tests of `linear_logps` and `linear_cross_entropy`."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedalign import explain, linear_cross_entropy, linear_logps
from fusedalign.impls import impl_names
from fusedalign.problem import OUTPUTS

DIFFERENTIABLE = ("logps", "entropy", "lse")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
#: Adapters whose library is installed. tests/conftest.py skips what they refuse.
ADAPTED = [verdict.impl for verdict in explain() if verdict.impl in impl_names("adapter") and verdict.reason is None]
#: Without triton installed, tests/test_triton.py reports the skip.
OURS = [name for name in sorted(impl_names("own", "oracle")) if name != "triton" or importlib.util.find_spec("triton")]
IMPLS = [*OURS, *ADAPTED]
#: Without a CUDA device Triton's kernels run in its (slow) CPU interpreter, enabled by tests/conftest.py.
INTERPRETED = not torch.cuda.is_available()
#: (leading dims, D, V): ragged sizes that no tile divides, several leading dims.
RAGGED = [((2, 5), 7, 11), ((3, 17), 23, 252), ((2, 3, 9), 33, 507), ((2, 2, 2, 5), 16, 123), ((65,), 48, 401)]
HEADS = [{}, {"softcap": 5.0}, {"scale": 0.3, "temperature": 0.7}, {"scale": 2.0, "softcap": 3.0, "temperature": 1.7}]


LAYOUTS = ["every other target", "one target for all", "hidden transposed"]


def strided_tokens(layout: str, **options) -> Case:
    """A case without ignored tokens and with targets or hidden states that are strided views."""
    case = make_case((12,), 16, 101, ignored=0.0, **options)
    if layout == "every other target":
        return replace(case, targets=torch.stack([case.targets, case.targets.flip(0)], 1)[:, 0])
    if layout == "one target for all":
        return replace(case, targets=case.targets[0].expand(12))
    return replace(case, hidden=case.hidden.t().contiguous().t())


def finest(impl: str) -> torch.dtype:
    """The most precise dtype that an impl supports."""
    return {"triton": torch.float32, "liger": torch.float32, "cce": torch.bfloat16}.get(impl, torch.float64)


def rounds_logit_grads(impl: str, device: str) -> bool:
    """Whether the gradients of logits are rounded to the half precision of the operands, as documented.

    Otherwise operands are widened for the products, and tests use tighter tolerances.
    """
    return impl == "triton" or (impl == "pytorch" and device == "cuda")


def skip_where_interpreted(impl: str, device: str) -> None:
    """Skip tests that would take the interpreter minutes and that a smaller test covers."""
    if impl == "triton" and device == "cpu":
        pytest.skip("for a GPU: Triton's interpreter would take minutes")


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
        """The `.grad` of each tensor, by name."""
        return {name: getattr(getattr(self, name), "grad", None) for name in ("hidden", "weight", "bias")}

    @property
    def valid(self) -> Tensor:
        return self.targets != -100


def make_case(leading, d, v, *, dtype=torch.float32, device="cpu", seed=0, bias=True, ignored=0.3, **head) -> Case:
    """A random case with logits that spread over a few nats; a fraction of the targets is ignored, never all."""
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
    """Random upstream gradients, one per token and output."""
    g = torch.Generator().manual_seed(99)
    kwargs = {"generator": g, "dtype": torch.float64}
    return {name: torch.randn(case.targets.shape, **kwargs).to(case.hidden.device) for name in names}


def run(case: Case, names=DIFFERENTIABLE, needs=(True, True, True), outputs=OUTPUTS, **options) -> dict[str, Tensor]:
    """Outputs and gradients of `linear_logps` on fresh leaves; gradient keys start with "d".

    `names`: the outputs with an upstream gradient; `needs`: requires-grad flags of hidden, weight and bias.
    """
    case = case.leaves(*needs)
    out = case.logps(outputs=outputs, **options)
    sum((getattr(out, k) * g.to(out.logps.dtype)).sum() for k, g in upstream(case, names).items()).backward()
    return _collect(out._asdict(), case)


def run_eager(case: Case, names=DIFFERENTIABLE) -> dict[str, Tensor]:
    """The usual eager code: `F.linear` in the inputs' dtype, then fp32 log-softmax. Its error sets the budgets."""
    case = case.leaves()
    fields = _eager_fields(case)
    sum((fields[k] * g.to(fields[k].dtype)).sum() for k, g in upstream(case, names).items()).backward()
    return _collect(fields, case)


def _eager_fields(case: Case) -> dict[str, Tensor]:
    dtype = torch.promote_types(case.hidden.dtype, case.weight.dtype)
    scale, softcap = case.head.get("scale", 1.0), case.head.get("softcap")
    logits = F.linear(case.hidden.to(dtype), case.weight.to(dtype), None if case.bias is None else case.bias.to(dtype))
    logits = logits * scale
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
    return {k: x.where(valid, 0) for k, x in fields.items()}


def run_loss(case: Case, needs=(True, True, True), *, upstream=1.0, call=linear_cross_entropy, **options):
    """Loss and gradients of `linear_cross_entropy` on fresh leaves; `upstream` scales the loss like a GradScaler."""
    case = case.leaves(*needs)
    loss = call(case.hidden, case.weight, case.targets, bias=case.bias, **case.head, **options)
    (loss * upstream).backward()
    return _collect({"loss": loss}, case)


def run_loss_exact(case: Case, **options) -> dict[str, Tensor]:
    """Like `run_loss`, from the per-token values of the fp64 reference."""
    case = case.to(torch.float64).leaves()
    out = case.logps(impl="reference", outputs=["lse"])
    return _loss_of(case, out.logps, out.lse, **options)


def run_loss_eager(case: Case, **options) -> dict[str, Tensor]:
    """Like `run_loss`, by the usual eager code in the inputs' dtype."""
    case = case.leaves()
    fields = _eager_fields(case)
    return _loss_of(case, fields["logps"], fields["lse"], **options)


def _loss_of(case: Case, logps, lse, *, loss_type="nll", z_loss=0.0, num_items=None, reduction="mean", upstream=1.0):
    factor = logps.detach().exp() if loss_type == "dft" else 1.0
    losses = -factor * logps + z_loss * lse.square()
    loss = (losses * case.valid).sum()
    if reduction == "mean":
        loss = loss / (case.valid.sum() if num_items is None else num_items)
    (loss * upstream).backward()
    return _collect({"loss": loss}, case)


def _collect(fields, case) -> dict[str, Tensor]:
    grads = {f"d{name}": g for name, g in case.grads().items() if g is not None}
    return {k: x.detach() for k, x in (fields | grads).items() if x is not None}


def error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item()


class BudgetError(AssertionError):
    """An error above the budget of eager code. A caveat excuses other failed assertions, not this one."""


def assert_within_budget(case: Case, got: dict[str, Tensor], names=DIFFERENTIABLE, roundings: float = 1) -> None:
    """Each error against fp64 is at most twice that of eager code in the same dtype, plus rounding; see `_assert_each`.

    `is_top1` must be equal. `roundings`: 2 where a frozen head's Jacobian is kept in the dtype of the hidden states.
    """
    exact, eager = run(case.to(torch.float64), names, impl="reference"), run_eager(case, names)
    if "is_top1" in got:
        assert torch.equal(got["is_top1"], exact["is_top1"])
    _assert_each(case, {k: x for k, x in got.items() if k != "is_top1"}, exact, eager, roundings)


def assert_loss_within_budget(case: Case, got: dict[str, Tensor], roundings: float = 2, **options) -> None:
    """`assert_within_budget` for `linear_cross_entropy`: gradients are rounded once more when the loss is scaled."""
    _assert_each(case, got, run_loss_exact(case, **options), run_loss_eager(case, **options), roundings)


def _assert_each(case: Case, got: dict, exact: dict, eager: dict, roundings: float) -> None:
    """Assert that each error is at most twice eager's plus rounding: `roundings` half ulps of the result's dtype at its
    largest value, and sqrt(terms) ulps of fp32 (fp64) for the sums inside.
    """
    terms = case.hidden.shape[-1] + case.weight.shape[0] + case.targets.numel()
    inner = torch.finfo(torch.float64 if case.hidden.dtype == torch.float64 else torch.float32).eps
    for name, x in got.items():
        size = max(exact[name].abs().max().item(), 1e-30)
        rounding = roundings * size * torch.finfo(x.dtype).eps / 2 + max(size, 1) * terms**0.5 * inner
        budget = 2 * error(eager[name], exact[name]) + rounding
        if not torch.isfinite(x).all():
            raise BudgetError(f"{name} is not finite")
        if not error(x, exact[name]) <= budget:
            raise BudgetError(f"{name}: {error(x, exact[name]):.2e} > {budget:.2e}")


class Allocations(TorchDispatchMode):
    """Record elements and dtype of every storage that operations allocate, in forward and backward.

    Meta tensors, used by the dry runs before compilation, have no storage and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        input_storages = {_storage(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and not x.is_meta and _storage(x) not in input_storages:
                self.sizes.append((x.untyped_storage().nbytes() // x.element_size(), x.dtype))
        return out

    def largest(self, *dtypes: torch.dtype) -> int:
        """Elements of the largest allocation of these dtypes (default: any dtype)."""
        return max((n for n, dtype in self.sizes if not dtypes or dtype in dtypes), default=0)


def peak_memory(f, device: str) -> int:
    """Peak bytes allocated while `f` runs, above those before the call; includes its result."""
    if device == "cuda":
        # Requested bytes: allocated bytes include up to 1 MiB of padding per tensor.
        bytes_asked_for = lambda which: torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]  # noqa: E731
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        bytes_before = bytes_asked_for("current")
        result = f()
        peak = bytes_asked_for("peak") - bytes_before
        del result
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = f()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
