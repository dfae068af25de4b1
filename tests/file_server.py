"""A real HTTP server of files for tests: ranged requests, and the ways in which a connection can go wrong."""

import contextlib
import hashlib
import http.server
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves the files under `root` at `url`; the attributes may be changed while it runs.

    ranges: whether `Range` is understood (with `If-Range`, as RFC 9110 wants it).
    validators: whether answers carry an ETag.
    cuts: how many bytes each of the next answers sends before its connection breaks; after these, whole answers.
    statuses: what the next requests are answered with instead.
    bytes_per_s: how fast each answer is sent, 0: as fast as can be.
    latency_s: how long it takes until an answer begins.
    lengths: whether answers say their Content-Length.
    range_shift: how many bytes too late the answers to ranged requests begin.
    corrupt: whether one byte in the middle of each file is flipped.
    requests: what came in: (path, Range header or empty).
    sent: bytes of bodies sent.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges = self.validators = True
        self.corrupt = False
        self.cuts: list[int] = []
        self.bytes_per_s = 0
        self.latency_s = 0.0
        self.lengths = True
        self.range_shift = 0
        self.statuses: list[int] = []
        self.redirects: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent = 0

    @property
    def url(self) -> str:
        """Where it is, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that went away: tests kill them."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.requests.append((self.path, wanted))
        time.sleep(server.latency_s)
        path = server.root / urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.end_headers()
            return None
        if not path.is_file():
            return self.send_error(404)
        content = bytearray(path.read_bytes())
        if server.corrupt:
            content[len(content) // 2] ^= 1
        tag = f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"'
        start = int(re.sub(r"bytes=(\d+)-", r"\1", wanted)) if wanted and server.ranges else 0
        if self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        start += server.range_shift if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.validators:
            self.send_header("ETag", tag)
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = bytes(content[start:])
        body = body[: server.cuts.pop(0)] if server.cuts else body
        pieces = 20 * len(body) // server.bytes_per_s + 1 if server.bytes_per_s else 1
        for number in range(pieces):
            if number:
                time.sleep(0.05)
            self.wfile.write(body[len(body) * number // pieces : len(body) * (number + 1) // pieces])
        server.sent += len(body)
        self.close_connection = True
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what came in is in `requests`."""


@contextlib.contextmanager
def serve(root: Path, *, tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Serve `root` on a free port while the context lasts; `tls`: by https (`url` says http all the same)."""
    with FileServer(root) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
