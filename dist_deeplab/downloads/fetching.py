"""`fetch`: one download per node, resumed after a kill, verified, and named only when whole.

In the folder lie `<name>`, complete; hidden beside it `.<name>.lock`, `.<name>.json` (where it came from and what was
verified) and, while it is downloaded, `.<name>.part` with `.<name>.part.json`.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dist_deeplab import files, locks
from dist_deeplab.downloads.records import Record, beside, read_record, write_record
from dist_deeplab.downloads.remote import Remote, RemoteError, Stream, open_remote
from dist_deeplab.downloads.urls import DownloadError, check_url, name_in, shown

_CHUNK = 2**20
_MAX_FAILURES = 5  # in a row, without a gain in between
_LEAST_GAIN = 2**16  # bytes that the next attempt can build on: a server that sends less is useless
_FIRST_PAUSE_S = 1.0  # doubled with each failure in a row
_SPARE_BYTES = 2**24  # left free on the disk, for whoever else writes there

_DIGESTS = {"sha256": ("SHA-256", 64), "md5": ("MD5", 32)}  # name, hexadecimal digits

log = logging.getLogger(__name__)

Progress = Callable[[int, "int | None"], object]
"""Is called with the bytes that are there and those of the whole file (None: unknown)."""


class DiskFullError(DownloadError):
    """The folder's file system has no room for the file."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is fetched; None (not the empty string): unknown.

    sha256: 64 hexadecimal digits. md5: 32 of them, for files whose owners publish no better digest. size: bytes.
    """

    sha256: str | None = None
    md5: str | None = None
    size: int | None = None

    @property
    def digests(self) -> dict[str, str]:
        """{kind: digest in lower case} of the digests that are known."""
        return {kind: text.lower() for kind, text in (("sha256", self.sha256), ("md5", self.md5)) if text is not None}

    def require_possible(self, url: str) -> None:
        """Check that the digests are digests.

        Raises:
            DownloadError: one is not.
        """
        for kind, text in self.digests.items():
            if not re.fullmatch(f"[0-9a-f]{{{_DIGESTS[kind][1]}}}", text):
                raise DownloadError(f"{text!r} is not the {_DIGESTS[kind][0]} of a file, which {shown(url)} must have")


ANYTHING = Expected()
"""Nothing is known of the file: its URL says which one it is."""


def fetch(
    url: str,
    folder: str | Path,
    *,
    name: str | None = None,
    expected: Expected = ANYTHING,
    not_before: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """The path of the file at `url`, downloaded into `folder` unless it lies there already.

    Any number of processes may ask at once: they wait for one download. After a kill the next call continues from the
    bytes that are there, if the server can and its file is still the same. An attempt counts as failed unless the next
    one can build on it, so that a server that always breaks off ends in an error; one that sends less than 1 MiB in
    10 minutes breaks off too.

    Args:
        url: http, https, s3, gs or hf.
        folder: made if missing; on a disk of this node, or one whose file system knows `flock`.
        name: file name in `folder`; default: the last part of the URL.
        expected: digests and size that the file must have. A file with the digests is taken, wherever it came from;
            where none is known, a file that came from this URL.
        not_before: a file that came before this time (as of `time.time`) is fetched again: for small files that change
            under their name.
        progress: see `Progress`; called after each MiB.

    Raises:
        DownloadError: not there, no connection after several tries, other bytes or more of them than expected,
            unwritable folder or one without file locks, a digest that is not one.
        DiskFullError: no room in `folder`.
    """
    check_url(url)
    folder = Path(folder).expanduser()
    target = folder / (name or name_in(url))
    expected.require_possible(url)
    download = _Download(url, target, expected, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(target, url)
        try:
            if not download.is_there(not_before):
                download.run()
        finally:
            lock.release()
    except OSError as error:
        raise _disk_error(error, target) from None
    return target


def _take_lock(target: Path, url: str) -> FileLock:
    lock = locks.file_lock(beside(target, "lock"))
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        log.info("waiting for another process that fetches %s", shown(url))
        lock.acquire()
    return lock


@dataclass(frozen=True)
class _Download:
    """The way of one file to `target`."""

    url: str
    target: Path
    expected: Expected
    progress: Progress | None

    @property
    def part(self) -> Path:
        """Where the bytes gather."""
        return beside(self.target, "part")

    def is_there(self, not_before: float | None) -> bool:
        """Whether `target` is the wanted file, and came at `not_before` or later."""
        if not self.target.is_file():
            return False
        found = self.target.stat()
        if not_before is not None and found.st_mtime < not_before:
            return False
        if self.expected.size not in (None, found.st_size):
            return False
        record = read_record(beside(self.target, "json"), Record)
        if record and (record.size, record.mtime_ns) != (found.st_size, found.st_mtime_ns):
            record = None
        if not self.expected.digests:
            return record is not None and record.url == self.url
        known = record.digests if record else {}
        return all(
            (known.get(kind) or files.digest(self.target, kind)) == text for kind, text in self.expected.digests.items()
        )

    def run(self) -> None:
        """Fetch, verify and name the file.

        Raises:
            DownloadError: see `fetch`.
            OSError: the disk.
        """
        resumed = self._fill()
        problem, digests = self._examine()
        if problem and resumed:  # the first part was of another file, or was damaged here
            log.warning("%s, put together from two attempts, %s; fetching it again", shown(self.url), problem)
            self.part.unlink()
            self._fill()
            problem, digests = self._examine()
        if problem:
            self.part.unlink()
            raise DownloadError(f"{shown(self.url)} {problem}; it was deleted, ask its owner or try another source")
        files.fsync(self.part)
        os.replace(self.part, self.target)
        found = self.target.stat()
        write_record(beside(self.target, "json"), Record(self.url, found.st_size, digests, found.st_mtime_ns))
        beside(self.target, "part.json").unlink(missing_ok=True)
        files.fsync(self.target.parent)

    def _examine(self) -> tuple[str, dict[str, str]]:
        """What is wrong with the fetched bytes, empty if nothing, and their digests."""
        size = self.part.stat().st_size
        digests = {kind: files.digest(self.part, kind) for kind in {"sha256": "", **self.expected.digests}}
        if self.expected.size not in (None, size):
            return f"has {size:,} bytes, not {self.expected.size:,}", digests
        for kind, text in self.expected.digests.items():
            if digests[kind] != text:
                return f"has the {_DIGESTS[kind][0]} {digests[kind]}, not {text}", digests
        return "", digests

    def _fill(self) -> bool:
        """Gather the whole file, over as many connections as it takes; whether these were several."""
        failures, best, resumed = 0, 0, False
        while True:
            offset, version = self._usable_bytes()
            best = max(best, offset)
            try:
                with open_remote(self.url, offset=offset, version=version) as stream:
                    resumed |= stream.offset > 0
                    self._receive(stream)
                return resumed
            except RemoteError as error:
                gained = self._usable_bytes()[0] - best >= _LEAST_GAIN
                failures = 1 if gained else failures + 1
                if error.permanent or failures >= _MAX_FAILURES:
                    raise DownloadError(f"{shown(self.url)} can't be fetched: {error}") from None
                log.warning("the download of %s broke off (%s); trying again", shown(self.url), error)
            time.sleep(_FIRST_PAUSE_S * 2 ** (failures - 1))

    def _usable_bytes(self) -> tuple[int, str]:
        """Bytes of `part` that a download may continue from, and of which version of the file they are.

        Without a version only a known digest makes that safe.
        """
        known = read_record(beside(self.target, "part.json"), Remote)
        if known and known.url == self.url and known.version:
            return self._size_of_part(), known.version
        return (self._size_of_part() if self.expected.digests else 0), ""

    def _size_of_part(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self, stream: Stream) -> None:
        """Write the stream to `part`, from its offset on.

        Raises:
            RemoteError: it broke off.
            DownloadError: it has more or fewer bytes than it must have, or there is no room.
            OSError: the disk.
        """
        total = stream.remote.size
        if None not in (self.expected.size, total) and total != self.expected.size:
            raise self._wrong_size(f"{total:,}")
        limit = self.expected.size if total is None else total
        self._require_room(0 if limit is None else limit - stream.offset)
        write_record(beside(self.target, "part.json"), stream.remote)
        done = stream.offset
        with self.part.open("r+b" if done else "wb") as file:
            if done:
                file.truncate(done)
                file.seek(done)
            while chunk := stream.read(_CHUNK):
                done += len(chunk)
                if limit is None:
                    self._require_room(len(chunk))
                elif done > limit:
                    self.part.unlink()
                    raise self._wrong_size(f"more than {limit:,}")
                file.write(chunk)
                if self.progress:
                    self.progress(done, total)
        if total is not None and done < total:
            raise RemoteError(f"the connection ended after {done:,} of {total:,} bytes", permanent=False)

    def _wrong_size(self, found: str) -> DownloadError:
        wanted = "what its server said" if self.expected.size is None else f"{self.expected.size:,}"
        return DownloadError(f"{shown(self.url)} has {found} bytes, not {wanted}; ask its owner or try another source")

    def _require_room(self, num_bytes: int) -> None:
        """Check that `num_bytes` can be written and some remain free for others.

        Raises:
            DiskFullError: they can't.
        """
        free = max(0, shutil.disk_usage(self.part.parent).free - _SPARE_BYTES)
        if num_bytes > free:
            raise DiskFullError(
                f"no room for {self.target.name} in {self.target.parent}: {num_bytes:,} bytes are to come and {free:,} "
                "are free; make room or choose another folder"
            )


def _disk_error(error: OSError, target: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no room for {target.name} in {target.parent}; make room or choose another folder")
    return DownloadError(
        f"cannot write {error.filename or target}: {locks.explain(error, remedy='choose another folder')}"
    )
