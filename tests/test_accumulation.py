"""keep_head=False under accumulation: the backward adds to the head's `.grad` in place, unless that is observable."""

import pytest
import torch
from helpers import DEVICES, Allocations, Case, make_case

from fusedalign import linear_cross_entropy, linear_logps
from fusedalign.impls import autograd

OURS = ["pytorch", "triton"]
V, D = 157, 24

pytestmark = [pytest.mark.parametrize("impl", OURS), pytest.mark.parametrize("device", DEVICES)]


def logps(case, **options):
    """A loss of per-token log-probabilities."""
    return -(case.logps(**options).logps * torch.linspace(0.5, 1, 14, device=case.hidden.device).view(2, 7)).sum()


def entropy(case, **options):
    out = case.logps(outputs=["entropy"], **options)
    return (out.entropy - out.logps).sum()


def scalar(case, **options):
    return linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **case.head, **options)


LOSSES = [logps, entropy, scalar]


def micro_batches(device, dtype=torch.float32, **head):
    """Three micro-batches with a common head."""
    cases = [make_case((2, 7), D, V, dtype=dtype, device=device, seed=seed, **head).leaves() for seed in range(3)]
    return [Case(c.hidden, cases[0].weight, c.targets, cases[0].bias, c.head) for c in cases]


def grads(cases):
    got = [case.hidden.grad for case in cases] + [cases[0].weight.grad, cases[0].bias.grad]
    for x in [case.hidden for case in cases] + [cases[0].weight, cases[0].bias]:
        x.grad = None
    return got


