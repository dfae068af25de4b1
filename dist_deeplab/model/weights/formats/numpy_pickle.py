"""Dictionaries of numpy arrays that numpy pickled, without giving its pickle to numpy."""

import io
import math
import re
from typing import Any

import numpy as np

from dist_deeplab.model.weights.formats.plain_pickle import PlainUnpickler, StandIn
from dist_deeplab.model.weights.variant import Damaged

_MAX_INSTRUCTIONS = 200_000  # DrSleep's file has some 10,000


def read_pickle(data: bytes) -> Any:
    """Content of a pickle: dictionaries, lists, tuples, strings, bytes, numbers, None and `Array`s.

    Raises:
        Damaged: not a pickle of those, or one that takes more memory than its size suggests.
    """
    names = {
        "numpy.core.multiarray._reconstruct": Array,
        "numpy._core.multiarray._reconstruct": Array,
        "numpy.ndarray": None,
        "numpy.dtype": _Type,
    }
    return PlainUnpickler(io.BytesIO(data), names, max_bytes=len(data), max_instructions=_MAX_INSTRUCTIONS).load()


class _Type(StandIn):
    """A numpy type as its `__reduce__` describes it: `dtype("f4", False, True)`, then a state with the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Damaged("an array has no proper type")
        self.code = state[1] + self.code.lstrip("<>|=")


class Array(StandIn):
    """A numpy array as its `__reduce__` describes it, or an array of objects: then `items` has them."""

    def __init__(self, *_: Any) -> None:
        self.type: Any = None
        self.shape: Any = None
        self.data: Any = None
        self.is_fortran: Any = False
        self.items: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, self.is_fortran, self.data = state
        if type(self.data) is list:
            self.items = self.data

    def to_numpy(self) -> "np.ndarray[Any, Any]":
        """The array: a view of its bytes, except for those that Python 2 wrote.

        Raises:
            Damaged: an array of objects, or one with more or fewer bytes than its shape needs.
        """
        kind, shape, data = self.type, self.shape, self.data
        if not isinstance(kind, _Type) or not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", str(kind.code)):
            raise Damaged("an array is not of numbers")
        if type(shape) is not tuple or len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
            raise Damaged("an array has no proper shape")
        try:
            dtype = np.dtype(kind.code)
        except TypeError:  # f1
            raise Damaged("an array is not of numbers") from None
        if not isinstance(data, bytes | str) or len(data) != math.prod(shape) * dtype.itemsize:
            raise Damaged(f"an array of shape {list(shape)} has another number of bytes")
        flat = np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, dtype=dtype)
        return flat.reshape(shape, order="F" if self.is_fortran else "C")
