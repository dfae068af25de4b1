"""A dry run: a few real steps that leave nothing behind, and what they say about the whole run."""

import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dist_deeplab.checkpointing.checkpoint import read_checkpoint
from dist_deeplab.config import RunConfig
from dist_deeplab.config.section import Location
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.distributed.process_group import DistEnv, ranks_on_host
from dist_deeplab.logs import format_count, format_duration
from dist_deeplab.tracking.journal import read_records
from dist_deeplab.training.memory import CPU_SHARE, GPU_SPARE, free_memory_bytes
from dist_deeplab.training.memory_estimate import MemoryEstimate, estimate_memory, gib, images_that_fit
from dist_deeplab.training.summary import evaluations_left

STEPS = 6
_SETTLE = 2  # of them, in which libraries load and choose algorithms

_MEASURED = 50  # validation images whose sizes are read

log = logging.getLogger(__name__)


def dry_run(config: RunConfig, env: DistEnv, run: Callable[[RunConfig, DistEnv], int]) -> int:
    """Let `run` train for some steps in a folder that goes away, log a forecast, and return its exit code.

    Data, weights, devices, batch split and the writing of a checkpoint are the real ones; nothing goes to MLflow, and
    the run's own folder is not touched. Every rank calls it.
    """
    with tempfile.TemporaryDirectory(prefix="dist_deeplab_dry_run_") as folder:
        short = _shortened(config, Path(folder))
        exit_code = run(short, env)
        if exit_code == 0:
            env.on_main(_report, config, short, env)
    return exit_code


def _shortened(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of the dry run, which starts at step 0, from the weights of `resume=PATH`."""
    starts_elsewhere = config.resume not in ("auto", "never") and not any(config.run_dir.glob("checkpoints/step_*.pt"))
    init = Location(config.resume) if starts_elsewhere else config.model.init
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "max_steps": STEPS,
            "resume": "auto",
            "model": config.model.model_copy(update={"init": init}),
            "checkpoint": config.checkpoint.model_copy(update={"every": STEPS}),
            "tracking": config.tracking.model_copy(
                update={"uri": Location("none"), "log_every": 1, "system_metrics": False}
            ),
        }
    )


def _report(config: RunConfig, short: RunConfig, env: DistEnv) -> None:
    points = [record for record, _ in read_records(short.run_dir / "metrics.jsonl")]

    def of(key: str) -> list[float]:
        return [point["value"] for point in points if point.get("key") == key and point["step"] > _SETTLE]

    saved = read_checkpoint(short.run_dir / "checkpoints" / f"step_{STEPS:08d}.pt")
    estimate = estimate_memory(saved.config, saved.variant)
    peak = max(of("memory/peak_gib")) * 2**30
    log.info("%s", forecast(config, of("time/step_s"), of("time/data_s"), image_area=_image_area(config)))
    largest = BatchSplit(config.batch.global_size, saved.micro_size, env.world_size).largest
    log.info("%s", memory_report(saved.config, estimate, peak, micro_size=largest, device=env.device))


def forecast(
    config: RunConfig, step_s: Sequence[float], data_s: Sequence[float], *, image_area: tuple[int, float] = (0, 0.0)
) -> str:
    """A sentence on the whole run, from seconds a step and seconds of it spent waiting for data.

    image_area: number of validation images, and their mean area in pixels. An evaluation is estimated by them: a pixel
    that is scored costs a third of one that is trained on (forward and backward), times the scales' areas and the flip.
    """
    seconds = statistics.median(step_s)
    images_per_s = config.batch.global_size / seconds
    count, area = image_area
    passes = sum(scale**2 for scale in config.eval.scales) * (2 if config.eval.flip else 1)
    evaluation_s = count * area * passes / (3 * config.data.crop_size**2 * images_per_s)
    num_evaluations = evaluations_left(config, 0)
    crf = ", the CRF not counted" if config.eval.crf else ""
    scored = (
        f", and {format_count(num_evaluations, 'evaluation')} some {format_duration(evaluation_s)} each (estimated by "
        f"the speed of training{crf})"
        if count
        else ""
    )
    return (
        f"dry run: {images_per_s:.3g} images/s, {seconds:.3g} s a step, "
        f"{100 * sum(data_s) / sum(step_s):.0f}% of it waiting for data; {format_count(config.max_steps, 'step')} "
        f"would take {format_duration(config.max_steps * seconds)}{scored}; nothing was kept"
    )


def _image_area(config: RunConfig) -> tuple[int, float]:
    """Number of validation images, and the mean area in pixels of some of them, evenly spread."""
    if not config.data.val:
        return 0, 0.0
    cache = build_cache(config.data.cache_dir, config.data.cache_gib)
    manifest = load_manifest(config.data.val.real, cache=cache, check_shards=False)
    reader = ShardReader(manifest)
    some = range(0, manifest.num_samples, max(1, manifest.num_samples // _MEASURED))
    sizes = [reader.image_size(index) for index in some]
    return manifest.num_samples, sum(height * width for height, width in sizes) / len(sizes)


def memory_report(
    config: RunConfig, estimate: MemoryEstimate, peak: float, *, micro_size: int, device: torch.device
) -> str:
    """Sentences on the peak memory in bytes: measured, of each image, and how many images would fit.

    On a GPU all of it is the step's, so an image's is measured. On a CPU it is that of the whole process, Python and
    libraries included, so an image's is counted.
    """
    what = (
        f"micro-batches of {format_count(micro_size, 'image')} of {config.data.crop_size} in {config.precision.dtype}"
    )
    if device.type == "cuda":
        each = max(1.0, (peak - estimate.fixed_bytes) / micro_size)
        total = torch.cuda.mem_get_info(device)[1]
        fit = images_that_fit((1 - GPU_SPARE) * total, estimate.fixed_bytes, each)
        return (
            f"peak memory of the main rank's GPU, measured with {what}: {gib(peak)} GiB = {gib(estimate.fixed_bytes)} "
            f"GiB fixed + {gib(each)} GiB an image ({gib(estimate.image_bytes)} counted); of its {gib(total)} GiB, "
            f"batch.micro_size of up to {fit} would take {100 * (1 - GPU_SPARE):.0f}%"
        )
    allowed = CPU_SHARE * free_memory_bytes() / ranks_on_host()
    fit = images_that_fit(allowed, 0, estimate.image_bytes)
    step = estimate.fixed_bytes + micro_size * estimate.image_bytes
    return (
        f"peak memory of the main rank, measured with {what}: {gib(peak)} GiB, Python and libraries included; counted "
        f"of it: {gib(step)} GiB = {gib(estimate.fixed_bytes)} GiB fixed + {gib(estimate.image_bytes)} GiB an image; "
        f"batch.micro_size of up to {fit} would take half of the memory that is free"
    )
