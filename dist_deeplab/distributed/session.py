"""The ranks of a command while it works: connection and watchdog; for a run also its lock, signals and time limit."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from dist_deeplab.distributed.failure import failure_published
from dist_deeplab.distributed.heartbeat import Progress, wait_for_all, watchdog_store
from dist_deeplab.distributed.launcher import launched_s_ago, write_status
from dist_deeplab.distributed.meter import Meter
from dist_deeplab.distributed.process_group import HANG_TIMEOUT_S, STARTUP_TIMEOUT_S, DistEnv, process_group
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.run_lock import lock_run
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.distributed.watchdog import watched

T = TypeVar("T")


@dataclass
class Session:
    """This rank among the others. progress: marks for the watchdog; stop: whether a rank was asked to stop."""

    env: DistEnv
    store: dist.Store | None = None
    progress: Progress = field(default_factory=Progress)
    stop: StopRequest = field(default_factory=StopRequest)
    _num_waits: int = 0

    def wait_for_all(self) -> None:
        """Wait until every rank has made this call, however far apart they are; every rank must make it.

        For ends of long unequal work: a collective would time out. A rank that waits makes progress as long as the
        first rank that is missing publishes heartbeats; that one's own watchdog notices where it hangs.
        """
        if self.store is None:
            return
        self._num_waits += 1
        arrived = dist.PrefixStore(f"wait_{self._num_waits}", self.store)
        wait_for_all(self.env, arrived, watchdog_store(self.store), self.progress)


@dataclass
class TrainingSession(Session):
    """A run's session: its step times and its status for the launcher as well."""

    rank_times: RankTimes = field(kw_only=True)
    meter: Meter = field(default_factory=Meter)
    first_step: int = 0

    def report(self, status: str, step: int) -> None:
        """Tell the script around torchrun that the run is "running" from a step on, "stopped" or "done"."""
        self.first_step = step if status == "running" else self.first_step
        self.env.on_main(lambda: write_status(status, first_step=self.first_step, last_step=step))

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield each step's batches, timed by the meter and watched by the watchdog."""
        return self.meter.timed(self.progress.watch(batches, waiting="waiting for data", working="in a step"))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context out of the meter: it is not training."""
        self.progress.begin("evaluating or saving")
        with self.meter.paused():
            yield


@contextlib.contextmanager
def session(
    env: DistEnv,
    *,
    startup_timeout_s: float = STARTUP_TIMEOUT_S,
    hang_timeout_s: float = HANG_TIMEOUT_S,
    logs: Path | None = None,
) -> Iterator[Session]:
    """Connect the ranks of a command that is not a run (evaluate, predict, doctor); every rank must enter.

    Args:
        env: this rank.
        startup_timeout_s: how long to wait for the other ranks.
        hang_timeout_s: how long the command may make no progress.
        logs: folder for the stacks of a command that hangs; None: they are printed.

    Raises:
        UserError: other ranks did not join.
    """
    ranks = Session(env)
    with (
        process_group(env, startup_timeout_s=startup_timeout_s, hang_timeout_s=hang_timeout_s) as store,
        watched(env, store, ranks.progress, ranks.stop, timeout_s=hang_timeout_s, logs=logs),
        failure_published(env, store),
    ):
        ranks.store = store
        yield ranks


@contextlib.contextmanager
def training_session(
    env: DistEnv, run_dir: Path, *, startup_timeout_s: float, hang_timeout_s: float, max_hours: float | None
) -> Iterator[TrainingSession]:
    """Open a run in `run_dir`; every rank must enter.

    Args:
        env: this rank.
        run_dir: the run's folder, made here; no other run may use it meanwhile.
        startup_timeout_s: how long to wait for the other ranks.
        hang_timeout_s: how long the run may make no progress.
        max_hours: ask to stop this long after the launch; None: never.

    Raises:
        UserError: other ranks did not join, or the folder is taken or cannot be written.
    """
    run = TrainingSession(env, rank_times=RankTimes(env, run_dir / "logs"))
    with (
        process_group(env, startup_timeout_s=startup_timeout_s, hang_timeout_s=hang_timeout_s) as store,
        lock_run(env, run_dir),
        watched(env, store, run.progress, run.stop, timeout_s=hang_timeout_s, logs=run_dir / "logs"),
        failure_published(env, store),
    ):
        run.store = store
        run.stop.install()
        if max_hours is not None:
            run.stop.set_deadline(3600 * max_hours - launched_s_ago())
        yield run
