"""`fusedalign bench scaling`: its formulas by hand, at their limits, against measured tables and real collectives."""

import json
import tempfile
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fusedalign import linear_logps
from fusedalign.bench.scaling import (
    HEADS,
    NETWORK_LATENCY,
    NVLINK_LATENCY,
    OPTIMIZER_BYTES,
    USES,
    Cluster,
    Collective,
    Group,
    Head,
    exchanges,
    layouts,
    products,
)
from fusedalign.cli import main
from fusedalign.problem import DEFAULT_WORKSPACE

GIB = 2**30
SECONDS = 60  # for all checks on ranks
DOCS = (Path(__file__).parents[1] / "docs/distributed.md").read_text()
WAIT = timedelta(seconds=20)  # for the other rank, where a check has failed there
PAIR = Group(2, 1)


def named(*arguments, **options):
    return {layout.name: layout for layout in layouts(*arguments, **options)}


# Formulas


def test_a_ring_moves_what_is_counted_by_hand():
    """Of 80 bytes on 4 ranks each rank lacks 60; an all-reduce scatters sums, then gathers them."""
    assert Collective("all-gather", 80, Group(4, 1)).received == 60
    assert Collective("reduce-scatter", 80, Group(4, 1)).received == 60
    assert Collective("all-reduce", 80, Group(4, 1)).received == 120


def test_a_ring_takes_the_slower_of_links_and_adapters_and_its_steps():
    """A node's adapters share what enters it, unless each belongs to a ring of its own."""
    cluster = Cluster(node=4, nvlink=100, network=10)
    size = 8 * 10**9
    inside = Collective("all-gather", size, Group(4, 1)).seconds(cluster)
    assert inside == pytest.approx(6 / 100 + 3 * NVLINK_LATENCY)
    across = Collective("all-gather", size, Group(8, 2)).seconds(cluster)
    assert across == pytest.approx(7 / 4 / 10 + 6 * NVLINK_LATENCY + NETWORK_LATENCY)
    alone = Collective("all-reduce", size, Group(2, 2)).seconds(cluster)
    assert alone == pytest.approx(8 / 10 + 2 * NETWORK_LATENCY)


def test_two_gpus_by_hand():
    """V=10, D=4 in bf16: 80 bytes of weight, 480 of optimizer; 3 tokens a GPU, so 6 for both."""
    layout = named(Head("hand", 10, 4), 3, "trained", 2)
    path = DEFAULT_WORKSPACE + 3 * 4 * 2
    assert {name: x.held for name, x in layout.items()} == {
        "DDP": 80 + 480,
        "ZeRO-2": 80 + 240,
        "FSDP2, ZeRO-3": 40 + 240,
        "HSDP": 40 + 240,
        "vocabulary-parallel": 40 + 240,
    }
    assert {name: x.peak - x.held for name, x in layout.items()} == {
        "DDP": 80 + path,
        "ZeRO-2": 80 + path,
        "FSDP2, ZeRO-3": 80 + 80 + path,
        "HSDP": 80 + 80 + path,
        "vocabulary-parallel": 40 + DEFAULT_WORKSPACE + 6 * 4 * (2 + 4),
    }
    *replicated, split = (x.received for x in layout.values())
    assert replicated == [80] * 4
    assert split == 40 + 6 * 3 * 4 + 6 * 4 * 4
    assert [x.flops for x in layout.values()] == [3 * 2 * 3 * 4 * 10] * 4 + [(4 - 4 / 6) * 2 * 6 * 4 * 5]


def test_products_are_those_of_the_gradient_paths():
    assert [products(use, 8192, 2048) for use in USES] == [1, 2, 3.75]
    assert products("trained", 1024, 2048) == 3


@pytest.mark.parametrize("use", USES)
def test_one_gpu_exchanges_nothing_and_all_layouts_are_one(use):
    first, *others = layouts(HEADS["qwen3-235b"], 8192, use, 1)
    for layout in (first, *others):
        assert layout.received == layout.communication(Cluster()) == 0
        assert (layout.held, layout.peak, layout.flops) == (first.held, first.peak, first.flops)


