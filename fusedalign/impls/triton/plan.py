"""How the workspace is divided into tiles, and the bytes of everything that counts towards it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fusedalign.impls.tiles import TileSizes
from fusedalign.impls.triton.launch import block_shape, is_operand
from fusedalign.problem import DEFAULT_WORKSPACE, Problem

#: Upper limit for tiles that are added to fp32 sums of their tokens: fewer tokens read the head more often, more
#: tokens the sums.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class WorkspacePlan(TileSizes):
    """Tile sizes, columns in whole blocks of the kernels."""

    spare: int
    """bytes of the workspace that no tile takes"""


def plan_grads(problem: Problem) -> WorkspacePlan:
    """Plan for tiles of logit gradients, in addition to the fp32 sum of dH and the operand copy of the hidden states.

    Every call with the same problem gives the same plan.
    """
    n, d = problem.hidden.shape
    itemsize = problem.operand_dtype.itemsize
    fp32_product = problem.operand_dtype == torch.float16 or problem.weight.dtype.itemsize < itemsize
    column_bytes = 4 * d if fp32_product else 0
    fixed = n * (4 * d + copy_bytes(problem))
    return plan_tiles(problem, cut_tokens=False, fixed=fixed, column_bytes=column_bytes, logit_bytes=itemsize)


def plan_tiles(
    problem: Problem,
    *,
    cut_tokens: bool = True,
    fixed: int = 0,
    token_bytes: int = 0,
    column_bytes: int = 0,
    logit_bytes: int = 0,
) -> WorkspacePlan:
    """Choose tile sizes for a workspace with `fixed` bytes taken; the other bytes are per item of a tile.

    Without `cut_tokens` a tile has all tokens, whatever `token_chunk` is: only columns are cut.

    The kernels' block statistics, fp32 products and copies of the head's tiles are counted here. The tiles get at least
    a quarter of the workspace, and at least a quarter of `fixed`, even if that exceeds the workspace: each tile is a
    pass over the sum of dH, so smaller ones would take longer than their products.
    """
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    options, itemsize = problem.memory, problem.operand_dtype.itemsize
    total = options.workspace or DEFAULT_WORKSPACE
    block_v = block_shape(problem.hidden.device).v
    budget = max(total - fixed, total // 4, fixed // 4)
    if problem.weight.dtype != problem.operand_dtype or not problem.weight.is_contiguous():
        column_bytes += d * itemsize
    bytes_per_logit = logit_bytes + (4 if itemsize == 4 else 0) + 4 * (3 + len(problem.outputs)) / block_v
    tokens = max(1, n)
    if cut_tokens and options.token_chunk:
        tokens = min(tokens, options.token_chunk)
    elif cut_tokens:
        # Equal chunks that leave room for 4 blocks of columns or more, and for columns half of the budget.
        token_limit = min(TOKENS_AT_ONCE, budget / (2 * token_bytes)) if token_bytes else n
        limit = max(1, int(min(token_limit, budget / (token_bytes + 4 * block_v * bytes_per_logit))))
        limit -= limit % 8 if limit > 8 else 0  # chunks start 16-byte aligned, whatever the length of a row
        chunks = math.ceil(tokens / limit)
        tokens = math.ceil(tokens / chunks)
        tokens += -tokens % 8 if chunks > 1 and limit >= 8 else 0
    columns = options.vocab_chunk or int((budget - tokens * token_bytes) / (tokens * bytes_per_logit + column_bytes))
    # Stored tiles take no more than keeps a GPU busy: exponentials make better use of the workspace.
    limit = v if cut_tokens or not logit_bytes or options.vocab_chunk else min(v, max(8192, 2**26 // tokens))
    columns = max(1, min(columns, math.ceil(limit / block_v) * block_v) // block_v) * block_v
    columns = math.ceil(v / math.ceil(v / columns) / block_v) * block_v  # equal tiles, in whole blocks
    tile_bytes = tokens * token_bytes + columns * (tokens * bytes_per_logit + column_bytes)
    return WorkspacePlan(tokens, columns, int(total - fixed - tile_bytes))


def columns_per_fold(problem: Problem, n: int, span: int) -> int:
    """Columns in whole tiles of `span` (at least one) with block statistics of at most a quarter of the workspace."""
    budget = (problem.memory.workspace or DEFAULT_WORKSPACE) // 4
    tiles = math.ceil(problem.weight.shape[0] / span)
    return span * max(1, min(tiles, budget // (n * stats_bytes(problem, span))))


def half_block_count(problem: Problem) -> int:
    """Number of halves of blocks of columns in the vocabulary."""
    return 2 * math.ceil(problem.weight.shape[0] / block_shape(problem.hidden.device).v)


def stats_bytes(problem: Problem, columns: int) -> int:
    """Bytes of the `BlockStats` of one token."""
    return 4 * (2 + len(problem.outputs)) * math.ceil(columns / block_shape(problem.hidden.device).v)


def copy_bytes(problem: Problem) -> int:
    """Bytes of the copy that `products.as_operand` makes of one token's hidden state."""
    return 0 if is_operand(problem.hidden, problem) else problem.hidden.shape[1] * problem.operand_dtype.itemsize
