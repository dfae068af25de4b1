"""The sample data set is a VOCdevkit, the same bytes every time, and never half made or written over another."""

import errno
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.commands import sample_voc as tool
from dist_deeplab.data import voc
from tests.commands import exit_code

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "dist_deeplab", "sample-voc"]
NUM_TRAIN, NUM_VAL = 21, 7
ARGUMENTS = ("--num-train", str(NUM_TRAIN), "--num-val", str(NUM_VAL))


run = partial(exit_code, tool.main)


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_list(out: Path, split: str) -> list[str]:
    text = (out / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").read_text()
    assert text.endswith("\n") and "\n\n" not in text
    return text.split()


def read_label(out: Path, image_id: str) -> np.ndarray:
    return np.array(Image.open(out / f"VOCdevkit/VOC2012/SegmentationClass/{image_id}.png"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small set; no test writes to it."""
    folder = tmp_path_factory.mktemp("sample") / "made" / "here"
    assert run("--out", folder, *ARGUMENTS) == 0
    return folder


def test_the_command_line_gives_the_same_bytes_as_a_run_in_this_process(out: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path), *ARGUMENTS, "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_tree(tmp_path) == read_tree(out)


def test_another_seed_draws_other_images(out: Path, tmp_path: Path) -> None:
    assert run("--out", tmp_path, "--num-train", 2, "--num-val", 1, "--seed", 1) == 0
    first = "VOCdevkit/VOC2012/JPEGImages/sample_000000.jpg"
    assert (tmp_path / first).read_bytes() != (out / first).read_bytes()


def test_the_layout_is_vocs_and_the_lists_name_every_file_once(out: Path) -> None:
    ids = [f"sample_{index:06d}" for index in range(NUM_TRAIN + NUM_VAL)]
    assert read_list(out, "train") == ids[:NUM_TRAIN]
    assert read_list(out, "val") == ids[NUM_TRAIN:]
    assert read_list(out, "trainval") == ids
    expected = {
        "sample.json",
        *(f"VOC2012/ImageSets/Segmentation/{split}.txt" for split in ("train", "val", "trainval")),
    }
    expected |= {f"VOC2012/JPEGImages/{image_id}.jpg" for image_id in ids}
    expected |= {f"VOC2012/SegmentationClass/{image_id}.png" for image_id in ids}
    assert set(read_tree(out / "VOCdevkit")) == expected
    assert [path.name for path in out.iterdir()] == ["VOCdevkit"]


def test_masks_are_palette_images_of_the_used_classes_and_as_large_as_their_jpegs(out: Path) -> None:
    used = {0, voc.IGNORE_LABEL, *(voc.CLASS_NAMES.index(name) for name in tool.CLASSES)}
    modes, sizes = [], set()
    for image_id in read_list(out, "trainval"):
        image = Image.open(out / f"VOCdevkit/VOC2012/JPEGImages/{image_id}.jpg")
        mask = Image.open(out / f"VOCdevkit/VOC2012/SegmentationClass/{image_id}.png")
        assert (mask.mode, mask.size) == ("P", image.size)
        palette = mask.getpalette()
        assert palette is not None and palette[: 21 * 3] == voc.PALETTE[:21].ravel().tolist()
        assert set(np.unique(np.array(mask)).tolist()) <= used
        modes.append(image.mode)
        sizes.add(image.size)
    assert modes.count("L") == len(modes) // tool.GREY_EVERY and set(modes) == {"L", "RGB"}
    assert len(sizes) >= 5 and all(112 <= min(size) <= 160 for size in sizes)


def test_void_lies_between_any_two_labels(out: Path) -> None:
    for image_id in read_list(out, "trainval"):
        label = read_label(out, image_id)
        assert 0.005 < (label == voc.IGNORE_LABEL).mean() < 0.2
        for a, b in (
            (label[1:], label[:-1]),
            (label[:, 1:], label[:, :-1]),
            (label[1:, 1:], label[:-1, :-1]),
            (label[1:, :-1], label[:-1, 1:]),
        ):
            assert ((a == b) | (a == voc.IGNORE_LABEL) | (b == voc.IGNORE_LABEL)).all(), image_id


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_classes_take_turns_so_that_each_is_in_both_splits(out: Path, split: str) -> None:
    names = list(tool.CLASSES)
    for turn, image_id in enumerate(read_list(out, split)):
        label = voc.CLASS_NAMES.index(names[turn % len(names)])
        assert (read_label(out, image_id) == label).sum() >= 100, image_id


def test_a_rerun_with_the_same_arguments_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--out", tmp_path, "--num-train", 2, "--num-val", 1)
    assert run(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("marker", [None, b"\xff\xfe", b'{"seed": 0}\n'])
def test_a_folder_not_made_with_these_arguments_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], marker: bytes | None
) -> None:
    foreign = tmp_path / "VOCdevkit"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("keep")
    if marker is not None:
        (foreign / "sample.json").write_bytes(marker)
    before = read_tree(tmp_path)
    assert run("--out", tmp_path, "--num-train", 1, "--num-val", 1) == 2
    assert str(foreign) in capsys.readouterr().err
    assert read_tree(tmp_path) == before


def test_a_set_made_with_other_arguments_is_refused(tmp_path: Path) -> None:
    assert run("--out", tmp_path, "--num-train", 1, "--num-val", 1) == 0
    before = read_tree(tmp_path)
    assert run("--out", tmp_path, "--num-train", 1, "--num-val", 1, "--seed", 1) == 2
    assert read_tree(tmp_path) == before


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(label: np.ndarray, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(voc, "save_palette_png", fail)
    assert run("--out", tmp_path, "--num-train", 2, "--num-val", 1) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_vocdevkit_and_the_next_run_makes_it(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path), "--num-train", "300"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not list(tmp_path.glob(".VOCdevkit-*/VOCdevkit/VOC2012/SegmentationClass/*.png")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "VOCdevkit").exists()
    assert run("--out", tmp_path, "--num-train", 1, "--num-val", 1) == 0
    assert (tmp_path / "VOCdevkit" / "sample.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--out"),
        (("--out", "{tmp}", "--num-train", "0"), "--num-train 0"),
        (("--out", "{tmp}", "--num-val", "-3"), "--num-val -3"),
        (("--out", "{tmp}", "--num-val", "many"), "--num-val"),
        (("--out", "{tmp}", "--seed", "-1"), "--seed -1"),
        (("--out", "{tmp}/file/below"), "file/below"),
        (("--out", "{tmp}", "--colour"), "--colour"),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    stdout, stderr = capsys.readouterr()
    assert named in stderr and stderr.count("\n") == 1 and stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
