"""Shards from URLs: one download per node, whole and verified, under a limit, never taken from one who reads them."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_deeplab.data.shards import cache as shard_cache
from dist_deeplab.data.shards import room
from dist_deeplab.data.shards.cache import FOLDER, ShardCache, build_cache
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.reader import ShardReader, open_shard
from dist_deeplab.data.shards.room import CacheError
from dist_deeplab.downloads import DiskFullError, DownloadError, fetching
from dist_deeplab.errors import UserError
from tests.file_server import FileServer, serve

GIB = 2**30


@pytest.fixture
def server(shard_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.0)
    with serve(shutil.copytree(shard_set.path.parent, tmp_path / "server")) as running:
        yield running


def cached(server: FileServer, folder: Path, limit: int = GIB) -> Manifest:
    return load_manifest(f"{server.url}/train.json", cache=ShardCache(folder, limit))


def tars_in(folder: Path) -> list[str]:
    return sorted(path.name[17:] for path in folder.iterdir() if path.name.endswith(".tar") and path.name[0] != ".")


def downloads(server: FileServer) -> list[str]:
    return [path for path, _ in server.requests if path.endswith(".tar")]


def test_a_set_at_a_url_reads_as_the_set_it_is(server: FileServer, shard_set: Manifest, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache")
    assert downloads(server) == [], "shards come when they are read"
    expected = ShardReader(shard_set)
    for _ in range(2):
        reader = ShardReader(manifest)
        assert [reader.read(i) for i in range(8)] == [expected.read(i) for i in range(8)]
    assert sorted(downloads(server)) == [f"/train-00000{i}.tar" for i in range(3)]
    assert manifest.shard_name(1) == f"{server.url}/train-000001.tar"
    assert manifest.keys_sha256 == shard_set.keys_sha256


def test_a_url_without_a_cache_says_which_key_to_set(server: FileServer) -> None:
    with pytest.raises(ShardError, match=r"data\.cache_dir"):
        load_manifest(f"{server.url}/train.json")
    with pytest.raises(DownloadError, match="run a command"):
        load_manifest("pipe:cat train.json", cache=ShardCache(Path("/nowhere"), GIB))


def _read_all(manifest: Manifest) -> list[str]:
    reader = ShardReader(manifest)
    return [reader.read(index).key for index in range(8)]


def test_all_processes_of_a_node_share_one_download(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache")
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        keys = list(pool.map(_read_all, [manifest] * 4))
    assert keys == [_read_all(manifest)] * 4
    assert sorted(downloads(server)) == [f"/train-00000{i}.tar" for i in range(3)]


def test_a_download_that_gets_its_final_name_while_room_is_counted_is_not_an_error(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    ShardReader(cached(server, folder)).read(7)
    another = "0123456789abcdef_another.tar"
    listed = os.scandir

    def rename_after_listing(path: Path) -> list[os.DirEntry[str]]:
        entries = list(listed(path))
        if part.exists():  # not by pathlib's glob, which calls this function from Python 3.12 on
            part.rename(folder / another)
        return entries

    part = folder / f".{another}.part"
    part.write_bytes(b"half")
    monkeypatch.setattr(room.os, "scandir", rename_after_listing)
    assert ShardReader(cached(server, folder)).read(0).key
    assert (folder / another).exists()


def test_a_shard_with_other_bytes_than_the_manifest_says_is_refused(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache")
    server.corrupt = True
    with pytest.raises(DownloadError, match=r"train-000000\.tar has the SHA-256"):
        ShardReader(manifest).read(0)
    assert tars_in(tmp_path / "cache") == []


def test_a_damaged_shard_in_the_cache_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache")
    ShardReader(manifest).read(0)
    (path,) = (tmp_path / "cache").glob("*_train-000000.tar")
    os.truncate(path, 1000)
    assert ShardReader(manifest).read(0).key
    assert len(downloads(server)) == 2
    shutil.rmtree(tmp_path / "cache")
    manifest = cached(server, tmp_path / "cache")
    assert ShardReader(manifest).read(0).key


def test_a_shard_that_is_evicted_while_it_is_opened_comes_again(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = cached(server, tmp_path / "cache")
    os.close(open_shard(manifest, 0))
    (shard,) = (path for path in manifest.cache.folder.iterdir() if path.name.endswith("train-000000.tar"))
    lock = fcntl.flock

    def evict_before_the_lock(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        shard.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", evict_before_the_lock)
    opened = open_shard(manifest, 0)
    assert os.fstat(opened).st_ino == shard.stat().st_ino
    os.close(opened)
    assert downloads(server) == ["/train-000000.tar"] * 2


def test_a_server_that_is_gone_does_not_stop_a_run_whose_shards_are_here(server: FileServer, tmp_path: Path) -> None:
    expected = _read_all(cached(server, tmp_path / "cache"))
    for file in server.root.iterdir():
        file.unlink()
    assert _read_all(cached(server, tmp_path / "cache")) == expected
    with pytest.raises(DownloadError, match="404"):
        cached(server, tmp_path / "another")


def test_a_set_that_was_made_again_under_its_url_is_seen_by_the_next_start(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by no rank of this one: they fetch the manifest once per node, and all have the same."""
    cached(server, tmp_path / "cache")
    values = json.loads((server.root / "train.json").read_text())
    (server.root / "train.json").write_text(json.dumps(values | {"split": "renamed"}))
    assert cached(server, tmp_path / "cache").split == "train"
    assert [path for path, _ in server.requests] == ["/train.json", "/train.index.npy"]
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: time.time())
    assert cached(server, tmp_path / "cache").split == "renamed"
    (server.root / "train.json").write_text(json.dumps(values | {"index": "../../etc/passwd"}))
    with pytest.raises(ShardError, match=r"index = .*neither the name of a file beside it"):
        cached(server, tmp_path / "cache")


