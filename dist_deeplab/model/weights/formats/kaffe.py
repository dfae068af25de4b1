"""DrSleep's `.npy`: what caffe-tensorflow (kaffe) writes, a pickled dictionary {layer: {parameter: array}}."""

import re
from pathlib import Path

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights.formats.caffe_names import LayerTensors, to_tensor
from dist_deeplab.model.weights.formats.numpy_pickle import Array, read_pickle
from dist_deeplab.model.weights.variant import Damaged, Variant

MAGIC = b"\x93NUMPY"
SLIM_EPS = 1e-3
"""Default epsilon of `slim.batch_norm` (TensorFlow 1.15's documentation), by which DrSleep's network normalises."""

PARAMETERS = {
    "weights": "weight",
    "biases": "bias",
    # DrSleep's kaffe and slim
    "gamma": "gamma",
    "beta": "beta",
    "moving_mean": "mean",
    "moving_variance": "variance",
    # caffe-tensorflow as it was, whose network has Caffe's epsilon 1e-5
    "scale": "gamma",
    "offset": "beta",
    "mean": "mean",
    "variance": "variance",
}
"""TensorFlow's names of parameters -> ours."""

FAMILY = "DrSleep DeepLab-v2"
_MAX_HEADER_BYTES = 10_000


def read_kaffe(path: Path) -> LayerTensors:
    """The layers of a kaffe dictionary; no code in the file is run.

    Raises:
        UserError: damaged, or not such a dictionary.
    """
    try:
        layers = _read_dictionary(path)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a .npy of kaffe: {error}; is it whole?") from None
    tensors, skipped, is_slim = {}, {}, False
    num_bytes_left = path.stat().st_size
    for layer, parameters in layers.items():
        if not isinstance(layer, str) or not isinstance(parameters, dict):
            raise UserError(f"{path} is a .npy file, but not of kaffe: it does not map layers to parameters")
        for parameter, array in parameters.items():
            name = f"{layer}/{parameter}"
            if parameter not in PARAMETERS or not isinstance(array, Array):
                skipped[name] = "not a parameter of a convolution or batch norm"
                continue
            is_slim |= parameter == "moving_variance"
            try:
                values = array.to_numpy()
            except Damaged as error:
                raise UserError(f"{name} in {path} can't be read: {error}") from None
            num_bytes_left -= values.nbytes
            if num_bytes_left < 0:
                raise UserError(f"the arrays in {path} share their bytes, which kaffe does not do; use another file")
            tensors[f"{layer}/{PARAMETERS[parameter]}"] = to_tensor(values, is_hwio=parameter == "weights")
    sources = {f"{k.rpartition('/')[0]}/{PARAMETERS[p]}": k for k, p in _names(layers)}
    variant = Variant(f"{FAMILY} (.npy)", True, CAFFE)
    return LayerTensors(FAMILY, tensors, SLIM_EPS if is_slim else EPS, variant, sources, skipped)


def _names(layers: "dict[str, dict[str, object]]") -> list[tuple[str, str]]:
    return [(f"{layer}/{p}", p) for layer, parameters in layers.items() for p in parameters if p in PARAMETERS]


def _read_dictionary(path: Path) -> "dict[str, dict[str, object]]":
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(file.read(2 if start[6:7] == b"\x01" else 4), "little")
        if size > _MAX_HEADER_BYTES:
            raise Damaged("its header is broken")
        header = file.read(size).decode("latin-1")  # a dictionary as Python writes it, which is not evaluated here
        kind, shape = re.search(r"'descr': '([^']*)'", header), re.search(r"'shape': \(([\d, ]*)\)", header)
        if not kind or not shape:
            raise Damaged("its header is broken")
        if kind[1] not in ("|O", "O") or shape[1]:
            raise Damaged(f"it holds one array of shape [{shape[1].strip(', ')}], not a dictionary of layers")
        content = read_pickle(file.read())
    if isinstance(content, Array) and len(content.items) == 1:
        content = content.items[0]
    if not isinstance(content, dict) or not content:
        raise Damaged("it holds no dictionary of layers")
    return content
