"""Figures are made in a thread beside the training; the journal is written by the thread that trains."""

import json
import threading
from pathlib import Path

import pytest

from dist_deeplab.errors import UserError
from dist_deeplab.tracking.tracker import JournalTracker

WAIT_S = 30.0


def files_in_journal(run_dir: Path) -> list[tuple[int, str]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["file"]) for record in records if "file" in record]


@pytest.fixture
def tracker(tmp_path: Path) -> JournalTracker:
    return JournalTracker(tmp_path)


def test_training_continues_while_a_figure_is_drawn_and_the_end_waits_for_it(
    tracker: JournalTracker, tmp_path: Path
) -> None:
    may_draw, threads = threading.Event(), []

    def draw() -> list[Path]:
        assert may_draw.wait(WAIT_S)
        threads.append(threading.current_thread())
        (tmp_path / "figure.png").write_text("drawn")
        return [tmp_path / "figure.png"]

    tracker.log_files(5, draw, in_background=True)
    tracker.log(6, {"train/loss": 1.0})  # would not return, if it waited for the figure
    assert files_in_journal(tmp_path) == []
    may_draw.set()
    tracker.close("FINISHED")
    assert files_in_journal(tmp_path) == [(5, "figure.png")]
    assert threads != [threading.main_thread()]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["status"] == "FINISHED"


def test_what_is_done_is_recorded_at_the_next_log_line(tracker: JournalTracker, tmp_path: Path) -> None:
    may_draw = threading.Event()
    tracker.log_files(5, lambda: [tmp_path / "a.png"] * may_draw.wait(WAIT_S), in_background=True)
    may_draw.set()
    tracker._files._thread.submit(lambda: None).result(WAIT_S)  # the thread has finished what came before
    assert files_in_journal(tmp_path) == []
    tracker.log(6, {"train/loss": 1.0})
    assert files_in_journal(tmp_path) == [(5, "a.png")]


def test_files_are_recorded_in_the_order_in_which_they_were_asked_for(tracker: JournalTracker, tmp_path: Path) -> None:
    tracker.log_files(1, lambda: [tmp_path / "a.png"], in_background=True)
    tracker.log_images(1, lambda: {"series": tmp_path / "b.png"}, in_background=True)
    tracker.log_files(2, lambda: [tmp_path / "c.csv"])
    assert files_in_journal(tmp_path) == [(1, "a.png"), (1, "b.png"), (2, "c.csv")]


@pytest.mark.parametrize("error", [OSError("no space"), UserError("cannot draw")])
def test_a_figure_that_fails_costs_a_warning_and_no_other_file(
    tracker: JournalTracker, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> list[Path]:
        raise error

    tracker.log_files(1, fail, in_background=True)
    tracker.log_files(1, lambda: [tmp_path / "b.png"], in_background=True)
    tracker.close("FINISHED")
    assert files_in_journal(tmp_path) == [(1, "b.png")]
    assert f"no files of step 1 for MLflow: {error}" in caplog.text