# --- the limit --------------------------------------------------------------------------------------------------------


def test_what_is_unused_for_longest_goes_first(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache", limit=0)
    sizes = [shard.size_bytes for shard in manifest.shards]
    manifest = cached(server, tmp_path / "cache", limit=max(sizes[0] + sizes[1], sizes[1] + sizes[2]))
    for number in (0, 1, 0, 2):
        os.close(open_shard(manifest, number))
        time.sleep(0.01)
    assert tars_in(tmp_path / "cache") == ["train-000000.tar", "train-000002.tar"]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= manifest.cache.limit_bytes


def test_a_shard_that_is_open_stays_and_a_cache_of_such_is_full(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache", limit=0)
    limit = sum(sorted(shard.size_bytes for shard in manifest.shards)[1:])
    manifest = cached(server, tmp_path / "cache", limit=limit)
    first, second = open_shard(manifest, 0), open_shard(manifest, 1)
    with pytest.raises(CacheError, match=r"is full: data\.cache_gib"):
        open_shard(manifest, 2)
    os.close(first)
    third = open_shard(manifest, 2)
    assert tars_in(tmp_path / "cache") == ["train-000001.tar", "train-000002.tar"]
    os.close(second)
    os.close(third)


def test_a_run_that_does_not_fit_is_told_so_with_both_sizes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * GIB)
    cache.require_room(10 * GIB)
    with pytest.raises(CacheError, match=r"12\.0 GiB .* 10\.0; .* data\.cache_gib to 12\.1 .*data\.access=stream"):
        cache.require_room(12 * GIB)


def test_two_shards_that_come_at_once_do_not_exceed_the_limit(server: FileServer, tmp_path: Path) -> None:
    """What one process has reserved, another one sees; what a dead one had reserved is free."""
    manifest = cached(server, tmp_path / "cache", limit=0)
    cache = ShardCache(tmp_path / "cache", manifest.size_bytes)
    holder = tmp_path / "cache" / ".0123456789abcdef_x.tar.4711.room"
    holder.write_text(str(manifest.size_bytes))
    with holder.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="is full"):
            open_shard(load_manifest(f"{server.url}/train.json", cache=cache), 0)
    os.close(open_shard(load_manifest(f"{server.url}/train.json", cache=cache), 0))
    assert not holder.exists()


def _open_and_sleep(manifest: Manifest, is_open: Event) -> None:
    open_shard(manifest, 0)
    is_open.set()
    time.sleep(600)


