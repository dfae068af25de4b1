"""Readers of data sets and configurations that somebody else may have made."""

import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dist_deeplab.config.loading import load_config
from dist_deeplab.data.decode import decode_image, decode_label, decode_packed, encode_label
from dist_deeplab.data.image_file import DecodeOptions
from dist_deeplab.data.packing.label_map import LabelMap, read_label_map
from dist_deeplab.data.packing.labels import decode_mask, read_class_names
from dist_deeplab.data.packing.lists import read_pair_list
from dist_deeplab.data.repeat import repeat_factors
from dist_deeplab.data.shards.index import build_index
from dist_deeplab.data.shards.keys import keys_digest
from dist_deeplab.data.shards.manifest import FORMAT, load_manifest
from dist_deeplab.data.shards.presence import read_presence
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.files import sha256
from tests.fuzz.targets_weights import scratch


def _file(name: str, data: bytes) -> Path:
    path = scratch()[0] / name
    path.write_bytes(data)
    return path


def _encoded(form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.arange(17 * 11 * 3, dtype=np.uint8).reshape(11, 17, 3)).convert(mode)
    image.save(file, form)
    return file.getvalue()


SMALL = DecodeOptions(max_pixels=2**22)  # a file of 100 bytes may be an image of many pixels, decoded for a minute
LABEL = encode_label(np.arange(12, dtype=np.uint8).reshape(3, 4))

# --- shards -----------------------------------------------------------------------------------------------------------


@functools.cache
def _shards() -> tuple[bytes, bytes, bytes]:
    """A tar of two samples, its index and its manifest; the files stay in place."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in ("a", "b"):
            for name, content in ((f"{key}.jpg", _encoded("JPEG")), (f"{key}.png", LABEL)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shard = _file("train-000000.tar", file.getvalue())
    index_file = scratch()[0] / "train.index.npy"
    indexed = build_index([shard], index_file)
    assert indexed == ([2], keys_digest(["a", "b"]))
    manifest = {
        "format": FORMAT,
        **{"split": "train", "num_samples": 2, "num_classes": 12, "ignore_label": 255},
        "class_names": [f"class{i}" for i in range(12)],
        **{"class_pixels": [2] * 12, "keys_sha256": indexed.keys_sha256},
        **{"index": index_file.name, "index_sha256": sha256(index_file)},
        "shards": [{"name": shard.name, "num_samples": 2, "size_bytes": shard.stat().st_size, "sha256": sha256(shard)}],
    }
    return file.getvalue(), index_file.read_bytes(), json.dumps(manifest).encode()


def _read_all(manifest: Path) -> None:
    reader = ShardReader(load_manifest(manifest))
    for number in range(min(len(reader), 10)):
        reader.read(number)


def fuzz_manifest(data: bytes) -> None:
    _shards()
    _read_all(_file("train.json", data))


def seeds_manifest() -> list[bytes]:
    return [_shards()[2]]


def fuzz_index(data: bytes) -> None:
    _, index, manifest = _shards()
    try:
        (scratch()[0] / "train.index.npy").unlink()  # an earlier input's may still be mapped
        _file("train.index.npy", data)
        _read_all(_file("train.json", manifest))
    finally:
        (scratch()[0] / "train.index.npy").unlink()
        _file("train.index.npy", index)


def seeds_index() -> list[bytes]:
    return [_shards()[1]]


def fuzz_classes(data: bytes) -> None:
    """Which classes each sample contains, with a manifest that has the digest of whatever this is."""
    manifest = _file("train.json", _shards()[2])
    content = {"classes": "train.classes.npy", "classes_sha256": sha256(_file("train.classes.npy", data))}
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | content))
    repeat_factors(read_presence(load_manifest(manifest)), num_classes=12, threshold=0.5)


def seeds_classes() -> list[bytes]:
    file = io.BytesIO()
    np.save(file, np.array([[1, 8], [3, 0]], np.uint8))
    return [file.getvalue()]


def fuzz_tar(data: bytes) -> None:
    build_index([_file("imported.tar", data)], scratch()[0] / "imported.index.npy")


def seeds_tar() -> list[bytes]:
    return [_shards()[0]]


# --- images and masks -------------------------------------------------------------------------------------------------


def fuzz_image(data: bytes) -> None:
    decode_packed(data)


def seeds_image() -> list[bytes]:
    return [_encoded("JPEG"), _encoded("PNG")]


def fuzz_label(data: bytes) -> None:
    decode_label(data)


def seeds_label() -> list[bytes]:
    return [LABEL, _encoded("PNG", "P")]


def fuzz_mask(data: bytes) -> None:
    decode_mask(data, None, SMALL)


def seeds_mask() -> list[bytes]:
    return [LABEL, _encoded("PNG", "P"), _encoded("GIF", "P"), _encoded("BMP", "L"), _encoded("TIFF", "L")]


def fuzz_mask_of_colours(data: bytes) -> None:
    decode_mask(data, LabelMap(Path("map.txt"), {(i, i + 1, i + 2): i % 3 for i in range(0, 254, 3)}), SMALL)


def seeds_mask_of_colours() -> list[bytes]:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (0, 1, 2)).save(file, "PNG")
    return [file.getvalue()]


def fuzz_predicted_image(data: bytes) -> None:
    decode_image(data, SMALL)


def seeds_predicted_image() -> list[bytes]:
    return [_encoded("JPEG"), _encoded("PNG", "RGBA"), _encoded("WEBP"), _encoded("PNG", "I;16")]


# --- texts ------------------------------------------------------------------------------------------------------------


def fuzz_label_map(data: bytes) -> None:
    read_label_map(_file("map.txt", data), class_names=None, ignore_label=255)


def seeds_label_map() -> list[bytes]:
    return [
        b"# CVAT\nbackground:0,0,0::\na car:128,0,0:parts:actions\n",
        b"# colours\n0 0 0 background\n128,0,0 a plane\n255 255 255 void\n",
        b"0 road\n1: car\n",
    ]


def fuzz_class_names(data: bytes) -> None:
    read_class_names(_file("names.txt", data))


def seeds_class_names() -> list[bytes]:
    return [b"background\ncar\n\nperson\n"]


def fuzz_pair_list(data: bytes) -> None:
    read_pair_list(scratch()[0], _file("train.txt", data))


def seeds_pair_list() -> list[bytes]:
    return [b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n\nb.jpg b.png\r\n"]


def fuzz_config(data: bytes) -> None:
    load_config(_file("config.yaml", data))


def seeds_config() -> list[bytes]:
    return [b"max_steps: 10\ndata: {scale_range: [0.5, 1.5], crop_size: 65}\nmodel:\n  backbone: resnet_tiny\n"]
