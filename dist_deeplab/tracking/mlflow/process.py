"""The process that sends a run's journal to MLflow (`uploader.py`), as those see it who start one.

Training starts one beside itself (`UploaderProcess`); an evaluation starts one that sends its results and ends
(`send_once`). Both are told on their command line what to do, by the configuration, never by the run's folder; an
address with secrets goes through the environment.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_deeplab.command_line import command_name
from dist_deeplab.files import NonEssentialWrites
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.journal import JOURNAL
from dist_deeplab.tracking.mlflow.pages import where_to_look
from dist_deeplab.tracking.mlflow.state import UploadState

log = logging.getLogger(__name__)

GIVE_UP_S = 600.0  # an uploader whose run has ended tries for so long; what is left stays in the journal
_END_WAIT_S = 30.0  # how long the end of a run waits for the uploader to send what is left
_MODEL_WAIT_S = 600.0  # the same where a model is to be logged, as long as MLflow takes what it is sent
_STOP_WAIT_S = 3.0  # where it was stopped or failed: less than the grace time of a preemption
_RESTART_S = 60.0  # an uploader that died (out of memory, say) is started again, but not at every log line
BUSY = 3  # the uploader's exit code where another process is sending
_POLL_S = 0.1


@dataclass(frozen=True)
class Upload:
    """What is sent where: a run's folder, a store's address, whether the best checkpoint becomes a (registered) model.

    on_event: the command of `tracking.on_event`, for a run that is killed.
    """

    run_dir: Path
    uri: str
    log_model: bool = False
    register_as: str = ""
    on_event: str = ""

    def command(self, *options: str) -> list[str]:
        """The command line of the uploader, without secrets: other users of the machine can read it."""
        command = [sys.executable, "-m", "dist_deeplab.tracking.mlflow.uploader", str(self.run_dir)]
        command += ["--uri", shown_url(self.uri), *options]
        command += ["--log-model"] if self.log_model else []
        return [*command, "--register-as", self.register_as] if self.register_as else command

    def environ(self) -> dict[str, str]:
        """Its environment: the address with its secrets; no variable by which MLflow's libraries think it is a rank."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
        if shown_url(self.uri) != self.uri:
            environ["MLFLOW_TRACKING_URI"] = self.uri
        return environ | ({"DIST_DEEPLAB_ON_EVENT": self.on_event} if self.on_event else {})


class UploaderProcess:
    """The uploader of a run in training; nothing but `wait` waits for it. `process`: one that is started already."""

    def __init__(self, upload: Upload, *, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.upload, self.run_dir = upload, upload.run_dir
        self._log_file = NonEssentialWrites("logs/mlflow_uploader.log")
        self.process = process or self._start()
        self._failed_sends = 0
        self._is_failing = False

    def _start(self) -> "subprocess.Popen[bytes]":
        self._started = time.monotonic()
        logs = self.run_dir / "logs"
        with contextlib.ExitStack() as stack:
            output: Any = subprocess.DEVNULL
            with self._log_file():
                logs.mkdir(exist_ok=True)
                output = stack.enter_context((logs / "mlflow_uploader.log").open("ab"))
            # Its own session: signals meant for the rank must not cut off the last points.
            return subprocess.Popen(
                self.upload.command("--follow", str(os.getpid())),
                stdout=output,
                stderr=output,
                env=self.upload.environ(),
                start_new_session=True,
            )

    @property
    def state(self) -> UploadState:
        """What the uploader says of itself in the run's folder."""
        return UploadState(self.run_dir, self.upload.uri)

    def watch(self) -> dict[str, float]:
        """Log once that MLflow is away and once that it is back; the count of failures where it has grown."""
        if self.process.poll() is not None and time.monotonic() - self._started > _RESTART_S:
            log.warning("the process that sends to MLflow ended (%d); starting it again", self.process.returncode)
            self.process = self._start()
        state = self.state
        is_failing = bool(state["error"])
        if is_failing and not self._is_failing:
            log.warning(
                "MLflow does not take points (%s); training continues, everything is kept in %s and sent later",
                state["error"],
                self.run_dir / JOURNAL,
            )
        elif self._is_failing and not is_failing:
            log.warning("MLflow takes points again; what had waited is being sent")
        self._is_failing = is_failing
        before, self._failed_sends = self._failed_sends, state["failed_sends"]
        return {"tracking/failed_sends": self._failed_sends} if self._failed_sends > before else {}

    def wait(self, status: str) -> None:
        """Wait a while until all is sent after a run's end; log where it is, or what is left, why, and what to do."""
        if self.process.poll():  # it died: what came since is still to be sent
            self.process = self._start()
        wants_model = status == "FINISHED" and self.upload.log_model
        if wants_model:
            log.info("waiting for MLflow to take the rest of the run, and the best checkpoint as a model")
        started = time.monotonic()
        patience_s = _MODEL_WAIT_S if wants_model else _END_WAIT_S if status == "FINISHED" else _STOP_WAIT_S
        while self.process.poll() is None and time.monotonic() - started < patience_s:
            if time.monotonic() - started > _END_WAIT_S and self.state["error"]:
                break
            time.sleep(_POLL_S)
        state = self.state
        if self.process.poll() is None:
            log.warning(
                "MLflow has not taken everything yet%s%s; process %d on this host tries until %s (`kill %d` ends it), "
                "and `%s %s` sends the rest at any time",
                ", the model not either" if wants_model and not state["model"] else "",
                f" ({state['error']})" if state["error"] else "",
                self.process.pid,
                time.strftime("%H:%M", time.localtime(time.time() + GIVE_UP_S)),
                self.process.pid,
                command_name("sync-mlflow"),
                self.run_dir,
            )
            return
        if wants_model and state["model"]:
            log.info("the best checkpoint is in MLflow as %s", state["model"])
        if state["run_id"] and not state["error"]:
            log.info("%s", where_to_look(self.upload.uri, state))


class Sent(NamedTuple):
    """What became of sending: the uploader's exit code (see there), and its last words where it is not 0."""

    code: int
    reason: str = ""


def send_once(upload: Upload, *options: str, timeout_s: float | None = None) -> Sent:
    """Send what a run's folder holds, in a process that ends; a store that does not answer in time is left."""
    command = upload.command("--once", *options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=upload.environ())
    except subprocess.TimeoutExpired:
        return Sent(1, f"no answer in {timeout_s:.0f} s")
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return Sent(done.returncode, lines[-1][-300:]) if done.returncode else Sent(0)
