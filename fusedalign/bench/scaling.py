"""The command `fusedalign bench scaling`: a head on 8 to 1,024 GPUs, calculated: memory, compute, communication.

Nothing is measured here. Sizes of collectives are those of the engines and of `impls/parallel.py`; their times are
NCCL's own model of a ring (nccl, src/graph/tuning.cc): bytes over bandwidth, and a latency for every step of the ring.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fusedalign.commandline import CommandParser
from fusedalign.reports import check_writable, markdown_table, replace_text, to_json

WORD = "scaling"
GIB = 2**30
RANKS = (8, 16, 64, 256, 1024)
TOKENS = 8192
USES = ("none", "frozen", "trained")

#: Bytes a parameter of the optimizer: an fp32 copy of the weight and two states of Adam.
OPTIMIZER_BYTES = 12
#: fp32 numbers of a token that ranks exchange: max, sum of exponentials, target logit.
STATISTICS = 3
#: Bytes by which ranks agree on a call.
AGREEMENT = 40
#: Seconds of a step of NCCL's ring, protocol Simple, on Hopper.
NVLINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 14e-6


@dataclass(frozen=True)
class Head:
    """A head [vocab, width]."""

    name: str
    vocab: int
    width: int
    itemsize: int = 2

    def bytes(self, ranks: int = 1) -> int:
        """Bytes of the largest of the shards on so many ranks; the whole on one."""
        return -(-self.vocab // ranks) * self.width * self.itemsize


HEADS = {head.name: head for head in (Head("llama3-70b", 128256, 8192), Head("qwen3-235b", 151936, 4096))}


@dataclass(frozen=True)
class Cluster:
    """What GPUs compute and exchange, as sustained rates; the defaults are an H100's, see docs/distributed.md."""

    node: int = 8
    """GPUs of a node"""
    tflops: float = 690
    """of large products in bf16"""
    nvlink: float = 370
    """GB/s that a GPU receives from others of its node"""
    network: float = 48
    """GB/s that the network adapter of a GPU receives"""


class Group(NamedTuple):
    """Ranks that exchange, evenly on some nodes."""

    ranks: int
    nodes: int


