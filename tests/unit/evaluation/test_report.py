"""A report says the same in metrics, JSON, table and figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from mlflow.utils.validation import _validate_metric_name
from PIL import Image

from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.evaluation.accumulator import TRIMAP_WIDTHS
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.evaluator import Evaluation, ImageScore, Panel
from dist_deeplab.evaluation.report import Report, describe, iou_table, metric_values, render, write_report

TABLES = ["metrics.json", "classes.csv", "images.csv"]
NAMES = ("background", "cat", "unicorn")
CONFUSION = np.array([[60, 20, 0], [0, 20, 0], [0, 0, 0]])  # IoU 75 %, 50 %, absent


def _evaluation(num_panels: int = 0, confusion: np.ndarray = CONFUSION) -> Evaluation:
    rng = np.random.default_rng(0)
    panels = []
    for number in range(num_panels):
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        label, pred = rng.integers(0, len(confusion), (2, 30, 40), dtype=np.uint8)
        label[:3] = 255
        panels.append(Panel(f"image_{number}", image, label, pred))
    images = (ImageScore("image_0", 0.25), ImageScore("all void", math.nan))
    trimap = np.zeros((len(TRIMAP_WIDTHS), *confusion.shape), dtype=np.int64)
    trimap[0], trimap[2] = confusion, np.diag(np.diag(confusion))
    return Evaluation(confusion, 7, 255, panels, trimap, images)


def test_metrics_have_a_point_for_each_class_that_is_there() -> None:
    values = metric_values(scores(CONFUSION), NAMES)
    assert values == {
        "val/mIoU": pytest.approx(0.625),
        "val/pixel_accuracy": pytest.approx(0.8),
        "val/mean_accuracy": pytest.approx((0.75 + 1.0) / 2),
        "val/fwIoU": pytest.approx(0.8 * 0.75 + 0.2 * 0.5),
        "val/iou/background": pytest.approx(0.75),
        "val/iou/cat": pytest.approx(0.5),
    }
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


def test_names_of_classes_become_names_that_mlflow_takes_each_its_own() -> None:
    values = metric_values(
        scores(np.diag([1, 1, 1, 1])), ["wall", "door;double door", "door,double door", "straße (b)"]
    )
    keys = [key for key in values if key.startswith("val/iou/")]
    assert [key[8:] for key in keys] == ["wall", "door_double door", "door_double door_2", "straße _b_"]
    for key in keys:
        _validate_metric_name(key)


def test_brackets_in_names_are_no_markup() -> None:
    text = render(iou_table(scores(CONFUSION), ["road [asphalt]", "a[/b]", "c"], notes=["of [x].pth"]))
    assert all(name in text for name in ("road [asphalt]", "a[/b]", "of [x].pth"))


def test_json_is_strict_json_with_null_for_an_absent_class() -> None:
    text = json.dumps(Report(_evaluation(), NAMES).to_json(), allow_nan=False)
    assert json.loads(text) == {
        "num_images": 7,
        "mIoU": pytest.approx(0.625),
        "pixel_accuracy": pytest.approx(0.8),
        "mean_accuracy": pytest.approx(0.875),
        "fwIoU": pytest.approx(0.7),
        "absent_classes": ["unicorn"],
        "trimap_mIoU": {"1": pytest.approx(0.625), "3": 1.0},
        "iou": {"background": pytest.approx(0.75), "cat": pytest.approx(0.5), "unicorn": None},
        "confusion": CONFUSION.tolist(),
    }


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_names_than_classes_is_an_error(count: int) -> None:
    names = ("a", "b", "c", "d")[:count]
    with pytest.raises(ValueError, match="zip"):
        metric_values(scores(CONFUSION), names)
    with pytest.raises(ValueError, match="zip"):
        Report(_evaluation(), names).to_json()


def _rows(text: str) -> dict[str, list[str]]:
    return {line.split("│")[1].strip(): line.split("│")[2:] for line in text.splitlines() if "│" in line}


def test_the_table_shows_the_classes_that_exist_and_the_means_and_says_how_many_do_not() -> None:
    text = describe(scores(CONFUSION), NAMES)
    assert {name: cells[0].strip() for name, cells in _rows(text).items()} == {
        "background": "0.7500",
        "cat": "0.5000",
        "mIoU": "0.6250",
        "pixel accuracy": "0.8000",
        "mean accuracy": "0.8750",
        "frequency-weighted IoU": "0.7000",
    }
    assert "1 of 3 classes has no pixel in this set, left out: unicorn" in " ".join(text.split())
    assert "WARNING" not in text
    assert "\x1b" not in text  # a log file takes it as it is


def test_the_mean_alone_is_one_line() -> None:
    assert describe(scores(CONFUSION), NAMES, per_class=False) == "mIoU 0.6250"
    assert describe(scores(CONFUSION), NAMES, per_class=False, notes=["a note"]) == "mIoU 0.6250\na note"


@pytest.mark.parametrize("per_class", [True, False])
def test_a_set_of_a_single_class_questions_its_score(per_class: bool) -> None:
    """Masks of 0 and 255 are one class and void: any network that predicts the class has a perfect score."""
    text = " ".join(describe(scores(np.diag([5, 0])), ["background", "person"], per_class=per_class).split())
    assert "WARNING: every labelled pixel of this set is 'background', so a score says nothing" in text


def test_the_bar_of_a_class_is_as_long_as_its_iou() -> None:
    bars = {name: "".join(cells).count("█") for name, cells in _rows(describe(scores(CONFUSION), NAMES)).items()}
    assert bars["background"] == round(30 * 0.75)
    assert bars["cat"] == 15


def test_a_table_of_a_set_with_all_classes_says_nothing_of_absent_ones() -> None:
    assert "no pixel" not in render(iou_table(scores(np.eye(3, dtype=np.int64)), NAMES))


def _image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("num_panels", [0, 2])
def test_a_report_is_its_files_with_figures_to_look_at(tmp_path: Path, num_panels: int) -> None:
    folder = tmp_path / "eval" / "step_00000001"
    files = write_report(Report(_evaluation(num_panels), NAMES), folder)
    names = [*TABLES, "confusion.png", "iou.png", "trimap.png"] + ["panels.png"] * bool(num_panels)
    assert files == [folder / name for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == Report(_evaluation(), NAMES).to_json()
    for path in files[3:]:
        pixels = _image(path)
        height, width = pixels.shape[:2]
        assert 200 <= height <= 4000
        assert 300 <= width <= 4000
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn


def test_figures_of_21_classes_and_no_correct_pixel_are_drawn_too(tmp_path: Path) -> None:
    confusion = np.zeros((21, 21), dtype=np.int64)
    confusion[0, 1:] = 5
    files = write_report(Report(_evaluation(1, confusion), CLASS_NAMES), tmp_path)
    assert [path.name for path in files] == [*TABLES, "confusion.png", "iou.png", "trimap.png", "panels.png"]
    assert _image(tmp_path / "confusion.png").shape[0] >= 800  # room for 21 names


def test_panels_show_wrong_pixels_in_red_but_neither_right_nor_void_ones(tmp_path: Path) -> None:
    right = np.zeros((40, 40), dtype=np.uint8)
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    red_pixels = {}
    for case, label in (("right", right), ("wrong", right + 1), ("void", right + 255)):
        write_report(Report(Evaluation(CONFUSION, 1, 255, [Panel("image", image, label, right)]), NAMES), tmp_path)
        red_pixels[case] = int((_image(tmp_path / "panels.png") == (214, 40, 40)).all(axis=2).sum())
    assert red_pixels["right"] == red_pixels["void"]  # the legend's patch
    assert red_pixels["wrong"] - red_pixels["right"] > 10_000  # the whole of an image


def test_writing_a_report_again_replaces_it(tmp_path: Path) -> None:
    write_report(Report(_evaluation(), NAMES), tmp_path)
    write_report(Report(_evaluation(confusion=np.diag([1, 1, 0])), NAMES), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["mIoU"] == 1.0


def test_the_tables_in_csv_say_the_same_and_leave_unknown_values_empty(tmp_path: Path) -> None:
    write_report(Report(_evaluation(), NAMES), tmp_path)
    assert (tmp_path / "classes.csv").read_text().splitlines() == [
        "class,iou,accuracy,label_pixels,predicted_pixels",
        "background,0.750000,0.750000,80,60",
        "cat,0.500000,1.000000,20,40",
        "unicorn,,,0,0",
    ]
    assert (tmp_path / "images.csv").read_text().splitlines() == ["key,iou", "image_0,0.250000", "all void,"]


def test_a_report_says_what_it_is_about_and_shows_the_best_and_worst_images(tmp_path: Path) -> None:
    panels = _evaluation(3).panels
    about = {"checkpoint": "best.pt", "notes": ["trained on it"]}
    files = write_report(Report(_evaluation(), NAMES, about, best=panels[:1], worst=panels[1:]), tmp_path)
    assert [path.name for path in files[-2:]] == ["best.png", "worst.png"]
    assert _image(files[-1]).shape[0] > _image(files[-2]).shape[0]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content == about | Report(_evaluation(), NAMES).to_json()


def test_notes_stand_below_the_table() -> None:
    text = render(iou_table(scores(CONFUSION), NAMES, notes=["WARNING: 3 of these 7 images were trained on"]))
    assert text.splitlines()[-1] == "WARNING: 3 of these 7 images were trained on"
