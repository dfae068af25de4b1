"""What ends the commands that a command runs one after the other, when it is to end itself."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType


class StopBetween:
    """Ends the training when the sweep is to end, by SIGTERM, on which it saves; nothing is left on the GPUs.

    On SIGINT, SIGTERM, and SIGHUP, which a dropped connection sends, unless that is ignored (`nohup`).
    """

    def __init__(self) -> None:
        self.requested = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end and return its exit code."""
        with subprocess.Popen(command, start_new_session=True) as self._process:
            if self.requested:
                self._process.terminate()
            return self._process.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