@dataclass(frozen=True)
class Collective:
    """An exchange by a ring."""

    name: str
    """all-gather, reduce-scatter or all-reduce"""
    bytes: int
    """of the whole tensor: all shards of a gather or a scatter"""
    group: Group

    @property
    def passes(self) -> int:
        """How often the tensor goes around the ring: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.name == "all-reduce" else 1

    @property
    def received(self) -> float:
        """Bytes that a rank receives; it sends as many."""
        return self.passes * self.bytes * (self.group.ranks - 1) / self.group.ranks

    def seconds(self, cluster: Cluster) -> float:
        """The time in a cluster: a ring enters a node by the adapters of all its ranks, each with its part."""
        ranks, nodes = self.group
        inside = self.received / cluster.nvlink if ranks > nodes else 0.0
        across = self.received / (ranks / nodes) / cluster.network if nodes > 1 else 0.0
        latency = (ranks - nodes) * NVLINK_LATENCY + (nodes - 1) * NETWORK_LATENCY
        return max(inside, across) / 1e9 + self.passes * latency


@dataclass(frozen=True)
class Layout:
    """A way to hold a head on so many GPUs, and what a step costs each of them."""

    name: str
    ranks: int
    held: int
    """bytes between steps: weight and optimizer"""
    peak: int
    """bytes while the head runs, gradients included"""
    flops: float
    """of the large products"""
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        """Bytes that a GPU receives."""
        return sum(x.received for x in self.collectives)

    def compute(self, cluster: Cluster) -> float:
        """Seconds of the products."""
        return self.flops / (cluster.tflops * 1e12)

    def communication(self, cluster: Cluster) -> float:
        """Seconds of all collectives, one after another."""
        return sum(x.seconds(cluster) for x in self.collectives)


def layouts(head: Head, tokens: int, use: str, ranks: int, node: int = 8) -> list[Layout]:
    """Every way to hold a head, for a step of one micro-batch.

    Args:
        tokens: of each GPU; ranks that share a vocabulary-parallel head all see the tokens of all of them.
        use: "none", "frozen" or "trained": which gradients are needed.
        ranks: up to one node, or whole nodes.
        node: GPUs of a node.
    """
    nodes = max(1, ranks // node)
    node = ranks // nodes
    every, inside, between = Group(ranks, nodes), Group(node, 1), Group(nodes, nodes)
    is_trained = use == "trained"

    def layout(name: str, weight: int, optimizer: int, collectives: list[Collective], *, split: int = 1) -> Layout:
        """A layout from the ranks that share the stored weight, the optimizer, and the work of the head."""
        part, count = head.bytes(split), tokens * split
        held = head.bytes(weight) + is_trained * head.bytes(optimizer) // head.itemsize * OPTIMIZER_BYTES
        gathered = part if weight > split else 0
        peak = held + gathered + is_trained * part + _path_bytes(head, count, use, is_summed=split > 1)
        flops = products(use, count, head.width) * 2 * count * (part // head.itemsize)
        return Layout(name, ranks, held, peak, flops, tuple(collectives))

    def sharded(group: Group) -> list[Collective]:
        size = group.ranks * head.bytes(group.ranks)  # shards are padded to the largest
        return [Collective(name, size, group) for name in ("all-gather", "reduce-scatter")[: 1 + is_trained]]

    def summed(size: int, group: Group) -> list[Collective]:
        return [Collective("all-reduce", size, group)] * is_trained

    replicas = summed(head.bytes(node), between)
    return [
        layout("DDP", 1, 1, summed(head.bytes(), every)),
        layout("ZeRO-2", 1, ranks, sharded(every) * is_trained),
        layout("FSDP2, ZeRO-3", ranks, ranks, sharded(every)),
        layout("HSDP", node, node, sharded(inside) + replicas),
        layout("vocabulary-parallel", node, node, exchanges(head, tokens * node, use, inside) + replicas, split=node),
    ]


def exchanges(head: Head, tokens: int, use: str, group: Group) -> list[Collective]:
    """The collectives of a vocabulary-parallel head, as in docs/distributed.md."""
    forward = [Collective("all-gather", group.ranks * x, group) for x in (AGREEMENT, 4 * STATISTICS * tokens)]
    return forward + [Collective("all-reduce", 4 * tokens * head.width, group)] * (use != "none")


def products(use: str, tokens: int, width: int) -> float:
    """Products of hidden states and head, in U; exponentials of `width` tokens are kept where the head is trained."""
    return {"none": 1, "frozen": 2, "trained": 4 - min(1, width / tokens)}[use]


def _path_bytes(head: Head, tokens: int, use: str, *, is_summed: bool) -> int:
    """What a gradient path takes at most: workspace, gradient of hidden (its sum too), and a frozen head's Jacobian."""
    from fusedalign.problem import DEFAULT_WORKSPACE  # imports torch

    items = head.itemsize + 4 * is_summed + 2 * (use == "frozen")
    return DEFAULT_WORKSPACE + (use != "none") * tokens * head.width * items


def scaling(argv: list[str]) -> None:
    """Run `fusedalign bench scaling`.

    Raises:
        ValueError: an invalid argument; one line.
    """
    options = _parser().parse(argv)
    if options is None:
        return
    cluster = Cluster(options.node, options.tflops, options.nvlink, options.network)
    for name in ("tokens", *dataclasses.asdict(cluster)):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(options, name)}")
    ranks, heads = _ranks(options.ranks, cluster.node), _heads(options)
    if options.out is not None:
        check_writable(options.out, "--out")
    rates = f"{cluster.tflops:g} TFLOP/s, NVLink {cluster.nvlink:g} GB/s, network {cluster.network:g} GB/s a GPU"
    print(f"# fusedalign bench {WORD}\n\nNodes of {cluster.node} GPUs: {rates}. Calculated, not measured.")
    results = []
    for head in heads:
        rows = [layouts(head, options.tokens, options.use, r, cluster.node) for r in ranks]
        print("\n" + section(head, options.tokens, options.use, rows, cluster))
        results += [{"head": head.name, **_figures(x, cluster)} for row in rows for x in row]
    if options.out is not None:
        report = {"cluster": dataclasses.asdict(cluster), "tokens": options.tokens, "use": options.use}
        replace_text(options.out / f"{WORD}.json", to_json({**report, "layouts": results}, indent=1) + "\n")


