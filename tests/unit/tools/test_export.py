"""What is exported computes what evaluation computes, at any size; formats and faults."""

import json
from pathlib import Path

import export as tool
import numpy as np
import pytest
import torch

from dist_deeplab.config import RunConfig, config_to_dict
from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.errors import TrainingError
from dist_deeplab.evaluation.exportable import Exportable
from dist_deeplab.evaluation.inference import Predictor, load_network
from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.runtime.checkpoint import write_sidecar, write_tensors
from tests.networks import discerning_network


@pytest.fixture(scope="module")
def saved() -> dict[str, object]:
    config = RunConfig.model_validate({"model": {"backbone": "resnet_tiny"}})
    plain = {"variant": SCRATCH.to_plain(), "config": config_to_dict(config), "class_names": list(CLASS_NAMES)}
    return plain | {"model": discerning_network(21).state_dict(), "optimizer": {}, "step": 7, "train_keys_sha256": ""}


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "best.pt"
    write_sidecar(path, step=7, digests=[write_tensors(path, saved)])
    return path


@pytest.mark.parametrize("preprocessing", [CAFFE, TORCHVISION])
def test_one_module_does_all_that_evaluation_does(saved: dict[str, object], preprocessing: Preprocessing) -> None:
    predictor = Predictor(load_network(saved), preprocessing)
    module = Exportable(predictor.net, preprocessing).eval()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(image)).numpy()

    pictures = {str(size): tool.draw(*size) for size in [*tool._SIZES, (1, 1), (96, 128)]}
    assert tool.compare(run, predictor, pictures) < 1e-6
    with pytest.raises(TrainingError, match="differs on"):
        tool.compare(lambda image: run(image)[..., ::-1], predictor, pictures)


def test_an_onnx_file_computes_the_same_and_says_what_it_is(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (the extra export) is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime (the extra export) is not installed")
    out = tmp_path / "model.onnx"
    assert tool.main([str(checkpoint), str(out)]) == 0
    assert "checked on 5 pictures" in capsys.readouterr().out
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(metadata["class_names"]) == list(CLASS_NAMES)
    assert json.loads(metadata["preprocessing"])["channels"] == "bgr"
    assert tool.main([str(checkpoint), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_program_takes_any_size_and_batch(checkpoint: Path, saved: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert tool.main([str(checkpoint), str(out)]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["metadata.json"])["checkpoint"] == "best.pt, step 7"
    image = torch.rand(3, 3, 41, 70) * 255
    with torch.no_grad():
        expected = Exportable(load_network(saved), CAFFE).eval()(image)
    torch.testing.assert_close(program(image), expected)


def test_another_suffix_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(checkpoint), str(tmp_path / "model.tflite")]) == 2
    assert ".onnx or .pt2" in capsys.readouterr().err
