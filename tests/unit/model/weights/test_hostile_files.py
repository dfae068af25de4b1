"""Damaged, hostile and simply wrong files: one clear sentence, no other exception, no code run, no memory eaten."""

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import SCRATCH, Weights, load_weights
from dist_deeplab.model.weights.formats.numpy_pickle import read_pickle
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import CaffeNetBuilder, Kazuto, TorchvisionResNet, drsleep_variables

BLOCKS, WIDTH = (1, 1, 2, 1), 2
FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _torch_file(folder: Path) -> Path:
    torch.save(TorchvisionResNet(BLOCKS, WIDTH, with_fc=False).state_dict(), folder / "a.pth")
    return folder / "a.pth"


def _legacy_torch_file(folder: Path) -> Path:
    state = Kazuto(BLOCKS, WIDTH, 3).state_dict()
    torch.save(state, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


def _safetensors(folder: Path) -> Path:
    save_file(TorchvisionResNet(BLOCKS, WIDTH, with_fc=False).state_dict(), folder / "a.safetensors")
    return folder / "a.safetensors"


def _caffemodel(folder: Path) -> Path:
    layers = CaffeNetBuilder(BLOCKS, WIDTH, 3, seed=0).layers
    (folder / "a.caffemodel").write_bytes(writers.caffemodel(layers))
    return folder / "a.caffemodel"


def _npy(folder: Path) -> Path:
    np.save(folder / "a.npy", writers.kaffe_dictionary(drsleep_variables(BLOCKS, WIDTH, 3, seed=0)), allow_pickle=True)
    return folder / "a.npy"


def _bundle(folder: Path) -> Path:
    return writers.write_bundle(drsleep_variables(BLOCKS, WIDTH, 3, seed=0), folder / "a.ckpt")


def _v1(folder: Path) -> Path:
    return writers.write_v1(drsleep_variables(BLOCKS, WIDTH, 3, seed=0), folder / "a.ckpt")


WRITERS = [_torch_file, _legacy_torch_file, _safetensors, _caffemodel, _npy, _bundle, _v1]
each_format = pytest.mark.parametrize("write", WRITERS, ids=[write.__name__.strip("_") for write in WRITERS])


def _load_or_refuse(path: Path) -> Weights | None:
    """A file is read, or refused in one sentence that names it."""
    try:
        return load_weights(path)
    except UserError as error:
        assert path.parent.name in str(error)
        assert "\n" not in str(error)
        return None


@each_format
def test_the_unharmed_file_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert _load_or_refuse(write(tmp_path)) is not None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@each_format
def test_no_mutation_leads_to_another_error(
    tmp_path: Path, limited_memory: None, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()

    @FUZZ
    @given(data=st.data())
    def mutate(data: st.DataObject) -> None:
        content = bytearray(whole)
        # Structure lies at the beginning and, in tables and archives, at the end: mutate there more often.
        near = st.integers(0, 300) | st.integers(len(whole) - 300, len(whole) - 1) | st.integers(0, len(whole) - 1)
        for _ in range(data.draw(st.integers(1, 4))):
            at = min(data.draw(near), max(0, len(content) - 1))
            kind = data.draw(st.sampled_from(["flip", "set", "insert", "remove", "huge", "cut"]))
            if kind == "flip" and content:
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "set" and content:
                content[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            elif kind == "insert":
                content[at:at] = data.draw(st.binary(max_size=9))
            elif kind == "remove":
                del content[at : at + data.draw(st.integers(1, 9))]
            elif kind == "huge":
                content[at : at + 10] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
            else:
                del content[at:]
        path.write_bytes(content)
        _load_or_refuse(path)

    mutate()


@each_format
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.97, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, write: Callable[[Path], Path], share: float) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert _load_or_refuse(path) is None


def test_a_flipped_byte_in_tensorflows_data_is_noticed(tmp_path: Path) -> None:
    index = _bundle(tmp_path)
    data = index.with_name("a.ckpt.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt\.index can't be read .* its checksum in a\.ckpt\.data.* is wrong"):
        load_weights(index)
    data.unlink()
    with pytest.raises(UserError, match=r"its data file a\.ckpt\.data-00000-of-00001 is not beside the index"):
        load_weights(index)


def test_a_flipped_byte_in_a_checkpoint_with_its_sidecar_is_noticed(tmp_path: Path) -> None:
    path, state = tmp_path / "best.pt", TorchvisionResNet(BLOCKS, WIDTH, with_fc=False).state_dict()
    torch.save({"format": "dist_deeplab.checkpoint/1", "variant": SCRATCH.to_plain(), "model": state}, path)
    content = bytearray(path.read_bytes())
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({"sha256": "of the one before", "replaces": [hashlib.sha256(content).hexdigest()]}))
    assert load_weights(path).variant == SCRATCH
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"the checkpoint .*best\.pt is damaged"):
        load_weights(path)
    sidecar.unlink()
    assert load_weights(path).variant == SCRATCH  # copied without it: nothing to hold it against


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Google Drive - Virus scan warning", "is a web page, not weights"),
        (b"\n\n  <html lang='en'>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "is an archive"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 200, "is an archive"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b'model_checkpoint_path: "model.ckpt-20000"\n', "only names TensorFlow checkpoints"),
        (b'name: "deeplab"\nlayer {\n  name: "data"', "is a .prototxt"),
        (b"# VGG\n\nlayer {", "is a .prototxt"),
        (b"\x7fELF\x02\x01", "holds no weights: it is of an unknown kind; known: checkpoints and exports"),
        (b"just some text that says nothing", "holds no weights: it is text; known: checkpoints and exports"),
        (b"epoch 1\n" * 100, "holds no weights: it is text"),
        (pickle.dumps({"conv1": [1.0]}), "holds no weights: it is a pickle that torch.save did not write"),
        (b"\x80", "holds no weights: it is a pickle"),
        (b"PK\x03\x04" + bytes(400), "is the beginning of an archive"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), r"can't be read as a torch file \(it ends too early\)"),
        (b"\x0a\x03abc", "it has no layers"),
        (struct.pack("<Q", 2**40) + b"{" + b" " * 40, "safetensors"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
@pytest.mark.parametrize("name", ["resnet101.pth", "weights.npy"])
def test_wrong_files_are_called_what_they_are(tmp_path: Path, content: bytes, sentence: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_weights(tmp_path / name)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights file at .*absent\.pth"):
        load_weights(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is a folder, not weights; give a file"):
        load_weights(tmp_path)
    (tmp_path / "m.ckpt.meta").write_bytes(b"graph")
    with pytest.raises(UserError, match=r"put m\.ckpt\.index beside it"):
        load_weights(tmp_path / "m.ckpt.meta")


# --- archives ---------------------------------------------------------------------------------------------------------


def _archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    whole = zipfile.ZipFile(_torch_file(tmp_path))
    members = {name: whole.read(name) for name in whole.namelist()}
    path = _archive(tmp_path / "bomb.pth", members | {"a/data/99": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    with pytest.raises(UserError, match="unpacks to more than its own"):
        load_weights(path)


def test_members_that_share_their_bytes_are_not_read(tmp_path: Path) -> None:
    whole = zipfile.ZipFile(_torch_file(tmp_path))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
        largest = max(archive.filelist, key=lambda member: member.file_size)
        for number in range(100):
            again = copy.copy(largest)
            again.filename = f"a/data/{1000 + number}"
            archive.filelist.append(again)
    with pytest.raises(UserError, match="unpacks to more than its own"):
        load_weights(tmp_path / "bomb.pth")


def test_other_archives_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unpack it and give the file in it"):
        load_weights(_archive(tmp_path / "a.zip", {"train_iter_20000.caffemodel": b"12"}))
    np.savez(tmp_path / "a.npz", conv1=np.zeros(3))
    with pytest.raises(UserError, match="unpack it and give the file in it"):
        load_weights(tmp_path / "a.npz")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="TorchScript program; save the state dict"):
        load_weights(tmp_path / "script.pt")


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    state = TorchvisionResNet(BLOCKS, WIDTH, with_fc=False).state_dict()
    state["conv1.weight"] = torch.zeros(1).expand(10**6, 10**6, 7, 7)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"conv1\.weight in .*a\.pth is not a plain dense tensor"):
        load_weights(tmp_path / "a.pth")


# --- pickles ----------------------------------------------------------------------------------------------------------


class _Bomb:
    """Unpickles by calling a function."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


def _object_npy(content: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(content, dtype=object), allow_pickle=True)
    return file.getvalue()


def test_objects_of_other_types_in_a_checkpoint_are_named(tmp_path: Path) -> None:
    state = TorchvisionResNet(BLOCKS, WIDTH, with_fc=False).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"plain values \(argparse\.Namespace\).*save its state dict alone"):
        load_weights(tmp_path / "a.pth")


def test_code_in_an_npy_is_refused_and_not_run(tmp_path: Path) -> None:
    path, crater = tmp_path / "a.npy", tmp_path / "crater"
    path.write_bytes(_object_npy({"conv1": {"weights": _Bomb(crater)}}))
    with pytest.raises(UserError, match=r"wants posix\.mkdir to be called, which could be any code"):
        load_weights(path)
    assert not crater.exists()
    np.load(path, allow_pickle=True)
    assert crater.exists()  # the bomb was live


def test_a_pickles_claims_allocate_nothing(tmp_path: Path, limited_memory: None) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    huge_memo = b"\x80\x02}r\xff\xff\xff\x7f."  # LONG_BINPUT 2^31-1: the C unpickler allocates a table of that length
    huge_string = b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc."
    for content in (huge_memo, huge_string, b"\x80\x02" + b"(" * 10**5 + b"."):
        (tmp_path / "a.npy").write_bytes(header.getvalue() + content)
        assert _load_or_refuse(tmp_path / "a.npy") is None


@pytest.mark.parametrize("content", [[1, 2], {}, {"conv1": 3}, {1: {}}, "text", None, {"conv1": {"weights": [1.0]}}])
def test_an_npy_that_is_not_a_network_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a.npy").write_bytes(_object_npy(content))
    assert _load_or_refuse(tmp_path / "a.npy") is None


def test_an_npy_of_one_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"holds one array of shape \[3, 4\], not a dictionary of layers"):
        load_weights(tmp_path / "a.npy")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_protocol_and_order_are_read(tmp_path: Path, protocol: int, order: Any) -> None:
    variables = drsleep_variables(BLOCKS, WIDTH, 3, seed=0)
    layers = writers.kaffe_dictionary({k: np.array(v, dtype=">f4", order=order) for k, v in variables.items()})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    outer = np.array(layers, dtype=object)
    (tmp_path / "a.npy").write_bytes(header.getvalue() + pickle.dumps(outer, protocol=protocol))
    tensors = load_weights(tmp_path / "a.npy").tensors
    expected = torch.from_numpy(variables["conv1/weights"].transpose(3, 2, 0, 1).copy())
    assert torch.equal(tensors["backbone.conv1.weight"], expected)


def test_a_pickle_of_python_2_is_read() -> None:
    """Written by hand as numpy 1.x wrote under Python 2: byte strings for bytes, and module names of that time."""
    values = np.array([1.5, -2.0], dtype="<f4")
    data = (
        b"\x80\x02}q\x00U\x05conv1q\x01}q\x02U\x06biasesq\x03cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\n"
        b"q\x05K\x00\x85q\x06U\x01bq\x07\x87q\x08Rq\t(K\x01K\x02\x85q\ncnumpy\ndtype\nq\x0bU\x02f4q\x0cK\x00K\x01\x87q\rRq"
        b"\x0e(K\x03U\x01<q\x0fNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x10b\x89U\x08"
        + values.tobytes()
        + b"q\x11tq"
        b"\x12bss."
    )
    assert pickle.loads(data, encoding="latin1")["conv1"]["biases"].tolist() == values.tolist()
    assert read_pickle(data)["conv1"]["biases"].to_numpy().tolist() == values.tolist()
