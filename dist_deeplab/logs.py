"""Logging: the main rank to the terminal and to its file, the others to a file each."""

import contextlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def setup_logging(*, to_terminal: bool, rank: int, folder: Path | None) -> None:
    """Send log records to stdout (`to_terminal`: the main rank) and, every rank, to `folder`/rank_<rank>.log."""
    root = logging.getLogger("dist_deeplab")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    if to_terminal:
        _add(root, logging.StreamHandler(sys.stdout), "%(asctime)s %(message)s", "%H:%M:%S", logging.INFO)
    else:
        _add(root, logging.StreamHandler(), f"rank {rank}: %(levelname)s %(message)s", None, logging.ERROR)
    if folder is not None:
        file = _RankLog(folder / f"rank_{rank}.log", encoding="utf-8", delay=True)
        _add(root, file, "%(asctime)s %(levelname)s %(name)s: %(message)s", None, logging.INFO)


class _RankLog(logging.FileHandler):
    """A rank's log file, which a run can do without: where it cannot be written, stderr says so once."""

    _is_failing = False

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening it; what fails later comes to `handleError` by itself
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_failing:
            self._is_failing = True
            print(f"{self.baseFilename} is not written ({error}); the run continues without it", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not written by now
            super().close()


def _add(root: logging.Logger, handler: logging.Handler, form: str, date: str | None, level: int) -> None:
    handler.setFormatter(logging.Formatter(form, date))
    handler.setLevel(level)
    root.addHandler(handler)


def format_duration(seconds: float) -> str:
    """A duration as 0:42, 12:07 or 3:05:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """E.g. `1 shard`, `1,464 images` or, with a plural of its own, `2 classes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def format_names(names: Iterable[str]) -> str:
    """E.g. `cat, 'dining, table'`: names in a list, those in quotes that hold a comma themselves."""
    return ", ".join(repr(name) if "," in name else name for name in names)
