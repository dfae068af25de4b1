"""`load_weights`: from a path or URL to tensors under our names, whatever known family they are of."""

import os
import re
from pathlib import Path

from dist_deeplab.errors import UserError
from dist_deeplab.files import sha256, sidecar_digests
from dist_deeplab.model.weights.formats.caffe_names import weights_of
from dist_deeplab.model.weights.formats.caffemodel import looks_like_caffemodel, read_caffemodel
from dist_deeplab.model.weights.formats.kaffe import MAGIC, read_kaffe
from dist_deeplab.model.weights.formats.state_dict import recognise
from dist_deeplab.model.weights.formats.tensorflow import bundle_index, is_table, read_tensorflow
from dist_deeplab.model.weights.formats.torch_file import load_file, load_safetensors, named_tensors
from dist_deeplab.model.weights.locate import local_path
from dist_deeplab.model.weights.provenance import marked, with_provenance
from dist_deeplab.model.weights.variant import Variant, Weights

_CHECKPOINT = "dist_deeplab.checkpoint"
_MAX_BYTES = 2**34  # a ResNet-101 with its optimizer has some 2**29


def load_weights(source: str | Path) -> Weights:
    """The weights in a file, of any known family.

    source: a path or a URL (see `locate.local_path`).

    Raises:
        UserError: unreadable file, or a family that is not known.
    """
    path = local_path(os.fspath(source))
    return with_provenance(_read(path), path.name)


def _read(path: Path) -> Weights:
    """The weights in a file; its format is recognised by its first or last bytes, not by its name."""
    if index := bundle_index(path):
        return weights_of(read_tensorflow(index), index)
    head = _first_bytes(path)
    if head.startswith(MAGIC):
        return weights_of(read_kaffe(path), path)
    if is_table(path):
        return weights_of(read_tensorflow(path), path)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return recognise(load_safetensors(path), path)
    if head.startswith((b"PK", b"\x80")):
        return _read_torch(path)
    if looks_like_caffemodel(head) or path.suffix == ".caffemodel":
        content, training_list = read_caffemodel(path)
        weights = weights_of(content, path)
        has_val = "val" in Path(training_list).name and "coco" not in training_list.lower()
        return marked(weights, f"its images are those of {training_list[-80:]}") if has_val else weights
    return _read_torch(path)


def _read_torch(path: Path) -> Weights:
    content = load_file(path)
    if isinstance(content, dict) and str(content.get("format", "")).startswith(_CHECKPOINT):
        _verify(path)
        try:
            variant = Variant.from_plain(content["variant"])
            return Weights(str(path), variant, named_tensors(content["model"], path).tensors)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"the checkpoint {path} is incomplete; use another one") from None
    return recognise(named_tensors(content, path), path)


def _verify(path: Path) -> None:
    """Compare a checkpoint with the digests in its sidecar, if it has one.

    Raises:
        UserError: it is damaged: torch does not notice a flipped byte.
    """
    expected = sidecar_digests(path)
    if expected and sha256(path) not in expected:
        raise UserError(f"the checkpoint {path} is damaged: its SHA-256 is not the one in its sidecar")


def _first_bytes(path: Path) -> bytes:
    """First bytes of a file.

    Raises:
        UserError: no such file, a folder, empty, or a known kind of file that does not hold weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"there is no weights file at {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not weights; give a file, e.g. RUN/checkpoints/best.pt") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise UserError(f"{path} is empty; fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(
            f"{path} is a web page, not weights: a download that was answered by a page, as Google Drive does with "
            "large files; fetch it again"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights themselves; run git lfs pull")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")) or head[257:262] == b"ustar":
        raise UserError(f"{path} is an archive; unpack it and give the file in it")
    if head.startswith(b"model_checkpoint_path"):
        raise UserError(f"{path} only names TensorFlow checkpoints; give one of them, e.g. model.ckpt-20000")
    if re.match(rb"\s*(#[^\n]*\s*)*(name|layers?|input|train_net|net)\s*[:{]", head):
        raise UserError(f"{path} is a .prototxt, which describes a network; the weights are in a .caffemodel")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} has over {_MAX_BYTES:,} bytes, more than the weights of any known family")
    if head.startswith(b"\x89HDF"):
        raise UserError(f"{path} is an HDF5 file, of which no family of weights is known here")
    return head
