"""Weak scaling of a step, simulated from one rank's measured compute and a stated network.

The compute between any two moments at which a rank has something to communicate is measured here; what DDP's buckets
and synchronised batch norm then add on n ranks is simulated. --check holds the simulation against fact: it starts real
gloo ranks on this machine, measures their links and their steps, and shows what would have been foretold. There,
compute is measured with as many ranks computing at once, since they share the cores, and each wait is for the slowest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import Report, Row
from benchmarks.network import Network, Step, simulate
from benchmarks.step import NUM_CLASSES, draw_batches
from benchmarks.timeline import measure_runs, median_events
from dist_deeplab.errors import UserError

SUMMARY = "what communication would cost on n ranks, simulated and checked"
TOOLS = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet_tiny", help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=321 if on_gpu else 65, help="pixels, 8k+1; default: %(default)s")
    parser.add_argument("--images", type=int, default=10 if on_gpu else 4, help="images a rank; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="default: 1 2 4 8 16 64")
    parser.add_argument(
        "--latency-us", type=float, default=10.0, help="from one rank to the next; default: %(default)s"
    )
    parser.add_argument(
        "--bandwidth-gbit", type=float, default=200.0, help="of a rank's link, Gbit/s; default: %(default)s"
    )
    parser.add_argument(
        "--check",
        type=int,
        nargs="+",
        default=[],
        metavar="RANKS",
        help="also run on real gloo ranks, e.g. 2 4",
    )


def run(arguments: argparse.Namespace) -> Report:
    if min([*arguments.ranks, *arguments.check]) < 1 or arguments.latency_us < 0 or arguments.bandwidth_gbit <= 0:
        raise UserError("--ranks and --check count from 1, --latency-us from 0, and --bandwidth-gbit is positive")
    network = Network(arguments.latency_us * 1e-6, arguments.bandwidth_gbit * 1e9 / 8)
    [batch] = draw_batches(arguments.images, 1, arguments.crop)
    alone, events = (
        median_events(measure_runs(arguments.backbone, batch, NUM_CLASSES, synchronised=how)) for how in (False, True)
    )
    alone_s = sum(event.compute_s for event in alone)
    frozen_events = [event if event.kind == "gradient" else replace(event, kind="nothing") for event in alone]
    rows: list[Row] = []
    for ranks in arguments.ranks:
        sync = simulate(events if ranks > 1 else alone, 0.0, network, ranks)
        rows.append(simulated_row(ranks, sync, simulate(frozen_events, 0.0, network, ranks), alone_s=alone_s))
    rows += [check(arguments, ranks) for ranks in arguments.check]
    if arguments.check:
        columns = {column: None for row in rows for column in row}
        rows = [{**columns, **row} for row in rows]
    num_collectives = sum(event.kind in ("gather", "reduce") for event in events)
    return Report(
        f"weak scaling of {arguments.backbone}, {arguments.images} x {arguments.crop} x {arguments.crop} a rank",
        rows,
        [
            f"simulated network: {arguments.latency_us:g} us and {arguments.bandwidth_gbit:g} Gbit/s from rank to rank",
            f"{num_collectives} collectives of batch norm a step, each waited for; gradients in buckets, overlapped",
            "compute of several ranks has the arithmetic of synchronised batch norm, of one rank that of BatchNorm2d",
            "frozen: without batch norm's collectives (model.batch_norm=frozen or local)",
        ],
    )


def simulated_row(ranks: int, sync: Step, frozen: Step, *, alone_s: float) -> Row:
    """The table's row of a simulated number of ranks; `alone_s`: a step's seconds on one, to compare with."""
    return {
        "what": f"{ranks} simulated",
        "compute_ms": 1e3 * sync.compute_s,
        "batch_norm_ms": 1e3 * sync.batch_norm_s,
        "gradients_ms": 1e3 * sync.gradients_s,
        "step_ms": 1e3 * sync.seconds,
        "efficiency": alone_s / sync.seconds,
        "frozen_efficiency": alone_s / frozen.seconds,
    }


def check(arguments: argparse.Namespace, ranks: int) -> Row:
    """The row of a real run on `ranks` gloo ranks, beside what the simulation says of it.

    Raises:
        UserError: the ranks failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        worker = [str(TOOLS / "benchmarks" / "scaling_worker.py"), str(out)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *worker]
        command += [arguments.backbone, str(arguments.crop), str(arguments.images)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS), str(TOOLS.parent)]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the check on {ranks} ranks failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return {"what": f"{ranks} real gloo", **found}
