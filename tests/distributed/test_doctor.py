"""The doctor on two real ranks: a sound machine passes; a missing shard or a wrong kernel fails with its name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_deeplab import doctor, train
from dist_deeplab.model.deeplabv2 import ASPP
from tests.distributed.forked_ranks import run_forked
from tests.distributed.workers import broken_kernel, hasty_doctor

pytestmark = pytest.mark.distributed

SMALL = ["model.backbone=resnet_tiny", "data.crop_size=65", "data.num_workers=1"]


def test_a_sound_machine_passes(sample_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    data = [f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}/runs"]
    exit_code = run_forked(hasty_doctor.main, [([*data, *SMALL, "--json", str(file)],)] * 2, tmp_path / "log")
    printed = (tmp_path / "log").read_text()
    assert exit_code == 0, printed
    for what in ("code", "libraries", "devices", "all-reduce (gloo)", "shared disk", "data.train", "whole step (fp32)"):
        assert f"ok       {what}" in printed
    assert list((tmp_path / "runs").iterdir()) == []
    report = json.loads(file.read_text())
    assert all(finding["status"] == "ok" for finding in report["findings"] if finding["what"] != "free space")
    assert all(rate > 0 for rate in report["rates"].values())
    assert report["forecast"]["limit"] in ("compute", "loader", "all-reduce")


def test_a_missing_shard_is_found(sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shutil.copytree(sample_shards, tmp_path / "shards")
    (shards / "train-000001.tar").unlink()
    assert doctor.main([f"data.train={shards}/train.json", f"output_dir={tmp_path}/runs", *SMALL]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "data.train" in line)
    assert line.startswith("FAILED")
    assert "train-000001.tar" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_training_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["device=cuda", f"output_dir={tmp_path}/runs"]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("override", [None, "data.num_classes=3", "loss.class_weights=[1,2]"])
def test_data_that_training_refuses_is_found(
    sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str | None
) -> None:
    shards = shutil.copytree(sample_shards, tmp_path / "shards")
    if override is None:
        text = (shards / "val.json").read_text()
        names = json.loads(text)["class_names"]
        (shards / "val.json").write_text(text.replace(f'"{names[1]}"', '"another"'))
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", f"output_dir={tmp_path}/runs"]
    arguments = [*data, *SMALL, *([override] if override else [])]
    assert train.main(arguments) == 2
    refusal = capsys.readouterr().err.strip().removeprefix("error: ")
    assert doctor.main(arguments) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("FAILED") and refusal in line], (refusal, out)


@pytest.mark.quick("P9")
def test_a_batch_norm_that_sums_wrongly_over_ranks_is_named(tmp_path: Path) -> None:
    arguments = [f"output_dir={tmp_path}/runs"]
    assert run_forked(broken_kernel.main, [(arguments,)] * 2, tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert first_failure(printed).startswith("batch norm over all ranks (fp32)"), printed


def test_a_head_that_computes_wrongly_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ASPP.forward
    wrong = lambda self, x: real(self, x) * (1.0 if x.dtype == torch.float64 else 1.1)  # noqa: E731
    monkeypatch.setattr(ASPP, "forward", wrong)
    assert doctor.main([f"output_dir={tmp_path}/runs"]) == 1
    assert first_failure(capsys.readouterr().out).startswith("ASPP head (fp32)")


def first_failure(report: str) -> str:
    """What the doctor found first; what follows from it is not a finding of its own."""
    failed = [line for line in report.splitlines() if line.startswith("FAILED")]
    assert not any("update" in line or line.split()[1] == "loss" for line in failed)
    return failed[0].removeprefix("FAILED").strip()
