"""The layer parameters in a `.caffemodel`, compared with our network: kernel, stride, padding, dilation, epsilon."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.deeplabv2 import ASPP_RATES
from dist_deeplab.model.weights.formats.caffe_names import Place, place_of
from dist_deeplab.model.weights.variant import Damaged

_DILATED, _CONTRACTED, _CLASSIFICATION = "dilated", "contracted", "classification"
_DILATIONS = {2: 1, 3: 1, 4: 2, 5: 4}


@dataclass(frozen=True)
class Convolution:
    """A convolution's geometry (both axes alike)."""

    kernel: int
    stride: int
    pad: int
    dilation: int
    group: int = 1

    def __str__(self) -> str:
        group = f", group {self.group}" if self.group != 1 else ""
        return f"kernel {self.kernel}, stride {self.stride}, pad {self.pad}, dilation {self.dilation}{group}"

    @classmethod
    def read(cls, parameter: Any, shape: tuple[int, ...]) -> "Convolution":
        """Geometry in a ConvolutionParameter; the kernel is checked against the weights' shape.

        Raises:
            Damaged: the two axes differ, or the parameter and the weights.
        """

        def size(name: str, default: int) -> int:
            axes = [axis for axis in (f"{name}_h", f"{name}_w") if parameter.HasField(axis)]
            values = set(getattr(parameter, name)) or {getattr(parameter, axis) for axis in axes}
            if len(values) > 1 or len(axes) == 1:
                raise Damaged(f"a convolution with unlike axes ({name} {sorted(values)[:4]})")
            return values.pop() if values else default

        stated = cls(
            kernel=size("kernel", shape[-1]),
            stride=size("stride", 1),
            pad=size("pad", 0),
            dilation=parameter.dilation[-1] if parameter.dilation else 1,
            group=parameter.group,
        )
        num_output = parameter.num_output if parameter.HasField("num_output") else shape[0]
        if shape[-2:] != (stated.kernel, stated.kernel) or num_output != shape[0]:
            raise Damaged(f"weights of shape {list(shape)} for a convolution of kernel {stated.kernel}")
        return stated


@dataclass(frozen=True)
class Geometry:
    """Which of the known networks a file's layers make."""

    family: str
    stride_on_1x1: bool
    contract_dilation: bool


def recognise_geometry(convolutions: dict[str, Convolution], path: Path) -> Geometry:
    """The network that the layers' parameters describe; without parameters, the authors'.

    Known are DeepLab-v2, the same with contracted dilation, and an ImageNet classification network, whose strides
    in res4 and res5 become dilation here; each with the stride on the first 1x1 or on the 3x3.

    Raises:
        UserError: none of them: the first layer that differs from the nearest is named.
    """
    best: list[str] = []
    chosen, fewest = (_DILATED, True), len(convolutions) + 1
    for form, on_1x1 in itertools.product((_DILATED, _CONTRACTED, _CLASSIFICATION), (True, False)):
        wrong = []
        for name, found in convolutions.items():
            place = place_of(name)
            expected = _expected(place, form, stride_on_1x1=on_1x1) if place else found
            if found != expected:
                wrong.append(f"{name} has {found}; ours has {expected}")
        if len(wrong) < fewest:
            chosen, fewest, best = (form, on_1x1), len(wrong), wrong
    if best:
        raise UserError(f"{path} is of another network: {best[0]} ({fewest} of {len(convolutions)} layers differ)")
    form, on_1x1 = chosen
    family = "Caffe ResNet (ImageNet)" if form == _CLASSIFICATION else "Caffe DeepLab-v2"
    return Geometry(family, on_1x1, form == _CONTRACTED)


def check_batch_norm(layer: Any, path: Path) -> None:
    """Compare a BatchNorm's epsilon with ours (V1 states none, and caffe.proto's default is ours).

    Raises:
        UserError: it is another.
    """
    eps = layer.batch_norm.eps if "batch_norm" in layer.DESCRIPTOR.fields_by_name else EPS
    if not abs(eps - EPS) <= 1e-3 * EPS:
        raise UserError(f"{path} is of another network: {layer.name} has eps {eps:g}; ours has {EPS:g}")


def check_pooling(layer: Any, path: Path) -> None:
    """Compare pool1 with ours; an ImageNet network pads by 0, which moves its features by a pixel and is accepted.

    Raises:
        UserError: it is another.
    """
    if not layer.HasField("pooling"):
        return
    pool = layer.pooling
    if (pool.kind, pool.kernel, pool.stride) != (0, 3, 2) or pool.pad not in (0, 1):
        raise UserError(
            f"{path} is of another network: pool1 has kind {pool.kind}, kernel {pool.kernel}, stride {pool.stride}, "
            f"pad {pool.pad}; ours has kind 0 (max), kernel 3, stride 2, pad 1"
        )


def _expected(place: Place, form: str, *, stride_on_1x1: bool) -> Convolution:
    """Geometry of a layer of one of the known networks."""
    if place.kind == "head":
        rate = ASPP_RATES[int(place.module[-1])]
        return Convolution(kernel=3, stride=1, pad=rate, dilation=rate)
    if place.stage == 0:
        return Convolution(kernel=7, stride=2, pad=3, dilation=1)
    is_first = place.block == 0
    dilation = 1 if form == _CLASSIFICATION else _DILATIONS[place.stage]
    if form == _CONTRACTED and is_first:
        dilation = max(1, dilation // 2)
    strided = is_first and (place.stage == 3 or (form == _CLASSIFICATION and place.stage > 3))
    carries_stride = place.branch in ("1", "2a" if stride_on_1x1 else "2b")
    stride = 2 if strided and carries_stride else 1
    if place.branch == "2b":
        return Convolution(kernel=3, stride=stride, pad=dilation, dilation=dilation)
    return Convolution(kernel=1, stride=stride, pad=0, dilation=1)
