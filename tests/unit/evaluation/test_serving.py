"""A logged model says of an image what `predict` says of it."""

import io

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from dist_deeplab.errors import UserError
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.evaluation.prediction import probabilities
from dist_deeplab.evaluation.serving import SegmentationModel
from dist_deeplab.model.preprocessing import CAFFE
from tests.networks import checkpoint_of, discerning_network


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_image_is_read_as_predict_reads_it_upright_and_on_white() -> None:
    net = discerning_network(21)
    model = SegmentationModel(checkpoint_of(net))
    rows, columns = np.mgrid[0:40, 0:53]
    alpha = np.where(rows < 20, 255, 0)
    stored = np.stack([6 * rows, 4 * columns, 255 - 2 * rows - 3 * columns, alpha], axis=2).clip(0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = io.BytesIO()
    Image.fromarray(stored.astype(np.uint8)).save(file, "PNG", exif=exif)

    mask = model.predict(pandas.DataFrame({"image": [file.getvalue()]}))["mask"][0]

    upright = np.rot90(np.where(stored[..., 3:] == 255, stored, 255)[..., :3].astype(np.uint8), -1)
    expected = probabilities(Predictor(net, CAFFE), upright, torch.device("cpu")).argmax(0)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(mask))), expected)


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_not_an_image_is_said_in_one_sentence() -> None:
    model = SegmentationModel(checkpoint_of(discerning_network(21)))
    with pytest.raises(UserError, match=r"the image \(5 bytes\) is not an image"):
        model.predict(pandas.DataFrame({"image": [b"hello"]}))
