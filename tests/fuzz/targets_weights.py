"""Readers of weights: one target per format, and one behind each checksum and archive that mutations rarely survive."""

import functools
import io
import itertools
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from dist_deeplab.model.weights import load_weights
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import (
    CaffeNetBuilder,
    Kazuto,
    TorchvisionResNet,
    drsleep_variables,
)

BLOCKS, WIDTH, CLASSES = (1, 1, 2, 1), 2, 3


@functools.cache
def scratch() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """A folder of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz_")
    return Path(folder.name), folder


def _load(name: str, data: bytes) -> None:
    path = scratch()[0] / name
    path.write_bytes(data)
    load_weights(path)


def _state(network: Callable[..., nn.Module], *arguments: object, **options: object) -> dict[str, torch.Tensor]:
    """The weights of a network, the same in each process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(*arguments, **options).state_dict()


def fuzz_weights_torch(data: bytes) -> None:
    _load("a.pth", data)


def seeds_weights_torch() -> list[bytes]:
    archive = io.BytesIO()
    torch.save(_state(TorchvisionResNet, BLOCKS, WIDTH, with_fc=False), archive)
    return [archive.getvalue(), _legacy(_state(Kazuto, BLOCKS, WIDTH, CLASSES))]


def _legacy(state: dict[str, torch.Tensor]) -> bytes:
    """A file as torch 1.5 wrote them. Storages are numbered, where it has their addresses: the same in each process."""
    numbers: dict[int, int] = {}
    address = torch.UntypedStorage._cdata
    number = property(lambda storage: numbers.setdefault(address.__get__(storage), len(numbers)))
    file = io.BytesIO()
    with mock.patch.object(torch.UntypedStorage, "_cdata", number):
        torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def fuzz_weights_torch_pickle(data: bytes) -> None:
    """The pickle in an archive, whose checksum is right."""
    with zipfile.ZipFile(scratch()[0] / "b.pth", "w") as archive:
        for name, content in {"a/data.pkl": data, "a/version": b"3", "a/byteorder": b"little"}.items():
            archive.writestr(name, content)
        for number in range(120):
            archive.writestr(f"a/data/{number}", bytes(1024))
    load_weights(scratch()[0] / "b.pth")


def seeds_weights_torch_pickle() -> list[bytes]:
    """Of a network all of whose storages have 1,024 bytes, as the archive has them."""
    state = _state(TorchvisionResNet, BLOCKS, WIDTH, with_fc=False)
    same = {}
    for name, tensor in state.items():
        shape = tensor.shape if tensor.numel() <= 256 else torch.Size([1])
        same[name] = torch.zeros(256)[: shape.numel()].view(shape)
    file = io.BytesIO()
    torch.save(same, file)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return [archive.read(name)]


def fuzz_weights_safetensors(data: bytes) -> None:
    _load("a.safetensors", data)


def seeds_weights_safetensors() -> list[bytes]:
    return [save(_state(TorchvisionResNet, BLOCKS, WIDTH, with_fc=False))]


def fuzz_weights_caffemodel(data: bytes) -> None:
    _load("a.caffemodel", data)


def seeds_weights_caffemodel() -> list[bytes]:
    layers = CaffeNetBuilder(BLOCKS, WIDTH, CLASSES, seed=0).layers
    return [writers.caffemodel(layers), writers.caffemodel(layers, v1=True, training_list="train_aug.txt")]


def fuzz_weights_npy(data: bytes) -> None:
    _load("a.npy", data)


def seeds_weights_npy() -> list[bytes]:
    layers = writers.kaffe_dictionary(drsleep_variables(BLOCKS, WIDTH, CLASSES, seed=0))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    return [header.getvalue() + pickle.dumps(np.array(layers, dtype=object), protocol=p) for p in (2, 4)]


def fuzz_weights_tensorflow_v1(data: bytes) -> None:
    _load("a.ckpt", data)


def seeds_weights_tensorflow_v1() -> list[bytes]:
    path = writers.write_v1(drsleep_variables(BLOCKS, WIDTH, CLASSES, seed=0), scratch()[0] / "seed.ckpt")
    return [path.read_bytes()]


def fuzz_weights_tensorflow_entries(data: bytes) -> None:
    """The entries of an index (or of a V1 checkpoint) in a table whose checksums are right."""
    file, entries = io.BytesIO(data), []
    while sizes := file.read(3):
        entries.append((file.read(sizes[0]), file.read(int.from_bytes(sizes[1:], "little"))))
    _bundle()
    _load("bundle.index", writers.table(entries))


def seeds_weights_tensorflow_entries() -> list[bytes]:
    bundle = _bundle()
    v1 = writers.write_v1(drsleep_variables(BLOCKS, WIDTH, CLASSES, seed=0), scratch()[0] / "seed.ckpt").read_bytes()
    return [b"".join(map(_entry, _entries(content))) for content in (bundle, v1)]


@functools.cache
def _bundle() -> bytes:
    """Index of a bundle; its data file stays in place."""
    return writers.write_bundle(drsleep_variables(BLOCKS, WIDTH, CLASSES, seed=0), scratch()[0] / "bundle").read_bytes()


def _entries(table: bytes) -> list[tuple[bytes, bytes]]:
    from dist_deeplab.model.weights.formats.sstable import read_table

    return [(key, bytes(value)) for key, value in itertools.islice(read_table(memoryview(table)), 10_000)]


def _entry(entry: tuple[bytes, bytes]) -> bytes:
    key, value = entry
    return bytes([len(key)]) + len(value).to_bytes(2, "little") + key + value
