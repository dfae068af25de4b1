"""How a run is doing, for scripts: `status.json` in its folder, and the command of `tracking.on_event`.

    {"event": "running", "step": 132, "max_steps": 400, "attempt": 1, "time": 1790000000.1, "note": "step 132 of 400"}

Events are started, running, finished, stopped (saved; the same command resumes it), requeued (stopped, and Slurm is
asked to start it again) and failed. The command runs at all but `running`, in a shell on the main rank's host, with
the event in DIST_DEEPLAB_EVENT, the run's folder in DIST_DEEPLAB_RUN_DIR and this JSON in DIST_DEEPLAB_STATUS. Its
output is in logs/on_event.log; whatever it does, training is not affected.
"""

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.files import NonEssentialWrites, replace_file

STATUS_FILE = "status.json"
_EVERY_S = 5.0  # between two updates of the step
_HOOK_WAIT_S = 10.0  # at the end of a run; a batch system may end the command with the job
_STOP_WAIT_S = 3.0  # the same for a run that was stopped: within the grace time of a preemption
_EVENTS = {"FINISHED": "finished", "FAILED": "failed"}

log = logging.getLogger(__name__)


class RunStatus:
    """The status of one attempt.

    Args:
        run_dir: the run's folder.
        max_steps: where the run ends; 0: not known.
        attempt: number of this attempt, the first is 0.
        on_event: a shell command; empty: none.
    """

    def __init__(self, run_dir: Path, *, max_steps: int = 0, attempt: int = 0, on_event: str = "") -> None:
        self.run_dir, self.on_event, self.step = run_dir, on_event, 0
        self._common = {"max_steps": max_steps, "attempt": attempt}
        self._write = NonEssentialWrites(STATUS_FILE)
        self._written = 0.0

    def at(self, step: int) -> None:
        """Note how far the run is."""
        self.step = step
        if time.monotonic() - self._written > _EVERY_S:
            self._save("running")

    def begin(self) -> None:
        """Say that the attempt has begun."""
        self._hook("started", self._save("running"), wait_s=0)

    def end(self, status: str) -> str:
        """Say how the attempt ended (FINISHED, FAILED or KILLED); a note such as `stopped, step 132 of 400`."""
        event = _EVENTS.get(status) or ("requeued" if is_requeued(os.environ) else "stopped")
        content = self._save(event)
        self._hook(event, content, wait_s=_STOP_WAIT_S if status == "KILLED" else _HOOK_WAIT_S)
        return str(content["note"])

    def _save(self, event: str) -> dict[str, Any]:
        where = f"step {self.step}" + (f" of {self._common['max_steps']}" if self._common["max_steps"] else "")
        note = where if event == "running" else f"{event}, {where}"
        content = {"event": event, "step": self.step, **self._common, "time": round(time.time(), 3), "note": note}
        self._written = time.monotonic()
        with self._write():
            text = json.dumps(content) + "\n"
            replace_file(self.run_dir / STATUS_FILE, lambda path: path.write_text(text), durable=event != "running")
        return content

    def _hook(self, event: str, content: Mapping[str, Any], *, wait_s: float) -> None:
        if self.on_event:
            run_hook(self.on_event, self.run_dir, event, content, wait_s=wait_s)


def report_death(run_dir: Path, on_event: str) -> None:
    """Say that a run has failed whose process is gone without a word (`kill -9`, out of memory, a lost node)."""
    try:
        content = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
        status = RunStatus(run_dir, max_steps=content["max_steps"], attempt=content["attempt"], on_event=on_event)
        status.step = content["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if content.get("event") == "running":
        status.end("FAILED")


def run_hook(command: str, run_dir: Path, event: str, content: Mapping[str, Any], *, wait_s: float) -> None:
    """Start the command of `tracking.on_event`, and wait for its end at most `wait_s`."""
    facts = {"EVENT": event, "RUN_DIR": str(run_dir.resolve()), "STATUS": json.dumps(content)}
    environ = os.environ | {f"DIST_DEEPLAB_{name}": value for name, value in facts.items()}
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        with (run_dir / "logs" / "on_event.log").open("ab") as output:
            process = subprocess.Popen(
                ["sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                start_new_session=True,
            )
        if not wait_s:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(wait_s):
                log.warning("tracking.on_event failed at %s (%d): see logs/on_event.log", event, process.returncode)
    except OSError as error:
        log.warning("tracking.on_event was not started at %s: %s", event, error)


def is_requeued(environ: Mapping[str, str]) -> bool:
    """Whether slurm/train.sh, which started this, will have a run that stopped start again."""
    restarts, limit = environ.get("SLURM_RESTART_COUNT") or "0", environ.get("DIST_DEEPLAB_REQUEUES", "")
    return restarts.isdigit() and limit.isdigit() and int(restarts) < int(limit)
