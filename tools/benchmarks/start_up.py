"""The start of a run as rank 0 of many, up to its first batch, by the real code; meant for a process of its own.

Real: the rendezvous over a store (another process sets the other ranks' answers), data, checkpoint, network, DDP, the
comparison of all ranks' networks, the facts of the run, and the loader. Not there: gloo's or NCCL's connections, and
the pass that warms up DDP. torch's fake process group carries nothing: every rank's part of a collective is this one's.
"""

import argparse
import contextlib
import io
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Row
from benchmarks.reads import make_set
from dist_deeplab import train
from dist_deeplab.config import load_config
from dist_deeplab.data.shards.manifest import save_manifest
from dist_deeplab.distributed import process_group
from dist_deeplab.distributed.meter import peak_memory_bytes
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rendezvous import Member
from dist_deeplab.training import builders
from dist_deeplab.training.data_builders import build_train_loader
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.summary import describe, run_info

T = TypeVar("T")


def in_new_process(function: "partial[T]") -> T:
    """The function's result from a process of its own, whose memory is that of nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_quietly, function).result()


def _quietly(function: "partial[T]") -> T:
    set_start_method("fork", force=True)  # of loader workers, as in a run; a spawned process passes on its own
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says about itself
        return function()


@contextmanager
def saved_run(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The arguments of a run that has a checkpoint to resume from, on a drawn set."""
    with tempfile.TemporaryDirectory() as name:
        manifest = make_set(Path(name) / "set", num_shards=4, per_shard=max(arguments.ranks))
        save_manifest(replace(manifest, class_pixels=(1, 1)))  # nothing is looked at in these images
        overrides = [
            f"data.train={manifest.path}",
            f"output_dir={name}",
            "name=run",
            f"data.crop_size={arguments.crop}",
        ]
        overrides += [f"model.backbone={arguments.backbone}", "data.num_workers=0", "precision.dtype=fp32"]
        overrides += ["tracking.uri=none", "tracking.system_metrics=false", "resume_anyway=true", "device=cpu"]
        in_new_process(partial(train.main, [*overrides, "batch.global_size=1", "max_steps=1"]))
        yield overrides


def start(overrides: list[str], ranks: int) -> Row:
    """Seconds (by the clock, of the processor), peak memory and received bytes of the start of rank 0."""
    config = load_config(None, [*overrides, f"batch.global_size={ranks}", "batch.micro_size=1", "max_steps=5"])
    env = DistEnv(0, 0, ranks, "torchrun", "cpu")
    received: list[float] = []
    began, computed = time.perf_counter(), time.process_time()
    with simulated_ranks(ranks, received), mock.patch.object(train, "train", first_batch):
        assert train.start(config, env) == 0
    return {
        "start_s": time.perf_counter() - began,
        "start_cpu_s": time.process_time() - computed,
        "start_mib": peak_memory_bytes(torch.device("cpu")) / 2**20,
        "start_received_kb": sum(received) / 1e3,
    }


def first_batch(run: Run, model: nn.Module, state: TrainState, *, trace: Path | None) -> int:
    """What `train.train` does before its first step."""
    describe(run, state)
    run_info(run)
    next(iter(build_train_loader(run, start=state.step)))
    return 0


@contextmanager
def simulated_ranks(ranks: int, received: list[float]) -> Iterator[None]:
    """Let this process be rank 0 of `ranks`; `received` gets the bytes that each collective would bring it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init, gather = dist.init_process_group, dist.all_gather

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        received.append((ranks - 1) * own.nbytes)
        return gather(parts, own, **options)

    def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
        received.append(2 * tensor.nbytes)
        is_sizes = tensor.dtype == torch.int64 and len(tensor) == ranks  # of what each rank is about to send
        return tensor.fill_(int(tensor.max())) if is_sizes else tensor.mul_(ranks)

    others = get_context("fork").Process(target=answer_for_the_others, args=(port, ranks), daemon=True)
    others.start()
    with (
        mock.patch.dict("os.environ", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="8"),
        mock.patch.object(dist, "init_process_group", lambda backend, **options: init("fake", **options)),
        mock.patch.object(builders, "separate_group", fake_group_for),
        mock.patch.object(dist, "all_gather", all_gather),
        mock.patch.object(process_group, "all_reduce_sum", all_reduce_sum),
    ):
        yield


def fake_group_for(device: torch.device) -> dist.ProcessGroup:
    """What `separate_group` opens, without connections."""
    return dist.new_group(backend="fake")


def answer_for_the_others(port: int, ranks: int) -> None:
    """Join rank 0's rendezvous as all other ranks."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    shared = dist.PrefixStore(store.get("rendezvous").decode(), store)
    for rank in range(1, ranks):
        member = Member(nonce=f"{rank:016x}", host=f"node{rank // 8:04d}", address=f"10.0.{rank // 256}.{rank % 256}")
        shared.set(f"rank/{rank}", json.dumps(asdict(member)))
