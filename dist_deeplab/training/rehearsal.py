"""A dry run: a few real steps that leave nothing behind, and what they say about the whole run."""

import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_deeplab.config import RunConfig
from dist_deeplab.runtime.distributed import DistEnv
from dist_deeplab.runtime.journal import read_records
from dist_deeplab.runtime.logs import format_duration

STEPS = 6
_SETTLE = 2  # of them, in which libraries load and choose algorithms

log = logging.getLogger(__name__)


def rehearse(config: RunConfig, env: DistEnv, run: Callable[[RunConfig, DistEnv], int]) -> int:
    """Let `run` train for some steps in a folder that goes away, log a forecast, and return its exit code.

    Data, weights, devices, batch split and the writing of a checkpoint are the real ones; nothing goes to MLflow, and
    the run's own folder is not touched. Every rank calls it.
    """
    with tempfile.TemporaryDirectory(prefix="dist_deeplab_dry_run_") as folder:
        short = _shortened(config, Path(folder))
        exit_code = run(short, env)
        if exit_code == 0:
            env.on_main(_tell, config, short)
    return exit_code


def _shortened(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration of the rehearsal."""
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "max_steps": STEPS,
            "data": config.data.model_copy(update={"val": ""}),
            "checkpoint": config.checkpoint.model_copy(update={"every": STEPS}),
            "tracking": config.tracking.model_copy(update={"uri": "none", "log_every": 1}),
        }
    )


def _tell(config: RunConfig, short: RunConfig) -> None:
    points = [record for record, _ in read_records(short.run_dir / "metrics.jsonl")]

    def of(key: str) -> list[float]:
        return [point["value"] for point in points if point.get("key") == key and point["step"] > _SETTLE]

    log.info("%s", forecast(config, of("time/step_s"), of("time/data_s"), of("memory/peak_gib")))


def forecast(config: RunConfig, step_s: Sequence[float], data_s: Sequence[float], memory_gib: Sequence[float]) -> str:
    """Return a sentence on the whole run, from seconds a step, seconds of it spent waiting for data, and peak GiB."""
    seconds = statistics.median(step_s)
    return (
        f"dry run: {config.batch.global_size / seconds:.3g} images/s, {seconds:.3g} s a step, "
        f"{100 * sum(data_s) / sum(step_s):.0f}% of it waiting for data; peak memory of the main rank "
        f"{max(memory_gib):.2f} GiB; {config.max_steps} steps would take {format_duration(config.max_steps * seconds)} "
        "and the evaluations on top; nothing was kept"
    )
