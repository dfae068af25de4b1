"""`fetch`: one download per node, resumed after a kill, verified, and named only when whole.

In the folder lie `<name>`, complete; hidden beside it `.<name>.lock`, `.<name>.json` (where it came from and what was
verified) and, while it comes, `.<name>.part` with `.<name>.part.json`.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dist_deeplab import files
from dist_deeplab.downloads.remote import Remote, RemoteError, Stream, open_remote
from dist_deeplab.downloads.urls import DownloadError, check_url, name_in, shown

_CHUNK = 2**20
_MAX_FAILURES = 5  # in a row, without a byte in between
_FIRST_PAUSE_S = 1.0  # doubled with each failure in a row
_SPARE_BYTES = 2**24  # left free on the disk, for whoever else writes there

_DIGEST_NAMES = {"sha256": "SHA-256", "md5": "MD5"}

T = TypeVar("T")
log = logging.getLogger(__name__)

Progress = Callable[[int, "int | None"], object]
"""Is called with the bytes that are there and those of the whole file (None: unknown)."""


class DiskFullError(DownloadError):
    """The folder's file system has no room for the file."""


def fetch(
    url: str,
    folder: str | Path,
    *,
    name: str | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the path of the file at `url`, downloaded into `folder` unless it lies there already.

    Any number of processes may ask at once: they wait for one download. After a kill the next call goes on with what
    came, if the server can and its file is still the same.

    Args:
        url: http, https, s3, gs or hf.
        folder: made if missing; on a disk of this node, or one whose file system knows `flock`.
        name: file name in `folder`; default: the last part of the URL.
        sha256: hexadecimal digest that the file must have. A file that has it is taken, wherever it came from;
            without one, a file that came from this URL.
        md5: the same, for files whose owners publish no better digest.
        size: bytes that the file must have.
        refresh: fetch it even if it is there: for small files that change under their name.
        progress: see `Progress`; called after each MiB.

    Raises:
        DownloadError: not there, no connection after several tries, other bytes than expected, unwritable folder.
        DiskFullError: no room in `folder`.
    """
    check_url(url)
    folder = Path(folder).expanduser()
    target = folder / (name or name_in(url))
    digests = {name: text.lower() for name, text in (("sha256", sha256), ("md5", md5)) if text}
    download = _Download(url, target, digests, size, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(target, url)
        try:
            if refresh or not download.is_there():
                download.run()
        finally:
            lock.release()
    except OSError as error:
        raise _disk_error(error, target) from None
    return target


def _take_lock(target: Path, url: str) -> FileLock:
    lock = FileLock(_beside(target, "lock"))
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        log.info("waiting for another process that fetches %s", shown(url))
        lock.acquire()
    return lock


@dataclass(frozen=True)
class _Record:
    """Where a file came from and what it was found to be: later calls trust this as long as the file is untouched."""

    url: str
    size: int
    digests: dict[str, str]
    mtime_ns: int


@dataclass(frozen=True)
class _Download:
    """The way of one file to `target`."""

    url: str
    target: Path
    digests: dict[str, str]
    size: int | None
    progress: Progress | None

    @property
    def part(self) -> Path:
        """Where the bytes gather."""
        return _beside(self.target, "part")

    def is_there(self) -> bool:
        """Return whether `target` is the wanted file."""
        if not self.target.is_file():
            return False
        found = self.target.stat()
        if self.size not in (None, found.st_size):
            return False
        record = _read_record(_beside(self.target, "json"), _Record)
        if record and (record.size, record.mtime_ns) != (found.st_size, found.st_mtime_ns):
            record = None
        if not self.digests:
            return record is not None and record.url == self.url
        known = record.digests if record else {}
        return all((known.get(kind) or files.digest(self.target, kind)) == text for kind, text in self.digests.items())

    def run(self) -> None:
        """Fetch, verify and name the file.

        Raises:
            DownloadError: see `fetch`.
            OSError: the disk.
        """
        resumed = self._fill()
        problem, digests = self._examine()
        if problem and resumed:  # the first part was of another file, or was damaged here
            log.warning("%s, put together from two attempts, %s; fetching it anew", shown(self.url), problem)
            self.part.unlink()
            self._fill()
            problem, digests = self._examine()
        if problem:
            self.part.unlink()
            raise DownloadError(f"{shown(self.url)} {problem}; it was thrown away, ask its owner or try another mirror")
        files.fsync(self.part)
        os.replace(self.part, self.target)
        found = self.target.stat()
        _write_record(_beside(self.target, "json"), _Record(self.url, found.st_size, digests, found.st_mtime_ns))
        _beside(self.target, "part.json").unlink(missing_ok=True)
        files.fsync(self.target.parent)

    def _examine(self) -> tuple[str, dict[str, str]]:
        """Return what is wrong with the fetched bytes, empty if nothing, and their digests."""
        size = self.part.stat().st_size
        digests = {kind: files.digest(self.part, kind) for kind in {"sha256": "", **self.digests}}
        if self.size not in (None, size):
            return f"has {size:,} bytes, not {self.size:,}", digests
        for kind, text in self.digests.items():
            if digests[kind] != text:
                return f"has the {_DIGEST_NAMES[kind]} {digests[kind]}, not {text}", digests
        return "", digests

    def _fill(self) -> bool:
        """Gather the whole file, over as many connections as it takes; return whether these were several."""
        failures, resumed = 0, False
        while True:
            offset, version = self._usable_bytes()
            try:
                with open_remote(self.url, offset=offset, version=version) as stream:
                    resumed |= stream.offset > 0
                    self._receive(stream)
                return resumed
            except RemoteError as error:
                gained = self._size_of_part() > offset
                failures = 1 if gained else failures + 1
                if error.permanent or failures >= _MAX_FAILURES:
                    raise DownloadError(f"{shown(self.url)} can't be fetched: {error}") from None
                log.warning("the download of %s broke off (%s); going on", shown(self.url), error)
            time.sleep(_FIRST_PAUSE_S * 2 ** (failures - 1))

    def _usable_bytes(self) -> tuple[int, str]:
        """Return how many bytes of `part` a download may go on from, and of which version of the file they are.

        Without a version only a known digest makes that safe.
        """
        known = _read_record(_beside(self.target, "part.json"), Remote)
        if known and known.url == self.url and known.version:
            return self._size_of_part(), known.version
        return (self._size_of_part() if self.digests else 0), ""

    def _size_of_part(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self, stream: Stream) -> None:
        """Write the stream to `part`, from its offset on.

        Raises:
            RemoteError: it broke off.
            DownloadError: it is of a wrong size, or there is no room.
            OSError: the disk.
        """
        total = stream.remote.size
        if None not in (self.size, total) and total != self.size:
            raise DownloadError(
                f"{shown(self.url)} has {total:,} bytes, not {self.size:,}; ask its owner or try another mirror"
            )
        free = shutil.disk_usage(self.part.parent).free
        if total is not None and total - stream.offset > free - _SPARE_BYTES:
            raise DiskFullError(
                f"no room for {self.target.name} in {self.target.parent}: {total - stream.offset:,} bytes are to come "
                f"and {max(0, free - _SPARE_BYTES):,} are free; make room or choose another folder"
            )
        _write_record(_beside(self.target, "part.json"), stream.remote)
        done = stream.offset
        with self.part.open("r+b" if done else "wb") as file:
            if done:
                file.truncate(done)
                file.seek(done)
            while chunk := stream.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if self.progress:
                    self.progress(done, total)
        if total is not None and done < total:
            raise RemoteError(f"the connection ended after {done:,} of {total:,} bytes", permanent=False)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _read_record(path: Path, kind: type[T]) -> T | None:
    """Return the record in a file, or None where there is none or it is damaged: then what it is about is not used."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kind(**values)
    except (OSError, ValueError, TypeError):
        return None


def _write_record(path: Path, record: _Record | Remote) -> None:
    path.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


def _disk_error(error: OSError, target: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no room for {target.name} in {target.parent}; make room or choose another folder")
    return DownloadError(f"cannot write {error.filename or target}: {error.strerror or error}; choose another folder")
