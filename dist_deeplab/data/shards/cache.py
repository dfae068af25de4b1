"""`ShardCache`: shards from URLs in a folder on the node's own disk, shared by all processes of the node.

Each shard comes once per node, whole and verified (see `downloads.fetch`), and is named by its SHA-256, so copies of a
set under several URLs are one. The folder stays under its limit: before a shard comes, those unused for longest go. A
shard that somebody has open is never one of them: an open shard carries a shared `flock`, which ends with its process.

The folder is a subfolder of data.cache_dir that the cache makes, marks (`CACHEDIR.TAG`) and has to itself. Without the
mark nothing is written or deleted, and of what is in it only files with the cache's own names are (see `room.py`).
`manifests/` holds manifests and indexes, one subfolder for each URL.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from dist_deeplab import locks
from dist_deeplab.data.shards.room import CacheError, Room
from dist_deeplab.downloads import DiskFullError, DownloadError, Expected, check_url, fetch, join_url, shown

FOLDER = "dist_deeplab_shards"
_MARK = "CACHEDIR.TAG"  # https://bford.info/cachedir: backups leave such a folder out
_MARK_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Shards that dist_deeplab fetched from URLs. They come again when they are needed: this folder may be deleted.\n"
)
_ATTEMPTS = 20  # to open a shard that others evict as soon as it is there
_GIB = 2**30

log = logging.getLogger(__name__)


def build_cache(cache_dir: str, cache_gib: float) -> "ShardCache | None":
    """Where shards from URLs go, of at most `cache_gib` GiB: a subfolder of `cache_dir`; None where that is empty."""
    return ShardCache(Path(cache_dir).expanduser() / FOLDER, round(cache_gib * _GIB)) if cache_dir else None


@dataclass(frozen=True)
class ShardCache:
    """A folder of at most `limit_bytes` of shards; made and marked when it is first used, see above."""

    folder: Path
    limit_bytes: int

    @property
    def _room(self) -> Room:
        return Room(self.folder, self.limit_bytes)

    def fetch_manifest(self, url: str) -> Path:
        """The manifest as it was at its URL when this process began, or later, so that the ranks of a node, which begin
        together, fetch it once; the copy of last time where the server does not answer.

        Raises:
            CacheError: the folder belongs to somebody else, or can't be made.
            DownloadError: not there, and never was.
        """
        folder = self._manifest_folder(check_url(url))
        self._claim()
        try:
            return fetch(url, folder, name="manifest.json", not_before=psutil.Process().create_time())
        except DownloadError as error:
            kept = folder / "manifest.json"
            if not kept.is_file():
                raise
            log.warning("%s; using the copy of last time", error)
            return kept

    def fetch_beside(self, url: str, name: str, *, sha256: str) -> Path:
        """The file `name` that lies beside the manifest at `url`, fetched to beside the manifest's copy.

        Raises:
            DownloadError: not there, or other bytes than the manifest says.
        """
        return fetch(join_url(url, name), self._manifest_folder(url), name=name, expected=Expected(sha256))

    def _manifest_folder(self, url: str) -> Path:
        return self.folder / "manifests" / hashlib.sha256(url.encode()).hexdigest()[:16]

    def require_room(self, num_bytes: int) -> None:
        """Check that all shards that a run needs at the same time fit in.

        Raises:
            CacheError: they do not.
        """
        if num_bytes > self.limit_bytes:
            raise CacheError(
                f"the shards needed at the same time have {num_bytes / _GIB:.1f} GiB but the cache {self.folder} may "
                f"hold {self.limit_bytes / _GIB:.1f}; they would be fetched again and again: raise data.cache_gib to "
                f"{num_bytes / _GIB + 0.1:.1f} or more, set data.shuffle=blocks (there with fewer data.window_shards "
                "or data.canonical_groups) or data.access=stream"
            )

    def open_shard(self, url: str, *, sha256: str, size: int) -> int:
        """A read-only descriptor of the shard, in the cache by then; it can't be evicted until it is closed.

        Raises:
            CacheError: no room, since the shards of others are in use; a folder without locks, or not the cache's own.
            DownloadError: it can't be fetched, or has other bytes than the manifest says.
        """
        path = self.folder / f"{sha256[:16]}_{url.partition('?')[0].rpartition('/')[2]}"
        for _ in range(_ATTEMPTS):
            with self._explained():
                file = _open_locked(path, size)
                if file is not None:
                    return file
                self._bring(url, path.name, sha256=sha256, size=size)
        raise CacheError(
            f"the shard {shown(url)} is evicted from {self.folder} as soon as it comes; raise data.cache_gib"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = locks.explain(error, remedy="choose another data.cache_dir")
            raise CacheError(f"cannot keep shards in {self.folder}: {reason}") from None

    def _claim(self) -> None:
        """Make and mark the folder, or check the mark of one that is there.

        Raises:
            CacheError: a folder without the mark is not the cache's, whatever it holds; or it can't be made.
        """
        with self._explained():
            if (self.folder / _MARK).is_file():
                return
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            marked = self.folder.with_name(f".{FOLDER}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            marked.mkdir()
            (marked / _MARK).write_text(_MARK_TEXT, encoding="utf-8")
            try:
                os.rename(marked, self.folder)  # onto nothing or an empty folder, else ENOTEMPTY: never over files
            except OSError as error:
                shutil.rmtree(marked, ignore_errors=True)  # the one made two lines above
                if (self.folder / _MARK).is_file():  # another process was faster
                    return
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise CacheError(
                    f"{self.folder} is there without the mark of the shard cache ({_MARK}): it holds something else, "
                    "which the cache would delete when it is full; move it away, or choose another data.cache_dir"
                ) from None

    def _bring(self, url: str, name: str, *, sha256: str, size: int) -> None:
        expected = Expected(sha256, size=size)
        self._claim()
        with self._room.reserved(name, size):
            try:
                fetch(url, self.folder, name=name, expected=expected)
            except DiskFullError as error:  # by others than this cache: what it holds itself can go
                if not self._room.free(size, keep=name):
                    raise CacheError(f"{error}; nothing in the cache can go") from None
                fetch(url, self.folder, name=name, expected=expected)


def _open_locked(path: Path, size: int) -> int | None:
    """A descriptor with a shared lock, or None where the shard is gone, going, or of another size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file)
        if found.st_size == size and os.path.exists(path) and os.stat(path).st_ino == found.st_ino:
            with contextlib.suppress(PermissionError):  # a shard that another user fetched
                os.utime(file, ns=(time.time_ns(), found.st_mtime_ns))  # many mounts keep no time of use themselves
            return file
    except FileNotFoundError:
        pass
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None
