"""One command from archives to shards: from a server, over breaks, damage and kills, as from files."""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dist_deeplab.commands import prepare_voc as tool
from dist_deeplab.data import voc
from dist_deeplab.data.decode import decode_label
from dist_deeplab.data.packing import voc_download
from dist_deeplab.data.shards.manifest import ShardError, load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.downloads import fetching
from tests.file_server import FileServer, serve

TRAIN, VAL = ["2007_000001", "2007_000002"], ["2007_000003"]
SBD_TRAIN, SBD_VAL = ["2008_000001", "2007_000003", "2007_000002"], ["2008_000002", "2007_000001"]
TRAIN_AUG = ["2007_000001", "2007_000002", "2008_000001", "2008_000002"]
SIZE = (24, 31)


def label_of(key: str, kind: str) -> np.ndarray:
    rng = np.random.default_rng(int(key.replace("_", "")) + (kind == "sbd"))
    label = rng.integers(0, 21, SIZE, dtype=np.uint8)
    if kind == "voc":
        label[:3] = 255
    return label


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archives of the official names and structure."""
    folder = tmp_path_factory.mktemp("archives")
    root = folder / "VOCdevkit" / "VOC2012"
    lists = {"train": TRAIN, "val": VAL, "trainval": TRAIN + VAL}
    for name, keys in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{key}\n" for key in keys))
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    (root / "Annotations").mkdir()
    (root / "Annotations" / "2007_000001.xml").write_text("<xml/>")
    for key in sorted({*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL}):
        Image.fromarray(np.full((*SIZE, 3), 70, np.uint8)).save(root / "JPEGImages" / f"{key}.jpg")
    for key in TRAIN + VAL:
        voc.save_palette_png(label_of(key, "voc"), root / "SegmentationClass" / f"{key}.png")
    sbd = folder / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    for name, keys in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        (sbd / f"{name}.txt").write_text("".join(f"{key}\n" for key in keys))
        for key in keys:
            content = {"Segmentation": label_of(key, "sbd"), "Boundaries": np.zeros(3), "CategoriesPresent": [1]}
            savemat(sbd / "cls" / f"{key}.mat", {"GTcls": content}, do_compression=True)
    with tarfile.open(folder / "VOCtrainval_11-May-2012.tar", "w") as tar:
        tar.add(folder / "VOCdevkit", "VOCdevkit")
    with tarfile.open(folder / "benchmark.tgz", "w:gz") as tar:
        tar.add(folder / "benchmark_RELEASE", "benchmark_RELEASE")
    return folder


@pytest.fixture
def server(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.0)
    with serve(archives) as running:
        yield running


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def arguments(archives: Path, place: str, out: Path) -> list[str]:
    tar, tgz = archives / "VOCtrainval_11-May-2012.tar", archives / "benchmark.tgz"
    return [
        *("--out", str(out), "--workers", "1"),
        *("--voc-archive", f"{place}/{tar.name}", "--voc-md5", md5(tar)),
        *("--sbd-archive", f"{place}/{tgz.name}", "--sbd-md5", md5(tgz)),
    ]


def assert_complete(out: Path) -> None:
    expected = {"train": TRAIN, "val": VAL, "trainval": TRAIN + VAL, "train_aug": TRAIN_AUG}
    for split, keys in expected.items():
        reader = ShardReader(load_manifest(out / f"{split}.json"))
        samples = [reader.read(index) for index in range(len(reader))]
        assert [sample.key for sample in samples] == keys
        for sample in samples:
            kind = "voc" if sample.key in TRAIN + VAL else "sbd"
            assert (decode_label(sample.label) == label_of(sample.key, kind)).all(), "VOC's own mask where there is one"


def test_one_command_makes_all_sets_from_files(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(arguments(archives, str(archives), tmp_path / "voc")) == 0
    assert_complete(tmp_path / "voc")
    assert "data.train=" in capsys.readouterr().out
    assert not (tmp_path / "voc" / "archives").exists(), "files that are here are used where they are"
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "voc").rglob("*"))
    assert tool.main(arguments(archives, str(archives), tmp_path / "voc")) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "voc").rglob("*")) == before


def test_a_server_whose_connections_break_is_enough(archives: Path, server: FileServer, tmp_path: Path) -> None:
    server.cuts = [5000, 10_000, 100, 700]
    assert tool.main(arguments(archives, server.url, tmp_path)) == 0
    assert_complete(tmp_path)
    total = sum((archives / name).stat().st_size for name in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"))
    assert server.sent == total, "no byte twice"


def test_a_corrupted_download_is_refused_and_the_next_mirror_tried(
    archives: Path, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.corrupt = True
    assert tool.main(arguments(archives, server.url, tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: cannot get VOCtrainval_11-May-2012.tar: ")
    assert "MD5" in message
    assert not (tmp_path / "VOCdevkit").exists()
    with_mirror = [*arguments(archives, server.url, tmp_path), "--voc-archive", str(tmp_path / "absent.tar")]
    with serve(archives) as mirror:
        for name, file in (("voc", "VOCtrainval_11-May-2012.tar"), ("sbd", "benchmark.tgz")):
            with_mirror += [f"--{name}-archive", f"{mirror.url}/{file}"]
        assert tool.main(with_mirror) == 0
    assert_complete(tmp_path)


def test_the_official_archives_are_checked_by_digest(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VOC2012", "SBD"):
        offline = getattr(voc_download, name)
        monkeypatch.setattr(voc_download, name, voc_download.Archive(offline.name, (), offline.md5))
    path = archives / "VOCtrainval_11-May-2012.tar"
    assert tool.main(["--out", str(tmp_path), "--voc-archive", str(path)]) == 2
    assert "not 6cd6e144f989b92b3379bac3b3de84fd" in capsys.readouterr().err


def test_the_official_number_of_images_is_checked(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file in (("VOC2012", "VOCtrainval_11-May-2012.tar"), ("SBD", "benchmark.tgz")):
        as_official = voc_download.Archive(file, (str(archives / file),), "")
        monkeypatch.setattr(voc_download, name, as_official)
    assert tool.main(["--out", str(tmp_path), "--workers", "1"]) == 2
    assert "names 2 images, not 1,464" in capsys.readouterr().err


def test_without_sbd_there_are_the_sets_of_voc(archives: Path, tmp_path: Path) -> None:
    without_sbd = arguments(archives, str(archives), tmp_path)[:-4]
    assert tool.main([*without_sbd, "--voc-only"]) == 0
    assert not (tmp_path / "train_aug.json").exists()
    assert load_manifest(tmp_path / "trainval.json").num_samples == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--voc-only", "--sbd-archive", "x.tgz"], "--voc-only leaves SBD out"),
        (["--sbd-md5", "0" * 32], "name it by --sbd-archive"),
        (["--voc-md5", "0" * 32], "name it by --voc-archive"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_anything_is_fetched(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--out", str(tmp_path / "new"), *wrong]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_unpacking_that_was_killed_begins_again_and_damage_is_a_sentence(archives: Path, tmp_path: Path) -> None:
    folder = tmp_path / "VOC2012"
    (tmp_path / ".VOC2012.unfinished").mkdir()
    (tmp_path / ".VOC2012.unfinished" / "half").write_text("")
    archive = archives / "VOCtrainval_11-May-2012.tar"
    parts = voc_download.VOC_PARTS
    voc_download.unpack(archive, folder, inside="VOCdevkit/VOC2012", parts=parts)
    assert sorted(path.name for path in folder.iterdir()) == ["ImageSets", "JPEGImages", "SegmentationClass"]
    cut = tmp_path / "cut.tgz"
    content = (archives / "benchmark.tgz").read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    for bad, reason in ((cut, "can't be unpacked"), (archive, "is it the right archive")):
        with pytest.raises(ShardError, match=reason):
            voc_download.unpack(bad, tmp_path / "x", inside="benchmark_RELEASE/dataset", parts=voc_download.SBD_PARTS)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["../../escape", "VOCdevkit/VOC2012/JPEGImages/../../../../escape"])
def test_an_archive_can_not_write_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "x", name)
    with pytest.raises(ShardError):
        voc_download.unpack(
            tmp_path / "evil.tar", tmp_path / "a" / "b", inside="VOCdevkit/VOC2012", parts=voc_download.VOC_PARTS
        )
    assert not list(tmp_path.rglob("escape*"))


def test_a_damaged_label_of_sbd_is_named(tmp_path: Path) -> None:
    path = tmp_path / "k.mat"
    with pytest.raises(ShardError, match=r"k\.mat, which is not there"):
        voc_download.read_sbd_label(path)
    path.write_bytes(b"no mat file")
    with pytest.raises(ShardError, match=r"k\.mat can't be read"):
        voc_download.read_sbd_label(path)
    savemat(path, {"GTcls": {"Segmentation": np.full((2, 2), 99, np.uint8)}})
    with pytest.raises(ShardError, match="no class indices"):
        voc_download.read_sbd_label(path)
