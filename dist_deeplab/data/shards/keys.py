"""What the keys of a set's samples are reduced to: a hash each, and one digest of all, however many there are."""

import hashlib
import heapq
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

_RUN = 2**20  # keys sorted in memory at a time, some 100 MB


def key_hash(key: str) -> int:
    """64 bits of the BLAKE2b digest of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class DuplicateKeyError(ValueError):
    """The same key twice; it is the only argument."""


def keys_digest(keys: Iterable[str]) -> str:
    """SHA-256 of the sorted keys, one per line: the identity of a set of samples.

    Sorted in memory 2**20 at a time, merged from temporary files beyond that. Keys hold no line breaks.
    """
    return _digest(_sorted(keys), unique=False)


def unique_keys_digest(keys: Iterable[str]) -> str:
    """The same of keys that must be unique.

    Raises:
        DuplicateKeyError: a key comes twice.
    """
    return _digest(_sorted(keys), unique=True)


def _digest(keys: Iterable[bytes], *, unique: bool) -> str:
    digest, last = hashlib.sha256(), None
    for key in keys:
        if unique and key == last:
            raise DuplicateKeyError(key.decode("utf-8", "surrogateescape"))
        digest.update(key + b"\n")
        last = key
    return digest.hexdigest()


def _sorted(keys: Iterable[str]) -> Iterator[bytes]:
    """The keys in UTF-8, sorted; in that encoding bytes sort as characters do."""
    files: list[IO[bytes]] = []
    run: list[bytes] = []
    try:
        for key in keys:
            run.append(key.encode("utf-8", "surrogateescape"))
            if len(run) == _RUN:
                files.append(tempfile.TemporaryFile())  # noqa: SIM115 (closed below)
                files[-1].writelines(key + b"\n" for key in sorted(run))
                files[-1].seek(0)
                run.clear()
        run.sort()
        yield from heapq.merge(run, *map(_lines, files)) if files else run
    finally:
        for file in files:
            file.close()


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    return (line[:-1] for line in file)
