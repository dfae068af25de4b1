"""The journal loses nothing on a full disk, and is read as far as it is whole."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from dist_deeplab.tracking import journal as journal_module
from dist_deeplab.tracking.journal import Journal, read_records


class FullDisk:
    """Stands in for `os.write` on a disk that has room for N bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_a_full_disk_keeps_lines_waiting_and_warns_once(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it cuts a line: the rest of that line comes first when there is space again."""
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    disk = FullDisk(room)
    monkeypatch.setattr(journal_module.os, "write", disk)
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(5):
        journal.append({"step": step, "key": "a", "value": 1.0})
    assert caplog.text.count("No space left on device") == 1
    disk.room = 10_000
    journal.append({"step": 5, "key": "a", "value": 1.0})
    assert "nothing was lost" in caplog.text
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6))


@pytest.mark.parametrize("room", [0, 20, 60])
def test_a_process_that_cannot_wait_for_space_leaves_no_part_of_its_records(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 1, "key": "a", "value": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    disk = FullDisk(room)
    monkeypatch.setattr(journal_module.os, "write", disk)
    late = [{"step": step, "key": "a", "value": 1.0} for step in (2, 3)]
    with pytest.raises(OSError, match="No space left on device"):
        journal.append_or_fail(*late)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    disk.room = 10_000
    journal.append_or_fail(*late)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_records_come_with_the_offset_behind_them_and_reading_resumes_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\nnoise\n{"a": 2}\n{"a": 3')
    records = list(read_records(path))
    assert records == [({"a": 1}, 9), ({}, 15), ({"a": 2}, 24)]
    assert list(read_records(path, 15)) == records[2:]
    assert list(read_records(path, 10_000)) == []
    assert list(read_records(tmp_path / "none")) == []
