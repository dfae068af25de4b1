"""File locks that the operating system frees when their process ends, `kill -9` included.

Where a file system has no such locks (Lustre mounted without `flock`, some FUSE), filelock would fall back to a marker
file that outlives its process: a killed job could never be started again. Here that is an error that says what to do.
"""

import errno
from pathlib import Path

from filelock import FileLock

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def file_lock(path: Path, *, timeout_s: float = -1) -> FileLock:
    """A lock on the file `path`, which is made if missing and stays; not taken yet.

    Taking it raises `filelock.Timeout`, or `OSError` where the file can't be opened or locked (see `explain`).
    """
    return FileLock(path, timeout=timeout_s, fallback_to_soft=False)


def explain(error: OSError, *, remedy: str) -> str:
    """What went wrong with a lock or the folder it is in, for an error's sentence; `remedy` ends it."""
    if error.errno in _NO_LOCKS:
        return (
            f"its file system has no file locks ({error.strerror}); mount it with them (Lustre: -o flock; NFS: with "
            f"its lock daemon), or {remedy}"
        )
    return f"{error.strerror or error}; {remedy}"
