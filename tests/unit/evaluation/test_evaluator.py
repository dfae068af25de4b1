"""evaluate() equals a plain loop over the images, and leaves the network as it was."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dist_deeplab.data.loader import EvalDataset, eval_batches
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.manifest import Manifest, ShardError
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import Session
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.errors import TrainingError
from dist_deeplab.evaluate import extremes
from dist_deeplab.evaluation import evaluator
from dist_deeplab.evaluation.accumulator import TRIMAP_WIDTHS, ImageScore
from dist_deeplab.evaluation.evaluator import Evaluation, EvaluationStopped, Loading, draw_panels, evaluate
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE, Preprocessing
from tests.networks import discerning_network
from tests.ranks import TwoRanks

NUM_CLASSES, IGNORE = 4, 255
RGB_WITH_STD = Preprocessing("rgb", mean=(120.5, 110.25, 100.75), std=(0.5, 0.8, 1.25))
ALONE = DistEnv(0, 0, 1, "single process")
SIZES = [(33, 41), (30, 47), (57, 34), (26, 26), (40, 33)]  # height, width: on the grid 8k+1 or not, each way


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank takes the GPU where there is one; here bits are compared with a loop on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and labels in folders, the files as PIL writes them."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"image_{number}.jpg", quality=95)
        label = rng.integers(0, NUM_CLASSES - 1, (height, width), dtype=np.uint8)  # the last class is absent
        label[rng.random(label.shape) < 0.2] = IGNORE
        label[:, -3:] = IGNORE if number % 2 else 0
        Image.fromarray(label).save(folder / f"image_{number}.png")
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    samples = [SourceSample(f"image_{n}", folder / f"image_{n}.jpg", folder / f"image_{n}.png") for n in range(5)]
    labels = LabelSpace(tuple("abcd"), IGNORE)
    return write_shards(
        samples,
        tmp_path_factory.mktemp("shards"),
        split="val",
        labels=labels,
        options=PackingOptions(samples_per_shard=2),
    )


@pytest.fixture(scope="module")
def repeated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twelve images of three sizes, in turns; two of the sizes are one when padded."""
    place = tmp_path_factory.mktemp("repeated")
    rng = np.random.default_rng(1)
    samples = []
    for n in range(12):
        height, width = [(26, 33), (33, 26), (41, 30)][n % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(place / f"{n}.jpg")
        Image.fromarray(rng.integers(0, NUM_CLASSES, (height, width), dtype=np.uint8)).save(place / f"{n}.png")
        samples.append(SourceSample(f"image_{n}", place / f"{n}.jpg", place / f"{n}.png"))
    return write_shards(
        samples,
        place,
        split="val",
        labels=LabelSpace(tuple("abcd"), IGNORE),
        options=PackingOptions(samples_per_shard=5),
    )


@pytest.fixture(scope="module")
def net() -> DeepLabV2:
    return discerning_network(NUM_CLASSES)


@torch.no_grad()
def _slow_prediction(net: DeepLabV2, path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Classes, uint8 [H, W]: pad with the mean to 8k+1, logits, corner-aligned upsampling, crop, argmax."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    height, width = rgb.shape[:2]
    padded_height, padded_width = height, width
    while padded_height % 8 != 1:
        padded_height += 1
    while padded_width % 8 != 1:
        padded_width += 1
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    canvas = np.tile(mean, (padded_height, padded_width, 1))
    canvas[:height, :width] = rgb[:, :, ::-1] if preprocessing.channels == "bgr" else rgb
    x = torch.from_numpy((canvas - mean) / std).permute(2, 0, 1)[None]
    logits = F.interpolate(net(x), (padded_height, padded_width), mode="bilinear", align_corners=True)
    return logits[0, :, :height, :width].argmax(0).numpy().astype(np.uint8)


def _slow_distance(label: np.ndarray) -> np.ndarray:
    """Chebyshev distance to the nearest pixel that is void or touches another label, plus one; by brute force."""
    height, width = label.shape
    border = []
    for y in range(height):
        for x in range(width):
            around = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            labels = {label[v, u] for v, u in around if 0 <= v < height and 0 <= u < width}
            if label[y, x] == IGNORE or labels - {label[y, x]}:
                border.append((y, x))
    ys, xs = np.array(border).T
    rows, columns = np.mgrid[:height, :width]
    return 1 + np.maximum(abs(rows[..., None] - ys), abs(columns[..., None] - xs)).min(-1)


@pytest.mark.quick("P4")
@pytest.mark.parametrize("preprocessing", [CAFFE, RGB_WITH_STD])
def test_evaluate_equals_a_plain_loop(
    net: DeepLabV2, manifest: Manifest, folder: Path, preprocessing: Preprocessing
) -> None:
    evaluation = evaluate(
        Predictor(net, preprocessing), manifest, Session(ALONE), loading=Loading(num_workers=0), num_panels=5
    )
    near = np.zeros((len(TRIMAP_WIDTHS), NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    for index, panel in enumerate(evaluation.panels):
        pred = _slow_prediction(net, folder / f"image_{index}.jpg", preprocessing)
        label = np.asarray(Image.open(folder / f"image_{index}.png"))
        assert panel.key == f"image_{index}"
        np.testing.assert_array_equal(panel.pred, pred)
        np.testing.assert_array_equal(panel.label, label)
        np.testing.assert_array_equal(panel.image, np.asarray(Image.open(folder / f"image_{index}.jpg")))
        distance = _slow_distance(label)
        own = np.zeros_like(expected)
        for true, predicted, far in zip(label.ravel(), pred.ravel(), distance.ravel()):
            if true != IGNORE:
                own[true, predicted] += 1
                for number, width in enumerate(TRIMAP_WIDTHS):
                    near[number, true, predicted] += far <= width
        expected += own
        classes = [c for c in range(NUM_CLASSES) if own[c].any() or own[:, c].any()]
        iou = np.mean([own[c, c] / (own[c].sum() + own[:, c].sum() - own[c, c]) for c in classes])
        assert panel.iou == pytest.approx(iou)
        assert (evaluation.images[index].key, evaluation.images[index].miou) == (panel.key, pytest.approx(iou))
    np.testing.assert_array_equal(evaluation.confusion, expected)
    np.testing.assert_array_equal(evaluation.trimap, near)
    assert (expected.sum(0) > 0).sum() > 1  # not one class everywhere
    assert evaluation.num_images == 5
    assert evaluation.ignore_label == IGNORE


def test_worker_processes_and_panels_change_nothing_of_the_score(net: DeepLabV2, manifest: Manifest) -> None:
    plain = evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0))
    other = evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=2), num_panels=3)
    np.testing.assert_array_equal(other.confusion, plain.confusion)