def _figures(layout: Layout, cluster: Cluster) -> dict[str, Any]:
    seconds = {"compute_s": layout.compute(cluster), "communication_s": layout.communication(cluster)}
    return {**dataclasses.asdict(layout), "received": layout.received, **seconds}


def section(head: Head, tokens: int, use: str, rows: list[list[Layout]], cluster: Cluster) -> str:
    """Markdown tables of a head: a row for each layout, a column for each number of GPUs."""

    def time(layout: Layout) -> str:
        seconds = layout.communication(cluster)
        return f"{seconds * 1e3:.1f} ({seconds / layout.compute(cluster):.0%})"

    one, *_, split = rows[-1]
    seconds = one.compute(cluster), split.compute(cluster)
    lines = [
        f"## {head.name}, {use}: V={head.vocab}, D={head.width}, N={tokens} a GPU\n",
        f"Weight: {head.bytes() / GIB:.2f} GiB. Logits, N x V x (2 + 4) B: {tokens * head.vocab * 6 / GIB:.2f} GiB.",
        f"Products of a step: {seconds[0] * 1e3:.1f} ms; {split.name}: {seconds[1] * 1e3:.1f} ms.",
    ]
    cells: dict[str, Callable[[Layout], str]] = {
        "GiB of a GPU between steps, and while the head runs": lambda x: f"{x.held / GIB:.2f}, {x.peak / GIB:.2f}",
        "GiB that a GPU receives in a step": lambda x: f"{x.received / GIB:.2f}",
        "ms of communication, and its share of the time of the products": time,
    }
    for title, cell in cells.items():
        table = [["", *(f"{row[0].ranks} GPUs" for row in rows)]]
        table += [[same[0].name, *map(cell, same)] for same in zip(*rows, strict=True)]
        lines += ["", f"{title}:", "", *markdown_table(table)]
    return "\n".join(lines)


def _ranks(text: str, node: int) -> list[int]:
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or any(r < 1 or (r > node and r % node) for r in ranks):
        raise ValueError(f"--ranks must be numbers up to {node} or whole nodes of {node}, as 8,16, got {text!r}")
    return ranks


def _heads(options: argparse.Namespace) -> list[Head]:
    sizes = options.vocab_size, options.hidden_size
    if sizes == (None, None):
        return [HEADS[options.head]] if options.head else list(HEADS.values())
    if options.head is not None or None in sizes or min(sizes) < 1:
        raise ValueError(f"--vocab_size and --hidden_size must be given together, without --head, got {sizes}")
    return [Head("head", *sizes)]


def _parser() -> CommandParser:
    parser = CommandParser(
        f"fusedalign bench {WORD}",
        "Memory, compute and communication of a head on many GPUs, for each way to hold it; calculated, without a GPU.",
    )
    add, default = parser.add_argument, Cluster()
    add("--head", choices=HEADS, help="model that has the head; default: all")
    add("--vocab_size", type=int, metavar="N", help="V, with --hidden_size, instead of --head")
    add("--hidden_size", type=int, metavar="N", help="D")
    add("--tokens", type=int, default=TOKENS, metavar="N", help=f"of each GPU in a step; default: {TOKENS}")
    add(
        "--use",
        choices=USES,
        default=USES[-1],
        help=f"gradients: none, of a frozen head, of a trained one; default: {USES[-1]}",
    )
    ranks = ",".join(map(str, RANKS))
    add("--ranks", default=ranks, metavar="NUMBERS", help=f"GPUs, with commas between; default: {ranks}")
    add("--node", type=int, default=default.node, metavar="N", help=f"GPUs of a node; default: {default.node}")
    add(
        "--tflops",
        type=float,
        default=default.tflops,
        metavar="X",
        help=f"TFLOP/s that a GPU sustains in large products; default: {default.tflops}",
    )
    add(
        "--nvlink",
        type=float,
        default=default.nvlink,
        metavar="X",
        help=f"GB/s that a GPU receives in a node; default: {default.nvlink}",
    )
    add(
        "--network",
        type=float,
        default=default.network,
        metavar="X",
        help=f"GB/s that it receives from others; default: {default.network}",
    )
    add("--out", type=Path, metavar="DIR", help=f"also write {WORD}.json there")
    return parser
