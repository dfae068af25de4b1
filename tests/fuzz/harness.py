"""Runs a reader of foreign bytes on any bytes: it reads them or refuses them by a `UserError` of one sentence, soon.

A target is a function `fuzz_<reader>(data)` in a module `targets_*.py` of this folder; `seeds_<reader>()` beside it
gives whole inputs to start from. See README.md.
"""

import importlib
import random
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_deeplab.errors import UserError

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MAX_CPU_S = 10.0  # per input: the slowest takes some 0.1
MAX_GROWTH = 2**28  # bytes of memory per input of at most some 64 kB
MAX_GROWTH_OF_IMAGES = 2**32  # a few bytes may be an image of as many pixels as OpenCV takes
IMAGES = ("image", "label")
MAX_SENTENCE = 1500  # characters, of which paths and lists of what is known take the most
_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Target:
    """A reader under test."""

    name: str
    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]

    def corpus(self) -> list[bytes]:
        """Its seeds, and the files in `corpus/<name>`: inputs that once broke it."""
        return self.seeds() + [file.read_bytes() for file in sorted((CORPUS / self.name).glob("*"))]


class OutOfBoundsError(AssertionError):
    """A reader took more time or memory than it may, or its sentence is not one."""


def all_targets() -> list[Target]:
    """The targets of all modules `targets_*.py`, by name."""
    targets = []
    for file in sorted(HERE.glob("targets_*.py")):
        module = importlib.import_module(f"tests.fuzz.{file.stem}")
        for function, read in vars(module).items():
            if function.startswith("fuzz_"):
                name = function.removeprefix("fuzz_")
                targets.append(Target(name, read, getattr(module, f"seeds_{name}")))
    return sorted(targets, key=lambda target: target.name)


def check(target: Target, data: bytes) -> bool:
    """Whether the reader accepts `data`.

    Raises:
        OutOfBoundsError: it took too much, or its sentence is not one.
        Exception: whatever else than a UserError it let through.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        target.read(data)
        return True
    except UserError as error:
        text = str(error)
        if "\n" in text or not text or len(text) > MAX_SENTENCE:
            raise OutOfBoundsError(f"not one sentence: {text[:3000]!r}") from error
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if growth > (MAX_GROWTH_OF_IMAGES if target.name in IMAGES else MAX_GROWTH):
            raise OutOfBoundsError(f"{len(data):,} bytes took {growth / 2**20:,.0f} MiB of memory")


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise OutOfBoundsError(f"over {MAX_CPU_S:g} s")


def mutations(corpus: list[bytes], num: int, *, seed: int) -> Iterator[bytes]:
    """`num` changed inputs, the same in each run: bytes changed, inserted, removed or repeated; two inputs mixed."""
    rng = random.Random(seed)
    for _ in range(num):
        data = bytearray(rng.choice(corpus))
        for _ in range(rng.randint(1, 4)):
            # Structure lies at the beginning and, in tables and archives, at the end.
            near_start, near_end = rng.randint(0, 300), len(data) - rng.randint(1, 300)
            at = max(0, min(len(data), rng.choice([near_start, near_end, rng.randrange(len(data) + 1)])))
            end = min(len(data), at + rng.choice([1, 1, 4, 8, 100]))
            kind = rng.randrange(7)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and at < len(data):
                data[at] = rng.randrange(256)
            elif kind == 2:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(_NUMBERS) % 256**size
                data[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            elif kind == 3:
                del data[at:end]
            elif kind == 4:
                data[at:at] = data[at:end] * rng.choice([1, 2, 100])
            elif kind == 5:
                other = rng.choice(corpus)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
        yield bytes(data[: 2**20])
