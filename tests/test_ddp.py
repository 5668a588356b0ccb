"""Two gloo ranks end with equal parameters, equal to one process, even if one rank has no targets."""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fusedalign import linear_cross_entropy, linear_logps

STEPS = 3
REDUCTIONS = ["per token", "scalar", "accumulated"]


def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"body": torch.nn.Linear(6, 8), "head": torch.nn.Linear(8, 31)})


def batches():
    """[STEPS, rank, rows, T, ...]; at step 1 every target of rank 1 is ignored."""
    g = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(STEPS, 2, 2, 5, 6, generator=g), torch.randint(0, 31, (STEPS, 2, 2, 5), generator=g)
    targets[0, 1, 0, 2:] = -100
    targets[1, 1] = -100
    return inputs, targets


class Loss(torch.nn.Module):
    """The sum over this rank's tokens divided by the mean number of tokens per rank: DDP averages gradients."""

    def __init__(self, layers, reduction):
        super().__init__()
        self.layers, self.reduction = layers, reduction

    def forward(self, inputs, targets, num_items):
        hidden, head = self.layers["body"](inputs), self.layers["head"]
        options = {"bias": head.bias, "keep_head": self.reduction != "accumulated"}
        if self.reduction == "scalar":
            return linear_cross_entropy(hidden, head.weight, targets, num_items=num_items, **options)
        return -linear_logps(hidden, head.weight, targets, **options).logps.sum() / num_items


def train(reduction, ranks, wrap=lambda module: module):
    """The final weights; "accumulated": one row at a time, with in-place accumulation of the head's gradient."""
    module = wrap(Loss(model(), reduction))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    no_sync = getattr(module, "no_sync", contextlib.nullcontext)
    for inputs, targets in zip(*batches(), strict=True):
        num_items = (targets != -100).sum() / (2 if len(ranks) == 1 else 1)
        optimizer.zero_grad()
        size = 1 if reduction == "accumulated" else 99
        rows = (x[ranks].flatten(0, 1).split(size) for x in (inputs, targets))
        *first, last = zip(*rows, strict=True)
        with no_sync():
            for row in first:
                module(*row, num_items).backward()
        module(*last, num_items).backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights = {name: train(name, [rank], torch.nn.parallel.DistributedDataParallel) for name in REDUCTIONS}
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that exits early closes the connections of the other
    dist.destroy_process_group()
    os._exit(0)  # interpreter shutdown occasionally aborts in PyTorch's threads ("terminate called ...")


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    single = train("per token", [0, 1])
    for reduction in REDUCTIONS:
        for a, b, c in zip(first[reduction], second[reduction], single, strict=True):
            assert torch.equal(a, b), reduction
            torch.testing.assert_close(a, c, msg=lambda m, reduction=reduction: f"{reduction}: {m}")
