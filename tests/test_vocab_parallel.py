"""A head sharded over gloo ranks: results and gradients are those of one process, and errors raise on all ranks.

The ranks of a world run all cases one after another, since a process takes seconds to start.
"""

import functools
import itertools
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import worlds
from helpers import HEADS, OURS, assert_loss_within_budget, assert_within_budget, make_case, run, run_loss
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusedalign import LinearCrossEntropyLoss, linear_cross_entropy, linear_logps
from fusedalign.head import lm_head
from fusedalign.problem import OUTPUTS

SHAPES = [((3, 17), 23, 252), ((2, 3, 9), 33, 507)]
NEEDS = {"all": (1, 1, 1), "frozen head": (1, 0, 0), "head alone": (0, 1, 1), "nothing": (0, 0, 0)}


def row_counts(vocab_size, ranks, uneven):
    """Rows of the head on each rank; uneven ones leave a rank with one row, or with none."""
    if not uneven:
        return [len(x) for x in torch.arange(vocab_size).chunk(ranks)]
    return [vocab_size - 31, 31] if ranks == 2 else [0, vocab_size - 2, 1, 1]


def part(case, uneven):
    """This rank's part of a case, and its rows."""
    counts = row_counts(len(case.weight), dist.get_world_size(), uneven)
    start = sum(counts[: dist.get_rank()])
    rows = slice(start, start + counts[dist.get_rank()])
    return replace(case, weight=case.weight[rows], bias=None if case.bias is None else case.bias[rows])


def whole(results):
    """Results with the gradients of all ranks' rows."""
    joined = dict(results)
    for name in ("dweight", "dbias"):
        if name in results:
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, results[name])
            joined[name] = torch.cat(ranks)
    return joined


def check_logps(impl, needs, uneven, dtype=torch.float32, seeds=(0,), heads=HEADS, shapes=SHAPES, **options):
    for seed, head, (leading, d, v) in itertools.product(seeds, heads, shapes):
        case = make_case(leading, d, v, dtype=dtype, seed=seed, **head)
        own = part(case, uneven)
        options = {"impl": impl, "process_group": dist.group.WORLD, **options}
        if any(needs):
            got = run(own, needs=needs, **options)
        else:
            got = {name: x for name, x in own.logps(outputs=OUTPUTS, **options)._asdict().items() if x is not None}
        assert_within_budget(case, whole(got))


def check_loss(impl, uneven, dtype=torch.float32):
    for options in ({}, {"loss_type": "dft"}, {"z_loss": 0.1, "reduction": "sum"}, {"num_items": 7}):
        case = make_case((3, 17), 33, 507, dtype=dtype, softcap=5.0)
        own = part(case, uneven)
        got = run_loss(own, impl=impl, process_group=dist.group.WORLD, **options)
        assert_loss_within_budget(case, whole(got), **options)


def check_masked_rows():
    """A rank all of whose columns are masked, as in a padded vocabulary."""
    case = make_case((3, 17), 33, 507)
    case.bias[-31:] = -torch.inf
    case.targets.clamp_(max=400)
    got = whole(run(part(case, True), impl="pytorch", process_group=dist.group.WORLD))
    exact = run(case.to(torch.float64), impl="reference")
    for name in ("logps", "entropy", "lse", "dhidden", "dweight"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=1e-4, msg=name)


