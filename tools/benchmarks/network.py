"""What a collective costs: NCCL's own cost model over nodes of GPUs, and times measured of gloo."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

MICROSECOND = 1e-6


@dataclass(frozen=True)
class Collective:
    """Cost of one collective where nothing else runs.

    latency_s: seconds of messages in a row, which no other collective slows down.
    transfer_s: seconds of bytes on the links, which collectives under way at the same time share.
    demand: what it takes of the device that computes, while it lasts: multiprocessors of a GPU as a share of all; cores
        of the machine by all its ranks together.
    """

    latency_s: float
    transfer_s: float = 0.0
    demand: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds where nothing else runs."""
        return self.latency_s + self.transfer_s


FREE = Collective(0.0)


class Network(Protocol):
    """Costs of collectives among some number of ranks."""

    def all_reduce(self, num_bytes: int, ranks: int) -> Collective:
        """A sum of `num_bytes` from each of `ranks`, known to all."""

    def all_gather(self, num_bytes: int, ranks: int) -> Collective:
        """`num_bytes` of each of `ranks`, known to all."""


@dataclass(frozen=True)
class Protocols:
    """How NCCL sends, in the order LL, LL128, Simple. Microseconds, and shares of the links' bandwidth.

    Latencies are those by which NCCL chooses (`baseLatencies` and `hwLatencies` of its tuning model): base for the
    launch, then for each hop. Shares too: LL sends a flag with each word, LL128 one with every 15.
    """

    base_us: tuple[float, float, float]
    nvlink_us: tuple[float, float, float]
    network_us: tuple[float, float, float]
    shares: tuple[float, float, float]


RING = Protocols((6.6, 14.0, 8.4), (0.6, 1.9, 3.4), (2.7, 4.0, 14.0), (0.5, 0.92, 1.0))
# Of trees NCCL discounts 0.92, then 0.85, and about 0.6 for 256 kB to 64 MB (its "correction factor"): 0.47 together.
TREE = Protocols((6.8, 14.0, 8.4), (0.6, 1.25, 4.0), (5.0, 8.5, 14.0), (0.47 / 3.8, 0.47 * 0.92, 0.47))


@dataclass(frozen=True)
class Nccl:
    """Nodes of GPUs with NVLink inside and a network between them, each collective by the fastest of NCCL's ways.

    A ring passes all GPUs of a node one after the other; a tree is a chain in each node and a binary tree of the nodes.
    NVLink SHARP, which H100 nodes have, and SHARP in switches are left out: with them collectives are faster.

    node_bandwidth: bytes/s of a node's whole network, each way.
    gpus: per node.
    nvlink_bandwidth: bytes/s; NCCL counts on 360 GB/s of a Hopper GPU's 450.
    latency_scale: 0.5 for a network and NVLink of half the latency; the launch (`base_us`) stays.
    demand: share of a GPU's multiprocessors that a collective takes: 16 channels of 132.
    """

    node_bandwidth: float
    gpus: int = 8
    nvlink_bandwidth: float = 360e9
    latency_scale: float = 1.0
    demand: float = 16 / 132

    def all_reduce(self, num_bytes: int, ranks: int) -> Collective:
        """The faster of rings and trees in three protocols."""
        if ranks == 1:
            return FREE
        nodes = math.ceil(ranks / self.gpus)
        ring_hops = 2 * (ranks - nodes) if nodes > 1 else 2 * (ranks - 1), 2 * nodes if nodes > 1 else 0
        tree_hops = 2 * (math.ceil(ranks / nodes) - 1), 2 * math.ceil(math.log2(nodes))
        ring = self._ways(RING, ring_hops, 2 * (ranks - 1) / ranks * num_bytes, nodes)
        return min([*ring, *self._ways(TREE, tree_hops, 2 * num_bytes, nodes)], key=lambda way: way.seconds)

    def all_gather(self, num_bytes: int, ranks: int) -> Collective:
        """The fastest of rings in three protocols."""
        if ranks == 1:
            return FREE
        nodes = math.ceil(ranks / self.gpus)
        hops = (ranks - nodes, nodes) if nodes > 1 else (ranks - 1, 0)
        return min(self._ways(RING, hops, (ranks - 1) * num_bytes, nodes), key=lambda way: way.seconds)

    def _ways(self, protocols: Protocols, hops: tuple[int, int], num_bytes: float, nodes: int) -> list[Collective]:
        """Each protocol's cost, with `hops` over NVLink and over the network and `num_bytes` on the slowest link."""
        bandwidth = min(self.nvlink_bandwidth, self.node_bandwidth) if nodes > 1 else self.nvlink_bandwidth
        each = zip(protocols.base_us, protocols.nvlink_us, protocols.network_us, protocols.shares, strict=True)
        return [
            Collective(
                (base + self.latency_scale * (hops[0] * nvlink + hops[1] * network)) * MICROSECOND,
                num_bytes / (share * bandwidth),
                self.demand,
            )
            for base, nvlink, network, share in each
        ]


@dataclass(frozen=True)
class Measured:
    """Collectives of real ranks, measured one at a time: {(kind, bytes): cost}; kind is all_reduce or all_gather.

    Their seconds are all latency: on one machine a transfer takes cores (`demand`), not a link.
    """

    costs: Mapping[tuple[str, int], Collective]

    def all_reduce(self, num_bytes: int, ranks: int) -> Collective:
        """As it was measured on that number of ranks."""
        return self.costs["all_reduce", num_bytes]

    def all_gather(self, num_bytes: int, ranks: int) -> Collective:
        """As it was measured on that number of ranks."""
        return self.costs["all_gather", num_bytes]
