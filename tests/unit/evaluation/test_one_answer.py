"""One image, one answer (P8): evaluation, prediction with scoring, serving and the ONNX file give the same mask.

For each kind of file: a photograph turned by EXIF, transparency, 16 bits, palettes, CMYK, and an image in windows.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from dist_deeplab import predict
from dist_deeplab.checkpointing.checkpoint import read_checkpoint
from dist_deeplab.commands import export, score
from dist_deeplab.commands import shards as packing
from dist_deeplab.config import RunConfig
from dist_deeplab.data import voc
from dist_deeplab.data.decode import decode_image, decode_packed
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import Session
from dist_deeplab.evaluation.evaluator import Loading, draw_panels, evaluate
from dist_deeplab.evaluation.inference import Predictor, inference_settings
from dist_deeplab.evaluation.prediction import classes_of_one
from dist_deeplab.evaluation.serving import SegmentationModel
from tests.networks import checkpoint_of, discerning_network, write_checkpoint

HEIGHT, WIDTH = 57, 75
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([4 * ROWS, 3 * COLUMNS, 255 - 2 * ROWS - COLUMNS], axis=2).clip(0, 255).astype(np.uint8)


def turned(form: str, orientation: int, **options: object) -> Callable[[Path], object]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda path: Image.fromarray(RGB).save(path, form, exif=exif, **options)


def translucent(path: Path) -> None:
    alpha = np.where(COLUMNS < 30, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([RGB, alpha])).save(path, "PNG")


KINDS: dict[str, Callable[[Path], object]] = {
    **{f"turned_{orientation}.jpg": turned("JPEG", orientation, quality=95) for orientation in range(2, 9)},
    "turned_losslessly.png": turned("PNG", 6),
    "turned_tiff.tif": turned("TIFF", 8),
    "turned_webp.webp": turned("WEBP", 3),
    "plain.jpg": turned("JPEG", 1, quality=95),
    "translucent.png": translucent,
    "palette.png": lambda path: Image.fromarray(RGB).quantize(16).save(path),
    "animation.gif": lambda path: Image.fromarray(RGB).quantize(32).save(path),
    "deep.png": lambda path: Image.fromarray(RGB[..., 0].astype(np.uint16) * 256 + 77).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(RGB).convert("CMYK").save(path, "JPEG", quality=95),
    "grey.bmp": lambda path: Image.fromarray(RGB[..., 1]).save(path),
}
SERVED = (".jpg", ".png", ".webp")
ALONE = DistEnv()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds, masks drawn on what people see, their shards, and a checkpoint whose classes vary."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for name, save in KINDS.items():
        save(root / "images" / name)
        height, width = decode_image((root / "images" / name).read_bytes()).shape[:2]
        label = np.kron(rng.integers(0, 21, (10, 10)), np.ones((8, 8)))[:height, :width].astype(np.uint8)
        voc.save_palette_png(label, (root / "masks" / name).with_suffix(".png"))
    (root / "names.txt").write_text("".join(f"{name}\n" for name in voc.CLASS_NAMES))
    pack = ["--images", str(root / "images"), "--masks", str(root / "masks"), "--class-names", str(root / "names.txt")]
    assert packing.main([*pack, "--split", "val", "--out", str(root)]) == 0
    write_checkpoint(root / "network.pt", checkpoint_of(discerning_network(21)))
    return root


@pytest.mark.quick("P8")
def test_a_shard_holds_the_pixels_that_prediction_sees_for_every_reader(world: Path) -> None:
    reader = ShardReader(load_manifest(world / "val.json"))
    files = {Path(name).stem: world / "images" / name for name in KINDS}
    kept = set()
    for index in range(len(reader)):
        sample = reader.read(index)
        original = files[sample.key].read_bytes()
        expected = decode_image(original)
        np.testing.assert_array_equal(decode_packed(sample.image), expected, err_msg=sample.key)
        plain = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))  # webdataset's decode("pil")
        np.testing.assert_array_equal(plain, expected, err_msg=sample.key)
        opencv = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_COLOR_RGB)  # applies orientations
        np.testing.assert_array_equal(opencv, expected, err_msg=sample.key)
        if sample.image == original:
            kept.add(sample.key)
    assert kept == {"plain", "palette"}


@pytest.mark.quick("P8")
@pytest.mark.parametrize("windows", [[], ["eval.window=41", "eval.overlap=9"]], ids=["whole", "in windows"])
def test_evaluation_prediction_scoring_and_serving_give_one_mask(
    world: Path, windows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = read_checkpoint(world / "network.pt")
    settings = inference_settings(checkpoint, windows)
    manifest = load_manifest(world / "val.json")
    out, options = tmp_path / "out", ["eval.batch_size=3", *windows]
    assert predict.main([str(world / "network.pt"), str(world / "images"), "--out", str(out), *options]) == 0

    predictor = Predictor.from_checkpoint(checkpoint, settings, torch.device("cpu"))
    panels = draw_panels(predictor, manifest, ALONE, range(manifest.num_samples))
    assert {panel.key for panel in panels} == {Path(name).stem for name in KINDS}
    content = checkpoint_of(discerning_network(21))
    content["config"]["eval"] |= {"window": settings.eval.window, "overlap": settings.eval.overlap}
    served = SegmentationModel(content)
    for panel in panels:
        predicted = np.asarray(Image.open(out / f"{panel.key}.png"))
        assert len(np.unique(predicted)) > 1, panel.key
        np.testing.assert_array_equal(predicted, panel.pred, err_msg=panel.key)
    for name in KINDS:
        if name.endswith(SERVED):
            frame = pandas.DataFrame({"image": [(world / "images" / name).read_bytes()]})
            mask = np.asarray(Image.open(io.BytesIO(served.predict(frame)["mask"][0])))
            np.testing.assert_array_equal(mask, np.asarray(Image.open(out / f"{Path(name).stem}.png")), err_msg=name)

    whole = evaluate(predictor, manifest, Session(ALONE), loading=Loading(num_workers=0, batch_size=3))
    arguments = [str(out), str(world / "masks"), "--json", str(tmp_path / "scores.json")]
    assert score.main(arguments) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == whole.confusion.tolist()


def test_the_onnx_file_gives_the_same_masks_and_says_what_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.main([str(world / "network.pt"), str(tmp_path / "model.onnx")]) == 0
    assert "checked on 5 images" in capsys.readouterr().out
    model = onnx.load(str(tmp_path / "model.onnx"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(voc.CLASS_NAMES)
    assert json.loads(metadata["preprocessing"])["channels"] == "bgr"
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 21, "height", "width"]]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    predictor = Predictor.from_checkpoint(
        read_checkpoint(world / "network.pt"), checkpoint_config(world), torch.device("cpu")
    )
    for name in KINDS:
        image = decode_image((world / "images" / name).read_bytes())
        (logits,) = session.run(None, {"image": image.transpose(2, 0, 1)[None].astype(np.float32)})
        same = logits[0].argmax(0) == classes_of_one(predictor, image, torch.device("cpu"))
        assert same.mean() > 0.999, name  # sums in another order decide ties


def checkpoint_config(world: Path) -> RunConfig:
    return inference_settings(read_checkpoint(world / "network.pt"), [])