def check_dtensors():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case((3, 17), 33, 507).leaves()
    weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(case.bias.detach(), mesh, [Shard(0)]).requires_grad_()
    for call in (linear_logps, linear_cross_entropy):
        for name in ("hidden", "weight", "bias"):
            getattr(case, name).grad = None
        weight.grad = bias.grad = None
        out = call(case.hidden, weight, case.targets, bias=bias)
        (out.logps.sin().sum() if call is linear_logps else out).backward()
        got = case.hidden.grad.clone(), weight.grad.full_tensor(), bias.grad.full_tensor()
        case.hidden.grad = None
        out = call(case.hidden, case.weight, case.targets, bias=case.bias)
        (out.logps.sin().sum() if call is linear_logps else out).backward()
        for x, name in zip(got, ("hidden", "weight", "bias"), strict=True):
            torch.testing.assert_close(x, getattr(case, name).grad, msg=name)
    if dist.get_world_size() == 2:  # rows in another order than the ranks
        reverse = DeviceMesh("cpu", [1, 0])
        with pytest.raises(TypeError, match="weight must be a plain tensor, or a DTensor"):
            linear_logps(case.hidden, distribute_tensor(case.weight.detach(), reverse, [Shard(0)]), case.targets)
    plane = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    with pytest.raises(TypeError, match=r"grad_placements=\[Partial\(\), Partial\(\)\]\)"):
        linear_logps(case.hidden, distribute_tensor(case.weight.detach(), plane, [Shard(0)] * 2), case.targets)
    for placements in ([Shard(1)], [Replicate()]):
        with pytest.raises(TypeError, match=r"weight must be .* sharded on dimension 0 .*full_tensor"):
            linear_logps(case.hidden, distribute_tensor(case.weight.detach(), mesh, placements), case.targets)


def check_module():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case((3, 17), 33, 507, bias=False)
    layer = nn.Linear(33, 507, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(case.weight, mesh, [Shard(0)]))
    hidden = case.hidden.clone().requires_grad_()
    LinearCrossEntropyLoss(layer)(hidden, case.targets).backward()
    exact = run_loss(case)
    torch.testing.assert_close(hidden.grad, exact["dhidden"])
    torch.testing.assert_close(layer.weight.grad.full_tensor(), exact["dweight"])


def check_tensor_parallel():
    """The head of a model that transformers has sharded over the ranks; gradients are those of the whole model."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 121, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "tie_word_embeddings": False}
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).save_pretrained(folder[0])
    dist.barrier()
    load = partial(transformers.Qwen3ForCausalLM.from_pretrained, folder[0], dtype=torch.float32)
    whole_model, model = load(), load(tp_plan="auto")
    ids = torch.randint(0, 121, (2, 7), generator=torch.Generator().manual_seed(1))
    logps = []
    for x in (whole_model, model):
        head, hidden = lm_head(x), x.model(input_ids=ids).last_hidden_state
        logps.append(linear_logps(hidden, head.weight, ids.roll(-1, 1)).logps)
        logps[-1].sin().sum().backward()
    torch.testing.assert_close(logps[1], logps[0])
    for (name, x), y in zip(model.named_parameters(), whole_model.parameters(), strict=True):
        grad = x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
        torch.testing.assert_close(grad, y.grad, rtol=1e-4, atol=1e-5, msg=name)


def check_split_head():
    """A split head: a thin column block of which each rank has its rows too."""
    case = make_case((3, 17), 33, 507).to(torch.float64)
    own, extra = (
        part(case, True),
        torch.randn(3, 17, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    block = torch.randn(507, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = part(replace(case, weight=block, bias=None), True).weight.clone().requires_grad_()
    hidden = torch.cat([case.hidden, extra], -1)
    got = linear_logps(hidden, (own.weight, rows), own.targets, bias=own.bias, process_group=dist.group.WORLD)
    got.logps.sin().sum().backward()
    exact_block = block.clone().requires_grad_()
    exact = linear_logps(hidden, (case.weight, exact_block), case.targets, bias=case.bias, impl="pytorch")
    exact.logps.sin().sum().backward()
    torch.testing.assert_close(got.logps, exact.logps)
    torch.testing.assert_close(whole({"dweight": rows.grad})["dweight"], exact_block.grad)


def check_no_tokens():
    case = part(make_case((3, 17), 33, 507), True).leaves()
    case.targets.fill_(-100)
    out = case.logps(process_group=dist.group.WORLD)
    assert not out.logps.any()
    out.logps.sum().backward()
    assert not case.hidden.grad.any()
    assert not case.weight.grad.any()


def check_errors():
    """One rank's mistake raises on every rank, and the group works afterwards."""
    rank, case = dist.get_rank(), make_case((3, 17), 33, 507)
    own = part(case, True)

    def expect(error, match, targets=own.targets, **options):
        options = {"process_group": dist.group.WORLD, **options}
        with pytest.raises(error, match=match):
            linear_logps(own.hidden, own.weight, targets, **{"bias": own.bias, **options})

    outside = own.targets.clone()
    outside[0, 0] = 507
    expect(ValueError, r"targets must be in \[0, 507\)", outside)
    if rank != 0:
        outside = own.targets
    expect(ValueError, "targets must be", outside)
    expect(ValueError, "the loss, num_items, dtypes and requires_grad must be the same", temperature=1.0 + rank)
    expect(ValueError, "must be the same on all ranks", bias=None if rank else own.bias)
    wrong = {} if rank else {"softcap": -1.0}
    expect(RuntimeError if rank else ValueError, "rank 0 refused" if rank else "softcap must be > 0", **wrong)
    expect(ValueError, "a head sharded over ranks; impls that can: auto, ", impl="reference")
    for wrong in ({"reduction": "max"}, {"loss_type": "mse"}, {"z_loss": -1.0}, {"num_items": -1}):
        options = {"process_group": dist.group.WORLD, **({} if rank else wrong)}
        with pytest.raises(RuntimeError if rank else ValueError, match="rank 0 refused" if rank else next(iter(wrong))):
            linear_cross_entropy(own.hidden, own.weight, own.targets, bias=own.bias, **options)
    for num_items in (7 + rank, torch.tensor(7 + rank), None if rank else 7):
        with pytest.raises(ValueError, match=r"num_items, .* must be the same on all ranks"):
            linear_cross_entropy(
                own.hidden, own.weight, own.targets, num_items=num_items, process_group=dist.group.WORLD
            )
    equal = torch.tensor(7) if rank else 7.0
    linear_cross_entropy(own.hidden, own.weight, own.targets, num_items=equal, process_group=dist.group.WORLD)
    shorter = own.targets if rank else own.targets.roll(1)
    expect(ValueError, "must be the same on all ranks", shorter)
    assert run(own, process_group=dist.group.WORLD)["logps"].isfinite().all()


