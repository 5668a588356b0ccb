"""A Qwen3 over two ranks of a pipeline, the loss on the last stage with each impl: equal to one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import IMPLS

pytest.importorskip("transformers")
RECIPE = Path(__file__).parents[1] / "recipes/pipeline.py"
ON_CPU = [impl for impl in IMPLS if impl != "cce"]
#: Triton's interpreter takes seconds for a step: one schedule shows what the other would.
CASES = [(s, impl) for s in ("GPipe", "1F1B") for impl in ON_CPU if (s, impl) != ("GPipe", "triton")]


def recipe():
    spec = importlib.util.spec_from_file_location("pipeline_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    r, results = recipe(), {}
    for schedule, impl in CASES:
        stage = r.build()[rank]
        loss = r.pipeline(stage, rank, schedule, impl, torch.device("cpu"), microbatches=4)(*r.batch())
        results[schedule, impl] = loss, {name: p.grad for name, p in stage.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves early takes the other's connections along
    dist.destroy_process_group()
    os._exit(0)  # as in test_ddp.py


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """(schedule, impl) -> loss and gradients, of each rank."""
    folder = tmp_path_factory.mktemp("pipeline")
    mp.spawn(rank_main, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def single():
    """The same in one process, from logits and PyTorch's own cross-entropy."""
    r = recipe()
    stages, (ids, labels) = r.build(), r.batch()
    logits = stages[1].lm_head(stages[1](stages[0](ids)))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), [{name: p.grad for name, p in stage.named_parameters()} for stage in stages]


@pytest.mark.parametrize(("schedule", "impl"), CASES)
def test_two_stages_equal_one_process(piped, single, schedule, impl):
    want, grads = single
    torch.testing.assert_close(piped[1][schedule, impl][0], want)
    for rank in (0, 1):
        got = piped[rank][schedule, impl][1]
        assert got.keys() == grads[rank].keys()
        for name, grad in grads[rank].items():
            assert grad is not None, name
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=f"rank {rank}: {name}")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_recipe_on_two_gpus(impl, schedule):
    """It learns, and its losses are those of the reference but for bf16."""

    def losses(name):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(RECIPE)]
        done = subprocess.run([*command, "--impl", name, "--schedule", schedule], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.tensor([float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")])

    got = losses(impl)
    assert len(got) == 20
    assert got[-1] < got[0]
    torch.testing.assert_close(got, losses("reference"), rtol=1e-2, atol=0)
