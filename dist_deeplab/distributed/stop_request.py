"""Signals and time limits become a flag. The training step adds it up over the ranks: all stop after the same step."""

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_S = 5.0  # srun, torchrun and the terminal each pass on the signal that the user or Slurm sent once


class StopRequest:
    """Whether this rank was asked to stop, or has heard of another one that was.

    Signals within 5 s of the first one are its echoes; a SIGINT or SIGTERM after that ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.reason = ""
        self._first = 0.0
        self._deadline = float("inf")

    def install(self) -> "StopRequest":
        """Catch SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's `--signal`) from now on; call from the main thread."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)
        return self

    def set_deadline(self, seconds: float) -> None:
        """Ask to stop after this many seconds."""
        self._deadline = time.monotonic() + seconds

    def hear(self, reason: str) -> None:
        """Take over another rank's request."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        if time.monotonic() > self._deadline:
            self.reason = self.reason or "max_hours"
        return bool(self.reason)

    @property
    def ends_launch(self) -> bool:
        """Whether nothing should start the run again in this job: its time is up, or Slurm said that it soon is."""
        return self.reason in ("max_hours", signal.SIGUSR1.name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Only plain values are set here: saving or calling collectives inside a handler fails intermittently.
        now = time.monotonic()
        if not self.signal_number:
            self._first = now
            self.signal_number = number
            self.reason = self.reason or signal.Signals(number).name
        elif number == signal.SIGUSR1:
            self.reason = signal.SIGUSR1.name
        elif now - self._first > _ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