def in_place_additions(monkeypatch):
    """count() -> number of in-place additions to the head's gradient so far."""
    counted, original = [], autograd._accumulator
    monkeypatch.setattr(autograd, "_accumulator", lambda x: (counted.append(original(x)), counted[-1])[1])
    return lambda: sum(x is not None for x in counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_in_place_accumulation_equals_autograd(monkeypatch, impl, device, loss, dtype):
    cases, count = micro_batches(device, dtype, softcap=8.0), in_place_additions(monkeypatch)
    for case in cases:
        loss(case, impl=impl).backward()
    want = grads(cases)
    assert count() == 0
    waiting = [loss(case, impl=impl, keep_head=False) for case in cases]
    for x in waiting:
        x.backward()
    assert count() == 2  # the first backward creates `.grad`
    for got, x in zip(grads(cases), want, strict=True):  # three terms, each sum and each term rounded at most once
        largest = x.abs().max().item()
        torch.testing.assert_close(got, x, rtol=0, atol=6 * torch.finfo(dtype).eps / 2 * largest + 1e-5 * largest)


def test_bf16_accumulation_is_at_least_as_exact(monkeypatch, impl, device):
    """The error against fp64 is at most that of summing rounded gradients."""
    cases = micro_batches(device, torch.bfloat16)
    exact_cases = [case.to(torch.float64) for case in cases]
    weight, bias = exact_cases[0].weight.detach().requires_grad_(), exact_cases[0].bias.detach().requires_grad_()
    for case in exact_cases:
        logps(Case(case.hidden, weight, case.targets, bias, case.head), impl="reference").backward()
    distances = []
    for options in ({"keep_head": False}, {}):
        for case in cases:
            logps(case, impl=impl, **options).backward()
        distances.append((cases[0].weight.grad.double() - weight.grad).norm())
        grads(cases)
    in_place, autograd_distance = distances
    assert in_place <= autograd_distance


@pytest.mark.parametrize("parts", [False, True])
def test_accumulation_allocates_nothing_of_head_size(impl, device, parts):
    n, v, d = 6, 301, 16
    case = make_case((n,), d, v, device=device, bias=False).leaves()
    weight = case.weight if not parts else (case.weight, torch.randn(v, 2, device=device).requires_grad_())
    hidden = case.hidden if not parts else torch.cat([case.hidden, case.hidden[:, :2]], 1)

    def backward():
        loss = linear_logps(hidden, weight, case.targets, impl=impl, keep_head=False, workspace=4000).logps.sum()
        with Allocations() as allocations:
            loss.backward(retain_graph=False)
        return allocations.sizes

    tensors = weight if parts else (weight,)
    sizes = {x.numel() for x in tensors}
    assert sizes <= {n for n, _ in backward()}
    hidden = hidden.detach().requires_grad_()
    first_grads = [x.grad for x in tensors]
    first_values = [x.clone() for x in first_grads]
    assert not sizes & {n for n, _ in backward()}
    for x, first_grad, value in zip(tensors, first_grads, first_values, strict=True):
        assert x.grad is first_grad
        torch.testing.assert_close(x.grad, 2 * value)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_observable_gradients_are_returned_to_autograd(monkeypatch, impl, device):
    """autograd.grad and hooks receive the gradient as without accumulation."""
    (case, *_), count = micro_batches(device), in_place_additions(monkeypatch)
    weight = case.weight
    loss = lambda: logps(case, impl=impl, keep_head=False)  # noqa: E731
    loss().backward()
    first = weight.grad.clone()

    (grad,) = torch.autograd.grad(loss(), weight)
    torch.testing.assert_close(grad, first)
    torch.autograd.grad(loss(), case.hidden)
    loss().backward(inputs=[case.hidden])
    assert torch.equal(weight.grad, first)

    hooked_grads = []
    for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
        handle = register(lambda x: hooked_grads.append(x.detach().clone()))
        loss().backward()
        handle.remove()
    torch.testing.assert_close(hooked_grads[0], first)
    torch.testing.assert_close(weight.grad, 3 * first)

    loss_value = loss()
    loss_value.backward(retain_graph=True)
    loss_value.backward()
    torch.testing.assert_close(weight.grad, 5 * first)
    assert count() == 1  # the last backward of a retained graph
    loss().backward(inputs=[weight])
    torch.testing.assert_close(weight.grad, 6 * first)
    assert count() == 2

    weight.grad = first.t().contiguous().t()  # a gradient with another layout is left to autograd
    loss().backward()
    torch.testing.assert_close(weight.grad, 2 * first)
    assert count() == 2


def test_a_non_leaf_head_gets_an_ordinary_gradient(monkeypatch, impl, device):
    (case, *_), count = micro_batches(device), in_place_additions(monkeypatch)
    for _ in range(2):
        copied = Case(case.hidden, case.weight * 1, case.targets, case.bias, case.head)
        logps(copied, impl=impl, keep_head=False).backward()
    sum_of_two = case.weight.grad
    case.weight.grad = None
    logps(case, impl=impl).backward()
    torch.testing.assert_close(sum_of_two, 2 * case.weight.grad)
    assert count() == 0


@pytest.mark.parametrize("keep_head", [True, False])
def test_a_tied_head_used_twice_gets_both_gradients(impl, device, keep_head):
    """The embedding and two losses of one graph add to the same gradient."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g).to(device).requires_grad_()
    ids = torch.randint(0, V, (2, 9), generator=g).to(device)

    def step(loss_of):
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        (loss_of(hidden, ids.roll(-1)) + loss_of(hidden * 2, ids.roll(-2))).backward()

    def fused(hidden, targets):
        return linear_logps(hidden, weight, targets, impl=impl, keep_head=keep_head).logps.mean()

    def eager_logps(hidden, targets):
        return (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[..., None]).mean()

    tied_grads = []
    for loss_of in (fused, eager_logps):
        weight.grad = None
        step(loss_of)
        step(loss_of)
        tied_grads.append(weight.grad)
    torch.testing.assert_close(*tied_grads, rtol=1e-4, atol=1e-5)


def test_a_batch_without_tokens_leaves_the_gradient_unchanged(impl, device):
    (case, *_) = micro_batches(device)
    logps(case, impl=impl, keep_head=False).backward()
    before = case.weight.grad.clone()
    nothing = Case(case.hidden, case.weight, torch.full_like(case.targets, -100), case.bias, case.head)
    logps(nothing, impl=impl, keep_head=False).backward()
    assert torch.equal(case.weight.grad, before)
