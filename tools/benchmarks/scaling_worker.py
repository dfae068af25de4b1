"""One of the real ranks of `scaling --check`: measures parts of a step and whole steps in turns, and predicts these.

Arguments: OUT BACKBONE CROP IMAGES ROUNDS, under torchrun. The main rank writes the table's row of each batch
norm to OUT; both share one start. Parts:

- compute, in processor time, of a step of all ranks at once whose collectives return without communicating;
- how much of the cores all ranks together got during that;
- each collective of the step, and the processor time that it takes, among ranks that arrive as in a step.

The prediction takes nothing from the whole steps.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.events import Workload
from benchmarks.gloo_parts import ComputeRun, Replay, Replica, Silent, common_events, cores_received
from benchmarks.step import NUM_CLASSES, draw_batches
from benchmarks.timeline import Machine, SmallSums, Step, simulate
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.distributed.parallel import separate_group
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, process_group
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.sync_batch_norm import use_group
from dist_deeplab.workers import num_cores

WARMUP = 3


def check(env: DistEnv, workload: Workload, rounds: int) -> dict[str, float]:
    """The row of a workload, on all ranks."""
    torch.manual_seed(0)
    net = DeepLabV2(workload.backbone, NUM_CLASSES, norm=norm_factory(workload.norm))
    [batch] = draw_batches(workload.images, 1, workload.crop)
    group = separate_group(env.device)
    real, silent = Replica.of(net, env), Silent(net, env, workload)
    use_group(real.model, group)
    replay = Replay(group, env.world_size, real.sums)
    own, seconds = [], []
    for turn in range(rounds + WARMUP):
        compute, whole_s = silent.run(batch), real.whole_steps(batch)
        if turn >= WARMUP:  # DDP forms its buckets in the first
            replay.run(compute)
            own.append(compute)
            seconds.append(whole_s)
    measured_s = statistics.mean(max(ranks) for ranks in zip(*gather_to_all(seconds), strict=True))
    turns = ComputeRun.of_all_ranks(own)
    capacity = statistics.mean(cores_received(runs, num_cores()) for runs in turns)
    network = replay.network()
    machine = Machine(env.world_size, network, capacity=capacity, compute_demand=env.world_size, host_computes=True)
    machine = replace(machine, sums=SmallSums(replay.small_sums(network)))
    steps = [simulate(common_events(runs, capacity), machine) for runs in turns]
    return row(steps, measured_s, capacity)


def row(predicted: Sequence[Step], measured_s: float, capacity: float) -> dict[str, float]:
    """The table's row of a check."""
    parts = ("compute", "sharing", "batch_norm", "gradients")
    means = {f"{part}_ms": 1e3 * statistics.mean(getattr(step, f"{part}_s") for step in predicted) for part in parts}
    step_s = statistics.mean(step.seconds for step in predicted)
    return {
        "cores": capacity,
        **means,
        "step_ms": 1e3 * step_s,
        "measured_ms": 1e3 * measured_s,
        "measured_over_simulated": measured_s / step_s,
    }


if __name__ == "__main__":
    this = replace(DistEnv.from_environ(), device_kind="cpu")
    out, backbone, crop, images, rounds = sys.argv[1:]
    with process_group(this):
        frozen = Workload(backbone, int(crop), int(images), "frozen", this.world_size)
        rows = {each.norm: check(this, each, int(rounds)) for each in (replace(frozen, norm="sync"), frozen)}
        this.on_main(Path(out).write_text, json.dumps(rows))
    hard_exit(0)
