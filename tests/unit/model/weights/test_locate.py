"""Weights from a URL: fetched once into the user's cache, checked by the digest that is given."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import load_weights
from dist_deeplab.model.weights.locate import cache_folder, local_path
from tests.unit.model.weights.networks import Kazuto


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, list[str]]]:
    """URL and folder of a local server, and the requests it got; the cache is a folder of this test."""
    folder, requests = tmp_path / "served", []
    folder.mkdir()
    monkeypatch.setenv("DIST_DEEPLAB_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, requests
    server.shutdown()
    server.server_close()


def test_a_url_is_fetched_once_and_its_digest_checked(served: tuple[str, Path, list[str]]) -> None:
    url, folder, requests = served
    torch.save(Kazuto((1, 1, 2, 1), 16, 3).state_dict(), folder / "a.pth")
    digest = hashlib.sha256((folder / "a.pth").read_bytes()).hexdigest()
    for _ in range(3):
        assert load_weights(f"{url}/a.pth#sha256={digest.upper()}").variant.family == "kazuto1011 DeepLab-v2"
    assert load_weights(f"{url}/a.pth").path.startswith(str(cache_folder()))
    assert len(requests) == 1
    with pytest.raises(UserError, match="has the SHA-256"):
        load_weights(f"{url}/a.pth#sha256={'0' * 64}")


def test_two_files_of_one_name_are_two(served: tuple[str, Path, list[str]]) -> None:
    url, folder, _ = served
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "a.pth").write_bytes(name.encode())
    paths = [local_path(f"{url}/{name}/a.pth") for name in ("x", "y", "x")]
    assert [path.read_bytes() for path in paths] == [b"x", b"y", b"x"]


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=123", "sha256=" + "g" * 64])
def test_a_fragment_that_is_not_a_digest_is_refused(fragment: str) -> None:
    with pytest.raises(UserError, match="must be sha256= and 64 hexadecimal digits"):
        local_path(f"https://example.org/a.pth#{fragment}")


def test_a_missing_file_and_an_unknown_protocol_are_refused(served: tuple[str, Path, list[str]]) -> None:
    with pytest.raises(UserError, match="can't be fetched"):
        load_weights(f"{served[0]}/absent.pth")
    with pytest.raises(UserError):
        load_weights("gopher://example.org/a.pth")


def test_a_name_that_states_another_digest_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resnet101-63fe2227.pth"
    path.write_bytes(b"something else")
    monkeypatch.setattr("dist_deeplab.downloads.fetch", lambda *_, **__: path)
    with pytest.raises(UserError, match=r"has the SHA-256 .{8}\.\.\., not 63fe2227 as its name says"):
        local_path("https://download.pytorch.org/models/resnet101-63fe2227.pth")
    assert local_path("https://example.org/resnet101-63fe2227.pth") == path  # elsewhere digits are digits
    true_name = path.rename(tmp_path / f"resnet101-{hashlib.sha256(b'something else').hexdigest()[:8]}.pth")
    monkeypatch.setattr("dist_deeplab.downloads.fetch", lambda *_, **__: true_name)
    assert local_path(f"https://download.pytorch.org/models/{true_name.name}") == true_name


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_DEEPLAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dist_deeplab/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache/dist_deeplab/weights"
