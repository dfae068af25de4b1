"""One of the real ranks of `scaling --check`: measures compute, links and whole steps, and simulates the latter.

Arguments: OUT BACKBONE CROP IMAGES, under torchrun. The main rank writes a row of the table to OUT.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.network import Event, Network, simulate
from benchmarks.peers import IGNORE_LABEL
from benchmarks.step import NUM_CLASSES, draw_batches
from benchmarks.timeline import measure_runs, slowest_events
from dist_deeplab.config import OptimConfig
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, process_group
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import cross_entropy_sum, sample_label
from dist_deeplab.training.optim import build_optimizer

ROUNDS = 15
SMALL, LARGE = 2**8, 2**22  # float32 numbers: the latency of batch norm's collectives, the bandwidth of a bucket


def median_s(work: Callable[[], object]) -> float:
    """The median seconds of `work`, started by all ranks together."""
    seconds = []
    for turn in range(ROUNDS + 2):
        dist.barrier()
        started = time.perf_counter()
        work()
        if turn >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_network(ranks: int) -> Network:
    """Fit latency and bandwidth to the all-reduce of a small and of a large tensor."""
    small, large = torch.zeros(SMALL), torch.zeros(LARGE)
    small_s, large_s = median_s(lambda: dist.all_reduce(small)), median_s(lambda: dist.all_reduce(large))
    messages = Network(1.0, float("inf")).all_reduce_s(0, ranks)
    return Network(small_s / messages, 2 * (ranks - 1) / ranks * 4 * LARGE / max(1e-9, large_s - small_s))


def main(env: DistEnv, out: str, backbone: str, crop: str, images: str) -> None:
    [batch] = draw_batches(int(images), 1, int(crop))
    runs = measure_runs(backbone, batch, NUM_CLASSES, synchronised=True, repeats=ROUNDS)  # all ranks compute at once
    plain = gather_to_all([[(event.kind, event.compute_s, event.num_bytes) for event in run] for run in runs])
    events = slowest_events([[[Event(*values) for values in run] for run in rank] for rank in plain])
    network = measure_network(env.world_size)
    simulated = simulate(events, 0.0, network, env.world_size)
    torch.manual_seed(0)
    net = DeepLabV2(backbone, NUM_CLASSES, norm=norm_factory("sync"))
    model = prepare_model(MultiScale(net), env).train()
    optimizer = build_optimizer(net, OptimConfig())

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        logits = model(CAFFE.normalize(batch.image, batch.content))["scale_1"]
        label = sample_label(batch.label, (logits.shape[2], logits.shape[3]))
        cross_entropy_sum(logits, label, IGNORE_LABEL).backward()

    measured_s = median_s(forward_and_backward)
    row = {
        "compute_ms": 1e3 * simulated.compute_s,
        "batch_norm_ms": 1e3 * simulated.batch_norm_s,
        "gradients_ms": 1e3 * simulated.gradients_s,
        "step_ms": 1e3 * simulated.seconds,
        "measured_ms": 1e3 * measured_s,
        "measured_over_simulated": measured_s / simulated.seconds,
    }
    env.on_main(Path(out).write_text, json.dumps(row))


if __name__ == "__main__":
    this = DistEnv.from_environ()
    with process_group(this):
        main(this, *sys.argv[1:])
    hard_exit(0)
