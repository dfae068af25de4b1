"""The doctor on two real ranks: a sound machine passes; a missing shard or a wrong kernel fails with its name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_deeplab import doctor, train
from tests.conftest import REPO, Run

pytestmark = pytest.mark.distributed

SMALL = ["model.backbone=resnet_tiny", "data.crop_size=65", "data.num_workers=1"]


def test_a_sound_machine_passes(run_ranks: Run, sample_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    data = [f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}/runs"]
    done = run_ranks(2, REPO / "tests/distributed/workers/hasty_doctor.py", *data, *SMALL, "--json", file)
    assert done.returncode == 0, done.stderr + done.stdout
    for what in ("code", "libraries", "devices", "all-reduce (gloo)", "shared disk", "data.train", "whole step (fp32)"):
        assert f"ok       {what}" in done.stdout
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
@pytest.mark.parametrize(("broken", "named"), [("batch_norm", "batch norm over all ranks"), ("head", "ASPP head")])
def test_a_kernel_that_computes_wrongly_is_named(run_ranks: Run, tmp_path: Path, broken: str, named: str) -> None:
    worker = REPO / "tests/distributed/workers/broken_kernel.py"
    done = run_ranks(2, worker, broken, f"output_dir={tmp_path}/runs")
    assert done.returncode == 1
    assert "exitcode  : 1" in done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed[0].removeprefix("FAILED").strip().startswith(f"{named} (fp32)"), done.stdout
    assert not any("update" in line or line.split()[1] == "loss" for line in failed)
