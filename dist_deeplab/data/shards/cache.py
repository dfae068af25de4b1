"""`ShardCache`: shards from URLs in a folder on the node's own disk, shared by all processes of the node.

Each shard comes once per node, whole and verified (see `downloads.fetch`), and is named by its SHA-256, so mirrors and
copies of a set are one. The folder stays under its limit: before a shard comes, those unused for longest go. A shard
that somebody has open is never one of them: an open shard carries a shared `flock`, which ends with its process.

In the folder: `<sha256>_<name>` shards and indexes; `manifests/`; hidden files of downloads, and `.<name>.<pid>.room`
for the room that a shard on its way has reserved.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dist_deeplab.downloads import DiskFullError, DownloadError, check_url, fetch, join_url, shown
from dist_deeplab.errors import UserError

_ATTEMPTS = 20  # to open a shard that others evict as soon as it is there
_GIB = 2**30

log = logging.getLogger(__name__)


class CacheError(UserError):
    """The cache can't hold what is needed."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of at most `limit_bytes` of shards."""

    folder: Path
    limit_bytes: int

    def fetch_manifest(self, url: str) -> Path:
        """Return the manifest, as it is at its URL now; the one of last time where the server does not answer.

        Raises:
            DownloadError: not there, and never was.
        """
        folder = self.folder / "manifests" / hashlib.sha256(check_url(url).encode()).hexdigest()[:16]
        try:
            return fetch(url, folder, name="manifest.json", refresh=True)
        except DownloadError as error:
            kept = folder / "manifest.json"
            if not kept.is_file():
                raise
            log.warning("%s; going on with the copy of last time", error)
            return kept

    def fetch_index(self, url: str, name: str, *, sha256: str) -> Path:
        """Return the index `name` that lies beside the manifest at `url`; it comes to lie beside the manifest's copy.

        Raises:
            DownloadError: not there, or other bytes than the manifest says.
        """
        folder = self.folder / "manifests" / hashlib.sha256(url.encode()).hexdigest()[:16]
        return fetch(join_url(url, name), folder, name=name, sha256=sha256)

    def require_room(self, num_bytes: int) -> None:
        """Check that all shards of a run fit in at once.

        Raises:
            CacheError: they do not.
        """
        if num_bytes > self.limit_bytes:
            raise CacheError(
                f"the shards have {num_bytes / _GIB:.1f} GiB but the cache {self.folder} may hold "
                f"{self.limit_bytes / _GIB:.1f}; random access would fetch them again and again: raise "
                f"data.cache_gib to {num_bytes / _GIB + 0.1:.1f} or more, or set data.access=stream"
            )

    def open_shard(self, url: str, *, sha256: str, size: int) -> int:
        """Return a read-only descriptor of the shard, in the cache by then; it can't be evicted until it is closed.

        Raises:
            CacheError: no room, since the shards of others are in use.
            DownloadError: it can't be fetched, or has other bytes than the manifest says.
        """
        path = self.folder / f"{sha256[:16]}_{url.partition('?')[0].rpartition('/')[2]}"
        for _ in range(_ATTEMPTS):
            file = _open_locked(path, size)
            if file is not None:
                return file
            self._bring(url, path.name, sha256=sha256, size=size)
        raise CacheError(
            f"the shard {shown(url)} is evicted from {self.folder} as soon as it comes; raise data.cache_gib"
        )

    def _bring(self, url: str, name: str, *, sha256: str, size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._reserved(name, size):
            try:
                fetch(url, self.folder, name=name, sha256=sha256, size=size)
            except DiskFullError as error:  # by others than this cache: what it holds itself can go
                with self._room_lock():
                    freed = self._evict(size, keep=name)
                if not freed:
                    raise CacheError(f"{error}; nothing in the cache can go") from None
                fetch(url, self.folder, name=name, sha256=sha256, size=size)

    @contextlib.contextmanager
    def _reserved(self, name: str, size: int) -> Iterator[None]:
        """Make room for a shard, by eviction where needed, and keep it from others while the shard comes."""
        reservation = self.folder / f".{name}.{os.getpid()}.room"
        with self._room_lock():
            used = self._used()
            used[name] = max(size, used.get(name, 0))
            excess = sum(used.values()) - self.limit_bytes
            if excess > 0 and self._evict(excess, keep=name) < excess:
                raise CacheError(
                    f"the cache {self.folder} is full: data.cache_gib allows {self.limit_bytes / _GIB:.1f} GiB, and "
                    "all it holds is in use; raise data.cache_gib, or give this run a data.cache_dir of its own"
                )
            holder = os.open(reservation, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(holder, fcntl.LOCK_EX)
            os.pwrite(holder, str(size).encode(), 0)
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)
            os.close(holder)

    def _room_lock(self) -> FileLock:
        return FileLock(self.folder / ".room.lock")

    def _used(self) -> dict[str, int]:
        """Return the bytes taken or reserved under each shard's name; room lock held."""
        used: dict[str, int] = {}
        for entry in os.scandir(self.folder):
            name = entry.name
            if name.endswith(".room"):
                name, size = name[1:].rsplit(".", 2)[0], _reservation(Path(entry.path))
            elif not entry.is_file() or (name.startswith(".") and not name.endswith(".part")):
                continue
            else:
                name, size = name.removeprefix(".").removesuffix(".part"), _size(entry)
            used[name] = max(size, used.get(name, 0))
        return used

    def _evict(self, num_bytes: int, *, keep: str) -> int:
        """Remove shards that nobody has open, unused for longest first, and return the bytes freed; room lock held."""
        coming = {entry.name[1:].rsplit(".", 2)[0] for entry in os.scandir(self.folder) if entry.name.endswith(".room")}
        shards = [Path(e.path) for e in os.scandir(self.folder) if e.is_file() and not e.name.startswith(".")]
        halves = [Path(e.path) for e in os.scandir(self.folder) if e.name.endswith(".part")]
        freed = 0
        for path in [*halves, *sorted(shards, key=_last_use)]:
            name = path.name.removeprefix(".").removesuffix(".part")
            if freed < num_bytes and name != keep and name not in coming:
                freed += _remove_unless_open(path)
        return freed


def _size(entry: os.DirEntry[str]) -> int:
    """Return a file's bytes; 0 where it got its final name meanwhile, for its reservation counts then."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_atime_ns
    except FileNotFoundError:
        return 0


def _open_locked(path: Path, size: int) -> int | None:
    """Return a descriptor with a shared lock, or None where the shard is gone, going, or of another size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"cannot open {path} in the cache: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file)
        if found.st_size == size and os.path.exists(path) and os.stat(path).st_ino == found.st_ino:
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))  # the time of use: many mounts keep none themselves
            return file
    except FileNotFoundError:
        pass
    os.close(file)
    return None


def _remove_unless_open(path: Path) -> int:
    """Remove the file and what lies hidden beside it unless a process has it open; return the bytes freed."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
    """Return the bytes that a living process has reserved; remove the reservation of a dead one."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
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
