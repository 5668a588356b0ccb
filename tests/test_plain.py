"""Every public function refuses tensors without plain storage, in one line that says what to pass."""

import functools
import inspect
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fusedalign
import fusedalign.losses
import fusedalign.sequence
from fusedalign import LinearCrossEntropyLoss, linear_cross_entropy, linear_logps, losses, sequence
from fusedalign.head import layer_head, lm_head

H, W, T, B = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randint(0, 6, (2, 3)), torch.randn(6)
X, GOOD, ROWS, ONES = torch.tensor([-1.0, -2.0]), torch.tensor([True, False]), -torch.ones(2, 3), torch.ones(2, 3)
IDS, LENGTHS = torch.arange(6).view(2, 3), torch.tensor([1, 2])

#: Every public function with tensor arguments -> its tensors by name.
CALLS = {
    "linear_logps": (linear_logps, {"hidden": H, "weight": W, "targets": T, "bias": B}, {}),
    "linear_cross_entropy": (linear_cross_entropy, {"hidden": H, "weight": W, "targets": T, "bias": B}, {}),
    "linear_cross_entropy items": (
        linear_cross_entropy,
        {"num_items": torch.tensor(3.0)},
        {"hidden": H, "weight": W, "targets": T},
    ),
    "dpo_loss": (
        losses.dpo_loss,
        {
            **dict.fromkeys(["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"], X),
            **dict.fromkeys(["chosen_lengths", "rejected_lengths", "pair_weights"], X.abs()),
        },
        {"loss_type": "ipo"},
    ),
    "cpo_loss": (losses.cpo_loss, {"chosen_logps": X, "rejected_logps": X}, {}),
    "simpo_loss": (losses.simpo_loss, {"chosen_mean_logps": X, "rejected_mean_logps": X}, {}),
    "tpo_loss": (losses.tpo_loss, {"chosen_logps": X, "rejected_logps": X}, {}),
    "orpo_loss": (losses.orpo_loss, {"chosen_mean_logps": X, "rejected_mean_logps": X}, {}),
    "alphapo_rewards": (losses.alphapo_rewards, {"mean_logps": X}, {}),
    "kto_loss": (losses.kto_loss, {"logps": X, "ref_logps": X, "desirable": GOOD, "kl": torch.tensor(1.0)}, {}),
    "kto_kl": (losses.kto_kl, {"kl_logps": X, "ref_kl_logps": X}, {}),
    "sft_loss": (
        losses.sft_loss,
        {"logps": ROWS, "mask": ONES, "num_items": torch.tensor(3), "mean_logps": ROWS, "lse": ROWS},
        {"label_smoothing": 0.1, "z_loss": 0.1},
    ),
    "ld_logps": (losses.ld_logps, {"logps": ROWS, "mask": ONES, "shared_lengths": LENGTHS}, {"ld_alpha": 0.5}),
    "wpo_weights": (losses.wpo_weights, {"logps": ROWS, "log_sum_sq_probs": ROWS, "mask": ONES}, {}),
    "completion_labels": (sequence.completion_labels, {"input_ids": IDS, "completion_mask": ONES}, {}),
    "completion_mask": (sequence.completion_mask, {"prompt_lengths": LENGTHS, "attention_mask": ONES}, {}),
    "shift_labels": (sequence.shift_labels, {"labels": IDS, "position_ids": IDS}, {}),
    "sequence_sum": (sequence.sequence_sum, {"values": ROWS, "mask": ONES}, {}),
    "sequence_mean": (sequence.sequence_mean, {"values": ROWS, "mask": ONES}, {}),
    "segment_sum": (sequence.segment_sum, {"values": ROWS, "mask": ONES, "position_ids": IDS}, {}),
    "split_pairs": (sequence.split_pairs, {"values": ROWS}, {}),
    "preference_pair": (sequence.preference_pair, {"logps": ROWS, "mask": ONES}, {}),
}
EACH = pytest.mark.parametrize(("call", "name"), [(call, name) for call in CALLS for name in CALLS[call][1]])


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def refused(call, name, bad):
    f, tensors, options = CALLS[call]
    f(**tensors, **options)  # is accepted
    with pytest.raises(TypeError) as caught:
        f(**tensors | {name: bad}, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_public_function_with_tensors_is_tested():
    public = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    public |= {n for n, f in vars(sequence).items() if inspect.isfunction(f) and f.__module__ == sequence.__name__}
    public |= {"linear_logps", "linear_cross_entropy"}
    assert {name for name in public if not name.startswith("_")} <= CALLS.keys()
    for f, tensors, options in CALLS.values():
        tensor_names = {p.name for p in inspect.signature(f).parameters.values() if "Tensor" in str(p.annotation)}
        assert tensor_names <= {*tensors, *options, "num_items", "bias"}


@EACH
def test_dtensors_are_refused(mesh, call, name):
    x, is_head = CALLS[call][1][name], name in ("weight", "bias")
    for placement in (Replicate(), *([Shard(0)] if x.ndim and not is_head else [])):
        message = refused(call, name, distribute_tensor(x, mesh, [placement]))
        served = ", or a DTensor sharded on dimension 0 over a mesh of one dimension" if is_head else ""
        got = f"got a DTensor with placements ({placement!r},): pass {name}.full_tensor() "
        assert message.startswith(f"{name} must be a plain tensor{served}, {got}")
        assert is_head or "attach() to TRL's trainer under FSDP2" in message


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_sharded_tensor_of_the_head_beside_a_plain_one(mesh, name):
    message = refused("linear_logps", name, distribute_tensor(CALLS["linear_logps"][1][name], mesh, [Shard(0)]))
    other = {"weight": "bias", "bias": "weight"}[name]
    assert message.startswith(f"{other} must be a DTensor sharded on dimension 0, like {name}, got a plain tensor")


@EACH
def test_nested_and_sparse_tensors_are_refused(call, name):
    x = CALLS[call][1][name]
    if not x.ndim:
        pytest.skip("a 0-d tensor has no nested or sparse layout")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's prototype warning
        nested = [torch.nested.nested_tensor([x, x], layout=layout) for layout in (torch.strided, torch.jagged)]
    for bad in nested:
        assert f"got a nested tensor: pass torch.nested.to_padded_tensor({name}, 0.0)" in refused(call, name, bad)
    assert f"got one with layout torch.sparse_coo: pass {name}.to_dense()" in refused(call, name, x.to_sparse())


class Wrapped(torch.Tensor):
    """A subclass with its own arithmetic, like masked and quantised tensors."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing may be computed")


@EACH
def test_tensor_subclasses_with_own_arithmetic_are_refused(call, name):
    message = refused(call, name, Wrapped(CALLS[call][1][name]))
    assert message.startswith(f"{name} must be a plain tensor, got a Wrapped, which brings its own arithmetic")


@pytest.mark.parametrize("position", [0, 1])
def test_dtensor_parts_of_the_head_are_refused(mesh, position):
    parts = [W[:, :3], W[:, 3:]]
    parts[position] = distribute_tensor(parts[position].contiguous(), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=rf"^weight\[{1 - position}\] must be a DTensor sharded on dimension 0"):
        linear_logps(H, tuple(parts), T)
    parts[position] = distribute_tensor(W[:, :3].contiguous(), mesh, [Replicate()])
    with pytest.raises(TypeError, match=rf"^weight\[{position}\] must be a plain tensor, or a DTensor"):
        linear_logps(H, tuple(parts), T)


def test_dtensor_heads_of_models_are_refused(mesh):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, tie_word_embeddings=False))
    lm_head(model)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    assert lm_head(model).weight is model.lm_head.weight
    model.lm_head.weight = nn.Parameter(distribute_tensor(torch.zeros(11, 8), mesh, [Replicate()]))
    name = re.escape("weight of Qwen3ForCausalLM.lm_head")
    with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor, got a DTensor with placements"):
        lm_head(model)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_module_refuses_dtensors(mesh, name):
    head = nn.Linear(4, 6)
    setattr(head, name, nn.Parameter(distribute_tensor(getattr(head, name).detach(), mesh, [Replicate()])))
    for call in (lambda: LinearCrossEntropyLoss(head)(H, T), lambda: layer_head(head)):
        with pytest.raises(TypeError, match=rf"^{name} of output_embeddings must be a plain tensor, got a DTensor"):
            call()
    module = LinearCrossEntropyLoss(nn.Linear(4, 6))
    with pytest.raises(TypeError, match=r"^hidden must be a plain tensor, got a DTensor"):
        module(distribute_tensor(H, mesh, [Shard(0)]), T)


def test_the_suggested_fix_gives_the_right_gradient(mesh):
    """On one rank; over several ranks, Partial() adds up the gradients of each rank's tokens."""
    want = W.clone().requires_grad_()
    linear_cross_entropy(H, want, T).backward()
    for options in ({}, {"grad_placements": [Partial()]}):
        weight = distribute_tensor(W, mesh, [Shard(0)]).requires_grad_()
        linear_cross_entropy(H, weight.full_tensor(**options), T).backward()
        torch.testing.assert_close(weight.grad.full_tensor(), want.grad)


def test_fake_tensors_of_a_traced_graph_are_accepted():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(2)
        assert fusedalign.dpo_loss(x, x, x, x, pair_weights=x).losses.shape == (2,)
        assert fusedalign.sft_loss(x, x, num_items=x[0]).shape == ()


def test_subclasses_without_own_arithmetic_are_accepted():
    class Named(torch.Tensor):
        """A subclass without its own arithmetic."""

    torch.testing.assert_close(
        linear_logps(H.as_subclass(Named), W, T).logps.as_subclass(torch.Tensor), linear_logps(H, W, T).logps
    )
    assert functools.reduce(torch.add, fusedalign.cpo_loss(X.as_subclass(Named), X).losses) > 0


@pytest.mark.parametrize("f", [linear_logps, linear_cross_entropy])
def test_meta_tensors_are_refused(f):
    """As in a model built on the meta device."""
    meta = [x.to("meta") for x in (H, W, T)]
    for args in (meta, [*meta[:2], T]):
        with pytest.raises(
            ValueError, match=r"^hidden must hold data, got a meta tensor: load the model's weights onto"
        ):
            f(*args)
    with pytest.raises(ValueError, match=r"^weight must be on cpu like hidden, got meta$"):
        f(H, meta[1], T)
    with pytest.raises(ValueError, match=r"^hidden must hold data, got a meta tensor"):
        LinearCrossEntropyLoss(in_features=4, out_features=6, device="meta")(meta[0], meta[2])
