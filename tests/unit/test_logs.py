"""Counts and durations as people write them; a log file that a run can do without."""

import errno
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from dist_deeplab.logs import format_count, format_duration, format_names, setup_logging


class FullDisk(io.StringIO):
    """A file on a disk that is full."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails_at", ["mkdir", "open", "write"])
def test_a_log_file_that_cannot_be_written_is_one_line_on_stderr_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails_at: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = logging.getLogger("dist_deeplab.test")
    with monkeypatch.context() as patch:
        if fails_at == "write":
            patch.setattr(logging.FileHandler, "_open", lambda handler: FullDisk())
        else:
            patch.setattr(*{"mkdir": (Path, "mkdir"), "open": (logging.FileHandler, "_open")}[fails_at], full)
        setup_logging(to_terminal=True, rank=0, folder=tmp_path / "logs")
        for number in range(3):
            log.info("line %d", number)
        setup_logging(to_terminal=True, rank=0, folder=None)
    said = capsys.readouterr()
    assert said.out.count("line ") == 3
    (warning,) = said.err.splitlines()
    assert "rank_0.log is not written ([Errno 28] No space left on device); the run continues without it" in warning


def test_a_log_file_is_continued_once_there_is_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("dist_deeplab.test")
    setup_logging(to_terminal=False, rank=0, folder=tmp_path / "logs")
    (tmp_path / "logs").write_text("a file where the folder should be")
    log.info("lost")
    (tmp_path / "logs").unlink()
    log.info("kept")
    assert [line.split(": ")[1] for line in (tmp_path / "logs/rank_0.log").read_text().splitlines()] == ["kept"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "shard"), "1 shard"),
        ((0, "node"), "0 nodes"),
        ((1464, "image"), "1,464 images"),
        ((1, "class", "classes"), "1 class"),
        ((21, "class", "classes"), "21 classes"),
    ],
)
def test_a_count_has_its_plural_and_separators(arguments: tuple[int, str], text: str) -> None:
    assert format_count(*arguments) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.7, "0:42"), (727, "12:07"), (11100, "3:05:00")])
def test_a_duration_is_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_name_with_a_comma_is_quoted_in_a_list() -> None:
    assert format_names(["cat", "dining, table"]) == "cat, 'dining, table'"