@pytest.mark.parametrize("align_corners", [True, False])
def test_batches_of_several_images_change_nothing_of_the_score(
    net: DeepLabV2, repeated: Manifest, align_corners: bool
) -> None:
    predictor = Predictor(net, CAFFE, align_corners=align_corners)
    single = evaluate(predictor, repeated, Session(ALONE), loading=Loading(num_workers=0, batch_size=1))
    batched = evaluate(predictor, repeated, Session(ALONE), loading=Loading(num_workers=0, batch_size=3))
    np.testing.assert_array_equal(batched.confusion, single.confusion)
    assert batched.images == single.images
    assert [image.key for image in batched.images] == [f"image_{n}" for n in range(12)]


def test_batches_hold_each_index_once_and_images_of_one_size(repeated: Manifest) -> None:
    dataset = EvalDataset(repeated, num_classes=NUM_CLASSES, ignore_label=IGNORE)
    for padded in (True, False):
        batches = eval_batches(dataset, batch_size=2, padded=padded)
        assert sorted(index for batch in batches for index in batch) == list(range(12))
        for batch in batches:
            sizes = [dataset.reader.image_size(index) for index in batch]
            assert len({tuple(-(-(n - 1) // 8) for n in size) if padded else size for size in sizes}) == 1
        assert max(map(len, batches)) == 2
    assert len(eval_batches(dataset, batch_size=12, padded=True)) == 2  # 26 x 33 and 33 x 26 pad to 33 x 33 both
    assert len(eval_batches(dataset, batch_size=12, padded=False)) == 3


def test_panels_of_chosen_images_come_in_the_order_asked_for(net: DeepLabV2, manifest: Manifest) -> None:
    predictor = Predictor(net, CAFFE)
    panels = draw_panels(predictor, manifest, ALONE, [3, 0, 4])
    assert [panel.key for panel in panels] == ["image_3", "image_0", "image_4"]
    scored = evaluate(predictor, manifest, Session(ALONE), loading=Loading(num_workers=0))
    assert [panel.iou for panel in panels] == [scored.images[index].miou for index in (3, 0, 4)]
    assert draw_panels(predictor, manifest, ALONE, []) == []


def test_panels_of_several_ranks_come_in_the_order_asked_for_on_each(
    net: DeepLabV2, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rank order a slider over the steps would show another image at another number of ranks."""
    ranks = TwoRanks()
    for name in ("gather_to_all", "gather_bytes"):
        monkeypatch.setattr(evaluator, name, ranks.gather, raising=False)
    asked = [3, 0, 4, 1, 2]
    for panels in ranks.run(lambda env: draw_panels(Predictor(net, CAFFE), manifest, env, asked)):
        assert [panel.key for panel in panels] == [f"image_{index}" for index in asked]


@pytest.mark.parametrize(("num_panels", "shown"), [(0, 0), (2, 2), (9, 5)])
def test_panels_are_spread_over_the_set(net: DeepLabV2, manifest: Manifest, num_panels: int, shown: int) -> None:
    panels = evaluate(
        Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0), num_panels=num_panels
    ).panels
    indices = [n * len(SIZES) // shown for n in range(shown)]
    assert [panel.key for panel in panels] == [f"image_{n}" for n in indices]
    for panel, size in zip(panels, [SIZES[n] for n in indices], strict=True):
        assert panel.image.shape == (*size, 3)
        assert panel.label.shape == panel.pred.shape == size
        assert panel.image.dtype == panel.label.dtype == panel.pred.dtype == np.uint8


def test_images_that_no_rank_has_seen_are_an_error(net: DeepLabV2, manifest: Manifest) -> None:
    missing_peer = Session(DistEnv(0, 0, 2, "torchrun"))  # one of two ranks, but alone: it sees images 0, 2 and 4
    with pytest.raises(TrainingError, match=r"saw 3 images, but .* has 5"):
        evaluate(Predictor(net, CAFFE), manifest, missing_peer, loading=Loading(num_workers=0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", ["sync", "local", "frozen"])
def test_the_network_is_left_as_it_was(net: DeepLabV2, manifest: Manifest, batch_norm: str, training: bool) -> None:
    own = DeepLabV2("resnet_tiny", NUM_CLASSES, norm=norm_factory(batch_norm))
    own.load_state_dict(net.state_dict())
    own.train(training)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    evaluation = evaluate(Predictor(own, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0))
    assert own.training is training
    assert all(module.training is training for module in own.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(p.grad is None for p in own.parameters())
    plain = evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0))
    np.testing.assert_array_equal(evaluation.confusion, plain.confusion)  # stored statistics, in any mode


@pytest.fixture
def write_one(tmp_path: Path, folder: Path) -> Callable[[np.ndarray], Manifest]:
    def write_one(label: np.ndarray) -> Manifest:
        Image.fromarray(label).save(tmp_path / "image_0.png")
        sample = SourceSample("image_0", folder / "image_0.jpg", tmp_path / "image_0.png")
        return write_shards(
            [sample],
            tmp_path,
            split="one",
            labels=LabelSpace(tuple("abcd"), 255),
            options=PackingOptions(samples_per_shard=1),
        )

    return write_one


def test_an_all_void_image_counts_as_an_image_and_not_in_the_score(
    net: DeepLabV2, write_one: Callable[[np.ndarray], Manifest]
) -> None:
    manifest = write_one(np.full(SIZES[0], IGNORE, dtype=np.uint8))
    evaluation = evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0))
    assert evaluation.num_images == 1
    assert evaluation.confusion.sum() == 0


def test_a_sample_that_cannot_be_read_is_an_error(net: DeepLabV2, write_one: Callable[[np.ndarray], Manifest]) -> None:
    manifest = write_one(np.zeros(SIZES[0], dtype=np.uint8))
    shard = manifest.path.parent / manifest.shards[0].name
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ShardError, match=shard.name):
        evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(num_workers=0))


def test_asked_to_stop_it_leaves_off_without_a_result(net: torch.nn.Module, manifest: Manifest) -> None:
    asked = []

    class SecondTime(StopRequest):
        def __bool__(self) -> bool:
            asked.append(True)
            return len(asked) == 2

    session = Session(ALONE, stop=SecondTime())
    with pytest.raises(EvaluationStopped):
        evaluate(Predictor(net, CAFFE), manifest, session, loading=Loading(num_workers=1))
    assert len(asked) == session.progress.count == 2


@pytest.mark.parametrize("benchmark", [True, False])
def test_cudnn_tunes_nothing_during_an_evaluation_and_afterwards_what_it_did_before(
    net: DeepLabV2, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, benchmark: bool
) -> None:
    """Images have many sizes, and tuning takes a second for each; training's crops have one."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    during: list[bool] = []
    add = evaluator.ConfusionAccumulator.add

    def watch(accumulator: evaluator.ConfusionAccumulator, *arguments: Any) -> None:
        during.append(torch.backends.cudnn.benchmark)
        add(accumulator, *arguments)

    monkeypatch.setattr(evaluator.ConfusionAccumulator, "add", watch)
    evaluate(Predictor(net, CAFFE), manifest, Session(ALONE), loading=Loading(0))
    assert set(during) == {False}
    assert torch.backends.cudnn.benchmark == benchmark


def test_the_best_and_the_worst_images_are_those_shown_as_such() -> None:
    mious = (0.2, math.nan, 0.9, 0.5, 0.7)  # void alone has no score
    images = tuple(ImageScore(f"image_{number}", miou) for number, miou in enumerate(mious))
    evaluation = Evaluation(np.zeros((2, 2), dtype=np.int64), len(images), IGNORE, [], images=images)
    assert extremes(evaluation, 2) == ([2, 4], [0, 3])
    assert extremes(evaluation, 9) == ([2, 4, 3, 0], [0, 3, 4, 2])
