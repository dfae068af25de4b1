"""Signals become a flag. The training step adds it up over the ranks, so that all stop after the same step."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked this rank to stop. A second SIGINT or SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def install(self) -> "StopRequest":
        """Catch SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's `--signal`) from now on; call from the main thread."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)
        return self

    def __bool__(self) -> bool:
        return self.signal_number != 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Only an int is set here: saving or calling collectives inside a handler fails intermittently.
        if self.signal_number and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number
