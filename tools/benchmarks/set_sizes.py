"""Sets of a million to a hundred million samples: time to the first batch, memory, and what a checkpoint keeps of them.

The shards are names of a few small tars, the index is written in full (68 bytes per sample) to a temporary folder. Each
row is rank 777 of 1,024 in a process of its own, at step 1,000,000, with the real configuration, loader and one loader
worker; the files are in the page cache.
"""

import argparse
import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import Report, Row
from benchmarks.loader import own_mib
from benchmarks.reads import make_set
from benchmarks.start_up import in_new_process
from dist_deeplab.config import load_config
from dist_deeplab.data.order import hash_each
from dist_deeplab.data.shards.index_file import INDEX_DTYPE, IndexFile
from dist_deeplab.data.shards.manifest import Manifest, load_manifest, save_manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_checkpoints, split_batch
from dist_deeplab.training.data_builders import build_train_loader, follow_manifest, open_data
from dist_deeplab.training.run import Run

PER_SHARD = 1000
RANKS, RANK, STEP, BATCHES = 1024, 777, 1_000_000, 20
_NAMES_PER_FILE = 50_000  # ext4 allows 65,000 names of one file
_ROWS = 1_000_000  # written at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", nargs="*", metavar="N", help="measure sets of N samples instead; default: 1e6 1e7")
    parser.add_argument("--folder", type=Path, help="with --samples: where the index is written; default: temporary")


def run(arguments: argparse.Namespace) -> Report:
    """Measure each set in both orders."""
    rows: list[Row] = []
    for text in arguments.samples or ("1e6", "1e7"):
        num_samples = _number(text)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            path = _make(Path(name), num_samples)
            kept = measure_checkpoint(path)
            for shuffle in ("full", "blocks"):
                row: Row = {"samples": num_samples, "shuffle": shuffle}
                rows.append(row | in_new_process(partial(measure, path, shuffle)) | kept)
    notes = [
        "first_batch: from nothing but imports to the first batch, with manifest, index, order and a loader worker; of "
        "them cpu: processor time of the rank",
        f"rank and worker: resident memory after {BATCHES} batches; what a worker has to itself, without shared pages",
        "checkpoint: what it keeps of the set, hashes of at most 2^20 keys, and how long the first one reads the index",
    ]
    return Report(f"rank {RANK} of {RANKS:,} at step {STEP:,}, {PER_SHARD:,} samples per shard", rows, notes)


def _number(text: str) -> int:
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < PER_SHARD or number % PER_SHARD:
        raise UserError(f"--samples {text} is not a multiple of {PER_SHARD}; give numbers such as 1e6")
    return number


def measure(path: Path, shuffle: str) -> Row:
    """Seconds to the first batch, by the clock and of the processor; MiB of this process and of its loader worker."""
    config = load_config(
        None,
        [
            *(f"data.train={path}", f"data.shuffle={shuffle}", "data.num_workers=1", "data.crop_size=33"),
            *(f"batch.global_size={10 * RANKS}", f"max_steps={2 * STEP}", "device=cpu"),
        ],
    )
    env = DistEnv(RANK, 0, RANKS, "torchrun", "cpu")  # the first of its node, which looks at all shards
    began, computed = time.perf_counter(), time.process_time()
    train_set, _ = open_data(config, env)
    config = follow_manifest(config, train_set)
    session = TrainingSession(env, rank_times=RankTimes(env, path.parent / "logs"))
    run = Run(config, env, split_batch(config, env), SCRATCH, train_set, None, session, build_checkpoints(config, env))
    batches = iter(build_train_loader(run, start=STEP))
    next(batches)
    took = {"first_batch_s": time.perf_counter() - began, "of_them_cpu_s": time.process_time() - computed}
    for _ in range(BATCHES - 1):
        next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid
    memory = psutil.Process().memory_info().rss / 2**20
    return took | {"rank_mib": memory, "worker_mib": own_mib(worker.pid)}


def measure_checkpoint(path: Path) -> Row:
    """MiB that a checkpoint keeps of the set, and seconds to gather them."""
    manifest = load_manifest(path, check_shards=False)
    began = time.perf_counter()
    kept = manifest.key_hashes.nbytes
    return {"checkpoint_mib": kept / 2**20, "checkpoint_s": time.perf_counter() - began}


def _make(folder: Path, num_samples: int) -> Path:
    """A set of `num_samples` samples, all images alike."""
    one = make_set(folder / "one", num_shards=1, per_shard=PER_SHARD)
    number = num_samples // PER_SHARD
    shards = [dataclasses.replace(one.shards[0], name=f"train-{i:06d}.tar") for i in range(number)]
    source = one.path.with_name(one.shards[0].name)
    for i, shard in enumerate(shards):
        target = folder / shard.name
        if i % _NAMES_PER_FILE == 0:
            source = Path(shutil.copy(source, target))
        else:
            os.link(source, target)
    _write_index(folder / one.index, one.open_index(), number)
    values: dict[str, Any] = {
        "num_samples": num_samples,
        "shards": tuple(shards),
        "class_pixels": (1, 1),
        "path": folder / one.path.name,
    }
    manifest: Manifest = dataclasses.replace(one, **values)
    save_manifest(manifest)
    return manifest.path


def _write_index(path: Path, one: IndexFile, num_shards: int) -> None:
    """The records of one shard again and again, with numbers of shards and hashes of keys of their own."""
    records = one.rows(0, PER_SHARD)
    about = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (num_shards * PER_SHARD,),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for first in range(0, num_shards, _ROWS // PER_SHARD):
            numbers = np.arange(first, min(first + _ROWS // PER_SHARD, num_shards))
            rows = np.tile(records, len(numbers))
            rows["shard"] = np.repeat(numbers, PER_SHARD)
            rows["key_hash"] = hash_each(np.arange(first * PER_SHARD, first * PER_SHARD + len(rows)), 0)
            file.write(rows.tobytes())
