"""Room in a `ShardCache`'s folder: what is taken, what is reserved for shards on their way, and which shards can go.

Files are counted and deleted by name, so that nothing else in the folder ever is: `<sha256>_<name>` are shards,
`.<sha256>_<name>.part` shards on their way, `.<sha256>_<name>.<pid>.room` the room reserved for one.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dist_deeplab import locks
from dist_deeplab.errors import UserError

_SHARD = re.compile(r"[0-9a-f]{16}_.+")
_PART = re.compile(r"\.([0-9a-f]{16}_.+)\.part")
_ROOM = re.compile(r"\.([0-9a-f]{16}_.+)\.\d+\.room")
_GIB = 2**30


class CacheError(UserError):
    """The cache can't hold what is needed."""


@dataclass(frozen=True)
class Room:
    """The space of a cache's folder, at most `limit_bytes`, shared by the processes of a node."""

    folder: Path
    limit_bytes: int

    def free(self, num_bytes: int, *, keep: str) -> int:
        """Bytes freed by removing shards that nobody uses, except the one named `keep`; at least `num_bytes` if it can.

        Raises:
            OSError: the folder.
        """
        with self._lock():
            return self._evict(num_bytes, keep=keep)

    def _lock(self) -> FileLock:
        return locks.file_lock(self.folder / ".room.lock")

    @contextlib.contextmanager
    def reserved(self, name: str, size: int) -> Iterator[None]:
        """Make room for a shard, by eviction where needed, and keep it from others while the shard comes.

        Raises:
            CacheError: what is there is in use, so that not enough can go.
            OSError: the folder.
        """
        reservation = self.folder / f".{name}.{os.getpid()}.room"
        with self._lock():
            used = self._used()
            used[name] = max(size, used.get(name, 0))
            excess = sum(used.values()) - self.limit_bytes
            if excess > 0 and self._evict(excess, keep=name) < excess:
                raise CacheError(
                    f"the cache {self.folder} is full: data.cache_gib allows {self.limit_bytes / _GIB:.1f} GiB, and "
                    "all it holds is in use; raise data.cache_gib, or give this run a data.cache_dir of its own"
                )
            holder = os.open(reservation, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            fcntl.flock(holder, fcntl.LOCK_EX)
            os.pwrite(holder, str(size).encode(), 0)
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)
            os.close(holder)

    def _used(self) -> dict[str, int]:
        """Bytes taken or reserved under each shard's name; room lock held."""
        used: dict[str, int] = {}
        for entry in os.scandir(self.folder):
            if room := _ROOM.fullmatch(entry.name):
                name, size = room[1], _reservation(Path(entry.path))
            elif (part := _PART.fullmatch(entry.name)) or _SHARD.fullmatch(entry.name):
                name, size = part[1] if part else entry.name, _size(entry)
            else:
                continue
            used[name] = max(size, used.get(name, 0))
        return used

    def _evict(self, num_bytes: int, *, keep: str) -> int:
        """Remove own shards that nobody has open, unused for longest first; the bytes freed. Room lock held."""
        entries = [entry for entry in os.scandir(self.folder) if entry.is_file(follow_symlinks=False)]
        kept = {keep} | {room[1] for entry in entries if (room := _ROOM.fullmatch(entry.name))}
        parts = [Path(e.path) for e in entries if (part := _PART.fullmatch(e.name)) and part[1] not in kept]
        shards = [Path(e.path) for e in entries if _SHARD.fullmatch(e.name) and e.name not in kept]
        freed = 0
        for path in [*parts, *sorted(shards, key=_last_use)]:
            if freed < num_bytes:
                freed += _remove_unless_open(path)
        return freed


def _size(entry: os.DirEntry[str]) -> int:
    """A file's bytes; 0 where it got its final name meanwhile, for its reservation counts then."""
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_atime_ns
    except FileNotFoundError:
        return 0


def _remove_unless_open(path: Path) -> int:
    """Remove the file and its record unless a process has it open; the bytes freed."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(file).st_size
        path.unlink()
        path.with_name(f".{path.name}.json").unlink(missing_ok=True)
        return size
    except OSError:
        return 0
    finally:
        os.close(file)


def _reservation(path: Path) -> int:
    """Bytes that a living process has reserved; the reservation of a dead one is removed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return int(os.read(file, 32) or b"0")
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(file)