#: Triton's interpreter takes seconds for each problem.
SMALL = {"heads": HEADS[-1:], "shapes": [((2, 5), 16, 123)]}
CHECKS = {
    **{
        f"pytorch, {name}, {'un' * uneven}even": partial(check_logps, "pytorch", needs, uneven)
        for name, needs in NEEDS.items()
        for uneven in (False, True)
    },
    "pytorch, bf16": partial(check_logps, "pytorch", (1, 1, 1), True, torch.bfloat16, seeds=(0, 1)),
    "pytorch, small tiles": partial(check_logps, "pytorch", (1, 1, 1), True, workspace=40_000),
    "pytorch, loss": partial(check_loss, "pytorch", True),
    "pytorch, loss, bf16": partial(check_loss, "pytorch", False, torch.bfloat16),
    "masked rows": check_masked_rows,
    "DTensors": check_dtensors,
    "module": check_module,
    "tensor parallel": check_tensor_parallel,
    "split head": check_split_head,
    "no tokens": check_no_tokens,
    "errors": check_errors,
}
if "triton" in OURS:
    CHECKS |= {
        **{f"triton, {name}": partial(check_logps, "triton", needs, True, **SMALL) for name, needs in NEEDS.items()},
        "triton, bf16": partial(check_logps, "triton", (1, 1, 1), False, torch.bfloat16, **SMALL),
    }


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Number of ranks -> failures of each rank by the name of the check."""
    return functools.cache(lambda ranks: worlds.failures(__name__, ranks, tmp_path_factory.mktemp(f"ranks{ranks}")))


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process(failures, ranks, name):
    for rank, failed in enumerate(failures(ranks)):
        assert name not in failed, f"rank {rank}: {failed[name]}"
