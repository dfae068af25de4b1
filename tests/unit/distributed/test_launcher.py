"""The run's word to the script that launched it."""

from pathlib import Path

import pytest

from dist_deeplab.distributed.launcher import VARIABLE, tell_launcher
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.session import Session


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "outcome"))
    return tmp_path / "outcome"


def test_the_last_word_counts_and_remembers_where_the_run_began(file: Path, tmp_path: Path) -> None:
    run = Session(DistEnv(), RankTimes(DistEnv(), tmp_path))
    run.report("running", 20)
    assert file.read_text() == "running 20 20\n"
    run.report("stopped", 25)
    assert file.read_text() == "stopped 20 25\n"
    assert list(tmp_path.iterdir()) == [file]


def test_only_the_main_rank_speaks(file: Path, tmp_path: Path) -> None:
    env = DistEnv(1, 1, 2, "torchrun")
    Session(env, RankTimes(env, tmp_path)).report("done", 5)
    assert not file.exists()


def test_nobody_needs_to_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    tell_launcher("done")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone" / "outcome"))
    tell_launcher("done")
