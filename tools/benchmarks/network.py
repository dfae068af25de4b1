"""What communication adds to a step: a model of the network, of DDP's buckets and of batch norm's collectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # torch DDP's bucket_cap_mb=25 and its smaller first one


@dataclass(frozen=True)
class Network:
    """Time of a collective = its messages in a row x latency + its bytes / bandwidth.

    latency_s: seconds from one rank to the next; bandwidth: bytes/s of a rank's link, each way.
    """

    latency_s: float
    bandwidth: float

    def all_reduce_s(self, num_bytes: int, ranks: int) -> float:
        """The seconds of a sum over `ranks`: the better of a ring and a tree (Thakur et al. 2005)."""
        ring = 2 * (ranks - 1) * self.latency_s + 2 * (ranks - 1) / ranks * num_bytes / self.bandwidth
        tree = 2 * math.ceil(math.log2(ranks)) * (self.latency_s + num_bytes / self.bandwidth) if ranks > 1 else 0.0
        return min(ring, tree)

    def all_gather_s(self, num_bytes: int, ranks: int) -> float:
        """The seconds until every rank has `num_bytes` of each other."""
        return math.ceil(math.log2(ranks)) * self.latency_s + (ranks - 1) * num_bytes / self.bandwidth


@dataclass(frozen=True)
class Event:
    """Something to communicate, and the seconds of compute between the event before and this one.

    kind: gather (forward of a synchronised batch norm, whose result the next layer waits for), reduce (its backward),
    gradient (of one parameter; waited for at the end of backward only), nothing.
    """

    kind: str
    compute_s: float
    num_bytes: int


@dataclass(frozen=True)
class Step:
    """Seconds of a step: compute alone, and what communication adds to it."""

    compute_s: float
    batch_norm_s: float
    gradients_s: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.batch_norm_s + self.gradients_s


def simulate(events: Sequence[Event], rest_s: float, network: Network, ranks: int) -> Step:
    """A step of `ranks` ranks, each with the work of one.

    Gradients are reduced bucket by bucket while backward continues; collectives run one at a time in the order in which
    they were asked for (one NCCL communicator or gloo context), so a batch norm may wait for a bucket.

    Args:
        events: of one micro-batch's forward and backward, in order.
        rest_s: compute after the last event (the update).
        network: the links.
        ranks: number of ranks.
    """
    now = channel_free = batch_norm_s = 0.0
    bucket, limit = 0, FIRST_BUCKET
    for event in events:
        now += event.compute_s
        if ranks == 1 or event.kind == "nothing":
            continue
        if event.kind == "gradient":
            bucket += event.num_bytes
            if bucket >= limit:
                channel_free = max(now, channel_free) + network.all_reduce_s(bucket, ranks)
                bucket, limit = 0, BUCKET
            continue
        collective = network.all_gather_s if event.kind == "gather" else network.all_reduce_s
        done = max(now, channel_free) + collective(event.num_bytes, ranks)
        batch_norm_s += done - now
        now = channel_free = done
    if bucket and ranks > 1:
        channel_free = max(now, channel_free) + network.all_reduce_s(bucket, ranks)
    compute_s = sum(event.compute_s for event in events) + rest_s
    return Step(compute_s, batch_norm_s, max(0.0, channel_free - now))
