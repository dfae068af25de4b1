"""The journal of a run, `metrics.jsonl`: one JSON object a line, only ever appended to. It is the truth about the run.

    {"time": 1790000000.0, "status": "RUNNING", "attempt": 0}                                       a start; an end
    {"step": 12, "time": 1790000000.123, "key": "train/loss", "value": 2.31, "attempt": 0}          a point
    {"step": 12, "time": 1790000000.4, "file": "eval/step_00000012/iou.png"}                        a file of the run
    {"step": 12, "time": 1790000000.4, "file": "eval/.../2007_000033.png", "image": "panels/2007_000033"}
    {"time": 1790000000.5, "tags": {"diverged": "..."}}                                             a fact about the run

A file with `image` is one picture of a series that shows something evolving; a record with `late` was added after the
end, by an evaluation. Times are seconds since 1970.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

JOURNAL = "metrics.jsonl"


class Journal:
    """The journal of a run's folder, opened by the one process that writes it.

    points: {(key, step): value} of all attempts so far. attempt: the number of this attempt. A full disk keeps lines
    waiting in memory, and costs no more than a warning.
    """

    def __init__(self, path: Path) -> None:
        self.points, self.attempt = _repair(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._path = path
        self._waiting = b""
        self._failing = False

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records, and what is waiting from before, at once: nothing stays in this process, it may be killed."""
        self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
        try:
            while self._waiting:  # a disk that fills up takes a part; the rest of the line follows later
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            if not self._failing:
                log.warning(
                    "cannot write to %s (%s); training goes on, and the points wait in memory for space",
                    self._path,
                    error.strerror,
                )
            self._failing = True
            return
        if self._failing:
            log.warning("%s can be written again; nothing was lost", self._path)
        self._failing = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def parse_record(line: bytes) -> dict[str, Any]:
    """Return a journal line's record; an empty one where the line is damaged, e.g. by a power cut."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def read_records(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the complete records from byte `start` on, each with the offset behind it; none without a journal."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(min(start, path.stat().st_size))
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield parse_record(line), end


def _repair(path: Path) -> tuple[dict[tuple[str, int], float], int]:
    """Cut an unfinished last line off the journal; return the points in it and the number of this attempt."""
    points: dict[tuple[str, int], float] = {}
    attempt = end = 0
    for record, offset in read_records(path):
        end = offset
        attempt = max(attempt, record.get("attempt", 0) + 1)
        if "key" in record:
            points[record["key"], record["step"]] = record["value"]
    if path.exists():
        os.truncate(path, end)
    return points, attempt
