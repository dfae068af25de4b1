"""A resumed run must compute what it computed before; where it does not, it is said, counted and shown."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dist_deeplab.tracking.divergence import Divergence
from dist_deeplab.tracking.tracker import JournalTracker


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)


def replayed(run_dir: Path, values: dict[str, float]) -> list[dict[str, Any]]:
    """Log step 10, be killed, log step 10 again with `values`; return the second attempt's records."""
    first = JournalTracker(run_dir)
    first.log(10, {"train/loss": 2.0, "lr/backbone": 0.1, "time/step_s": 1.0, "train/loss_fused": 0.0})
    before = (run_dir / "metrics.jsonl").stat().st_size
    JournalTracker(run_dir).log(10, values)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes()[before:].splitlines()]


def test_the_same_values_again_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert replayed(tmp_path, {"train/loss": 2.0, "lr/backbone": 0.1, "train/loss_fused": 0.0}) == []
    assert caplog.text == ""


def test_times_and_memory_may_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert replayed(tmp_path, {"time/step_s": 3.0, "memory/peak_gib": 9.0})[0]["key"] == "memory/peak_gib"
    assert caplog.text == ""


def test_another_value_is_a_warning_a_counter_and_a_tag_and_the_journal_keeps_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = replayed(tmp_path, {"train/loss": 2.5, "train/loss_fused": 1e-9})
    assert "train/loss of step 10 is 2.5, but the journal has 2 (relative difference 2.0e-01)" in caplog.text
    points = {record["key"]: record["value"] for record in records if "key" in record}
    assert points == {"tracking/diverged_points": 2.0, "tracking/divergence": 1.0}
    assert records[-1]["tags"]["diverged"].startswith("2 points came out differently")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["value"] == 2.0


def test_rounding_is_called_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    replayed(tmp_path, {"train/loss": 2.0 + 1e-9})
    assert "(relative difference 5.0e-10): rounding" in caplog.text


def test_a_long_replay_warns_a_handful_of_times(caplog: pytest.LogCaptureFixture) -> None:
    divergence = Divergence()
    for step in range(1000):
        divergence.compare("train/loss", step, 1.0, 1.0 + 1e-8 * (1 + step))
    assert divergence.count == 1000
    assert 1 <= len(caplog.records) <= 5


def test_a_value_that_is_not_a_number_any_more_differs(tmp_path: Path) -> None:
    (point, *_, tag) = replayed(tmp_path, {"train/loss": float("nan")})
    assert (point["key"], point["value"]) == ("tracking/diverged_points", 1.0)
    assert "inf" in tag["tags"]["diverged"]
