"""A file arrives whole or not at all: over broken connections, kills, other bytes, many processes and full disks."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from dist_deeplab.downloads import (
    DiskFullError,
    DownloadError,
    Expected,
    check_url,
    fetch,
    fetching,
    is_url,
    join_url,
    remote,
    shown,
)
from tests.file_server import FileServer, serve

CONTENT = np.random.default_rng(0).integers(0, 256, 3 * 2**20 + 77, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    root = tmp_path / "server"
    (root / "a b").mkdir(parents=True)
    (root / "data.tar").write_bytes(CONTENT)
    (root / "a b" / "ü.txt").write_text("small")
    with serve(root) as running:
        yield running


@pytest.fixture
def url(server: FileServer) -> str:
    return f"{server.url}/data.tar"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.0)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected",
    [Expected(), Expected(DIGEST), Expected(DIGEST.upper(), size=len(CONTENT)), Expected(md5=MD5)],
)
def test_a_file_is_fetched_once(url: str, server: FileServer, expected: Expected, tmp_path: Path) -> None:
    for _ in range(3):
        path = fetch(url, tmp_path / "new" / "folder", expected=expected)
        assert path == tmp_path / "new/folder/data.tar"
        assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert visible(path.parent) == ["data.tar"]
    assert not (path.parent / ".data.tar.part").exists()


def test_the_name_is_the_last_part_of_the_url_without_its_query(server: FileServer, tmp_path: Path) -> None:
    assert fetch(f"{server.url}/a%20b/%C3%BC.txt?X-Signature=secret", tmp_path).name == "ü.txt"
    assert fetch(f"{server.url}/a b/ü.txt", tmp_path / "typed").name == "ü.txt"
    assert fetch(f"{server.url}/data.tar", tmp_path, name="other").name == "other"


def test_progress_is_told_in_bytes(url: str, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    fetch(url, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(min(n * 2**20, len(CONTENT)), len(CONTENT)) for n in range(1, 5)]


def test_a_redirection_is_followed_but_never_to_a_local_file(server: FileServer, tmp_path: Path) -> None:
    server.redirects = {"/moved": "/data.tar", "/evil": f"file://{tmp_path}/server/data.tar", "/ftp": "ftp://host/x"}
    assert fetch(f"{server.url}/moved", tmp_path).read_bytes() == CONTENT
    for name in ("evil", "ftp"):
        with pytest.raises(DownloadError, match="can't be fetched"):
            fetch(f"{server.url}/{name}", tmp_path)


def test_a_file_that_was_touched_is_read_again_and_replaced_if_damaged(
    url: str, server: FileServer, tmp_path: Path
) -> None:
    path = fetch(url, tmp_path, expected=Expected(sha256=DIGEST))
    os.utime(path, (1, 1))
    fetch(url, tmp_path, expected=Expected(sha256=DIGEST))
    assert len(server.requests) == 1, "its bytes are right, whatever its time"
    path.write_bytes(CONTENT[:-1] + b"\0")
    assert fetch(url, tmp_path, expected=Expected(sha256=DIGEST)).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:100])
    assert fetch(url, tmp_path).read_bytes() == CONTENT


def test_without_a_digest_a_file_of_another_url_is_not_taken(url: str, server: FileServer, tmp_path: Path) -> None:
    (server.root / "other").mkdir()
    (server.root / "other" / "data.tar").write_bytes(b"other")
    fetch(url, tmp_path)
    assert fetch(f"{server.url}/other/data.tar", tmp_path).read_bytes() == b"other"
    shutil.copy(server.root / "data.tar", tmp_path / "data.tar")  # by hand: taken if its digest is known
    assert fetch(f"{server.url}/nowhere/data.tar", tmp_path, expected=Expected(sha256=DIGEST)).read_bytes() == CONTENT


def test_refresh_sees_a_change_under_the_same_name(url: str, server: FileServer, tmp_path: Path) -> None:
    fetch(url, tmp_path)
    (server.root / "data.tar").write_bytes(b"new")
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    assert fetch(url, tmp_path, not_before=time.time()).read_bytes() == b"new"


# --- broken connections, kills ----------------------------------------------------------------------------------------


def test_a_broken_connection_continues_where_it_broke(url: str, server: FileServer, tmp_path: Path) -> None:
    server.cuts = [10, 2**20, 0, 1_500_000]
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    assert server.requests[1:] == [("/data.tar", f"bytes={n}-") for n in (10, 2**20 + 10, 2**20 + 10, 2_548_586)]
    assert server.sent == len(CONTENT)


def test_a_server_without_ranges_begins_again(url: str, server: FileServer, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [2**20]
    assert fetch(url, tmp_path).read_bytes() == CONTENT


def test_passing_errors_are_tried_again_and_lasting_ones_end_in_a_sentence(
    url: str, server: FileServer, tmp_path: Path
) -> None:
    server.statuses = [503, 429, 500, 502]
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    before = len(server.requests)
    for name, reason in (("absent.tar", "404 Not Found"),):
        with pytest.raises(DownloadError, match=f"{name} can't be fetched: {reason}"):
            fetch(f"{server.url}/{name}?token=secret", tmp_path)
    assert len(server.requests) == before + 1
    server.statuses = [503] * 5
    with pytest.raises(DownloadError, match="503"):
        fetch(url, tmp_path, not_before=time.time())
    with pytest.raises(DownloadError, match="refused"):
        fetch("http://127.0.0.1:9/x.tar", tmp_path)


def _fetch_and_die_at(url: str, folder: Path, number: int, done: int) -> None:
    def die(so_far: int, total: int | None) -> None:
        if so_far >= done:
            os.kill(os.getpid(), number)

    fetch(url, folder, progress=die)


def run_killed(url: str, folder: Path, done: int) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_fetch_and_die_at, args=(url, folder, signal.SIGKILL, done)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_kill_9_leaves_no_file_and_the_next_call_continues(url: str, server: FileServer, tmp_path: Path) -> None:
    run_killed(url, tmp_path / "here", 2 * 2**20)
    assert visible(tmp_path / "here") == []
    assert fetch(url, tmp_path / "here").read_bytes() == CONTENT
    assert server.requests[-1][1] != "", "ranged"


def test_kill_9_between_the_last_byte_and_the_name_costs_no_second_download(
    url: str, server: FileServer, tmp_path: Path
) -> None:
    run_killed(url, tmp_path / "here", len(CONTENT))
    part = tmp_path / "here" / ".data.tar.part"
    part.write_bytes(CONTENT)  # the last chunk may still have been in the killed process
    assert fetch(url, tmp_path / "here").read_bytes() == CONTENT
    assert server.sent <= len(CONTENT)


@pytest.mark.parametrize("digest", [None, hashlib.sha256(CONTENT[::-1]).hexdigest()])
def test_a_file_that_changed_on_the_server_is_not_mixed(
    digest: str | None, url: str, server: FileServer, tmp_path: Path
) -> None:
    run_killed(url, tmp_path, 2 * 2**20)
    (server.root / "data.tar").write_bytes(CONTENT[::-1])
    assert fetch(url, tmp_path, expected=Expected(sha256=digest)).read_bytes() == CONTENT[::-1]


def test_the_part_of_a_file_from_elsewhere_is_not_continued(url: str, server: FileServer, tmp_path: Path) -> None:
    run_killed(url, tmp_path, 2 * 2**20)
    (server.root / "other").mkdir()
    (server.root / "other" / "data.tar").write_bytes(CONTENT[::-1])
    assert fetch(f"{server.url}/other/data.tar", tmp_path).read_bytes() == CONTENT[::-1]
    assert server.requests[1:] == [("/other/data.tar", "")], "no range"


@pytest.mark.parametrize(("digest", "whole"), [(None, 2), (DIGEST, 1)])
def test_without_validators_only_a_known_digest_makes_continuing_safe(
    digest: str | None, whole: int, url: str, server: FileServer, tmp_path: Path
) -> None:
    server.validators = False
    run_killed(url, tmp_path, 2 * 2**20)
    assert fetch(url, tmp_path, expected=Expected(sha256=digest)).read_bytes() == CONTENT
    assert sum(wanted == "" for _, wanted in server.requests) == whole


def test_a_first_part_that_is_damaged_is_noticed_and_the_whole_fetched_again(
    url: str, server: FileServer, tmp_path: Path
) -> None:
    run_killed(url, tmp_path, 2 * 2**20)
    part = tmp_path / ".data.tar.part"
    part.write_bytes(bytes(len(part.read_bytes())))
    assert fetch(url, tmp_path, expected=Expected(sha256=DIGEST)).read_bytes() == CONTENT


def test_a_server_that_always_breaks_off_ends_in_an_error(
    url: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that the next attempt can't build on are no gain: without validators, without ranges, or a trickle."""
    for validators, ranges, cuts in (
        (False, True, [2**20, 2**20 + 1] * 50),
        (True, False, [2**21, 2**20] * 50),
        (True, True, [1000] * 100),
    ):
        server.requests.clear()
        server.validators, server.ranges, server.cuts = validators, ranges, cuts
        with pytest.raises(DownloadError, match="the connection ended after"):
            fetch(url, tmp_path / f"{validators}{ranges}{len(cuts)}")
        assert len(server.requests) <= 6


