"""torch.func and torch.export around the head give the right number, or one line that says what is supported."""

import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from fusedalign import LinearCrossEntropyLoss, linear_cross_entropy, linear_logps

H, W, T = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([3, 19, -100, 0])
TRAINED = W.clone().requires_grad_()
CALLS = {
    "logps": lambda h, w, **options: linear_logps(h, w, T, **options).logps.square().sum(),
    "loss": lambda h, w, **options: linear_cross_entropy(h, w, T, **options),
}
EACH = pytest.mark.parametrize("call", CALLS)

#: Transforms that opaque backwards do not support.
TRANSFORMS = {
    "grad": lambda f: grad(f)(H),
    "jacrev": lambda f: jacrev(f)(H),
    "vmap": lambda f: vmap(f)(torch.stack([H, 2 * H])),
    "grad in vmap": lambda f: vmap(grad(f))(torch.stack([H, 2 * H])),
    "hessian": lambda f: hessian(f)(H),
    "jvp of what needs a gradient": lambda f: jvp(lambda h: f(h, TRAINED), (H,), (H,))[1],
}


@EACH
@pytest.mark.parametrize("impl", ["auto", "pytorch"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_unsupported_transforms_are_one_line_errors(call, impl, name):
    with pytest.raises(ValueError, match=rf"^impl='{impl}' cannot do this: torch\.func's transforms .*") as caught:
        TRANSFORMS[name](lambda h, w=W: CALLS[call](h, w, impl=impl))
    assert "impls that can: reference; or take gradients with torch.autograd" in str(caught.value)
    assert "\n" not in str(caught.value)


@EACH
def test_the_reference_supports_all_transforms(call):
    def f(h, w=W):
        return CALLS[call](h, w, impl="reference")

    def exact(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(f(h), h)[0]

    torch.testing.assert_close(grad(f)(H), exact(H))
    torch.testing.assert_close(vmap(grad(f))(torch.stack([H, 2 * H])), torch.stack([exact(H), exact(2 * H)]))
    # In fp64: second derivatives of squares cancel, so that fp32 may differ by more than its usual tolerance.
    hidden, head = H.double(), W.double()
    torch.testing.assert_close(
        hessian(lambda h: f(h, head))(hidden), torch.autograd.functional.hessian(lambda h: f(h, head), hidden)
    )
    torch.testing.assert_close(vmap(lambda w: f(H, w))(torch.stack([W, -W])), torch.stack([f(H), f(H, -W)]))


def test_targets_mapped_by_vmap_are_refused():
    with pytest.raises(ValueError, match=r"^targets must be the same in all of vmap, got mapped ones: use leading dim"):
        vmap(lambda h, t: linear_logps(h, W, t, impl="reference").logps)(H, T)
    grads = grad(lambda h, t: linear_logps(h, W, t, impl="reference").logps.sum())(H, T)  # wrapped, not mapped
    assert grads.shape == H.shape


@EACH
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5, "temperature": 0.7}])
def test_forward_mode_works_without_gradients(call, head):
    """torch.func.jvp, and the dual numbers it uses."""
    want = jvp(lambda h: CALLS[call](h, W, impl="reference", **head), (H,), (W[:4],))[1]
    torch.testing.assert_close(jvp(lambda h: CALLS[call](h, W, impl="pytorch", **head), (H,), (W[:4],))[1], want)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(CALLS[call](forward_ad.make_dual(H, W[:4]), W, impl="pytorch", **head)).tangent
    torch.testing.assert_close(dual, want)


def test_functional_call_works():
    """torch.func.functional_call with plain tensors instead of parameters."""
    loss = LinearCrossEntropyLoss(in_features=8, out_features=20, bias=True)
    other = {"head.weight": W.clone().requires_grad_(), "head.bias": torch.randn(20, requires_grad=True)}
    got = torch.autograd.grad(functional_call(loss, other, (H, T)), other.values())
    want = torch.autograd.grad(
        linear_cross_entropy(H, *list(other.values())[:1], T, bias=other["head.bias"]), other.values()
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match=r"^impl='auto' cannot do this: torch\.func's transforms"):
        grad(lambda p: functional_call(loss, p, (H, T)))({k: v.detach() for k, v in other.items()})


class Model(nn.Module):
    """A backbone and the loss of its head."""

    def __init__(self, **options):
        super().__init__()
        self.backbone, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 20)
        self.loss = LinearCrossEntropyLoss(lambda: self.lm_head, shift=1, **options)

    def forward(self, x, labels):
        return self.loss(self.backbone(x), labels)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"z_loss": 0.1, "reduction": "sum", "softcap": 3.0, "impl": "pytorch"}]
)
def test_export_gives_the_same_numbers(strict, options):
    model = Model(**options)
    x, labels = torch.randn(2, 5, 8), torch.randint(0, 20, (2, 5))
    exported = torch.export.export(model, (x, labels), strict=strict).module()
    for seed in range(2):
        torch.manual_seed(seed)
        x, labels = torch.randn(2, 5, 8), torch.randint(0, 20, (2, 5)).masked_fill(torch.rand(2, 5) < 0.3, -100)
        torch.testing.assert_close(exported(x, labels), model(x, labels))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_trains(strict):
    model, x, labels = Model(), torch.randn(2, 5, 8), torch.randint(0, 20, (2, 5))
    exported = torch.export.export(model, (x, labels), strict=strict).module()
    want = torch.autograd.grad(model(x, labels), list(model.parameters()))
    got = torch.autograd.grad(
        exported(x, labels), [exported.get_parameter(name) for name, _ in model.named_parameters()]
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False])
def test_unsupported_exports_raise(strict):
    class Parts(nn.Module):
        def forward(self, hidden, weight):
            return linear_logps(hidden, (weight[:, :3], weight[:, 3:]), T).logps

    x, labels = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
    for model, args, message in (
        (
            Model(impl="reference"),
            (x, labels),
            "impl='reference' cannot do this: torch.export; impls that can: auto, tr",
        ),
        (Parts(), (H, W), "weight must be one tensor under torch.export, got several parts: merge the adapters first"),
    ):
        with pytest.raises(Exception, match=re.escape(message)) as caught:
            torch.export.export(model, args, strict=strict)
        assert strict or isinstance(caught.value, ValueError)  # dynamo raises its own error


@pytest.mark.parametrize("loss_hint", [None, "nll"])
@pytest.mark.parametrize("trained", [False, True])
def test_batched_upstream_gradients_are_a_one_line_error(trained, loss_hint):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=trained)
    targets = torch.tensor([1, 5, 0])
    logps = linear_logps(hidden, weight, targets, impl="pytorch", loss_hint=loss_hint).logps
    loss = linear_cross_entropy(hidden, weight, targets, impl="pytorch")
    for out, upstream in ((logps, torch.eye(3)), (loss, torch.ones(3))):
        with pytest.raises(RuntimeError, match=r"^several gradients at once .* expected impl='reference'"):
            torch.autograd.grad(out, hidden, upstream, is_grads_batched=True)
