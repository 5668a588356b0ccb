"""Heads under FSDP2, on two gloo ranks: gradients are those of one process, and the head is gathered once.

The forward is tested without a trainer; every layer may be gathered again in the backward, the head only if trained.
"""

import contextlib
import itertools
import warnings
from functools import partial

import peft
import pytest
import tiny
import torch
import torch.distributed as dist
import trl
import trl.trainer.utils
import worlds
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from fusedalign.engines import sharded_layers
from fusedalign.trl.attachment import _Attachment, _install_switch, _Mark, _remove_switch, _stepping
from fusedalign.trl.forward import add_lm_head
from fusedalign.trl.options import HeadOptions

LAYERS = 2
STEPS = 2
OUTPUTS = ("log_probs", "entropy")


def batch(rank):
    """Rows whose length depends on the rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 419, (2, 7 + 4 * rank), generator=generator)
    labels = ids.clone()
    labels[0, : 3 + rank] = -100
    return {"input_ids": ids, "labels": labels}


def shard(model, unit, policy):
    """FSDP2 with the head in the root's unit, as a unit of its own, or with the last norm, as accelerate has it."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy}
    for layer in base.model.layers:
        fully_shard(layer, **options)
    tied = [base.model.embed_tokens] if base.config.tie_word_embeddings else []
    if unit == "own":
        fully_shard(base.lm_head, reshard_after_forward=True, **options)
    elif unit == "own, kept":
        fully_shard(base.lm_head, reshard_after_forward=False, **options)
    elif unit == "tail":
        fully_shard([base.model.norm, *tied, base.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    return model


@contextlib.contextmanager
def head_of(name, model):
    """The model with the Fused trainers' head, or with TRL's as `attach` replaces it."""
    if name == "fused":
        add_lm_head(model, OUTPUTS, options=HeadOptions())
        yield
        return
    trl.trainer.utils.add_fused_lm_head(model, outputs=OUTPUTS)
    attachment = _Attachment(HeadOptions(), None, torch.device("cpu"))
    mark = _Mark(attachment, model)
    model.register_forward_pre_hook(mark.enter, prepend=True)
    model.register_forward_hook(mark.leave, always_call=True)
    _install_switch()
    token = _stepping.set(attachment)
    try:
        yield
    finally:
        _stepping.reset(token)
        _remove_switch()


def freeze(model, trained):
    for name, parameter in model.named_parameters():
        frozen = {"all": False, "no head": "lm_head" in name, "queries": "q_proj" not in name}[trained]
        parameter.requires_grad_(not frozen)


def loss(model, rank, bonus=0.0):
    """`bonus` weighs the entropy, which is only logged where it is 0."""
    out = model(**batch(rank), fused_lm_head=True)
    value = out.log_probs.square().mean()
    return value + bonus * out.entropy.square().mean() if bonus else value


def gathers(counts):
    return sum(n for name, n in counts.items() if "allgather" in str(name))


def distance(x, reference):
    return float((x - reference).norm() / reference.norm())


def model_of(tied):
    torch.manual_seed(0)
    model = tiny.MODELS["tied" if tied else "qwen3"]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


def check(unit, *, tied=False, trained="all", half=False, head="fused", bonus=0.0):
    ranks = dist.get_world_size()
    whole, model = model_of(tied), model_of(tied)
    for x in (whole, model):
        freeze(x, trained)
    add_lm_head(whole, OUTPUTS, options=HeadOptions())
    (sum(loss(whole, rank, bonus) for rank in range(ranks)) / ranks).backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    shard(model, unit, policy or MixedPrecisionPolicy())
    with head_of(head, model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="For backward hooks|Full backward hook")  # of CommDebugMode
        warnings.filterwarnings("error", message=".*view tensor")
        for _ in range(STEPS):
            model.zero_grad()
            with CommDebugMode() as forward:
                value = loss(model, dist.get_rank(), bonus)
            with CommDebugMode() as backward:
                value.backward()
    units = LAYERS + 1 + (unit != "root" and not tied)  # a tied tail leaves the root nothing
    assert gathers(forward.get_comm_counts()) == units
    is_freed = {"root": False, "own": True, "own, kept": trained != "all", "tail": False}[unit]
    assert gathers(backward.get_comm_counts()) == LAYERS + (is_freed and (trained == "all" or bonus > 0))
    for (name, x), y in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if y.grad is not None:
            allowed = 8 * torch.finfo(torch.bfloat16).eps if half else 1e-5
            assert distance(x.grad.full_tensor(), y.grad) < allowed, name


def check_lora(unit):
    """LoRA on the head too: its factors belong to the unit of the head."""
    ranks, models = dist.get_world_size(), []
    for _ in range(2):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=3, init_lora_weights=False)
        models.append(peft.get_peft_model(model_of(False), config))
        add_lm_head(models[-1].get_base_model(), options=HeadOptions())
    whole, model = models
    (sum(loss(whole, rank) for rank in range(ranks)) / ranks).backward()
    shard(model, unit, MixedPrecisionPolicy())
    for _ in range(STEPS):
        model.zero_grad()
        loss(model, dist.get_rank()).backward()
    for (name, x), y in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if y.grad is not None:
            assert distance(x.grad.full_tensor(), y.grad) < 1e-5, name


def check_no_grad():
    """A reference model: sharded again after its forward."""
    whole, model = model_of(False), model_of(False)
    for x in (whole, model):
        add_lm_head(x, options=HeadOptions())
    shard(model, "own", MixedPrecisionPolicy())
    with torch.no_grad():
        for _ in range(STEPS):
            torch.testing.assert_close(loss(model, dist.get_rank()), loss(whole, dist.get_rank()))
    assert isinstance(model.lm_head.weight, DTensor)


def check_failure():
    """A forward that raises leaves the head's own forward in place."""
    model = model_of(False)
    add_lm_head(model, options=HeadOptions())
    shard(model, "own", MixedPrecisionPolicy())
    with pytest.raises(ValueError, match="targets must be in"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.full((1, 4), 999), fused_lm_head=True)
    assert sharded_layers(model.lm_head) == [model.lm_head]
    assert "forward" not in vars(model.lm_head)


UNITS = ("root", "own", "own, kept", "tail")
CHECKS = {
    **{
        f"{unit}, {trained} trained": partial(check, unit, trained=trained)
        for unit, trained in itertools.product(UNITS, ("all", "no head"))
    },
    "own, queries trained": partial(check, "own", trained="queries"),
    **{
        f"{unit}, no head trained, entropy": partial(check, unit, trained="no head", bonus=0.3)
        for unit in ("own", "own, kept", "tail")
    },
    **{f"{unit}, bf16": partial(check, unit, half=True) for unit in ("own", "tail")},
    **{f"{unit}, tied": partial(check, unit, tied=True) for unit in ("root", "tail")},
    **{f"{unit}, attach": partial(check, unit, head="attach") for unit in UNITS},
    "tail, tied, attach": partial(check, "tail", tied=True, head="attach"),
    **{f"{unit}, LoRA": partial(check_lora, unit) for unit in ("root", "own")},
    "no gradients": check_no_grad,
    "a failure": check_failure,
}


def test_fsdp2_gives_the_gradients_of_one_process(tmp_path):
    """One test, since a world takes long to start."""
    for rank, failed in enumerate(worlds.failures(__name__, 2, tmp_path)):
        assert not failed, f"rank {rank}: {''.join(f'{name}: {text}' for name, text in failed.items())}"
