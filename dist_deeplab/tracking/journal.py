"""The journal of a run, `metrics.jsonl`: one JSON object a line, only ever appended to. It is the truth about the run.

    {"time": 1790000000.0, "status": "RUNNING", "log_every": 20, "attempt": 0}                      a start; an end
    {"step": 12, "time": 1790000000.123, "key": "train/loss", "value": 2.31, "attempt": 0}          a point
    {"step": 12, "time": 1790000000.4, "file": "eval/step_00000012/iou.png"}                        a file of the run
    {"step": 12, "time": 1790000000.4, "file": "eval/.../2007_000033.png", "image": "panels/2007_000033"}
    {"time": 1790000000.5, "tags": {"diverged": "..."}}                                             a fact about the run

A file with `image` is one image of a series over the steps; a record with `late` was added after the end of training,
by an evaluation. Times are seconds since 1970.
"""

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.logs import format_count

log = logging.getLogger(__name__)

JOURNAL = "metrics.jsonl"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "time": (int, float),
    "step": int,
    "attempt": int,
    "log_every": int,
    "key": str,
    "value": (int, float),
    "file": str,
    "image": str,
    "status": str,
    "tags": dict,
}
_NEEDED = {"key": ("step", "value"), "file": ("step",), "status": ("attempt",)}
_END_OF_TIME = 1e11  # seconds since 1970; MLflow keeps milliseconds in 64 bits


class Journal:
    """The journal of a run's folder, opened by the one process that writes it.

    points: {(key, step): value} of all attempts so far. attempt: the number of this attempt. periods: `log_every` of
    attempts before this one. On a full disk lines wait in memory, at the cost of one warning.

    Raises:
        OSError: the file can't be opened or made, or is not a regular file of its own (a link, a pipe).
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(path, flags, 0o644)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(f"{path} is not a regular file")
        self.points: dict[tuple[str, int], float] = {}
        self.attempt = 0
        self.periods: set[int] = set()
        end = self._read(path)
        os.ftruncate(self._descriptor, end)  # an unfinished last line
        self._path = path
        self._waiting = b""
        self._failing = False

    def _read(self, path: Path) -> int:
        """Take in what is there, and return where its last whole line ends."""
        end = 0
        for record, offset in read_records(path):
            end = offset
            self.attempt = max(self.attempt, record.get("attempt", 0) + 1)
            if "key" in record:
                self.points[record["key"], record["step"]] = record["value"]
            if "log_every" in record:
                self.periods.add(record["log_every"])
        return end

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records, and what is waiting from before, at once: nothing stays in this process, it may be killed."""
        self._waiting += _lines(records)
        try:
            while self._waiting:  # a disk that fills up takes a part; the rest of the line follows later
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            if not self._failing:
                log.warning(
                    "cannot write to %s (%s); training continues, and the points wait in memory for space",
                    self._path,
                    error.strerror,
                )
            self._failing = True
            return
        if self._failing:
            log.warning("%s can be written again; nothing was lost", self._path)
        self._failing = False

    def append_or_fail(self, *records: Mapping[str, Any]) -> None:
        """Write all of the records or none: for a process that ends soon, which cannot keep them in memory.

        Raises:
            OSError: e.g. a full disk.
        """
        content, size = _lines(records), os.fstat(self._descriptor).st_size
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Try once more to write what is waiting, say what is lost, and close the file."""
        if self._waiting:
            self.append()
        if self._waiting:
            lost = format_count(self._waiting.count(b"\n"), "record")
            log.warning("lost, for %s has no space: %s", self._path, lost)
        os.close(self._descriptor)


def parse_record(line: bytes) -> dict[str, Any]:
    """The record of a journal's line; an empty one where the line is damaged (e.g. by a power cut) or foreign."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and _is_well_formed(record) else {}


def _is_well_formed(record: dict[str, Any]) -> bool:
    has_types = all(
        isinstance(value, _TYPES.get(name, object)) and not (name in _TYPES and isinstance(value, bool))
        for name, value in record.items()
    )
    has_fields = all(each in record for name, needed in _NEEDED.items() if name in record for each in needed)
    return has_types and has_fields and 0 <= record.get("time", 0) < _END_OF_TIME and abs(record.get("step", 0)) < 2**63


def read_records(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete records from byte `start` on, each with the offset behind it; none without a journal."""
    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb") as file:
        end = file.seek(min(start, path.stat().st_size))
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield parse_record(line), end


def _lines(records: tuple[Mapping[str, Any], ...]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
