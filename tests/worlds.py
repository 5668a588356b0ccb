"""Checks that run in gloo ranks, all of a module's in one world, since a process takes seconds to start.

A module has `CHECKS`, a dict of functions by name, and asserts in a test that `failures(MODULE, ranks, folder)` has no
entry for a name.
"""

import importlib
import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 150  # for all checks
WAIT = timedelta(seconds=20)  # for another rank, where a check has failed there


def failures(module, ranks, folder):
    """The failures of each rank by the name of the check; ranks that hang are killed."""
    context = mp.spawn(_run_rank, args=(ranks, str(folder), module), nprocs=ranks, join=False)
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            break
    failed = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    if len(failed) == ranks:
        return failed
    return [dict.fromkeys(importlib.import_module(module).CHECKS, "the ranks hang"), *failed]


def _run_rank(rank, ranks, folder, module):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}  # for transformers
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=WAIT)
    failed = {}
    for name, check in importlib.import_module(module).CHECKS.items():
        try:
            check()
        except BaseException:  # of pytest.fail too
            failed[name] = traceback.format_exc()
            break  # the others may wait in a collective of this check
    torch.save(failed, f"{folder}/{rank}.pt")
    if not failed:
        dist.barrier()  # a rank that leaves early takes the other's connections along
    os._exit(0)
