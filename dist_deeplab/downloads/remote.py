"""Bytes of a remote file from any offset on: http(s) by the standard library, object stores by fsspec.

Not fsspec for http: a resume is safe only if the server is asked for the rest of the *same* file (If-Range), and fsspec
does not send that.
"""

import contextlib
import http.client
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dist_deeplab.downloads.urls import DownloadError, shown
from dist_deeplab.errors import first_line

_TIMEOUT_S = 60.0  # for a connection, and for each packet
_SLOWEST_S = 600.0  # for the bytes of one `Stream.read`
_BLOCK_BYTES = 8 * 2**20  # of one request to an object store
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may change
_COMPLETE = 416  # the range begins at the file's end (or behind it)


class RemoteError(Exception):
    """The remote side failed. `permanent`: another attempt would fail too."""

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True)
class Remote:
    """What identifies a remote file's content: a resume needs the same `version`; empty values are unknown."""

    url: str
    size: int | None
    version: str


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


@dataclass
class Stream:
    """An open remote file: the bytes from `offset` on."""

    remote: Remote
    offset: int
    body: Readable

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end.

        Raises:
            RemoteError: the connection broke, or is too slow ever to end.
        """
        read_some = getattr(self.body, "read1", self.body.read)  # `read` would wait for all of them, however long
        pieces: list[bytes] = []
        missing, until = size, time.monotonic() + _SLOWEST_S
        try:
            while missing and (piece := read_some(missing)):
                pieces.append(piece)
                missing -= len(piece)
                if time.monotonic() > until:
                    raise TimeoutError(f"only {size - missing:,} bytes in {_SLOWEST_S:.0f} s")
        except Exception as error:  # whatever the library behind it raises
            raise RemoteError(first_line(error), permanent=False) from error
        return b"".join(pieces)


@contextlib.contextmanager
def open_remote(url: str, *, offset: int, version: str) -> Iterator[Stream]:
    """Open the file from `offset` on, or from 0 where the server has no ranges or, by now, another version.

    Args:
        url: of a kind that `check_url` passes.
        offset: bytes that are here already.
        version: of the file they are part of; empty: it is not compared.

    Raises:
        RemoteError: no connection, no such file, no permission.
        DownloadError: the package for this kind of URL is not installed.
    """
    opener = _open_http if url.startswith("http") else _open_store
    with opener(url, offset, version) as stream:
        yield stream


@contextlib.contextmanager
def _open_http(url: str, offset: int, version: str) -> Iterator[Stream]:
    headers = {"User-Agent": "dist_deeplab", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation), headers=headers)
    try:
        response = _http_opener().open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        end = _content_range(error.headers)[1]
        if error.code == _COMPLETE and offset and end is not None:
            error.close()
            if end == offset:
                yield Stream(Remote(url, end, version), offset, error)
            else:  # longer than the file is now
                with _open_http(url, 0, "") as stream:
                    yield stream
            return
        raise RemoteError(f"{error.code} {error.reason}", permanent=error.code not in _PASSING) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise RemoteError(
            first_line(reason) if isinstance(reason, Exception) else str(reason), permanent=False
        ) from None
    with response:
        stream = _http_stream(url, response)
        if stream.offset in (0, offset) and (not stream.offset or version in ("", stream.remote.version)):
            yield stream
            return
    if not offset:
        raise RemoteError(f"an answer from byte {stream.offset:,} on to a request for the whole", permanent=True)
    with _open_http(url, 0, "") as stream:  # ranges that are not those asked for, or of another version: do without
        yield stream


def _http_stream(url: str, response: http.client.HTTPResponse) -> Stream:
    entity_tag = response.headers.get("ETag", "")
    version = entity_tag if entity_tag.startswith('"') else response.headers.get("Last-Modified", "")  # W/: weak
    if response.status == 206:
        start, size = _content_range(response.headers)
        if start is None:
            raise RemoteError("a partial answer that does not say which part", permanent=True)
        return Stream(Remote(url, size, version), start, response)
    length = response.headers.get("Content-Length", "")
    return Stream(Remote(url, int(length) if length.isdecimal() else None, version), 0, response)


def _content_range(headers: Any) -> tuple[int | None, int | None]:
    """Start and whole size that `Content-Range: bytes 5-9/10` (or `bytes */10`) names."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", (headers.get("Content-Range") or "").strip())
    if not found:
        return None, None
    return tuple(int(text) if text and text.isdecimal() else None for text in found.groups())  # type: ignore[return-value]


class _NoWayDown(urllib.request.HTTPRedirectHandler):
    """Redirections, but none from https to http: whoever is on the way could then send other bytes."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        """See urllib."""
        if req.type == "https" and urllib.parse.urlsplit(newurl).scheme != "https":
            raise RemoteError(f"it redirects from https to {shown(newurl)}, which is not encrypted", permanent=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _http_opener() -> urllib.request.OpenerDirector:
    """An opener of http and https alone, so that no redirection leads to a local file or to FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _NoWayDown(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


@contextlib.contextmanager
def _open_store(url: str, offset: int, version: str) -> Iterator[Stream]:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        about = files.info(path)
    except ImportError as error:
        raise DownloadError(
            f"{shown(url)} needs a package that is not installed ({first_line(error)}): "
            'pip install "dist_deeplab[remote]"'
        ) from None
    except Exception as error:  # each store's library has errors of its own
        permanent = isinstance(error, FileNotFoundError | PermissionError)
        raise RemoteError(f"{type(error).__name__}: {first_line(error)}", permanent=permanent) from error
    names = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    found = next((str(about[name]) for name in names if about.get(name)), "")
    size = about.get("size")
    same = offset > 0 and (not version or found == version) and (size is None or offset <= size)
    try:
        file = files.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
        file.seek(offset if same else 0)
    except Exception as error:
        raise RemoteError(f"{type(error).__name__}: {first_line(error)}", permanent=False) from error
    with file:
        yield Stream(Remote(url, size, found), offset if same else 0, file)