def test_the_shards_of_a_killed_process_can_go(server: FileServer, tmp_path: Path) -> None:
    manifest = cached(server, tmp_path / "cache", limit=0)
    manifest = cached(server, tmp_path / "cache", limit=max(shard.size_bytes for shard in manifest.shards))
    context = multiprocessing.get_context("fork")
    is_open = context.Event()
    process = context.Process(target=_open_and_sleep, args=(manifest, is_open))
    process.start()
    assert is_open.wait(60)
    with pytest.raises(CacheError, match="full"):
        open_shard(manifest, 1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    os.close(open_shard(manifest, 1))


def test_a_full_disk_lets_unused_shards_go_and_else_is_a_sentence(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = cached(server, tmp_path / "cache")
    os.close(open_shard(manifest, 0))
    fetch = shard_cache.fetch

    def no_room_beside_another(*arguments: object, **options: object) -> Path:
        if tars_in(tmp_path / "cache"):
            raise DiskFullError("no room for it")
        return fetch(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_cache, "fetch", no_room_beside_another)
    file = open_shard(manifest, 1)
    assert tars_in(tmp_path / "cache") == ["train-000001.tar"]
    with pytest.raises(CacheError, match="no room for it; nothing in the cache can go"):
        open_shard(manifest, 2)
    os.close(file)


# --- the user's own files ---------------------------------------------------------------------------------------------


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_cache_never_touches_what_the_user_has_in_the_same_folder(server: FileServer, tmp_path: Path) -> None:
    """data.cache_dir=$HOME with a limit of one shard: the cache works beside the user's files."""
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    for name in ("thesis.tex", "folder/data.bin", ".bashrc", ".thesis.tex.part", "x.room", f"{'a' * 16}_mine.tar"):
        (home / name).write_bytes(b"dear" * 1000)
    before = files_in(home)
    cache = build_cache(str(home), 1)
    assert cache is not None
    manifest = load_manifest(f"{server.url}/train.json", cache=cache)
    largest = max(shard.size_bytes for shard in manifest.shards)
    small = ShardCache(cache.folder, largest)
    for number in range(3):
        os.close(small.open_shard(f"{server.url}/train-00000{number}.tar", **known(manifest, number)))
    assert len(tars_in(cache.folder)) == 1, "evicted its own"
    assert {name: content for name, content in files_in(home).items() if not name.startswith(FOLDER)} == before


def known(manifest: Manifest, number: int) -> dict[str, Any]:
    shard = manifest.shards[number]
    return {"sha256": shard.sha256, "size": shard.size_bytes}


def test_of_what_somebody_put_into_the_caches_folder_nothing_is_counted_or_deleted(
    server: FileServer, tmp_path: Path
) -> None:
    manifest = cached(server, tmp_path / "cache")
    (tmp_path / "outside.tar").write_bytes(bytes(10**6))
    (tmp_path / "cache" / f"{'b' * 16}_link.tar").symlink_to(tmp_path / "outside.tar")
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    (tmp_path / "cache" / f"{'c' * 16}_folder.tar").mkdir()
    small = ShardCache(tmp_path / "cache", max(shard.size_bytes for shard in manifest.shards) + 2**16)
    for number in range(3):
        os.close(small.open_shard(f"{server.url}/train-00000{number}.tar", **known(manifest, number)))
    assert (tmp_path / "outside.tar").stat().st_size == 10**6
    assert (tmp_path / "cache" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["file", "folder", "not a folder"])
def test_a_folder_without_the_caches_mark_is_refused_and_left_alone(
    content: str, server: FileServer, tmp_path: Path
) -> None:
    folder = tmp_path / FOLDER
    if content == "not a folder":
        folder.write_text("mine")
    else:
        (folder / "sub").mkdir(parents=True)
        if content == "file":
            (folder / f"{'a' * 16}_mine.tar").write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(CacheError, match=r"without the mark of the shard cache .* choose another data\.cache_dir"):
        load_manifest(f"{server.url}/train.json", cache=build_cache(str(tmp_path), 1))
    assert files_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def _mark(folder: Path, url: str) -> bool:
    return ShardCache(folder, GIB).fetch_manifest(url).is_file()


def test_processes_that_make_the_cache_at_once_have_one(server: FileServer, tmp_path: Path) -> None:
    with ProcessPoolExecutor(8, multiprocessing.get_context("fork")) as pool:
        assert all(pool.map(_mark, [tmp_path / "cache"] * 8, [f"{server.url}/train.json"] * 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "server"]


def test_a_file_system_without_locks_is_a_sentence(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = cached(server, tmp_path / "cache")

    def not_implemented(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", not_implemented)
    with pytest.raises(UserError, match=r"no file locks .*flock.* choose another"):
        open_shard(manifest, 0)