def test_a_ranged_answer_that_begins_elsewhere_is_not_written_there(
    url: str, server: FileServer, tmp_path: Path
) -> None:
    server.cuts, server.range_shift = [2**20], 7
    assert fetch(url, tmp_path / "here").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == ["", f"bytes={2**20}-", ""], "then without ranges"


def test_a_server_that_is_too_slow_ever_to_end_breaks_off(
    url: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SLOWEST_S", 0.2)
    server.bytes_per_s = 10_000
    with pytest.raises(DownloadError, match=r"only [\d,]+ bytes in 0 s"):
        fetch(url, tmp_path)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate by openssl")
def test_https_never_redirects_to_http(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-keyout", key, "-out", certificate, "-days", "1"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serve(server.root, tls=tls) as secure:
        address = secure.url.replace("http:", "https:")
        secure.redirects = {
            "/down": f"{server.url}/data.tar?token=secret",
            "/same": "/data.tar",
            "/again": f"{address}/same",
        }
        server.redirects = {"/up": f"{address}/data.tar", "/up_and_down": f"{address}/down"}
        assert fetch(f"{address}/data.tar", tmp_path / "1").read_bytes() == CONTENT
        assert fetch(f"{address}/again", tmp_path / "2").read_bytes() == CONTENT
        assert fetch(f"{server.url}/up", tmp_path / "3").read_bytes() == CONTENT
        for source in (f"{address}/down", f"{server.url}/up_and_down"):
            asked = len(server.requests)
            with pytest.raises(DownloadError, match="redirects from https to http://127") as caught:
                fetch(source, tmp_path / "4")
            assert "secret" not in str(caught.value)
            assert len(server.requests) - asked == source.startswith(server.url), "the http address was not asked"


# --- other bytes ------------------------------------------------------------------------------------------------------


def test_other_bytes_than_expected_are_deleted(url: str, server: FileServer, tmp_path: Path) -> None:
    server.corrupt = True
    with pytest.raises(DownloadError, match=f"SHA-256 .* not {DIGEST}; it was deleted"):
        fetch(url, tmp_path / "here", expected=Expected(sha256=DIGEST))
    server.corrupt = False
    server.cuts = [0]  # a wrong size is known before the first byte: none is sent
    with pytest.raises(DownloadError, match=r"has 3,145,805 bytes, not 5"):
        fetch(url, tmp_path / "here", expected=Expected(size=5))
    assert visible(tmp_path / "here") == []
    assert not (tmp_path / "here" / ".data.tar.part").exists()
    assert fetch(url, tmp_path / "here", expected=Expected(sha256=DIGEST)).read_bytes() == CONTENT


@pytest.mark.parametrize("lengths", [True, False])
def test_more_bytes_than_known_are_never_received(lengths: bool, url: str, server: FileServer, tmp_path: Path) -> None:
    """64 MiB instead of 1,000 bytes: the first MiB that is too much ends it, whether the server names a size or not."""
    (server.root / "data.tar").write_bytes(bytes(64 * 2**20))
    server.lengths, told = lengths, []
    with pytest.raises(DownloadError, match=r"has (67,108,864|more than 1,000) bytes, not 1,000"):
        fetch(url, tmp_path / "here", expected=Expected(size=1000), progress=lambda done, total: told.append(done))
    assert told == []
    assert not (tmp_path / "here" / ".data.tar.part").exists()


def test_a_body_of_unknown_length_stops_before_the_disk_is_full(
    url: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.lengths = False
    usage, asked = shutil.disk_usage(tmp_path), iter(range(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**24 + (3 - next(asked)) * 2**20))
    with pytest.raises(DiskFullError, match=r"1,048,576 bytes are to come and 0 are free"):
        fetch(url, tmp_path / "here")


@pytest.mark.parametrize("digest", ["", "0", "x" * 64, DIGEST[:-1], DIGEST + "0", f"{DIGEST}\n"])
def test_a_digest_that_is_not_one_never_switches_the_check_off(
    digest: str, url: str, server: FileServer, tmp_path: Path
) -> None:
    for expected in (Expected(digest), Expected(md5=digest)):
        with pytest.raises(DownloadError, match=r"is not the (SHA-256|MD5) of a file"):
            fetch(url, tmp_path, expected=expected)
    assert server.requests == []


def test_a_file_system_without_locks_is_a_sentence_not_a_marker_that_stays(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_implemented(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    with pytest.raises(DownloadError, match=r"no file locks .*-o flock.* choose another folder"):
        fetch(url, tmp_path)
    monkeypatch.undo()
    assert fetch(url, tmp_path).read_bytes() == CONTENT, "nothing was left behind that refuses it"


@pytest.mark.parametrize("record", [b"", b"[]", b'{"url": 1}', b"\xff", b"null"])
def test_a_damaged_record_is_not_believed(record: bytes, url: str, server: FileServer, tmp_path: Path) -> None:
    fetch(url, tmp_path)
    (tmp_path / ".data.tar.json").write_bytes(record)
    (tmp_path / ".data.tar.part.json").write_bytes(record)
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


# --- many processes, full disks ---------------------------------------------------------------------------------------


def test_processes_that_ask_at_once_wait_for_one_download(url: str, server: FileServer, tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        paths = list(pool.map(fetch, [url] * 4, [tmp_path / "here"] * 4))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.requests) == 1


def test_the_lock_of_a_killed_process_is_free(url: str, tmp_path: Path) -> None:
    run_killed(url, tmp_path, 1)
    started = time.monotonic()
    fetch(url, tmp_path)
    assert time.monotonic() - started < 30, "waited for a dead process"


def test_a_full_disk_is_known_before_the_first_byte(
    url: str, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**24 + 1000))
    with pytest.raises(DiskFullError, match=r"no room for data\.tar in .*here: 3,145,805 bytes .* 1,000 are free"):
        fetch(url, tmp_path / "here")
    assert visible(tmp_path / "here") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_on_the_way_is_a_sentence(url: str, tmp_path: Path) -> None:
    (tmp_path / ".data.tar.part").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="no room"):
        fetch(url, tmp_path)


def test_a_folder_that_can_not_be_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write .*file"):
        fetch(url, tmp_path / "file")


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("pipe:cat /etc/passwd", "run a command"),
        ("PIPE:rm -rf x", "run a command"),
        ("ftp://host/file", "not a URL that can be fetched"),
        ("file:///etc/passwd", "not a URL that can be fetched"),
        ("ssh://host/file", "not a URL"),
        ("github://org:repo@main/x", "not a URL"),
        ("simplecache::https://host/x", "not a URL"),
        ("https://host/x::file:///etc/passwd", "not a URL"),
        ("https://", "no file"),
        ("https://host", "no file"),
        ("https://host/folder/", "no file"),
        ("https://host/folder/..", "no file"),
        ("https://me:word@host/file", "user name"),
        ("data/voc/train.json", "not a URL"),
    ],
)
def test_other_kinds_of_urls_are_refused_without_being_opened(bad: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=reason) as caught:
        fetch(bad, tmp_path)
    assert "word" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_a_url_never_leaves_the_folder(server: FileServer, tmp_path: Path) -> None:
    (server.root / "..%2f").mkdir(exist_ok=True)
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/x/..%2F..%2F", tmp_path / "in")
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{server.url}/..%2F..%2Fescape", tmp_path / "in")
    assert not (tmp_path / "escape").exists()


def test_paths_and_urls_are_told_apart() -> None:
    for text in ("https://h/x", "s3://b/k", "pipe:ls", "ftp://h/x", "simplecache::s3://b/k", "hf://datasets/o/r/x"):
        assert is_url(text), text
    for text in ("data/voc/train.json", "/data:1/x.json", "a:b/x", "C:x", "runs/a::b/x.pt", "", "x//y"):
        assert not is_url(text), text
    assert check_url("hf://datasets/o/r/train.json")


def test_messages_hold_no_secrets_and_neighbours_keep_the_signature() -> None:
    assert shown("https://me:word@host/a/train.json?sig=secret#x") == "https://host/a/train.json"
    assert join_url("https://host/a/train.json?sig=s", "train 0.tar") == "https://host/a/train%200.tar?sig=s"
    assert join_url("s3://bucket/a/train.json", "x.tar") == "s3://bucket/a/x.tar"


# --- object stores ----------------------------------------------------------------------------------------------------


class FolderStore(LocalFileSystem):
    """Stands for an object store: a folder behind a scheme, through the same interface of fsspec."""

    root = ""
    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path if path.startswith("/") else f"{cls.root}/{path.removeprefix('s3://')}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(FolderStore, "root", str(tmp_path / "store"))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (FolderStore(), FolderStore._strip_protocol(url)))
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    (tmp_path / "store" / "bucket" / "data.tar").write_bytes(CONTENT)
    return tmp_path / "store" / "bucket"


def test_an_object_store_is_read_through_fsspec_and_resumed(store: Path, tmp_path: Path) -> None:
    url = "s3://bucket/data.tar"
    run_killed(url, tmp_path / "here", 2 * 2**20)
    told: list[int] = []
    path = fetch(
        url, tmp_path / "here", expected=Expected(sha256=DIGEST), progress=lambda done, total: told.append(done)
    )
    assert path.read_bytes() == CONTENT
    assert told[0] > 2**20, "continued"
    run_killed(url, tmp_path / "there", 2 * 2**20)
    (store / "data.tar").write_bytes(CONTENT[::-1])
    assert fetch(url, tmp_path / "there").read_bytes() == CONTENT[::-1]
    with pytest.raises(DownloadError, match="FileNotFoundError"):
        fetch("s3://bucket/absent", tmp_path)


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_a_missing_package_is_named_with_its_extra(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(DownloadError, match=r'Install s3fs.*pip install "dist_deeplab\[remote\]"'):
        fetch(f"{scheme}://bucket/data.tar", tmp_path)


def test_records_are_plain_json(url: str, tmp_path: Path) -> None:
    fetch(url, tmp_path)
    record = json.loads((tmp_path / ".data.tar.json").read_text())
    assert (record["url"], record["size"], record["digests"]) == (url, len(CONTENT), {"sha256": DIGEST})
