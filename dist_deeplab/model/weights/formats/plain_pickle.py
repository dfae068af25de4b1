"""Pickles of plain data and numpy arrays, read without ever being run.

A pickle is a program, and `pickle.load` obeys it. Here its instructions are taken apart by `pickletools` and only those
that build dictionaries, lists, strings, numbers and arrays are followed; there is nothing that could call anything, so
no flag of trust is needed. Arrays are assembled by ourselves from bytes whose number is checked.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_deeplab.model.weights.variant import Damaged

_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_ORDERED_DICT = {("collections", "OrderedDict")}
_KNOWN = _RECONSTRUCT | _ORDERED_DICT | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_TYPES = {f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248")) for size in sizes} | {"b1"}
_MAX_ITEMS = 10_000_000
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


@dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names; never looked up."""

    module: str
    name: str


@dataclass
class _Type:
    """A numpy type under construction."""

    code: str
    order: str = "<"


@dataclass
class Array:
    """A numpy array under construction; `items` of one of objects."""

    shape: tuple[int, ...] = ()
    type: _Type | None = None
    fortran: bool = False
    data: bytes = b""
    items: list[Any] = field(default_factory=list)

    def to_numpy(self) -> "np.ndarray[Any, Any]":
        """Return the array.

        Raises:
            Damaged: it is one of objects, or has more or fewer bytes than its shape needs.
        """
        if self.type is None or self.type.code not in _TYPES:
            raise Damaged("an array is not of numbers")
        dtype = np.dtype(self.type.code).newbyteorder("<" if self.type.order in "<|=" else ">")
        num = 1
        for length in self.shape:
            num *= length
        if num * dtype.itemsize != len(self.data):
            raise Damaged(f"an array of shape {list(self.shape)} has {len(self.data):,} bytes")
        flat = np.frombuffer(self.data, dtype=dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def read_pickle(data: bytes) -> Any:
    """Return what a pickle holds: dictionaries, lists, tuples, strings, numbers, None and `Array`s.

    Raises:
        Damaged: it is no pickle, or needs something else to be called.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.follow(opcode.name, argument)
    except Damaged:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise Damaged(f"its pickle is broken ({error})") from None
    raise Damaged("its pickle does not end")


class _Machine:
    """The stack and the memo of the instructions that are followed."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = _MAX_ITEMS

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Damaged("its pickle takes more than there is")
        return value

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise Damaged("its pickle takes more than there is")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def follow(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        self.budget -= 1
        if self.budget < 0:
            raise Damaged(f"its pickle has over {_MAX_ITEMS:,} instructions")
        push = self.stack.append
        if name in _VALUES:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name == "MARK":
            push(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(name, argument)
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            push(_built(function, arguments))
        elif name == "BUILD":
            state = self.pop()
            _set_state(self.stack[-1], state)
        elif name == "POP":
            self.stack.pop()
        elif name not in ("PROTO", "FRAME"):
            self._collect(name)

    def _name(self, opcode: str, argument: Any) -> None:
        if opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
        else:
            name, module = self.pop(), self.pop()
        if (module, name) not in _KNOWN:
            raise Damaged(f"its pickle wants {module}.{name} to be called, which could be any code")
        self.stack.append(_Global(module, name))

    def _collect(self, name: str) -> None:
        """Follow an instruction that makes or fills a container."""
        push = self.stack.append
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({} if name == "EMPTY_DICT" else [] if name == "EMPTY_LIST" else ())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([self.pop() for _ in range(int(name[-1]))])))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self.pop_to_mark()
            push(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            if type(self.stack[-1]) is not list:
                raise Damaged("its pickle appends to something else than a list")
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
            if type(self.stack[-1]) is not dict:
                raise Damaged("its pickle sets items of something else than a dictionary")
            self.stack[-1].update(_pairs(items))
        else:
            raise Damaged(f"its pickle uses {name}, which plain data do not need")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2 or any(type(key) not in (str, int, bytes) for key in items[::2]):
        raise Damaged("its pickle has a dictionary of other keys than strings")
    return dict(zip(items[::2], items[1::2], strict=True))


def _built(function: Any, arguments: Any) -> Any:
    """Return the stand-in for what a call would make."""
    if not isinstance(function, _Global) or type(arguments) is not tuple:
        raise Damaged("its pickle calls something that is no function")
    called = (function.module, function.name)
    if called in _RECONSTRUCT:
        return Array()
    if called in _ORDERED_DICT and not arguments:
        return {}
    if called == ("numpy", "dtype") and arguments and type(arguments[0]) in (str, bytes):
        code = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode("latin-1")
        return _Type(code.lstrip("<>|=")[:2], ">" if code.startswith(">") else "<")
    if called == ("_codecs", "encode") and len(arguments) == 2 and type(arguments[0]) is str:
        return arguments[0].encode("latin-1")  # how protocol 2 of Python 3 writes bytes
    raise Damaged(f"its pickle calls {function.module}.{function.name} in an unknown way")


def _set_state(target: Any, state: Any) -> None:
    """Finish a type or an array as their `__setstate__` would."""
    if isinstance(target, _Type) and type(state) is tuple and len(state) >= 2 and state[1] in ("<", ">", "|", "="):
        target.order = state[1]
        return
    if not isinstance(target, Array) or type(state) is not tuple or len(state) != 5:
        raise Damaged("its pickle sets the state of something that has none")
    _, shape, kind, fortran, data = state
    if type(shape) is not tuple or len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise Damaged("an array has no proper shape")
    target.shape, target.fortran = shape, bool(fortran)
    target.type = kind if isinstance(kind, _Type) else None
    if type(data) is list:
        target.items = data
    elif type(data) in (bytes, str):
        target.data = data if isinstance(data, bytes) else data.encode("latin-1")  # a str is one of Python 2
    else:
        raise Damaged("an array has no bytes")
