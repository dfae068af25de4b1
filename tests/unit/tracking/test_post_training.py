"""Results of an evaluation join their run's journal, and nothing else's."""

import json
import math
from pathlib import Path

import pytest
from filelock import FileLock

from dist_deeplab.tracking.journal import Journal, read_records
from dist_deeplab.tracking.post_training import add_to_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "eval" / "best_val").mkdir(parents=True)
    (folder / "eval" / "best_val" / "iou.png").write_bytes(b"image")
    (folder / "run.json").write_text(json.dumps({"tracking": {"uri": "none", "experiment": "x"}}))
    journal = Journal(folder / "metrics.jsonl")
    journal.append({"step": 3, "time": 1.0, "key": "val/mIoU", "value": 0.5, "attempt": 0})
    journal.append({"status": "FINISHED", "time": 2.0, "attempt": 0})
    journal.close()
    return folder


def _records(run_dir: Path) -> list[dict[str, object]]:
    return [record for record, _ in read_records(run_dir / "metrics.jsonl")]


def test_points_and_files_are_appended_as_those_of_the_last_attempt_after_its_end(run_dir: Path) -> None:
    add_to_run(run_dir, 3, {"eval/val/mIoU": 0.7, "nothing": math.nan}, run_dir / "eval" / "best_val")
    point, file = _records(run_dir)[2:]
    assert point.pop("time") == file.pop("time") > 1e9
    assert point == {"step": 3, "late": True, "key": "eval/val/mIoU", "value": 0.7, "attempt": 0}
    assert file == {"step": 3, "late": True, "file": "eval/best_val/iou.png"}
    assert Journal(run_dir / "metrics.jsonl").attempt == 1  # as before: an evaluation is not an attempt


def test_a_score_is_recorded_again_only_if_it_changed(run_dir: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("elsewhere").mkdir()
    tmp_path.joinpath("elsewhere/file").touch()
    for value in (0.7, 0.7, 0.8):
        add_to_run(run_dir, 3, {"eval/val/mIoU": value}, tmp_path / "elsewhere")
    assert [record["value"] for record in _records(run_dir)[2:]] == [0.7, 0.8]


def test_a_folder_that_is_not_a_run_s_is_left_alone(tmp_path: Path) -> None:
    add_to_run(tmp_path, 3, {"eval/val/mIoU": 0.7}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_training_is_left_alone_with_a_warning(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FileLock(run_dir / "run.lock"):
        add_to_run(run_dir, 3, {"eval/val/mIoU": 0.7}, run_dir / "eval" / "best_val")
    assert len(_records(run_dir)) == 2
    assert "a training is running" in caplog.text
