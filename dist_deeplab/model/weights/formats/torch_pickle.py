"""The pickles in a file of torch.save, checked before torch reads them.

`torch.load(weights_only=True)` runs no code, but bounds neither time nor memory: in torch 2.13, 60 bytes that call
`bytearray` take a GiB, and nested tuples as keys take exponential time or overflow the C stack. So each file is first
read with stand-ins for tensors; what passes is plain data and tensors within their storages.
"""

import os
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

from dist_deeplab.model.weights.formats.plain_pickle import PlainUnpickler, StandIn, require_plain_keys
from dist_deeplab.model.weights.variant import Damaged

_MAX_INSTRUCTIONS = 500_000  # a checkpoint of ResNet-101 has some 40,000
_MAX_PICKLE_BYTES = 2**28
_TYPES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat QInt8 QInt32 QUInt8"
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
_REBUILDERS = "_rebuild_tensor _rebuild_tensor_v2"
_OTHER_REBUILDERS = (
    "_rebuild_parameter _rebuild_parameter_with_state _rebuild_sparse_tensor _rebuild_qtensor "
    "_rebuild_meta_tensor_no_storage"
)
"""Of tensors that are refused later, by name."""


def check_archive(opened: BinaryIO) -> None:
    """Check the pickles in an archive of torch.save, whose members are known to be stored uncompressed.

    Raises:
        Damaged: more than plain data and tensors within their storages.
        zipfile.BadZipFile: damaged.
    """
    size = os.fstat(opened.fileno()).st_size
    with zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            if member.filename.lower().endswith("data.pkl"):  # torch compares names without regard to case
                if member.file_size > _MAX_PICKLE_BYTES:
                    raise Damaged(f"its pickle has over {_MAX_PICKLE_BYTES:,} bytes")
                with archive.open(member) as file:
                    _TorchUnpickler(_Clamped(file, member.file_size), size).load()


def check_legacy(file: BinaryIO) -> None:
    """Check the five pickles with which a file of torch before 1.6 begins; the numbers of its storages follow them.

    Raises:
        Damaged: more than plain data and tensors within their storages.
    """
    size = os.fstat(file.fileno()).st_size
    for _ in ("magic number", "protocol", "system", "content", "keys of the storages"):
        keys = _TorchUnpickler(_Clamped(file, size), size).load()
    if not isinstance(keys, list):
        raise Damaged("it has no list of storages")
    require_plain_keys(keys)


class _Clamped:
    """A file of a known size for pickle.py: it would allocate as much as a length in the file claims."""

    def __init__(self, file: Any, size: int) -> None:
        self.file = file
        self.size = size

    def read(self, length: int) -> Any:
        return self.file.read(max(0, min(length, self.size - self.file.tell())))

    def readline(self) -> Any:
        return self.file.readline(1000)


class _Dict(dict[Any, Any], StandIn):
    """An OrderedDict; its state is a module's `_metadata`."""

    def __init__(self, pairs: Iterable[Any] = ()) -> None:
        super().__init__()
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:  # a list is what Python 2 wrote
            require_plain_keys([key])
            self[key] = value

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or any(type(key) is not str for key in state):
            raise Damaged("its pickle sets the state of a dictionary to something else")


class _Storage:
    def __init__(self, numel: int) -> None:
        self.numel = numel


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
    """Stand-in for a tensor, which must lie within its storage: torch would enlarge that."""
    if len(size) > 64 or len(size) != len(stride) or min(offset, *size, *stride, 0) < 0:
        raise Damaged("a tensor has an impossible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if all(size) and last >= storage.numel:
        raise Damaged(f"a tensor of shape {list(size)} is larger than the numbers stored for it")


def _set(items: Any) -> None:
    require_plain_keys(items)


def _something(*_: Any) -> None:
    """Stand-in for what takes no memory of its own."""


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {f"torch.{name}Storage": None for name in _TYPES.split()}
    names |= {f"torch.storage.{name}Storage": None for name in ("Typed", "Untyped")}
    names |= {f"torch.{name}": None for name in _DTYPES.split()}
    names |= {f"torch._utils.{name}": _tensor for name in _REBUILDERS.split()}
    names |= {f"torch._utils.{name}": _something for name in _OTHER_REBUILDERS.split()}
    names |= dict.fromkeys(("torch.device", "torch.Size", "torch.serialization._get_layout"), _something)
    names |= dict.fromkeys(("builtins.complex", "__builtin__.complex"), _something)
    names |= dict.fromkeys(("builtins.set", "__builtin__.set"), _set)
    return names | {"collections.OrderedDict": _Dict, "collections.Counter": _Dict}


class _TorchUnpickler(PlainUnpickler):
    """Reads a pickle of torch.save; what it gives has stand-ins for tensors."""

    def __init__(self, file: _Clamped, file_size: int) -> None:
        super().__init__(cast(BinaryIO, file), _names(), max_bytes=file.size, max_instructions=_MAX_INSTRUCTIONS)
        self.numels: dict[Any, int] = {}
        self.file_size = file_size

    def persistent_load(self, pid: Any) -> _Storage:
        """Stand-in for a storage, named ("storage", type, key, location, numel, and in old files a view of it)."""
        kind, _, key, location, numel, *view = pid
        plain = (kind, key, location, numel, *(view[0] or () if view else ()))
        if kind != "storage" or any(type(value) not in (str, int) for value in plain) or type(numel) is not int:
            raise Damaged("its pickle refers to something that is not a storage")
        self.numels[key] = numel
        if numel < 0 or sum(self.numels.values()) > self.file_size:
            raise Damaged("its storages are larger than the file")
        return _Storage(view[0][2] if view and view[0] else numel)
