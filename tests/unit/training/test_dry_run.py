"""A dry run runs the real thing, shortened, in a folder that goes away, and foretells the whole."""

from pathlib import Path

import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.checkpointing.file import save_content
from dist_deeplab.config import RunConfig, load_config
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.tracking.journal import Journal
from dist_deeplab.training import dry_run as module
from dist_deeplab.training.dry_run import STEPS, dry_run, forecast, memory_report
from dist_deeplab.training.memory_estimate import MemoryEstimate

GIB = 2**30
FP32 = load_config(None, ["precision.dtype=fp32"])


def test_the_forecast_is_of_the_whole_run() -> None:
    config = load_config(None, ["max_steps=1000", "batch.global_size=8"])
    text = forecast(config, [1.0, 2.0, 9.0], [0.3, 0.3, 0.6])
    assert text.startswith("dry run: 4 images/s, 2 s a step, 10% of it waiting for data; 1,000 steps would take 33:20")


def test_on_a_gpu_an_images_memory_is_what_was_measured_beyond_the_fixed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
    estimate = MemoryEstimate({"weights": GIB, "momentum": GIB}, {"scale_1": 2 * GIB})
    text = memory_report(FP32, estimate, 14 * GIB, micro_size=4, device=torch.device("cuda"))
    assert "micro-batches of 4 images of 321 in fp32: 14 GiB = 2 GiB fixed + 3 GiB an image (2 counted)" in text
    assert "of its 80 GiB, batch.micro_size of up to 24 would take 95%" in text  # (0.95 * 80 - 2) / 3


def test_on_a_cpu_an_images_memory_is_counted_and_half_of_what_is_free_is_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 20 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    estimate = MemoryEstimate({"weights": GIB}, {"scale_1": GIB, "scale_0.5": GIB // 2})
    text = memory_report(FP32, estimate, 6 * GIB, micro_size=2, device=torch.device("cpu"))
    assert "6 GiB, Python and libraries included; counted of it: 4 GiB = 1 GiB fixed + 1.5 GiB an image" in text
    assert "batch.micro_size of up to 3 would take half of the memory that is free" in text


def test_it_runs_a_shortened_copy_elsewhere_and_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["name=mine", f"output_dir={tmp_path}", "max_steps=500"])
    seen: list[RunConfig] = []
    saved = Checkpoint({"model": {}, "optimizer": {}, "step": STEPS, "micro_size": 5}, FP32, SCRATCH, ())

    def run(short: RunConfig, env: DistEnv) -> int:
        seen.append(short)
        short.run_dir.mkdir(parents=True)
        journal = Journal(short.run_dir / "metrics.jsonl")
        for step in range(1, STEPS + 1):
            seconds = 100.0 if step <= 2 else 2.0  # the first steps don't count
            values = {"time/step_s": seconds, "time/data_s": 0.5, "memory/peak_gib": 1.25}
            journal.append(*({"step": step, "key": key, "value": value} for key, value in values.items()))
        journal.close()
        path = short.run_dir / "checkpoints" / f"step_{STEPS:08d}.pt"
        path.parent.mkdir()
        save_content(path, saved.to_content(), step=STEPS)
        return 0

    with caplog.at_level("INFO"):
        assert dry_run(config, DistEnv(), run) == 0
    [short] = seen
    assert (short.max_steps, short.tracking.uri) == (STEPS, "none")
    assert (short.batch, short.optim, short.model) == (config.batch, config.optim, config.model)
    assert not Path(short.output_dir).exists() and list(tmp_path.iterdir()) == []
    assert "2 s a step, 25% of it waiting" in caplog.text and "500 steps would take 16:40" in caplog.text
    assert "micro-batches of 5 images of 321 in fp32: 1.25 GiB" in caplog.text


def test_a_failed_module_says_nothing_of_the_future(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert dry_run(RunConfig(), DistEnv(), lambda config, env: 75) == 75
    assert "dry run" not in caplog.text


def test_the_evaluations_are_in_the_forecast_by_their_pixels() -> None:
    config = load_config(None, ["max_steps=500", "eval.every=100", "data.crop_size=321", "eval.flip=true"])
    # 2 s for 10 crops, forward and backward: a crop's forward takes 0.2 / 3 s, and each image is twice a crop, twice.
    text = forecast(config, [2.0], [0.5], image_area=(30, 2 * 321.0**2))
    assert "500 steps would take 16:40, and 5 evaluations some 0:08 each" in text
    assert "evaluation" not in forecast(config, [2.0], [0.5])
