"""What holds while a run goes on: the ranks' connection, the folder's lock, the watchdog, signals and time limits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dist_deeplab.distributed.launcher import tell_launcher
from dist_deeplab.distributed.meter import Meter
from dist_deeplab.distributed.process_group import DistEnv, launched_s_ago, process_group
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.run_lock import lock_run
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.distributed.watchdog import watched


@dataclass
class Session:
    """What a running run tells the rest of the world (meter, report) and is told by it (stop)."""

    env: DistEnv
    rank_times: RankTimes
    first_step: int = 0
    meter: Meter = field(default_factory=Meter)
    stop: StopRequest = field(default_factory=StopRequest)

    def report(self, status: str, step: int) -> None:
        """Tell the script around torchrun that the run is "running" from a step on, "stopped" or "done"."""
        self.first_step = step if status == "running" else self.first_step
        if self.env.is_main:
            tell_launcher(status, first_step=self.first_step, last_step=step)

    def asks_to_stop(self) -> bool:
        """Return whether a rank was asked to stop, from time to time inside something long: which goes on otherwise."""
        self.meter.begin(self.meter.phase)
        return bool(self.stop)


@contextlib.contextmanager
def session(
    env: DistEnv, run_dir: Path, *, startup_timeout_s: float, hang_timeout_s: float, max_hours: float | None
) -> Iterator[Session]:
    """Open a run in `run_dir`; every rank must enter.

    Args:
        env: this rank.
        run_dir: the run's folder, made here; no other run may use it meanwhile.
        startup_timeout_s: how long to wait for the other ranks.
        hang_timeout_s: how long the run may make no progress.
        max_hours: ask to stop so long after the launch; None: never.

    Raises:
        UserError: ranks did not come, or the folder is taken or can't be written.
    """
    run = Session(env, RankTimes(env, run_dir / "logs"))
    with (
        process_group(env, startup_timeout_s=startup_timeout_s, hang_timeout_s=hang_timeout_s) as store,
        lock_run(env, run_dir),
        watched(env, store, run.meter, run.stop, timeout_s=hang_timeout_s, logs=run_dir / "logs"),
    ):
        run.stop.install()
        if max_hours is not None:
            run.stop.set_deadline(3600 * max_hours - launched_s_ago())
        yield run
