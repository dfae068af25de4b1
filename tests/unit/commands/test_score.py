"""The tool's numbers are those of plain numpy on the files, and files that cannot be scored are named."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dist_deeplab.commands import score as tool


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and labels of 5 images, 6 classes of VOC's; greyscale and palette PNGs."""
    rng = np.random.default_rng(0)
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        label = np.kron(rng.integers(0, 6, (4, 5)), np.ones((8, 9))).astype(np.uint8)
        pred = np.where(rng.random(label.shape) < 0.7, label, rng.integers(0, 21, label.shape)).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = 255
        for folder, mask in (("gt", label), ("pred", pred)):
            image = Image.fromarray(mask)
            if (number + len(folder)) % 2:
                image.putpalette(bytes(range(256)) * 3)
            image.save(tmp_path / folder / f"image_{number}.png")
    return tmp_path / "pred", tmp_path / "gt"


def _plain_scores(pred_dir: Path, gt_dir: Path, keys: list[str]) -> tuple[float, list[float], float]:
    """mIoU, IoU per class and pixel accuracy with sets of pixels."""
    labels = np.concatenate([np.asarray(Image.open(gt_dir / f"{key}.png")).ravel() for key in keys])
    preds = np.concatenate([np.asarray(Image.open(pred_dir / f"{key}.png")).ravel() for key in keys])
    labels, preds = labels[labels != 255], preds[labels != 255]
    ious = []
    for c in range(21):
        true, said = labels == c, preds == c
        ious.append((true & said).sum() / (true | said).sum() if true.any() else np.nan)
    return float(np.nanmean(ious)), ious, float((labels == preds).mean())


@pytest.mark.parametrize("listed", [False, True])
def test_scores_equal_plain_numpy(folders: tuple[Path, Path], tmp_path: Path, listed: bool) -> None:
    pred, gt = folders
    arguments = [str(pred), str(gt), "--json", str(tmp_path / "scores.json")]
    keys = [f"image_{n}" for n in range(5)]
    if listed:
        keys = keys[1:3]
        (tmp_path / "list.txt").write_text("image_1\nimage_2\n\n")
        arguments += ["--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "report")]
    assert tool.main(arguments) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    miou, ious, accuracy = _plain_scores(pred, gt, keys)
    assert scores["num_images"] == len(keys)
    assert scores["mIoU"] == pytest.approx(miou)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy)
    np.testing.assert_allclose([np.nan if x is None else x for x in scores["iou"].values()], ious)
    assert (tmp_path / "report" / "iou.png").exists() is listed


def test_a_list_names_files_with_spaces_and_may_have_a_second_column(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for folder in folders:
        (folder / "image_1.png").rename(folder / "image 1.png")
    (tmp_path / "list.txt").write_text("image 1\nimage_2 -1\n")
    pairs = tool.find_pairs(*folders, tool.parse_arguments([*map(str, folders), "--list", str(tmp_path / "list.txt")]))
    assert list(pairs) == ["image 1", "image_2"]


def _write(path: Path, mask: np.ndarray) -> None:
    cv2.imwrite(str(path), mask)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda pred, gt: (pred / "image_2.png").unlink(), r"missing.*pred/image_2\.png"),
        (lambda pred, gt: _write(pred / "image_2.png", np.zeros((32, 44), np.uint8)), r"44 x 32 .* 45 x 32"),
        (lambda pred, gt: _write(pred / "image_2.png", np.full((32, 45, 3), (1, 2, 3), np.uint8)), "in colour"),
        (lambda pred, gt: _write(pred / "image_2.png", np.full((32, 45), 21, np.uint8)), "21 is a class index of no"),
        (lambda pred, gt: _write(pred / "image_2.png", np.full((32, 45), 255, np.uint8)), "255 is a class index of no"),
        (lambda pred, gt: _write(gt / "image_2.png", np.full((32, 45), 99, np.uint8)), r"gt/image_2\.png: 99"),
        (lambda pred, gt: (pred / "image_2.png").write_bytes(b"no png"), "not an image"),
        (lambda pred, gt: [_write(p, np.full((32, 45), 255, np.uint8)) for p in gt.iterdir()], "no label but void"),
        (lambda pred, gt: [p.unlink() for p in gt.iterdir()], "nothing to score"),
    ],
)
def test_what_cannot_be_scored_is_named(
    folders: tuple[Path, Path], spoil: object, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(spoil)
    spoil(*folders)
    assert tool.main([str(folder) for folder in folders]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "image_2" in error or "void" in reason or "nothing" in reason
    assert re.search(reason, error)


def test_border_bands_are_those_of_the_label_whatever_is_predicted(tmp_path: Path) -> None:
    """Bands of the prediction's own borders would score different pixels for each network."""
    label = np.zeros((20, 40), dtype=np.uint8)
    label[:, 20:] = 1
    for folder, mask in (("gt", label), ("pred", np.zeros_like(label))):  # a prediction without any border
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder / "a.png", mask)
    arguments = [str(tmp_path / "pred"), str(tmp_path / "gt"), "--json", str(tmp_path / "scores.json")]
    assert tool.main(arguments) == 0
    trimap = json.loads((tmp_path / "scores.json").read_text())["trimap_mIoU"]
    assert trimap["1"] == trimap["20"] == 0.25, "in each band half is class 0, with IoU 1/2, and half class 1"
