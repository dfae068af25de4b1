"""The predict command: masks that are the network's, every kind of result, and manners with files."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_deeplab import predict as command
from dist_deeplab.data.voc import CLASS_NAMES, PALETTE
from dist_deeplab.evaluation.images import Source
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE
from tests.networks import checkpoint_of, discerning_network, write_checkpoint

SIZES = {"a": (40, 57), "b": (33, 41), "sub/c": (40, 57), "d": (70, 90)}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def net() -> DeepLabV2:
    return discerning_network(21)


@pytest.fixture(scope="module")
def checkpoint(net: DeepLabV2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "best.pt", checkpoint_of(net))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(checkpoint: Path, images: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        return command.main([str(checkpoint), str(images), "--out", str(tmp_path / "out"), *arguments])

    return run


def _expected(net: DeepLabV2, path: Path) -> np.ndarray:
    image = np.asarray(Image.open(path).convert("RGB"))
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -(height - 1) % 8), (0, -(width - 1) % 8), (0, 0)))
    tensor = torch.from_numpy(padded).permute(2, 0, 1)[None]
    logits = Predictor(net, CAFFE).logits(tensor, torch.tensor([[height, width]]))
    return logits[0, :, :height, :width].softmax(0).numpy()


def test_masks_are_the_networks_classes_with_vocs_palette(
    run: Callable[..., int], net: DeepLabV2, images: Path, tmp_path: Path
) -> None:
    assert run("--overlay", "--side-by-side", "--probabilities") == 0
    for name, (height, width) in SIZES.items():
        prob = _expected(net, images / f"{name}.png")
        with Image.open(tmp_path / "out" / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.getpalette() == PALETTE.ravel().tolist()
            pred = np.asarray(mask)
        np.testing.assert_array_equal(pred, prob.argmax(0))
        assert len(np.unique(pred)) > 1
        saved = np.load(tmp_path / "out" / "probabilities" / f"{name}.npz")
        np.testing.assert_allclose(saved["prob"], prob, atol=1e-3)
        assert saved["class_names"].tolist() == list(CLASS_NAMES)
        overlay = np.asarray(Image.open(tmp_path / "out" / "overlay" / f"{name}.jpg"))
        assert overlay.shape == (height, width, 3)
        side_by_side = Image.open(tmp_path / "out" / "side_by_side" / f"{name}.jpg").width
        assert side_by_side == 3 * width + 12 or (side_by_side > 3 * width + 12 and width < 60)  # as wide as a name is
    assert not list((tmp_path / "out").rglob(".*"))


def test_large_images_go_in_windows(run: Callable[..., int], net: DeepLabV2, images: Path, tmp_path: Path) -> None:
    assert run("--window", "65", "--overlap", "40") == 0
    whole = _expected(net, images / "d.png").argmax(0)
    blended = np.asarray(Image.open(tmp_path / "out" / "d.png"))
    assert blended.shape == whole.shape
    assert (blended == whole).mean() > 0.5  # another context, but no other image
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out" / "a.png")), _expected(net, images / "a.png").argmax(0)
    )


def test_unreadable_files_are_listed_at_the_end_and_stop_nothing(
    run: Callable[..., int], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "b2.png").write_bytes((images / "b.png").read_bytes()[:-30])
    assert run() == 1
    assert {path.stem for path in (tmp_path / "out").rglob("*.png")} == {"a", "b", "c", "d"}
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert [Path(line.split()[0]).name.rstrip(":") for line in listed] == ["b2.png", "broken.jpg"]
    assert "2 of 6 files could not be read" in capsys.readouterr().out


def test_nothing_is_overwritten_unless_told(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    mask = tmp_path / "out" / "a.png"
    mask.write_bytes(b"mine")
    (tmp_path / "out" / "b.png").unlink()
    assert run() == 2
    assert "--overwrite replaces them, --skip-existing" in capsys.readouterr().err
    assert not (tmp_path / "out" / "b.png").exists()
    assert run("--skip-existing") == 0
    assert mask.read_bytes() == b"mine"
    assert (tmp_path / "out" / "b.png").exists()
    assert run("--overwrite") == 0
    assert mask.read_bytes() != b"mine"


def test_a_submission_is_the_tree_and_the_tar_that_pascal_takes(
    run: Callable[..., int], images: Path, tmp_path: Path
) -> None:
    (tmp_path / "test.txt").write_text("a\nd\n")
    assert run("--voc-submission", "comp6", "--list", str(tmp_path / "test.txt")) == 0
    with tarfile.open(tmp_path / "out" / "results.tar") as tar:
        names = tar.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/{key}.png" for key in ("a", "d")]
        member = tar.extractfile(names[0])
        assert member is not None
        assert Image.open(member).mode == "P"


def test_a_list_names_images_with_spaces_and_may_have_a_second_column(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffmy photo\nd 1\n", encoding="utf-8")
    sources = [Source(tmp_path, name) for name in ("d", "my", "my photo", "x")]
    assert [source.name for source in command.listed(sources, tmp_path / "list.txt")] == ["d", "my photo"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["optim.lr=1"], "no meaning here"),
        (["--list", "nowhere.txt"], "cannot read the list nowhere.txt: No such file or directory; give a text"),
        (["--list", "/dev/null"], "the list /dev/null holds no name"),
        (["--out", f"{__file__}/out"], "test_predict.py/out: Not a directory; choose another --out"),
        (["eval.scale=[1.0]"], "did you mean 'eval.scales'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    run: Callable[..., int], arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_replacing_results_and_leaving_them_alone_are_not_combined(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--overwrite", "--skip-existing")
    assert stop.value.code == 2
    assert "are opposites" in capsys.readouterr().err


def test_several_scales_and_flipping_apply_here_too(run: Callable[..., int], tmp_path: Path) -> None:
    assert run() == 0
    plain = np.asarray(Image.open(tmp_path / "out" / "d.png"))
    assert run("--overwrite", "eval.scales=[0.5,1.0]", "eval.flip=true") == 0
    assert (np.asarray(Image.open(tmp_path / "out" / "d.png")) != plain).any()
