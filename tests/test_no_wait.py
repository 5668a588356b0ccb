"""With targets on the CPU no call synchronises with the GPU, and the results are the same."""

import contextlib
from dataclasses import replace

import pytest
import torch
from helpers import OURS, make_case

from fusedalign import dpo_loss, kto_loss, ld_logps, linear_cross_entropy, sft_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextlib.contextmanager
def no_wait():
    """Raise on any operation that makes the CPU wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", [impl for impl in OURS if impl != "reference"])
@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")])
def test_forward_and_backward_do_not_synchronise(impl, needs, ignored, outputs):
    case = make_case((3, 17), 64, 303, dtype=torch.bfloat16, device="cuda", ignored=ignored, bias=needs[2])

    def run(case):
        out = case.logps(impl=impl, outputs=outputs)
        if any(needs):
            (out.logps * (1 - out.logps).detach()).sum().backward()
        return [x for x in out if x is not None] + [g for g in case.grads().values() if g is not None]

    expected = run(case.leaves(*needs))
    host = replace(case, targets=case.targets.cpu()).leaves(*needs)
    with no_wait():
        got = run(host)
    assert len(got) == 1 + len(outputs) + sum(needs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_losses_do_not_synchronise(bad):
    """Numbers passed as tensors are not read: one out of range gives NaN."""
    x, desirable = -torch.rand(2, device="cuda"), torch.tensor([True, False], device="cuda")
    rows, mask = -torch.rand(2, 3, device="cuda"), torch.ones(2, 3, device="cuda")
    numbers, one = torch.tensor([1.0, bad], device="cuda"), torch.ones(2, device="cuda")
    lengths = {"chosen_lengths": one, "rejected_lengths": numbers}
    case = make_case((3, 17), 64, 303, device="cuda", ignored=0.0)
    host = replace(case, targets=case.targets.cpu())
    with no_wait():
        outs = [
            dpo_loss(x, x, x, x, loss_type="ipo", **lengths).losses[1],
            ld_logps(rows, mask, numbers, ld_alpha=0.5)[1],
            sft_loss(rows, mask, num_items=numbers[1]),
            linear_cross_entropy(host.hidden, host.weight, host.targets, num_items=numbers[1]),
            *([] if bad == -1.0 else [dpo_loss(x, x, x, x, pair_weights=numbers).losses[1]]),
        ]
    assert torch.stack(outs).isnan().all()
    if bad != -1.0:  # its rewards need a count that only the device knows
        assert kto_loss(x, x, desirable, numbers[1]).losses.isnan().all()


def test_the_forward_of_the_fused_trainers_does_not_synchronise():
    """Although labels are on the GPU: they are copied to the CPU before the backbone runs."""
    transformers, forward = pytest.importorskip("transformers"), pytest.importorskip("fusedalign.trl.forward")
    from fusedalign.trl.options import HeadOptions

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Qwen3Config(
        vocab_size=303, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **heads
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    forward.add_lm_head(model, options=HeadOptions())
    ids = torch.randint(0, 303, (2, 9), device="cuda")
    labels = ids.where(ids % 3 > 0, -100)
    # transformers reads 2-D masks (or detects packed rows without one) and waits; it does not read this 4-D mask.
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool, device="cuda").tril()
    arguments = {"attention_mask": mask, "labels": labels, "fused_lm_head": True, "num_items_in_batch": 7}
    expected = model(ids, **arguments).log_probs
    try:
        with no_wait():
            model.base_model(ids, attention_mask=mask, use_cache=False)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        pytest.skip("this backbone synchronises with the GPU itself")
    with no_wait():
        got = model(ids, **arguments).log_probs
    assert torch.equal(got, expected)
