"""A Qwen3 over two pipeline ranks, with each impl's loss on the last stage, equals one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import IMPLS, INTERPRETED

pytest.importorskip("transformers")
RECIPE = Path(__file__).parents[1] / "recipes/pipeline.py"
SCHEDULES = ("GPipe", "1F1B")
ON_CPU = [impl for impl in IMPLS if impl != "cce"]
#: Triton's interpreter takes seconds per step, so it runs one schedule only.
CASES = [(s, impl) for s in SCHEDULES for impl in ON_CPU if not INTERPRETED or (s, impl) != ("GPipe", "triton")]
CASES_ON_GPUS = [(s, impl) for s in SCHEDULES for impl in IMPLS]


def recipe():
    spec = importlib.util.spec_from_file_location("pipeline_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rank_main(rank, folder, cases, on_gpus):
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    backend, store = "nccl" if on_gpus else "gloo", f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    r, results = recipe(), {}
    for schedule, impl in cases:
        stage = r.build()[rank].to(device, torch.bfloat16 if on_gpus else torch.float32)
        step = r.pipeline(stage, rank, schedule, impl, device, microbatches=4)
        loss = step(*(x.to(device) for x in r.batch()))
        grads = {name: p.grad.cpu() for name, p in stage.named_parameters()}
        results[schedule, impl] = None if loss is None else loss.cpu(), grads
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that exits early closes the connections of the other
    dist.destroy_process_group()
    os._exit(0)  # as in test_ddp.py


def run_pipelines(folder, cases, *, on_gpus):
    """(schedule, impl) -> loss and gradients of each rank."""
    mp.spawn(rank_main, args=(str(folder), cases, on_gpus), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def in_one_process(device="cpu", dtype=torch.float32, exact=False):
    """Loss and gradients from logits with PyTorch's cross-entropy; `exact`: weights of `dtype` computed in fp64."""
    r = recipe()
    stages, (ids, labels) = [stage.to(device, dtype) for stage in r.build()], (x.to(device) for x in r.batch())
    stages = [stage.double() for stage in stages] if exact else stages
    logits = stages[1].lm_head(stages[1](stages[0](ids)))
    dtype_of_logits = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).to(dtype_of_logits), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach().cpu(), [{name: p.grad.cpu() for name, p in stage.named_parameters()} for stage in stages]


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    return run_pipelines(tmp_path_factory.mktemp("pipeline"), CASES, on_gpus=False)


@pytest.fixture(scope="module")
def single():
    return in_one_process()


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


def test_the_recipe_learns():
    """Run as in its docstring: on two GPUs if present, else on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(RECIPE)]
    process = subprocess.run([*command, "--impl", "pytorch", "--schedule", "1F1B"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    losses = [float(line.split()[-1]) for line in process.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def piped_on_gpus(tmp_path_factory):
    return run_pipelines(tmp_path_factory.mktemp("pipeline"), CASES_ON_GPUS, on_gpus=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("schedule", "impl"), CASES_ON_GPUS)
def test_two_stages_in_bf16_on_two_gpus(piped_on_gpus, schedule, impl):
    """At most twice the error of one process with logits, plus the rounding of sums over micro-batches."""
    loss, exact = in_one_process("cuda", torch.bfloat16, exact=True)
    eager_loss, eager = in_one_process("cuda", torch.bfloat16)
    size = torch.finfo(torch.bfloat16).eps / 2
    got_loss = piped_on_gpus[1][schedule, impl][0]
    assert (got_loss - loss).abs() <= 2 * (eager_loss - loss).abs() + size * loss
    for rank in (0, 1):
        got = piped_on_gpus[rank][schedule, impl][1]
        assert got.keys() == exact[rank].keys()
        for name, want in exact[rank].items():
            error, eager_error = ((x[name].double() - want).norm() for x in (got, eager[rank]))
            assert error <= 2 * eager_error + 4 * size * want.norm(), f"rank {rank}: {name}"
