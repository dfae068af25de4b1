"""A dry run runs the real thing, shortened, in a folder that goes away, and foretells the whole."""

from pathlib import Path

import pytest

from dist_deeplab.config import RunConfig, load_config
from dist_deeplab.runtime.distributed import DistEnv
from dist_deeplab.runtime.journal import Journal
from dist_deeplab.training.rehearsal import STEPS, forecast, rehearse


def test_the_forecast_is_of_the_whole_run() -> None:
    config = load_config(None, ["max_steps=1000", "batch.global_size=8"])
    text = forecast(config, [1.0, 2.0, 9.0], [0.3, 0.3, 0.6], [1.5, 1.75])
    assert text.startswith("dry run: 4 images/s, 2 s a step, 10% of it waiting for data; peak memory")
    assert "1.75 GiB; 1000 steps would take 33:20" in text


def test_it_runs_a_shortened_copy_elsewhere_and_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["name=mine", f"output_dir={tmp_path}", "data.val=val.json", "max_steps=500"])
    seen: list[RunConfig] = []

    def run(short: RunConfig, env: DistEnv) -> int:
        seen.append(short)
        short.run_dir.mkdir(parents=True)
        journal = Journal(short.run_dir / "metrics.jsonl")
        for step in range(1, STEPS + 1):
            seconds = 100.0 if step <= 2 else 2.0  # the first steps don't count
            values = {"time/step_s": seconds, "time/data_s": 0.5, "memory/peak_gib": 1.0}
            journal.append(*({"step": step, "key": key, "value": value} for key, value in values.items()))
        journal.close()
        return 0

    with caplog.at_level("INFO"):
        assert rehearse(config, DistEnv(), run) == 0
    [short] = seen
    assert (short.max_steps, short.data.val, short.tracking.uri) == (STEPS, "", "none")
    assert (short.batch, short.optim, short.model) == (config.batch, config.optim, config.model)
    assert not Path(short.output_dir).exists() and list(tmp_path.iterdir()) == []
    assert "2 s a step, 25% of it waiting" in caplog.text and "500 steps would take 16:40" in caplog.text


def test_a_failed_rehearsal_says_nothing_of_the_future(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert rehearse(RunConfig(), DistEnv(), lambda config, env: 75) == 75
    assert "dry run" not in caplog.text
