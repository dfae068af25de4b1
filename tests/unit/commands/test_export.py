"""What is exported computes what evaluation computes, at any size; formats and faults. ONNX: test_one_answer.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.commands import export as tool
from dist_deeplab.errors import TrainingError
from dist_deeplab.evaluation.exportable import Exportable
from dist_deeplab.evaluation.inference import Predictor, load_network
from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing
from tests.conftest import REPO
from tests.networks import checkpoint_of, discerning_network, write_checkpoint


@pytest.fixture(scope="module")
def saved() -> dict[str, object]:
    return checkpoint_of(discerning_network(21))


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "best.pt", saved)


def python(*arguments: object) -> str:
    """Output of a Python process of its own."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("preprocessing", [CAFFE, TORCHVISION])
def test_one_module_does_all_that_evaluation_does(saved: dict[str, object], preprocessing: Preprocessing) -> None:
    predictor = Predictor(load_network(Checkpoint.from_content(saved)), preprocessing)
    module = Exportable(predictor.net, preprocessing).eval()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(image)).numpy()

    images = {str(size): tool.draw(*size) for size in [*tool._SIZES, (1, 1), (96, 128)]}
    assert tool.compare(run, predictor, images) < 1e-6
    with pytest.raises(TrainingError, match="differs on"):
        tool.compare(lambda image: run(image)[..., ::-1], predictor, images)


def test_a_file_that_is_there_is_not_overwritten(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.pt2"
    out.write_bytes(b"precious")
    assert tool.main([str(checkpoint), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"


def test_a_file_that_differs_takes_no_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: Exportable, out: Path, metadata: dict[str, str]) -> tool.Model:
        out.write_bytes(b"other weights")
        return lambda image: np.zeros((1, 21, *image.shape[2:]), dtype=np.float32)

    out = tmp_path / "model.pt2"
    out.write_bytes(b"precious")
    monkeypatch.setattr(tool, "write_program", write)
    assert tool.main([str(checkpoint), str(out), "--overwrite"]) == 1
    assert "the exported network differs on drawn" in capsys.readouterr().err
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"precious"]


RUN_PROGRAM = """
import json, sys, torch
extra = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
with torch.no_grad():
    torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
print(json.loads(extra["metadata.json"])["checkpoint"])
"""


def test_a_program_takes_any_size_and_batch(
    checkpoint: Path,
    saved: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Loaded by torch alone, in another process."""
    out = tmp_path / "model.pt2"
    assert tool.main([str(checkpoint), str(out)]) == 0
    assert [str(warning.message) for warning in recwarn] == []
    assert "checked on 5 images" in capsys.readouterr().out
    image = torch.rand(3, 3, 41, 70) * 255
    torch.save(image, tmp_path / "image.pt")
    said = python("-c", RUN_PROGRAM, out, tmp_path / "image.pt", tmp_path / "logits.pt")
    assert said.strip() == "best.pt, step 7"
    with torch.no_grad():
        expected = Exportable(load_network(Checkpoint.from_content(saved)), CAFFE).eval()(image)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_another_suffix_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(checkpoint), str(tmp_path / "model.tflite")]) == 2
    assert ".onnx or .pt2" in capsys.readouterr().err
