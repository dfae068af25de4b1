"""A folder of this user alone, for what must not be read, replaced or locked by others: locks, and known stores."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """`$XDG_STATE_HOME/dist_deeplab` (`~/.local/state`), else one in the system's temporary folder; mode 700.

    Raises:
        OSError: neither can be made, or the name is taken by another user.
    """
    candidates = [Path(tempfile.gettempdir()) / f"dist_deeplab-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # a user id without an entry in /etc/passwd and no HOME
        users = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        candidates.insert(0, Path(users).expanduser() / "dist_deeplab")
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.lstat()  # of a link that somebody put there, not of what it leads to
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
                folder.chmod(0o700)
                return folder
    raise OSError(f"no folder of this user alone can be made ({', '.join(map(str, candidates))}); set XDG_STATE_HOME")


def known_stores() -> list[str]:
    """Addresses of MLflow stores that this user has sent runs to by an explicit setting."""
    try:
        return (private_folder() / "stores").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def remember_store(uri: str) -> None:
    """Add an address to the known ones; a run's folder that names it may be sent there from now on.

    Raises:
        OSError: the list can't be written.
    """
    if uri not in known_stores():
        with (private_folder() / "stores").open("a", encoding="utf-8") as file:
            file.write(f"{uri}\n")
