"""One run folder, one run: a lock that the operating system frees even after `kill -9`.

`run.lock` carries an flock, which is exact where all hosts see each other's. Some mounts keep it to one host (Lustre:
`localflock`), so `run.lock.json` says beside it who holds the lock, and its time of change is a heartbeat. A holder on
this host is judged by the lock alone; one on another host is gone once its heartbeat stops.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from dist_deeplab import locks
from dist_deeplab.distributed.process_group import DistEnv, broadcast_from_main
from dist_deeplab.errors import UserError
from dist_deeplab.files import NonEssentialWrites, replace_text

_WAIT_S = 20.0  # loader workers of a killed run hold the lock until they notice, within about 5 s
_BEAT_S = 5.0
_SILENT_S = 20.0  # without a heartbeat for this long a holder on another host is gone
_OLD_S = 600.0  # hosts' clocks differ less: a heartbeat older than this needs no waiting

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_run(env: DistEnv, run_dir: Path) -> Iterator[None]:
    """Hold the folder for this run; every rank must enter.

    Raises:
        UserError: another run holds the folder; it can't be written, or its file system has no locks.
    """
    lock = locks.file_lock(run_dir / "run.lock")
    holder = _Holder(run_dir / "run.lock.json")
    problem = ""
    if env.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_WAIT_S)
            if holder.is_alive_elsewhere():
                raise Timeout(str(run_dir))
        except Timeout:
            problem = (
                f"another run is working in {run_dir}{holder.described()}; wait for its end, or choose another name="
            )
        except OSError as error:
            reason = locks.explain(error, remedy="choose another output_dir=")
            problem = f"cannot write to the run's folder {run_dir}: {reason}"
    problem = broadcast_from_main(problem)
    if problem:
        lock.release()
        raise UserError(problem)
    try:
        with env.on_main(holder.beating) or contextlib.nullcontext():
            yield
    finally:
        lock.release()


class _Holder:
    """The file that says who holds a run's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, object]:
        """Its content; empty where there is none or it is damaged."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            return {}

    def described(self) -> str:
        """The holder, for a message; empty if unknown."""
        content = self.read()
        return f" (process {content.get('pid')} on {content.get('host')})" if content else ""

    def is_alive_elsewhere(self) -> bool:
        """Whether a process on another host holds the run, by its heartbeat; takes up to 20 s if it is recent."""
        content = self.read()
        if not content or content.get("boot") == _boot_id():  # of this host the flock, which we have, says it all
            return False
        seen = self._beat()
        if abs(time.time() - seen / 1e9) > _OLD_S:
            return False
        log.info("waiting for %.0f s to see whether the run%s is still alive", _SILENT_S, self.described())
        until = time.monotonic() + _SILENT_S
        while time.monotonic() < until:
            time.sleep(min(1.0, _BEAT_S))
            if self._beat() not in (seen, 0):
                return True
        return False

    def _beat(self) -> int:
        """Time of the last heartbeat in ns, 0 if the file is gone; opened, since NFS then asks its server."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return 0

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Name this process as the holder and keep up the heartbeat in this context."""
        writing, ended = NonEssentialWrites(str(self.path)), threading.Event()
        content = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot_id()}
        with writing():
            replace_text(self.path, json.dumps(content) + "\n")

        def beat() -> None:
            while not ended.wait(_BEAT_S):
                with writing():
                    os.utime(self.path)

        thread = threading.Thread(target=beat, name="run lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with writing():
                self.path.unlink(missing_ok=True)


def _boot_id() -> str:
    """What identifies this host since it was started, the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
