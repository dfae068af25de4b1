"""What can't be written is refused in one sentence, and nothing is written yet; what a run can do without warns."""

import errno
import logging
import os
from pathlib import Path

import pytest

from dist_deeplab import files
from dist_deeplab.errors import UserError
from dist_deeplab.files import NonEssentialWrites, prepare_file, prepare_folder, replace_file


def test_a_folder_is_made_with_those_above_it_and_may_be_there_already(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_folder(tmp_path / "a" / "b", remedy="?")
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_folder_of_a_file_is_made_but_no_file(tmp_path: Path) -> None:
    prepare_file(tmp_path / "a" / "scores.json", remedy="?")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize(
    ("place", "problem"),
    [("taken", "it is a file"), ("taken/below", "Not a directory"), ("n" * 300, "File name too long")],
)
def test_a_folder_that_cannot_be_is_refused_with_the_remedy(tmp_path: Path, place: str, problem: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError) as caught:
        prepare_folder(tmp_path / place, remedy="choose another --out")
    assert str(caught.value) == f"cannot write to the folder {tmp_path / place}: {problem}; choose another --out"


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write nearly anywhere
    with pytest.raises(UserError, match="it may not be written to; choose another --out"):
        prepare_folder(tmp_path, remedy="choose another --out")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot write the file {tmp_path}: it is a folder; choose another --json"):
        prepare_file(tmp_path, remedy="choose another --json")


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_on_disk_before_it_has_its_name_and_then_the_name_is(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure may leave the name with an empty file behind it."""
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        files, "fsync", lambda path: events.append(f"sync {'folder' if path.is_dir() else path.read_text()}")
    )
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("name") or replace(old, new))
    replace_file(tmp_path / "a", lambda path: path.write_text("content"), durable=durable)
    assert events == (["sync content", "name", "sync folder"] if durable else ["name"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_filled_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def fill(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a", fill)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_writes_that_a_run_can_do_without_warn_once_for_each_time_that_the_disk_is_full(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    writing = NonEssentialWrites("the list")
    for is_full in (True, True, False, True, True, False):
        with writing():
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
    assert len(caplog.messages) == 2
    assert all("the list is not written" in message for message in caplog.messages)
