"""Each rank's seconds are shared, kept, and the slowest one is named."""

import json
import logging
from pathlib import Path

import pytest
import torch

from dist_deeplab.distributed import rank_times
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes

OWN = {"time/step_s": 1.0, "time/data_s": 0.1, "time/wait_s": 0.6}


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1 (which waits for data and makes the others wait) and 2."""
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.1, 0.3, 0.6]], dtype=torch.float64)
    monkeypatch.setattr(rank_times, "all_reduce_sum", lambda table: table + rows)


def test_the_largest_of_each_are_metrics_and_all_of_them_are_kept(others: None, tmp_path: Path) -> None:
    values = RankTimes(DistEnv(0, 0, 3, "slurm"), tmp_path).record(20, OWN)
    assert values == pytest.approx({"time/data_max_s": 0.8, "time/compute_max_s": 0.3, "time/wait_max_s": 0.6})
    (line,) = (tmp_path / rank_times.FILE).read_text().splitlines()
    expected = {"step": 20, "data_s": [0.1, 0.8, 0.1], "compute_s": [0.3, 0.2, 0.3], "wait_s": [0.6, 0.0, 0.6]}
    assert json.loads(line) == expected


def test_the_rank_that_the_others_wait_for_is_named(
    others: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    RankTimes(DistEnv(0, 0, 3, "slurm"), tmp_path).record(20, OWN)
    assert (
        "rank 1 is the slowest: 0.800 s for data and 0.200 s of work per step, the median rank needs 0.400"
        in caplog.text
    )


def test_a_rank_that_is_slower_by_less_than_a_fifth_of_the_step_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    rows = torch.tensor([[0.0, 0.0, 0.0], [5.6, 0.4, 0.0], [5.0, 0.4, 4.6]], dtype=torch.float64)
    monkeypatch.setattr(rank_times, "all_reduce_sum", lambda table: table + rows)
    own = {"time/step_s": 10.0, "time/data_s": 5.0, "time/wait_s": 4.6}
    RankTimes(DistEnv(0, 0, 3, "slurm"), tmp_path).record(20, own)  # rank 1 is 0.6 s slower
    assert not caplog.text


def test_another_rank_writes_nothing(others: None, tmp_path: Path) -> None:
    RankTimes(DistEnv(2, 2, 3, "slurm"), tmp_path / "absent").record(20, OWN)


def test_a_single_process_is_not_compared(tmp_path: Path) -> None:
    assert RankTimes(DistEnv(), tmp_path).record(20, OWN) == {}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_warning_and_the_run_continues(
    others: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    (tmp_path / rank_times.FILE).symlink_to("/dev/full")
    times = RankTimes(DistEnv(0, 0, 3, "slurm"), tmp_path)
    assert times.record(20, OWN) == times.record(40, OWN) != {}
    assert caplog.text.count("No space left on device") == 1
