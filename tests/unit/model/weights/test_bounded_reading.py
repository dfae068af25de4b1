"""Files that would take far more time or memory than their size suggests: each is refused in one sentence.

A quadratic reader would need hours for what is here, and so runs into the time limit of the tests.
"""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dist_deeplab.checkpointing.file import load_content, write_sidecar
from dist_deeplab.errors import UserError
from dist_deeplab.files import sha256
from dist_deeplab.model.weights import load_weights
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import CaffeNetBuilder, drsleep_variables

BLOCKS, WIDTH = (1, 1, 2, 1), 2

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("limited_memory")]

# --- torch.save -------------------------------------------------------------------------------------------------------

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
"""The persistent name of a storage of 4 numbers, looked up."""


def _archive(path: Path, content: bytes, *, first: dict[str, bytes] | None = None) -> Path:
    members = {"a/data.pkl": content, "a/version": b"3", "a/byteorder": b"little", "a/data/0": bytes(16)}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in ((first or {}) | members).items():
            archive.writestr(member, data)
    return path


def _tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    """A pickle of one tensor in `STORAGE`."""
    arguments = b"(" + STORAGE + offset + size + stride + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


HOSTILE_PICKLES = {
    "a call of bytearray": (b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.", r"\(builtins\.bytearray\)"),
    "a call of Tensor": (b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x40\x85R.", r"\(torch\.FloatTensor\)"),
    "a key that overflows the stack": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "keys that are neither"),
    "a key that takes exponential time": (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "keys that are neither"),
    "such a key by OrderedDict": (
        b"\x80\x02ccollections\nOrderedDict\n])" + b"q\x00h\x00\x86" * 60 + b"K\x01\x86a\x85R.",
        "keys that are neither",
    ),
    "such an item of a set": (
        b"\x80\x02cbuiltins\nset\n])" + b"q\x00h\x00\x86" * 60 + b"a\x85R.",
        "keys that are neither",
    ),
    "a text encoded many times": (
        b"\x80\x02]X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x00("
        b"c_codecs\nencode\nq\x01" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 3_000 + b"e.",
        "makes more bytes than it has",
    ),
    "millions of empty lists": (b"\x80\x02" + b"]" * 600_000 + b".", "more instructions"),
    "a tensor behind its storage": (
        _tensor(b"K\x01", b"K\x04\x85", b"K\x01\x85"),
        r"a tensor of shape \[4\] is larger",
    ),
    "a tensor of 2^31 numbers": (
        _tensor(b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x01\x85"),
        r"a tensor of shape \[2147483647\] is larger",
    ),
    "a storage larger than the file": (
        _tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85").replace(b"cpuK\x04", b"cpuJ\xff\xff\xff\x7f"),
        "its storages are larger than the file",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), HOSTILE_PICKLES.values(), ids=HOSTILE_PICKLES)
def test_a_file_of_torch_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_weights(_archive(tmp_path / "a.pth", content))
    with pytest.raises(UserError, match=sentence):
        # Where a name fits but for its case, torch may take that member.
        load_weights(_archive(tmp_path / "a.pth", b"\x80\x02}.", first={"a/DATA.PKL": content}))
    legacy = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    legacy_content = content.replace(b"K\x04tQ", b"K\x04NtQ").replace(b"\x7ftQ", b"\x7fNtQ")
    (tmp_path / "a.pth").write_bytes(legacy + legacy_content + bytes(100))
    with pytest.raises(UserError, match=sentence):
        load_weights(tmp_path / "a.pth")


def test_the_tensor_of_these_tests_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no known family; its names begin with w;"):
        load_weights(_archive(tmp_path / "a.pth", _tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85")))


def test_a_checkpoint_is_held_to_the_same_limits(tmp_path: Path) -> None:
    path = _archive(tmp_path / "best.pt", HOSTILE_PICKLES["a key that overflows the stack"][0])
    write_sidecar(path, path, step=1, digest=sha256(path))
    with pytest.raises(UserError, match=r"best\.pt can't be read as a checkpoint: its pickle has a dictionary"):
        load_content(path)


def test_a_name_that_takes_quadratic_time_is_refused(tmp_path: Path) -> None:
    name = b"layer1." * 100_000 + b"\n"
    content = _tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85")
    content = content.replace(b"X\x01\x00\x00\x00w", b"X" + struct.pack("<I", len(name)) + name)
    with pytest.raises(UserError, match="a tensor's name has over 512 characters"):
        load_weights(_archive(tmp_path / "a.pth", content))


# --- kaffe ------------------------------------------------------------------------------------------------------------


def _npy(path: Path, content: bytes) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(header.getvalue() + content)
    return path


def test_arrays_of_kaffe_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    shared = np.zeros(2**18, dtype=np.float32)
    content = pickle.dumps({f"conv{i}": {"weights": shared} for i in range(1_000)}, protocol=4)
    with pytest.raises(UserError, match=r"the arrays in .*a\.npy share their bytes"):
        load_weights(_npy(tmp_path / "a.npy", content))


@pytest.mark.parametrize("case", ["a key that takes exponential time", "a text encoded many times"])
def test_a_pickle_of_kaffe_is_refused(tmp_path: Path, case: str) -> None:
    content, sentence = HOSTILE_PICKLES[case]
    with pytest.raises(UserError, match=sentence):
        load_weights(_npy(tmp_path / "a.npy", content))


# --- Caffe ------------------------------------------------------------------------------------------------------------


def _caffemodel(path: Path, *layers: bytes) -> Path:
    path.write_bytes(writers.text(1, "net") + b"".join(writers.chunk(100, layer) for layer in layers))
    return path


def test_a_blob_with_a_million_axes_is_refused(tmp_path: Path) -> None:
    shape = writers.chunk(7, writers.chunk(1, writers.varint(2**62) * 1_000_000))
    with pytest.raises(UserError, match=r"a blob of shape \[4611686018427387904, .*\] has 0 values"):
        load_weights(_caffemodel(tmp_path / "a.caffemodel", writers.text(1, "conv1") + writers.chunk(7, shape)))


def test_a_million_empty_layers_or_blobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds 1,000,000 messages where at most 20,000"):
        load_weights(_caffemodel(tmp_path / "a.caffemodel", *[b""] * 1_000_000))
    with pytest.raises(UserError, match="it holds 1,000,000 messages where at most 16"):
        load_weights(_caffemodel(tmp_path / "a.caffemodel", writers.chunk(7, b"") * 1_000_000))


def test_a_layers_name_that_takes_quadratic_time_is_refused(tmp_path: Path) -> None:
    layer = writers.text(1, "_res05" * 200_000 + "\n") + writers.chunk(7, writers.blob(np.zeros(1), old=False))
    with pytest.raises(UserError, match="a layer's name is not text of at most 256 characters"):
        load_weights(_caffemodel(tmp_path / "a.caffemodel", layer))


def test_a_packed_size_per_byte_is_read_in_linear_time(tmp_path: Path) -> None:
    layers = CaffeNetBuilder(BLOCKS, WIDTH, 3, seed=0).layers
    first = next(layer for layer in layers if layer.name == "conv1")
    strides = writers.caffe_layer(first, v1=False) + writers.chunk(106, writers.integer(6, 1) * 1_000_000)
    with pytest.raises(UserError, match=r"unlike axes \(stride \[1, 2\]\)"):
        load_weights(_caffemodel(tmp_path / "a.caffemodel", strides))


# --- TensorFlow -------------------------------------------------------------------------------------------------------


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    index = writers.write_bundle(drsleep_variables(BLOCKS, WIDTH, 3, seed=0), tmp_path / "a.ckpt")
    data = index.with_name("a.ckpt.data-00000-of-00001")
    size = data.stat().st_size // 4
    entry = writers.integer(1, 1) + writers.chunk(2, writers.tensor_shape((size,))) + writers.integer(5, 4 * size)
    entry += writers.varint(6 << 3 | 5) + struct.pack("<I", writers.masked(writers.crc32c(data.read_bytes())))
    header = (b"", writers.integer(1, 1))
    index.write_bytes(writers.table([header, *((f"conv{i:02d}/weights".encode(), entry) for i in range(2))]))
    with pytest.raises(UserError, match=r"its tensors are larger than a\.ckpt\.data-00000-of-00001"):
        load_weights(index)


def test_keys_that_share_their_beginning_are_limited(tmp_path: Path) -> None:
    long = [(b"", writers.integer(1, 1)), (b"k" * 1_000, b"")]
    (tmp_path / "a.index").write_bytes(writers.table(long))
    with pytest.raises(UserError, match="an entry of a block lies outside of it"):
        load_weights(tmp_path / "a.index")
    many = [(b"", writers.integer(1, 1)), *((b"k" * 50, b"") for _ in range(20_001))]
    (tmp_path / "a.index").write_bytes(writers.table(many, per_block=10**6, restart_every=10**6))
    with pytest.raises(UserError, match="it has over 20,000 entries"):
        load_weights(tmp_path / "a.index")
