"""Logging: the main rank to the terminal and to its file, the others to a file each."""

import logging
import sys
from pathlib import Path


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
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{rank}.log", encoding="utf-8", delay=True)
        _add(root, file, "%(asctime)s %(levelname)s %(name)s: %(message)s", None, logging.INFO)


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
