"""Pickles read without running what they name, and in time and memory that grow with their size only.

`pickle.load` calls whatever a file names. Here each instruction and each name must be on a list, and a name stands for
what the caller says. It is pickle's reader in Python that is restricted: the one in C allocates what a file claims.
"""

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from dist_deeplab.model.weights.variant import Damaged

_INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES"),
    *("SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL"),
    *("REDUCE", "BINPERSID"),
)
"""What protocols 2 to 4 use for plain data (numpy and torch save with no older one), without SETITEM(S) and BUILD."""

_KEYS = (str, int, float, bytes, type(None))
_InPython: Any = pickle._Unpickler  # private by its name, and the only reader in Python there is


class Foreign(Damaged):
    """A pickle names a function or class that is not on the list; `name` with its module."""

    def __init__(self, name: str) -> None:
        super().__init__(f"its pickle wants {name} to be called, which could be any code")
        self.name = name


class StandIn:
    """What a name in a pickle may make; only these take a state."""

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError


class PlainUnpickler(_InPython):
    """Reads one pickle: `load()` gives dictionaries, lists, tuples, strings, numbers, None and stand-ins.

    Args:
        file: read from where it stands.
        names: what stands for a name, e.g. {"numpy.dtype": ...}.
        max_bytes: that strings may be encoded to in all, by the instructions with which protocol 2 writes bytes.
        max_instructions: each makes at most some 100 bytes beside the file's own.
    """

    def __init__(self, file: BinaryIO, names: Mapping[str, Any], *, max_bytes: int, max_instructions: int) -> None:
        super().__init__(file, encoding="latin-1")  # byte strings of Python 2 become str
        self.names = {**names, "_codecs.encode": self._encode}
        self.num_bytes_left = max_bytes
        methods = {name: _InPython.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS}
        methods |= {"SETITEM": PlainUnpickler._set_item, "SETITEMS": PlainUnpickler._set_items}
        methods |= {"BUILD": PlainUnpickler._build}
        self.dispatch = _Counted({getattr(pickle, name)[0]: method for name, method in methods.items()})
        self.dispatch.num_left = max_instructions

    def load(self) -> Any:
        """Content of the pickle.

        Raises:
            Damaged: not a pickle of plain data (`Foreign`: the name of a function or class is why), or too large.
        """
        try:
            return super().load()
        except Damaged:
            raise
        except EOFError:
            raise Damaged("it ends too early") from None
        except Exception as error:  # pickle.py checks little: broken instructions raise anything
            raise Damaged(f"its pickle is broken ({type(error).__name__})") from None

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file: never what the name says."""
        full = f"{module}.{name}"
        if full not in self.names:
            raise Foreign(full if full.isprintable() and len(full) < 100 else "something")
        return self.names[full]

    def _encode(self, text: str, _: str) -> bytes:
        self.num_bytes_left -= len(text)  # one text may be encoded over and over
        if self.num_bytes_left < 0:
            raise Damaged("its pickle makes more bytes than it has")
        return text.encode("latin-1")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise Damaged("its pickle sets items of something that has none")
        require_plain_keys(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2]))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise Damaged("its pickle sets the state of something that has none")
        self.stack[-1].__setstate__(state)


def require_plain_keys(keys: list[Any]) -> None:
    """Refuse tuples as keys: the hash of nested ones takes exponential time, or overflows the C stack.

    Raises:
        Damaged: a key is neither text nor a number.
    """
    if any(type(key) not in _KEYS for key in keys):
        raise Damaged("its pickle has a dictionary with keys that are neither text nor numbers")


class _Counted(dict[int, Callable[..., None]]):
    """Instructions by their code, of which a limited number is handed out."""

    num_left = 0

    def __missing__(self, code: int) -> None:
        raise Damaged(f"its pickle uses the instruction {code}, which plain data do not need")

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.num_left -= 1
        if self.num_left < 0:
            raise Damaged("its pickle has more instructions than the weights of any known family")
        return super().__getitem__(code)
