"""Bad samples are counted once each, listed in a file, and too many of them end the run."""

import json
from pathlib import Path

import pytest
import torch

from dist_deeplab.data.batch import BadSample, Batch
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError
from dist_deeplab.training.bad_samples import FILE, BadSamples

ALONE = DistEnv()


def batch(*samples: str) -> Batch:
    nothing = torch.zeros(1)
    return Batch(nothing, nothing, nothing, ["k"], [BadSample(name, f"{name} is damaged") for name in samples])


def take(bad: BadSamples, step: int, *batches: Batch) -> None:
    bad.take(step, batches, sum(len(one.bad) for one in batches))


def listed(folder: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    return [(line["step"], line["sample"]) for line in lines]


def test_each_bad_sample_counts_once_and_is_listed(tmp_path: Path) -> None:
    bad = BadSamples.open(tmp_path, 3, ALONE, start=0)
    take(bad, 1, batch(), batch())
    assert bad.values() == {"data/bad_samples": 0.0}
    assert not (tmp_path / FILE).exists()
    take(bad, 2, batch("a"), batch("b", "a"))
    take(bad, 5, batch("a"), batch("c"))
    assert bad.values() == {"data/bad_samples": 3.0}
    assert listed(tmp_path) == [(2, "a"), (2, "b"), (5, "c")]


def test_one_too_many_ends_the_run_with_the_last_problem_and_the_list(tmp_path: Path) -> None:
    bad = BadSamples.open(tmp_path, 1, ALONE, start=0)
    take(bad, 1, batch("a"))
    take(bad, 2, batch("a"))
    with pytest.raises(TrainingError, match=rf"2 samples are bad, data\.max_bad_samples=1; the last: b .*{FILE}"):
        take(bad, 3, batch("b"))
    assert listed(tmp_path) == [(1, "a"), (3, "b")]


def test_a_resumed_run_knows_those_of_before_and_forgets_those_that_come_again(tmp_path: Path) -> None:
    bad = BadSamples.open(tmp_path, 5, ALONE, start=0)
    take(bad, 4, batch("a"))
    take(bad, 5, batch("c"))
    take(bad, 6, batch("b"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 7, "sam')
    bad = BadSamples.open(tmp_path, 5, ALONE, start=5)
    assert bad.values() == {"data/bad_samples": 2.0}, "step 5 is the last that the checkpoint holds"
    take(bad, 6, batch("b"))
    assert listed(tmp_path) == [(4, "a"), (5, "c"), (6, "b")]


def test_one_sample_is_bad(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^1 sample is bad, data\.max_bad_samples=0"):
        take(BadSamples.open(tmp_path, 0, ALONE, start=0), 1, batch("a"))


def test_without_permission_there_is_no_metric(tmp_path: Path) -> None:
    assert BadSamples.open(tmp_path, 0, ALONE, start=0).values() == {}


def test_a_list_that_cannot_be_written_is_one_warning_and_the_samples_still_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadSamples.open(tmp_path, 2, ALONE, start=0)
    (tmp_path / FILE).symlink_to("/dev/full")
    take(bad, 1, batch("a"))
    take(bad, 2, batch("b"))
    assert bad.values() == {"data/bad_samples": 2.0}
    assert len([message for message in caplog.messages if "is not written (" in message]) == 1
    with pytest.raises(TrainingError, match="3 samples are bad"):
        take(bad, 3, batch("c"))
