"""Which URLs are taken, and how they are shown. No form of a URL runs a command."""

import re
import urllib.parse
from pathlib import PurePosixPath

from dist_deeplab.errors import UserError
from dist_deeplab.redaction import shown_url

SCHEMES = ("https", "http", "s3", "gs", "hf")
_ALLOWED = ", ".join(f"{scheme}://" for scheme in SCHEMES)


class DownloadError(UserError):
    """A file can't be fetched, or is not the expected one."""


def is_url(text: str) -> bool:
    """Whether `text` is meant as a URL rather than a path, whether its kind is known or not."""
    return re.match(r"([A-Za-z][\w+.-]+::?)+//|pipe:", text) is not None


def check_url(url: str) -> str:
    """`url`, if it is of a kind that `fetch` takes.

    Raises:
        DownloadError: it would run a command, has another scheme, a chained one, a password, or names no file.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "pipe":
        raise DownloadError(f"{url!r} would run a command, which data and weights may not do; use {_ALLOWED} or a path")
    if scheme not in SCHEMES or not rest.startswith("//") or "::" in url:
        raise DownloadError(f"{shown(url)!r} is not a URL that can be fetched; use {_ALLOWED} or a path")
    parts = urllib.parse.urlsplit(url)
    if not parts.netloc or not name_in(url):
        raise DownloadError(f"{shown(url)!r} names no file; give the whole URL")
    if "@" in parts.netloc:
        raise DownloadError(f"{shown(url)!r} holds a user name; URLs end up in logs, so use a signed one instead")
    return url


def shown(url: str) -> str:
    """The URL without what may be secret: the user's part and all behind the question mark."""
    return shown_url(url).partition("#")[0]


def name_in(url: str) -> str:
    """The file name that a URL ends in; empty where it ends in a slash or in dots."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    name = path.rpartition("/")[2]
    return "" if name in (".", "..") or "\0" in name else PurePosixPath(name).name


def join_url(base: str, name: str) -> str:
    """The URL of the file `name` in the folder of the file `base`; what follows the question mark is kept."""
    parts = urllib.parse.urlsplit(base)
    path = f"{parts.path.rpartition('/')[0]}/{urllib.parse.quote(name)}"
    return urllib.parse.urlunsplit(parts._replace(path=path))
