"""Where the weights are: a path, or a URL that is fetched once and kept."""

import hashlib
import os
import re
from pathlib import Path

from dist_deeplab import downloads
from dist_deeplab.errors import UserError
from dist_deeplab.files import sha256

_NAMES_STATE_DIGESTS = ("download.pytorch.org", "download.openmmlab.com")
"""Hosts whose files are called <name>-<first 8 digits of their SHA-256>.pth (torch.hub's convention)."""


def local_path(source: str) -> Path:
    """Path of a file given as path or URL; a URL may end in `#sha256=<64 hexadecimal digits>`.

    A URL is fetched into `cache_folder()`, by one process of a node while the others wait.

    Raises:
        UserError: not there, or bytes with another digest.
    """
    if not downloads.is_url(source):
        if "://" in source:
            downloads.check_url(source)  # says which are known
        return Path(source).expanduser()
    url, _, fragment = source.partition("#")
    digest = None
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if not found:
            raise UserError(f"{fragment!r} behind the URL of the weights must be sha256= and 64 hexadecimal digits")
        digest = found[1].lower()
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:12]  # one name, two URLs: two files
    path = downloads.fetch(url, folder, expected=downloads.Expected(digest))
    if digest is None:
        _check_name(url, path)
    return path


def cache_folder() -> Path:
    """Folder that keeps fetched weights: $DIST_DEEPLAB_CACHE/weights, else in the user's cache (XDG)."""
    own = os.environ.get("DIST_DEEPLAB_CACHE")
    if own:
        return Path(own).expanduser() / "weights"
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "dist_deeplab" / "weights"


def _check_name(url: str, path: Path) -> None:
    """Compare a file with the digest in its name, if its host is known to put it there."""
    host = re.match(r"https?://([^/:]+)", url)
    stated = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if host and host[1] in _NAMES_STATE_DIGESTS and stated:
        found = sha256(path)
        if not found.startswith(stated[1]):
            raise UserError(
                f"{path} has the SHA-256 {found[: len(stated[1])]}..., not {stated[1]} as its name says; delete it and "
                "start again"
            )
