"""A head whose rows are sharded over the ranks of a process group: find this rank's part, and agree on the call.

Ranks exchange five integers before a call, so that a wrong argument on one of them raises on all and none waits for
another for ever.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusedalign.checks import is_dtensor, is_row_sharded
from fusedalign.compaction import TokenIndex, compact
from fusedalign.impls import impl_names, resolve
from fusedalign.impls.autograd import OwnGradients
from fusedalign.impls.parallel import VocabParallel, VocabShard
from fusedalign.impls.pytorch import IMPL as PYTORCH
from fusedalign.losses.common import check_loss_type
from fusedalign.losses.sft import LOSS_TYPES
from fusedalign.problem import NeedsGrad, Problem, Spec, SplitHead, with_tensors

Weight = Tensor | tuple[Tensor, ...]
#: The arguments loss_type, z_loss, reduction and num_items of a scalar loss.
Loss = tuple[str, float, str, float | Tensor | None]


class _Status(NamedTuple):
    """What a rank tells the others before a call, as integers."""

    is_valid: int
    """whether its arguments passed all checks"""
    vocab_size: int = 0
    """rows of its part of the head"""
    tokens: int = 0
    targets: int = 0
    """a hash"""
    options: int = 0
    """a hash"""


def local_part(
    weight: Weight, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Weight, Tensor | None, dist.ProcessGroup | None]:
    """This rank's rows of a head of DTensors, and their process group; other heads as they are.

    Raises:
        TypeError: a DTensor that is not sharded by rows on a mesh of one dimension, or sharded and plain tensors.
        ValueError: another process group than that of a DTensor.
    """
    with shared_failures(group):
        parts = weight if isinstance(weight, tuple) else (weight,)
        names = ["weight"] if isinstance(weight, Tensor) else [f"weight[{i}]" for i in range(len(parts))]
        sharded: dict[str, Any] = {
            name: x for name, x in zip([*names, "bias"], [*parts, bias], strict=True) if is_dtensor(x)
        }
        if not sharded:
            return weight, bias, group
        for name, x in sharded.items():
            if not is_row_sharded(x):
                partial = ", ".join(["Partial()"] * x.device_mesh.ndim)
                raise TypeError(
                    f"{name} must be a plain tensor, or a DTensor sharded on dimension 0 over a mesh of one dimension, "
                    f"got a DTensor with placements {tuple(x.placements)}: pass {name}.full_tensor() where all ranks "
                    f"hold the same tokens, {name}.full_tensor(grad_placements=[{partial}]) where each holds its own"
                )
        plain = [
            name
            for name, x in zip([*names, "bias"], [*parts, bias], strict=True)
            if x is not None and name not in sharded
        ]
        if plain:
            raise TypeError(
                f"{plain[0]} must be a DTensor sharded on dimension 0, like {next(iter(sharded))}, got a plain tensor: "
                "shard it over the same mesh, or pass each rank's rows of all of them with process_group"
            )
        mesh_groups = {x.device_mesh.get_group() for x in sharded.values()}
        if len(mesh_groups | ({group} if group is not None else set())) > 1:
            raise ValueError(
                "process_group must be that of the DTensors, and the same for all of them, got several groups"
            )
        local = tuple(sharded[name].to_local() if name in sharded else x for name, x in zip(names, parts, strict=True))
        bias = sharded["bias"].to_local() if "bias" in sharded else bias
        return local[0] if isinstance(weight, Tensor) else local, bias, mesh_groups.pop()


@contextlib.contextmanager
def shared_failures(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Tell the other ranks of an exception before `parallel_problem` is reached, so that they raise too."""
    try:
        yield
    except Exception:
        if group is not None:
            _exchange(group, _Status(is_valid=0))
        raise


def parallel_problem(
    hidden: Tensor,
    weight: Tensor | SplitHead,
    targets: Tensor,
    bias: Tensor | None,
    spec: Spec,
    ignore_index: int,
    *,
    impl: str,
    needs: NeedsGrad,
    group: dist.ProcessGroup,
    loss: Loss | None = None,
) -> tuple[Problem, TokenIndex, OwnGradients]:
    """This rank's part of a problem, and the impl that exchanges what the ranks need of one another.

    Raises:
        RuntimeError: another rank's arguments were refused.
        ValueError: ranks have other targets or options, a target is out of range, or the impl cannot serve.
    """
    with shared_failures(group):
        # Only an impl with gradients of its own can be split between statistics and gradients.
        names = ("auto", *impl_names("own"))
        if impl not in names:
            raise ValueError(
                f"impl={impl!r} cannot do this: a head sharded over ranks; impls that can: {', '.join(names)}"
            )
        compared: tuple[Any, ...] = ()
        if loss is not None:
            loss_type, *others, num_items = loss
            check_loss_type(loss_type, LOSS_TYPES)
            compared = loss_type, *others, None if num_items is None else float(num_items)
        flat = targets.reshape(-1).cpu()
        empty = with_tensors(spec, hidden.reshape(-1, hidden.shape[-1])[:0], weight, flat[:0].to(hidden.device), bias)
        chosen = resolve(impl, empty)
        numbers = [
            None if x is None else float(x) for x in (spec.scale, spec.softcap, spec.temperature, spec.filter_eps)
        ]
        tensors = hidden.shape[-1], hidden.dtype, spec.operand_dtype, bias is None, needs
        options = repr((impl, numbers, sorted(spec.outputs), int(ignore_index), tensors, compared))
        status = _Status(1, weight.shape[0], len(flat), _hash(flat), zlib.crc32(options.encode()))
    statuses = _exchange(group, status)
    _check_agreement(statuses)
    rank, sizes = dist.get_rank(group), [status.vocab_size for status in statuses]
    shard = VocabShard(group, sum(sizes[:rank]), sum(sizes))
    problem, token_index = compact(hidden, weight, targets, bias, spec, ignore_index, vocab_size=shard.vocab_size)
    problem = replace(problem, targets=problem.targets - shard.start)
    return problem, token_index, VocabParallel(chosen if isinstance(chosen, OwnGradients) else PYTORCH, shard)


def _exchange(group: dist.ProcessGroup, status: _Status) -> list[_Status]:
    """The statuses of all ranks, in their order; waits for the device."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor(status, dtype=torch.int64, device=device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, own, group=group)
    return [_Status(*numbers) for numbers in torch.stack(ranks).tolist()]


def _check_agreement(statuses: list[_Status]) -> None:
    refused = [rank for rank, status in enumerate(statuses) if not status.is_valid]
    if refused:
        raise RuntimeError(f"expected valid arguments on all ranks of the process group, rank {refused[0]} refused its")
    first = statuses[0]
    for rank, status in enumerate(statuses):
        if (status.tokens, status.targets) != (first.tokens, first.targets):
            raise ValueError(
                f"hidden and targets must be the same on all ranks that share a head, got others on rank {rank} than "
                "on rank 0: gather an FSDP2 weight first, or all tokens of a sequence-parallel group"
            )
        if status.options != first.options:
            raise ValueError(
                "impl, scale, softcap, temperature, ignore_index, outputs, the loss, num_items, dtypes and "
                "requires_grad must be the same on all ranks that share a head, got others on rank "
                f"{rank} than on rank 0"
            )


def _hash(targets: Tensor) -> int:
    """Of [N] int64 on the CPU, by their order too."""
    factors = torch.arange(1, len(targets) + 1) * 0x5851F42D4C957F2D  # wraps
    return int(((targets + 1_000_003) * factors).sum())
