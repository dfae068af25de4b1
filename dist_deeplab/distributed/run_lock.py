"""One run folder, one run: a lock that the operating system frees even after `kill -9`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dist_deeplab.distributed.process_group import DistEnv, broadcast_from_main
from dist_deeplab.errors import UserError

_WAIT_S = 20.0  # loader workers of a killed run hold the lock until they notice, within about 5 s


@contextlib.contextmanager
def lock_run(env: DistEnv, run_dir: Path) -> Iterator[None]:
    """Hold the folder for this run; every rank must enter.

    Raises:
        UserError: another run goes on in the folder, or the folder can't be written.
    """
    problem = ""
    lock = FileLock(run_dir / "run.lock")
    if env.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_WAIT_S)
        except Timeout:
            problem = f"another run goes on in {run_dir}; wait for its end, or choose another name="
        except OSError as error:
            problem = f"cannot write to the run's folder {run_dir}: {error.strerror}; choose another output_dir="
    problem = broadcast_from_main(problem)
    if problem:
        raise UserError(problem)
    try:
        yield
    finally:
        lock.release()
