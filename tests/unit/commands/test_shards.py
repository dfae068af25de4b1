"""The command packs VOC folders and list files, and says in one sentence what is wrong with its arguments or data."""

import errno
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.commands import shards as tool
from dist_deeplab.commands.packing import look, masks, pack
from dist_deeplab.data import voc
from dist_deeplab.data.packing import writer
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from tests.commands import exit_code

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "dist_deeplab", "shards"]


run = partial(exit_code, tool.main)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one sentence that the tool ends with."""
    assert run(*arguments) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.fixture
def own_voc(voc_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(voc_root, tmp_path / "voc")


# --- packing ----------------------------------------------------------------------------------------------------------


def test_the_command_packs_a_voc_split_and_says_what_it_holds(voc_root: Path, tmp_path: Path) -> None:
    arguments = ["--voc-root", str(voc_root), "--split", "val", "--out", str(tmp_path), "--samples-per-shard", "2"]
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = load_manifest(tmp_path / "val.json")
    assert (manifest.num_samples, len(manifest.shards)) == (5, 3)
    words = " ".join(done.stdout.split())
    assert "5 samples" in words
    share = manifest.class_pixels[0] / sum(manifest.class_pixels)
    assert f"{share:.2%}" in words
    assert all(name in words for name in voc.CLASS_NAMES)


def test_a_set_from_a_list_file_equals_the_one_from_voc_folders(
    voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (voc_root / "ImageSets/Segmentation/train.txt").read_text().split()
    listing = tmp_path / "train.txt"
    listing.write_bytes("".join(f"/JPEGImages/{k}.jpg /SegmentationClass/{k}.png\r\n" for k in keys).encode())
    same = ("--split", "train", "--samples-per-shard", 3)
    assert run("--voc-root", voc_root, "--out", tmp_path / "a", *same) == 0
    assert run("--list", listing, "--data-root", voc_root, "--out", tmp_path / "b", *same) == 0
    assert capsys.readouterr().err == "", "no progress bar where nobody looks"
    for name in ("train.json", "train.index.npy", "train-000000.tar", "train-000001.tar", "train-000002.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_classes_of_ones_own_are_read_from_a_file(voc_root: Path, tmp_path: Path) -> None:
    for key, label in (("one", [[0, 1], [2, 9]]), ("two", [[2, 2], [2, 9]])):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{key}.jpg")
        Image.fromarray(np.array(label, np.uint8)).save(tmp_path / f"{key}.png")
    (tmp_path / "list.txt").write_text("one.jpg one.png\ntwo.jpg two.png\n")
    (tmp_path / "names.txt").write_bytes("background\r\n\r\n  straße \r\nroad sign\r\n".encode())
    assert (
        run(
            *("--list", tmp_path / "list.txt", "--data-root", tmp_path, "--split", "mine", "--out", tmp_path / "out"),
            *("--class-names", tmp_path / "names.txt", "--ignore-label", 9),
        )
        == 0
    )
    manifest = load_manifest(tmp_path / "out/mine.json")
    assert manifest.class_names == ("background", "straße", "road sign")
    assert (manifest.num_classes, manifest.ignore_label, manifest.class_pixels) == (3, 9, (1, 1, 4))
    assert [ShardReader(manifest).key(index) for index in range(2)] == ["one", "two"]


def test_a_set_is_replaced_with_overwrite_only(
    voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--voc-root", voc_root, "--split", "val", "--out", tmp_path)
    assert run(*arguments) == 0
    capsys.readouterr()
    assert "--overwrite" in refusal(capsys, *arguments)
    assert run(*arguments, "--overwrite") == 0


def test_every_command_in_the_manual_is_accepted() -> None:
    assert tool.__doc__ is not None
    manual = tool.__doc__.replace("\\\n", " ")
    commands = re.findall(r"dist-deeplab shards (.*)", manual)
    assert len(commands) == 11
    for command in commands:
        arguments = shlex.split(command)
        part = {"masks": masks}.get(arguments[0], look if arguments[0] in look.COMMANDS else pack)
        part.parse_arguments(arguments, manual="")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--split train --out x",
        "--voc-root a --list b --split train --out x",
        "--voc-root a --out x",
        "--voc-root a --split train",
        "--voc-root a --split sub/train --out x",
        "--voc-root a --split '' --out x",
        "--voc-root a --split 50% --out x",
        "--voc-root a --split .. --out x",
        "--voc-root a --split train --out x --samples-per-shard 0",
        "--voc-root a --split train --out x --samples-per-shard many",
        "--voc-root a --split train --out x --ignore-label 256",
        "--voc-root a --split train --out x --ignore-label -1",
        "--voc-root a --split train --out x --unknown",
        "--voc-root a --split train --out x --mask-suffix _L",
        "--list a --split train --out x --image-suffix _L",
        "--tree a --split train --out x --voc-masks SegmentationClassAug",
        "--images a --masks b --split train --out x --data-root c",
    ],
)
def test_wrong_arguments_end_with_2_and_a_sentence(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*shlex.split(arguments)) == 2
    assert " shards: error: " in capsys.readouterr().err


def test_a_missing_folder_list_or_names_file_ends_with_2_and_its_name(
    voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, same = tmp_path / "absent", ("--split", "nosuch", "--out", tmp_path / "out")
    assert str(absent) in refusal(capsys, "--voc-root", absent, *same)
    assert "nosuch.txt; lists there: train, val" in refusal(capsys, "--voc-root", voc_root, *same)
    assert str(absent) in refusal(capsys, "--list", absent, *same)
    same = ("--split", "val", "--out", tmp_path / "out")
    assert str(absent) in refusal(capsys, "--voc-root", voc_root, "--class-names", absent, *same)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"background\n",
        b"background\ncat\ncat\n",
        b"\xff\xfe\x00",
        b"".join(b"class %d\n" % number for number in range(256)),
        b"".join(b"class %d\n" % number for number in range(300)),
    ],
    ids=["none", "one", "twice", "no text", "256", "300"],
)
def test_class_names_that_can_not_be_are_refused(
    content: bytes, voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(content)
    arguments = ("--voc-root", voc_root, "--split", "val", "--out", tmp_path / "out", "--class-names", names)
    assert str(names) in refusal(capsys, *arguments)
    assert not (tmp_path / "out" / "val.json").exists()


def test_a_colour_mask_ends_with_2_its_name_and_no_set(
    own_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = own_voc / "SegmentationClass/2007_000003.png"
    Image.open(mask).convert("RGB").save(mask)
    message = refusal(capsys, "--voc-root", own_voc, "--split", "val", "--out", tmp_path / "out")
    assert str(mask) in message
    assert "in colour" in message
    assert not (tmp_path / "out").exists()


def test_an_empty_list_ends_with_2(own_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_voc / "ImageSets/Segmentation/none.txt").write_text("\n\n")
    assert "names no samples" in refusal(capsys, "--voc-root", own_voc, "--split", "none", "--out", tmp_path / "out")


@pytest.mark.parametrize("filename", [None, "out/x.tar"])
def test_a_full_disk_ends_with_1_and_a_sentence(
    filename: str | None,
    voc_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failed `open` knows the file's name, a failed `write` does not."""

    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    monkeypatch.setattr(writer, "build_index", no_space)
    message = refusal(capsys, "--voc-root", voc_root, "--split", "val", "--out", tmp_path, code=1)
    assert "No space left on device" in message
    assert (filename or str(tmp_path)) in message
    assert "None" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_file_is_named(voc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.write_text("something else")
    message = refusal(capsys, "--voc-root", voc_root, "--split", "val", "--out", out)
    assert f"cannot write to the folder {out}: it is a file; choose another --out" in message
    assert out.read_text() == "something else"
