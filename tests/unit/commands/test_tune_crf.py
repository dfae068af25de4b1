"""The grid is every combination; the search scores each point as a direct call would."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.commands import tune_crf as tool
from dist_deeplab.config import RunConfig
from dist_deeplab.data.loader import EvalDataset
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation.confusion import count_pixels, scores
from dist_deeplab.evaluation.crf import dense_crf
from dist_deeplab.evaluation.evaluator import content_of
from dist_deeplab.evaluation.inference import Predictor, load_network
from dist_deeplab.evaluation.prediction import probabilities
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights import SCRATCH
from tests.networks import discerning_network


def test_a_grid_is_every_combination_and_ranges_hold_their_end() -> None:
    points = tool.parse_grid(["crf.bi_w=3,4.5", "crf.bi_xy_std=30:50:10", "crf.iterations=5"])
    assert len(points) == 6
    assert points[0] == {"bi_w": 3.0, "bi_xy_std": 30.0, "iterations": 5}
    assert [point["bi_xy_std"] for point in points[:3]] == [30.0, 40.0, 50.0]


@pytest.mark.parametrize("text", ["crf.bi_w=a", "crf.bi_w=1:2", "crf.bi_w=5:3:1", "crf.nothing=3", "crf.bi_xy_std=0"])
def test_a_grid_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        tool.parse_grid([text])


def test_what_is_not_a_parameter_of_the_crf_is_not_an_axis_and_a_set_may_be_a_url() -> None:
    url, axis = "https://example.org/val.json", "crf.bi_w=3,4"
    given = ["x.pt", "--data", url, "--grid", axis, "crf.num_workers=1", "eval.flip=true"]
    arguments = tool.parse_arguments([*given, "--num-images", "2"])
    assert (arguments.grid, arguments.overrides) == ([axis], ["crf.num_workers=1", "eval.flip=true"])
    assert arguments.data == url


def test_each_point_scores_as_a_direct_call(shard_set: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydensecrf", reason="pydensecrf2 (the extra crf) is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net = discerning_network(21)
    settings = RunConfig.model_validate(
        {"model": {"backbone": "resnet_tiny"}, "precision": {"dtype": "fp32"}, "crf": {"num_workers": 1}}
    )
    checkpoint = Checkpoint({"model": net.state_dict()}, settings, SCRATCH, CLASS_NAMES)
    points: list[dict[str, Any]] = [tool.base_point(settings) | {"bi_w": weight} for weight in (0.0, 4.0)]
    mious, without = tool.search(checkpoint, settings, shard_set, points, num_images=3)

    dataset = EvalDataset(shard_set, num_classes=21, ignore_label=255)
    predictor = Predictor(load_network(checkpoint), CAFFE)
    expected = np.zeros((3, 21, 21), dtype=np.int64)
    for index in (0, 4, 7):
        image, label = content_of(dataset.fetch(index), 0)
        prob = probabilities(predictor, image, torch.device("cpu"))
        for number, refined in enumerate([*(dense_crf(image, prob, **point) for point in points), prob]):
            pred = torch.from_numpy(refined.argmax(0).astype(np.uint8))[None]
            expected[number] += count_pixels(torch.from_numpy(label)[None], pred, num_classes=21, ignore_label=255)[
                0, 0
            ].numpy()
    assert [*mious, without] == pytest.approx([scores(confusion).miou for confusion in expected])
    assert mious[0] != mious[1]
