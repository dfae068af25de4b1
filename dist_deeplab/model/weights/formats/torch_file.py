"""Files of torch.save and of safetensors: named tensors, read without running code that a file may hold."""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_deeplab.errors import UserError, first_line
from dist_deeplab.model.weights.formats.plain_pickle import Foreign
from dist_deeplab.model.weights.formats.torch_pickle import check_archive, check_legacy
from dist_deeplab.model.weights.variant import Variant

METADATA_KEY = "dist_deeplab"
"""Where our exports keep their variant: in a state dict's `_metadata[""]`, and in the header of safetensors."""

_INNER = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")
"""Keys under which common training scripts save a network's state dict."""

_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
"""The number 0x1950a86a20f9469cfc6c as a pickle of its own, with which torch.save began before it wrote archives."""
_MAGIC_WITHIN = 24  # before it only the pickle's protocol, and a frame's length

_MAX_NAME = 512  # characters: names are compared with patterns, in time that may grow with the square of their length

_TEXT = frozenset({*range(0x20, 0x7F), *b"\t\n\r\f", *range(0x80, 0x100)})


@dataclass(frozen=True)
class NamedTensors:
    """Tensors of a file under its own names; `variant` if the file states it."""

    tensors: dict[str, torch.Tensor]
    variant: Variant | None = None


def load_file(path: str | Path) -> Any:
    """Content of a file of `torch.save`, on the CPU, without running any code that the file may hold.

    Raises:
        UserError: no such file, damaged, or holding more than plain values and tensors.
    """
    path = Path(path).expanduser()
    try:
        return load_plain(path)
    except FileNotFoundError:
        raise UserError(f"there is no weights file at {path}") from None
    except Foreign as error:
        raise UserError(
            f"{path} holds more than tensors and plain values ({error.name}), which might run code; where you trust "
            "it, save its state dict alone and give that"
        ) from None
    except UserError:
        raise
    except Exception as error:  # an unpickler that meets arbitrary bytes may raise anything
        reason = "it ends too early" if isinstance(error, EOFError | IndexError) else first_line(error)
        raise UserError(f"{path} can't be read as a torch file ({reason}); is it whole?") from None


def load_plain(path: Path) -> Any:
    """Content of a file of `torch.save`, on the CPU, without running code and in memory that its size suggests.

    Raises:
        UserError: compressed, TorchScript, or another kind of file.
        Foreign: it names functions or classes.
        Exception: damaged: torch meets arbitrary bytes.
    """
    with path.open("rb") as file:
        return load_opened(file, path)


def load_opened(file: BinaryIO, path: Path) -> Any:
    """`load_plain` of a file that is open already; `path` is for messages."""
    checks = (_require_stored, check_archive) if zipfile.is_zipfile(file) else (_require_magic, check_legacy)
    file.seek(0)
    checks[0](file, path)
    file.seek(0)
    checks[1](file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _require_magic(file: BinaryIO, path: Path) -> None:
    """Refuse files that do not begin like those of torch.save before torch 1.6, which are not archives.

    Raises:
        UserError: another file; its kind is named if it is recognised.
    """
    head = file.read(512)
    if _MAGIC in head[:_MAGIC_WITHIN]:
        return
    if head.startswith(b"PK\x03\x04"):
        raise UserError(
            f"{path} is the beginning of an archive, as torch.save writes them; its end is missing: fetch it again"
        )
    if head.startswith(b"\x80"):
        what = "a pickle that torch.save did not write"
    elif all(byte in _TEXT for byte in head):
        what = "text"
    else:
        what = "of an unknown kind"
    raise UserError(f"{path} holds no weights: it is {what}; {KNOWN}")


def _require_stored(file: BinaryIO, path: Path) -> None:
    """Refuse an archive that is larger in memory than on disk: torch.save compresses nothing.

    Raises:
        UserError: compressed or overlapping members, TorchScript, or some other archive.
        zipfile.BadZipFile: damaged.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise UserError(f"{path} is an archive of other files, not weights; unpack it and give the file in it")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(f"{path} is a TorchScript program; save the state dict of the network instead")
    size = os.fstat(file.fileno()).st_size
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
        sum(member.file_size for member in members) > size
    ):
        raise UserError(f"{path} unpacks to more than its own {size:,} bytes, as no file of torch.save does; not read")


def named_tensors(content: Any, path: Path) -> NamedTensors:
    """Tensors of a state dict, found at any level of up to four nested dictionaries.

    Raises:
        UserError: there is none, or a tensor is not a plain dense one.
    """
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _INNER if isinstance(content.get(key), Mapping)]  # a state dict has none
        if not inner:
            break
        content = inner[0]
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            if len(name) > _MAX_NAME:
                raise UserError(f"a tensor's name has over {_MAX_NAME} characters in {path}; use another file")
            _require_plain(name, value, path)
            tensors[name] = value
    if not tensors:
        raise UserError(f"{path} holds no named tensors, so the weights in it are of no known family; {KNOWN}")
    metadata = getattr(content, "_metadata", None)
    own = metadata.get("") if isinstance(metadata, Mapping) else None
    plain = own.get(METADATA_KEY) if isinstance(own, Mapping) else None
    return NamedTensors(tensors, _variant(plain, path))


def load_safetensors(path: Path) -> NamedTensors:
    """Tensors of a safetensors file.

    Raises:
        UserError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, MemoryError) as error:
        raise UserError(f"{path} can't be read as safetensors ({first_line(error)}); is it whole?") from None
    if any(len(name) > _MAX_NAME for name in tensors):
        raise UserError(f"a tensor's name has over {_MAX_NAME} characters in {path}; use another file")
    if not tensors:
        raise UserError(f"{path} holds no tensors, so the weights in it are of no known family; {KNOWN}")
    try:
        plain = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except ValueError:
        plain = {}
    return NamedTensors(tensors, _variant(plain, path))


def _variant(plain: Any, path: Path) -> Variant | None:
    if plain is None:
        return None
    try:
        return Variant.from_plain(plain)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} describes the network of its weights in a way that can't be read") from None


def _require_plain(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Refuse what is not an ordinary array: sparse, quantized, without data, or larger than the bytes behind it."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not dense or tensor.is_nested or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{name} in {path} is not a plain dense tensor; save it as one")


KNOWN = (
    "known: checkpoints and exports of this project, torchvision's and timm's ResNet-50/101, torchvision's and "
    "mmsegmentation's DeepLabV3 backbones, kazuto1011's and isht7's DeepLab-v2 (.pth), DrSleep's (.npy, .ckpt), "
    "and the authors' .caffemodel"
)