@pytest.mark.parametrize(("vocab", "ranks"), [(128256, 8), (151936, 1024), (507, 2), (10, 4), (3, 8)])
def test_shards_make_up_the_whole(vocab, ranks):
    """The largest is that of FSDP2 and DTensor; a gather moves shards padded to it."""
    head = Head("", vocab, 16)
    rows = [len(x) for x in torch.arange(vocab).chunk(ranks)]
    assert head.bytes(ranks) == max(rows) * 16 * 2
    gather = named(head, 8, "none", ranks)["FSDP2, ZeRO-3"].collectives[0]
    assert 0 <= gather.bytes - head.bytes() < ranks * 16 * 2
    assert sum(rows) * 16 * 2 == head.bytes()


@pytest.mark.parametrize("head", HEADS.values(), ids=str)
def test_more_gpus_hold_less_each_and_exchange_more(head):
    rows = [named(head, 8192, "trained", ranks) for ranks in (8, 16, 64, 256, 1024)]
    for fewer, more in pairwise(rows):
        assert more["FSDP2, ZeRO-3"].held < fewer["FSDP2, ZeRO-3"].held
        assert more["HSDP"].held == fewer["HSDP"].held
        assert all(more[name].received > fewer[name].received for name in fewer)
    for row in rows:  # an all-reduce is a reduce-scatter and an all-gather, whatever its levels; padding is under 1 %
        assert row["HSDP"].received == pytest.approx(row["DDP"].received)
        assert row["FSDP2, ZeRO-3"].received == pytest.approx(row["DDP"].received, rel=0.01)
    assert rows[0]["HSDP"].received == rows[0]["FSDP2, ZeRO-3"].received


@pytest.mark.parametrize(("use", "divisor"), [("trained", 2), ("frozen", 4)])
@pytest.mark.parametrize("head", HEADS.values(), ids=str)
def test_vocabulary_parallel_moves_less_up_to_a_share_of_the_vocabulary(head, use, divisor):
    """As docs/distributed.md says: where the ranks of a node have fewer tokens than V / 2, frozen V / 4."""
    for factor, is_less in ((0.98, True), (1.02, False)):
        layout = named(head, int(factor * head.vocab / divisor / 8), use, 8)
        assert (layout["vocabulary-parallel"].received < layout["FSDP2, ZeRO-3"].received) is is_less


# Measurements of docs/distributed.md and docs/performance.md


@pytest.mark.parametrize(
    ("width", "vocab", "measured"),
    [(4096, 151936, (15.8, 32.7, 56.3)), (4096, 128256, (12.5, 26.4, 45.7))],
)
def test_products_take_within_15_percent_of_the_measured_time(width, vocab, measured):
    for use, ms in zip(USES, measured, strict=True):
        layout = layouts(Head("", vocab, width), 8192, use, 1)[0]
        assert layout.compute(Cluster()) * 1e3 == pytest.approx(ms, rel=0.15)


