"""`UploaderProcess`: what sends a run's journal to MLflow (`tracking/mlflow/uploader.py`), as training sees it."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.tracking.journal import JOURNAL
from dist_deeplab.tracking.run_files import read_mlflow_file, read_run_file

log = logging.getLogger(__name__)

_END_WAIT_S = 30.0  # how long the end of a run waits for the uploader to send what is left
_MODEL_WAIT_S = 600.0  # the same where a model is to be logged, as long as MLflow takes what it is sent
_STOP_WAIT_S = 3.0  # where it was stopped or failed: less than the grace time of a preemption
_RESTART_S = 60.0  # a uploader that died (out of memory, say) is started again, but not at every log line
_POLL_S = 0.1


class UploaderProcess:
    """Started once; nothing here waits for it but `wait`. `process`: one that is started already."""

    def __init__(self, run_dir: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.run_dir = run_dir
        self._started = time.monotonic()
        self.process = process or self._start()
        self._failed_sends = 0
        self._is_failing = False

    def _start(self) -> "subprocess.Popen[bytes]":
        self._started = time.monotonic()
        logs = self.run_dir / "logs"
        logs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "dist_deeplab.tracking.mlflow.uploader", str(self.run_dir)]
        # torchrun's variables would make MLflow's libraries believe they are a rank.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
        with (logs / "mlflow_uploader.log").open("ab") as output:
            # Its own session: signals meant for the rank must not cut off the last points.
            return subprocess.Popen(
                [*command, "--follow", str(os.getpid())],
                stdout=output,
                stderr=output,
                env=environ,
                start_new_session=True,
            )

    def watch(self) -> dict[str, float]:
        """Say once that MLflow is away and once that it is back; return the count of failures where it has grown."""
        if self.process.poll() is not None and time.monotonic() - self._started > _RESTART_S:
            log.warning("the process that sends to MLflow ended (%d); starting it again", self.process.returncode)
            self.process = self._start()
        state = read_mlflow_file(self.run_dir)
        is_failing = bool(state.get("error"))
        if is_failing and not self._is_failing:
            log.warning(
                "MLflow does not take points (%s); training goes on, everything is kept in %s and sent later",
                state["error"],
                self.run_dir / JOURNAL,
            )
        elif self._is_failing and not is_failing:
            log.warning("MLflow takes points again; what had waited is being sent")
        self._is_failing = is_failing
        before, self._failed_sends = self._failed_sends, int(state.get("failed_sends", 0))
        return {"tracking/failed_sends": self._failed_sends} if self._failed_sends > before else {}

    def wait(self, status: str) -> None:
        """Wait a while until all is sent after a run's end; say what is left, why, and how to send it later."""
        if self.process.poll():  # it died: what came since is still to be sent
            self.process = self._start()
        wants_model = status == "FINISHED" and bool(read_run_file(self.run_dir).get("model_command"))
        if wants_model:
            log.info("waiting for MLflow to take the rest of the run, and the best checkpoint as a model")
        started = time.monotonic()
        patience_s = _MODEL_WAIT_S if wants_model else _END_WAIT_S if status == "FINISHED" else _STOP_WAIT_S
        while self.process.poll() is None and time.monotonic() - started < patience_s:
            if time.monotonic() - started > _END_WAIT_S and read_mlflow_file(self.run_dir).get("error"):
                break
            time.sleep(_POLL_S)
        state = read_mlflow_file(self.run_dir)
        if self.process.poll() is None:
            log.warning(
                "MLflow has not taken everything yet%s%s; process %d goes on trying for 10 minutes, and "
                "`%s %s` sends the rest at any time",
                command_name("sync-mlflow"),
                ", the model not either" if wants_model and not state.get("model") else "",
                f" ({state['error']})" if state.get("error") else "",
                self.process.pid,
                self.run_dir,
            )
        elif wants_model and state.get("model"):
            log.info("the best checkpoint is in MLflow as %s", state["model"])