@pytest.mark.parametrize(("ranks", "measured"), [(1, (1.20, 1.45, 2.64)), (2, (0.60, 0.86, 1.41))])
def test_memory_is_at_most_a_workspace_above_the_measured(ranks, measured):
    head = Head("", 151936, 4096)
    for use, gib in zip(USES, measured, strict=True):
        layout = named(head, 8192 // ranks, use, ranks)["vocabulary-parallel"]
        optimizer = OPTIMIZER_BYTES * head.bytes(ranks) / 2 if use == "trained" else 0
        assert gib - 0.01 < (layout.peak - optimizer) / GIB < gib + 0.25


# The command


def test_the_tables_of_the_page_are_those_of_the_command(capsys):
    assert main(["bench", "scaling"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 * 3 * 7
    for row in rows:
        assert row in DOCS


def test_another_head_and_other_rates(capsys, tmp_path):
    sizes = ["--vocab_size", "1000", "--hidden_size", "64", "--ranks", "2,32", "--tokens", "100"]
    rates = ["--node", "4", "--network", "6", "--use", "frozen", "--out", str(tmp_path)]
    assert main(["bench", "scaling", *sizes, *rates]) == 0
    assert "V=1000, D=64, N=100 a GPU" in capsys.readouterr().out
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert report["cluster"] == {"node": 4, "tflops": 690, "nvlink": 370, "network": 6}
    assert [x["ranks"] for x in report["layouts"]] == [2] * 5 + [32] * 5
    assert report["layouts"][2]["held"] == 500 * 64 * 2
    assert report["layouts"][2]["received"] == 500 * 64 * 2
    assert report["layouts"][5]["communication_s"] == 0  # DDP, a frozen head


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "12"], "--ranks must be numbers up to 8 or whole nodes of 8, as 8,16, got '12'"),
        (["--ranks", "8,x"], "--ranks must be numbers up to 8"),
        (["--vocab_size", "9"], "--vocab_size and --hidden_size must be given together"),
        (["--node", "0"], "--node must be above 0, got 0"),
        (["--network", "nan"], "--network must be above 0, got nan"),
        (["--head", "gpt"], "--head must be one of llama3-70b, qwen3-235b, got 'gpt'"),
    ],
)
def test_invalid_arguments_are_errors_in_one_line(capsys, words, message):
    assert main(["bench", "scaling", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Real collectives


NAMES = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


class Recorder(TorchDispatchMode):
    """Records the collectives of PyTorch's process groups, with the bytes of their whole tensors."""

    def __init__(self, group):
        super().__init__()
        self.group, self.collectives = group, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function).partition(".")
        if namespace == "c10d":
            kind = name.strip("_").partition(".")[0].removesuffix("_").removesuffix("_base")
            whole = args[1] if kind == "reduce_scatter" else args[0]  # outputs come first
            size = sum(x.nbytes for x in torch.utils._pytree.tree_leaves(whole) if isinstance(x, torch.Tensor))
            self.collectives.append(Collective(NAMES[kind], size, self.group))
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    """A model of two units under FSDP2: a layer, and the root with the head."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(24, 24, bias=False), LossHead(507, 24)

    def forward(self, hidden, targets):
        return self.head(self.layer(hidden), targets)


class LossHead(nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, width))

    def forward(self, hidden, targets):
        return -linear_logps(hidden, self.weight, targets).logps.sum()


def record(loss):
    with Recorder(PAIR) as recorder:
        result = loss()
        if result.requires_grad:
            result.backward()
    return recorder.collectives


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=WAIT)
    head = Head("", 507, 24, itemsize=4)  # the second shard is a row shorter
    tokens = 10
    hidden, targets = torch.randn(2 * tokens, 24), torch.randint(507, (2 * tokens,))
    weight = torch.randn(507, 24).chunk(2)[rank]
    for use in USES:
        x, w = (t.detach().requires_grad_(needs) for t, needs in ((hidden, use != "none"), (weight, use == "trained")))
        options = {"process_group": dist.group.WORLD}
        recorded = record(lambda x=x, w=w, options=options: linear_logps(x, w, targets, **options).logps.sum())
        assert recorded == exchanges(head, 2 * tokens, use, PAIR), use
        expected = named(head, tokens, use, 2)
        assert sum(c.received for c in recorded) == expected["vocabulary-parallel"].received

        module = LossHead(507, 24)
        module.weight.requires_grad_(use == "trained")
        module = fully_shard(module, reshard_after_forward=False)
        x = hidden[:tokens].detach().requires_grad_(use != "none")
        recorded = record(lambda x=x, module=module: module(x, targets[:tokens]))
        assert tuple(recorded) == expected["FSDP2, ZeRO-3"].collectives, use
    module = DistributedDataParallel(LossHead(507, 24))
    recorded = record(lambda: module(hidden[:tokens], targets[:tokens]))
    assert tuple(recorded) == expected["DDP"].collectives

    module = Model()
    fully_shard(module.layer)
    recorded = record(lambda: fully_shard(module)(hidden[:tokens], targets[:tokens]))
    layer = {name: Collective(name, 24 * 24 * 4, PAIR) for name in ("all-gather", "reduce-scatter")}
    both_units = [*expected["FSDP2, ZeRO-3"].collectives, layer["all-gather"], *layer.values()]
    assert sorted(recorded, key=str) == sorted(both_units, key=str)

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    module = fully_shard(LossHead(507, 24), mp_policy=half, reshard_after_forward=False)
    recorded = record(lambda: module(hidden[:tokens].bfloat16(), targets[:tokens]))
    assert tuple(recorded) == named(Head("", 507, 24), tokens, "trained", 2)["FSDP2, ZeRO-3"].collectives
    dist.barrier()
    dist.destroy_process_group()


def test_bytes_are_those_of_real_collectives():
    """Two ranks: kinds, number and bytes of what a vocabulary-parallel head, FSDP2 and DDP exchange."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(rank_main, (folder,), nprocs=2, join=False, start_method="spawn")
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"the ranks took more than {SECONDS} s"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
