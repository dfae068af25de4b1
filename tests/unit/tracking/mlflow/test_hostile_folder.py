"""A run's folder from somebody else: evaluating or sending it runs nothing, reads and writes nothing outside it.

Each test makes an otherwise good folder hostile in one way, and sends it to a real store of the user's own.
"""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image

from dist_deeplab.errors import UserError
from dist_deeplab.log_model import main as log_model
from dist_deeplab.tracking.journal import Journal
from dist_deeplab.tracking.mlflow.private import remember_store
from dist_deeplab.tracking.mlflow.process import Upload, send_once
from dist_deeplab.tracking.mlflow.store import choose_store, default_store
from dist_deeplab.tracking.mlflow.uploader import Uploader, upload_until_done
from dist_deeplab.tracking.post_training import add_to_run
from tests.conftest import command_environ

SECRET = "the user's own secret"
OTHER = {"run_id": "", "experiment_id": "0", "sent_bytes": 0, "sent_system": {}, "described": 0}


@pytest.fixture(autouse=True)
def _environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def home(tmp_path: Path, empty_store: Path) -> Path:
    """The user's folder of runs, with a store, one run of their own, and a file that must not leave."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    (home / "secret.txt").write_text(SECRET)
    return home


@pytest.fixture
def folder(home: Path) -> Path:
    """The downloaded run, as good as one can be."""
    return make_run(home / "downloaded")


def make_run(folder: Path, **changes: Any) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/metrics.json").write_text("{}")
    (folder / "config.yaml").write_text("seed: 1\n")
    write_run_file(folder, **changes)
    append(
        folder,
        {"time": 1.0, "status": "RUNNING", "attempt": 0},
        point(1),
        {"step": 1, "time": 2.0, "file": "eval/metrics.json"},
    )
    append(folder, {"time": 9.0, "status": "FINISHED", "attempt": 0})
    return folder


def write_run_file(folder: Path, **changes: Any) -> None:
    about = {"name": folder.name, "tracking": {"uri": "sqlite:////nowhere/mlflow.db", "experiment": "e"}, "attempt": 0}
    (folder / "run.json").write_text(json.dumps(about | {"parameters": {}, "tags": {}} | changes))


def point(step: int, key: str = "train/loss") -> dict[str, Any]:
    return {"step": step, "time": 2.0, "key": key, "value": 0.5, "attempt": 0}


def append(folder: Path, *records: dict[str, Any] | bytes) -> None:
    with (folder / "metrics.jsonl").open("ab") as journal:
        for record in records:
            journal.write(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n")


def send(folder: Path) -> None:
    assert upload_until_done(Uploader(folder), is_running=lambda: False, give_up_s=0.0), "everything else is sent"


class Store:
    """What is in the store of the user's folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")

    def run(self, name: str = "downloaded") -> Any:
        runs = self.client.search_runs([e.experiment_id for e in self.client.search_experiments()])
        (run,) = [run for run in runs if run.info.run_name == name]
        return run

    def assert_nothing_leaked(self) -> None:
        for path in (self.home / "mlartifacts").rglob("*"):
            assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def assert_sent(home: Path) -> Any:
    """Check that the good part of the folder arrived, and nothing of the user's; return the run."""
    store = Store(home)
    run = store.run()
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.5)
    store.assert_nothing_leaked()
    return run


# --- nothing is run ---------------------------------------------------------------------------------------------------


def test_no_command_of_the_folder_is_run(home: Path, folder: Path) -> None:
    touch = f"open({str(home / 'was here')!r}, 'w')"
    about = {"model_command": ["-c", touch], "on_event": f"touch '{home}/was here'", "log_model": True}
    write_run_file(folder, **about, register_as="production")
    add_to_run(folder, 1, {"eval/val/mIoU": 0.5}, folder / "eval")
    assert_sent(home)
    assert not (home / "was here").exists()
    assert Store(home).client.search_registered_models() == [], "no version of the user's own models is made"


def test_a_model_of_the_folder_is_logged_only_where_the_user_says_so(folder: Path) -> None:
    write_run_file(folder, log_model=True, register_as="production")
    assert "--log-model" not in Upload(folder, "sqlite:///x").command()
    assert Uploader(folder).model_options is None


# --- nothing outside is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["absolute", "above", "link", "link to a folder", "circle", "NUL", "folder", "long"])
def test_a_file_that_is_not_in_the_folder_is_not_sent(kind: str, home: Path, folder: Path) -> None:
    (folder / "link.txt").symlink_to(home / "secret.txt")
    (folder / "links").symlink_to(home)
    (folder / "circle").symlink_to("circle")
    names = {"absolute": str(home / "secret.txt"), "above": "../secret.txt", "link": "link.txt", "circle": "circle"}
    names |= {"link to a folder": "links/secret.txt", "NUL": "a\0b", "folder": "eval", "long": "a/" * 5000}
    for extra in ({}, {"image": "panels/x"}):
        append(folder, {"step": 1, "time": 3.0, "file": names[kind]} | extra)
    send(folder)
    assert_sent(home)


def test_a_link_inside_the_folder_is_sent(home: Path, folder: Path) -> None:
    (folder / "latest.json").symlink_to("eval/metrics.json")
    append(folder, {"step": 1, "time": 3.0, "file": "latest.json"})
    send(folder)
    run = assert_sent(home)
    assert "eval" in [item.path for item in Store(home).client.list_artifacts(run.info.run_id)]


def test_a_configuration_that_is_a_link_is_not_sent(home: Path, folder: Path) -> None:
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(home / "secret.txt")
    send(folder)
    run = assert_sent(home)
    assert [item.path for item in Store(home).client.list_artifacts(run.info.run_id)] == ["eval"]


@pytest.mark.parametrize(
    "content", [b"not an image", b"\x89PNG\r\n\x1a\n broken", b"%!PS-Adobe EPSF\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_not_a_png_is_not_opened_as_an_image(content: bytes, home: Path, folder: Path) -> None:
    (folder / "eval/a.png").write_bytes(content)
    append(folder, {"step": 1, "time": 3.0, "file": "eval/a.png", "image": "../..\0x+step+1"})
    send(folder)
    assert_sent(home)


def test_the_name_of_a_series_leads_nowhere(home: Path, folder: Path) -> None:
    Image.new("RGB", (20, 20)).save(folder / "eval/a.png")
    append(folder, {"step": 1, "time": 3.0, "file": "eval/a.png", "image": "../../../" + "x" * 300 + "\0%2e%2e/"})
    send(folder)
    run = assert_sent(home)
    assert len(Store(home).client.list_artifacts(run.info.run_id, "images")) == 4, "image and cover, each also small"


def test_metrics_of_another_run_are_not_sent_as_system_metrics(home: Path, folder: Path) -> None:
    other = home / "private.jsonl"
    other.write_text(json.dumps(point(1, "secret/metric")) + "\n")
    (folder / "system").mkdir()
    (folder / "system/node.jsonl").symlink_to(other)
    send(folder)
    assert "secret/metric" not in assert_sent(home).data.metrics


# --- nothing goes to a store of the folder's choice -------------------------------------------------------------------


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """An attacker's server: its address, and the requests that it got, with their credentials."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_results_go_to_the_default_store_not_to_the_folder_s(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    with listening() as (uri, asked):
        write_run_file(folder, tracking={"uri": uri, "experiment": "e"})
        (folder / "mlflow.json").write_text(json.dumps({"uri": uri, **OTHER, "run_id": "0" * 32}))
        add_to_run(folder, 1, {"eval/val/mIoU": 0.5}, folder / "eval")
        command = [sys.executable, "-m", "dist_deeplab", "sync-mlflow", str(folder)]
        done = subprocess.run(command, env=command_environ(), capture_output=True, text=True, check=True)
        assert log_model([str(folder)]) == 2, "it has no checkpoint"
    assert asked == []
    assert assert_sent(home).data.metrics["eval/val/mIoU"] == 0.5
    assert f"sent to {default_store(home)}" in done.stdout


def test_the_store_is_the_user_s_word_then_a_known_one_then_the_environment_s_then_the_default(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_store(folder, "http://theirs") == default_store(home)
    assert choose_store(folder, "none") == "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mine")
    assert choose_store(folder, "http://theirs") == "http://me:secret@mine"
    assert choose_store(folder, "http://theirs", "http://theirs") == "http://theirs"
    assert choose_store(folder, "http://theirs", "http://mine") == "http://me:secret@mine"
    remember_store("http://known")
    assert choose_store(folder, "http://known") == "http://known"
    remember_store("http://mine")
    assert choose_store(folder, "http://mine") == "http://me:secret@mine", "the environment has its password"


# --- nothing of the user's is written to ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.lock", "mlflow.lock", ".mlflow_run.lock", "mlflow.json"])
def test_a_link_in_place_of_a_file_that_is_written_changes_nothing_behind_it(
    name: str, home: Path, folder: Path
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(home / "secret.txt")
    add_to_run(folder, 1, {"eval/val/mIoU": 0.5}, folder / "eval")
    assert (home / "secret.txt").read_text() == SECRET
    Store(home).assert_nothing_leaked()


def test_a_pipe_in_place_of_the_journal_does_not_hang(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    add_to_run(folder, 1, {"eval/val/mIoU": 0.5}, folder / "eval")
    assert "these results were not added" in caplog.text


def test_the_run_of_another_folder_is_not_written_to(home: Path, folder: Path) -> None:
    """`mlflow.json` names the id of a run of the user's own."""
    own = make_run(home / "own")
    send(own)
    before = Store(home).run("own")
    state = json.loads((own / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps(state | {"sent_bytes": 0, "described": -1}))
    append(folder, point(7, "their/metric"))
    send(folder)
    after = Store(home).run("own")
    assert (after.data.metrics, after.data.tags) == (before.data.metrics, before.data.tags)
    assert assert_sent(home).data.metrics["their/metric"] == 0.5


@pytest.mark.parametrize(
    "parent", ["../../outside", "../sweep/../../outside", "/etc", "..", ".", "../link", "x/../../outside", "../a\0"]
)
def test_a_parent_can_only_be_a_folder_beside_it(parent: str, home: Path, folder: Path) -> None:
    outside = make_run(home.parent / "outside", children=[])
    (home / "link").symlink_to(outside)
    before = sorted(outside.iterdir())
    write_run_file(folder, parent=parent)
    send(folder)
    assert "mlflow.parentRunId" not in assert_sent(home).data.tags
    assert sorted(outside.iterdir()) == before, "nothing was written there"


def test_tags_of_mlflow_s_own_are_not_taken_from_the_folder(home: Path, folder: Path) -> None:
    theirs = {"mlflow.parentRunId": "0" * 32, "mlflow.user": "somebody", "mlflow.loggedModels": "x", "note": "good"}
    write_run_file(folder, tags=theirs)
    append(folder, {"time": 3.0, "tags": {"mlflow.parentRunId": "1" * 32, "later": "good"}})
    send(folder)
    tags = assert_sent(home).data.tags
    assert (tags["note"], tags["later"]) == ("good", "good")
    assert "mlflow.parentRunId" not in tags and "mlflow.loggedModels" not in tags and tags["mlflow.user"] != "somebody"


# --- nonsense holds up nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"key": "a", "value": "text", "step": 1, "time": 1.0},
        {"key": "a", "step": 1},
        {"key": ["a"], "value": 1.0, "step": 1, "time": 1.0},
        {"key": "a", "value": 1.0, "step": 2**70, "time": 1.0},
        {"key": "a", "value": 1.0, "step": 1, "time": 1e300},
        {"key": "a", "value": True, "step": None, "time": 1.0},
        {"file": {"a": 1}, "step": 1, "time": 1.0},
        {"tags": [1, 2], "time": 1.0},
        {"tags": {"a" * 400: 1, "b": {"c": []}}, "time": 1.0},
        {"status": 7, "attempt": "x", "time": 1.0},
        b'{"key": "a", "value": 1.0, "step": 1, "time": Infinity}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_record_of_the_wrong_shape_is_passed_over(record: dict[str, Any] | bytes, home: Path, folder: Path) -> None:
    append(folder, record, point(1, "later"))
    send(folder)
    assert assert_sent(home).data.metrics["later"] == 0.5
    assert Journal(folder / "metrics.jsonl").attempt == 1, "a training can resume there"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"attempt": "x"}', b'{"tags": 1}', b'{"datasets": [{}]}']
)
def test_a_run_file_of_the_wrong_shape_is_one_sentence(
    content: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "run.json").write_bytes(content)
    with pytest.raises(UserError, match="is not what training writes"):
        Uploader(folder)
    add_to_run(folder, 1, {"eval/val/mIoU": 0.25}, folder / "eval")
    assert "these results were not added" in caplog.text
    assert send_once(Upload(folder, "sqlite:///x")).code == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0\0",
        b"{",
        b"[]",
        b'{"uri": 7}',
        b'{"uri": "x", "other_stores": 3, "sent_bytes": "9"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_state_means_that_nothing_was_sent(content: bytes, home: Path, folder: Path) -> None:
    (folder / "mlflow.json").write_bytes(content)
    send(folder)
    assert_sent(home)


def test_a_state_with_wrong_values_means_that_nothing_was_sent(home: Path, folder: Path) -> None:
    wrong = {"run_id": 7, "sent_bytes": "9", "sent_system": [], "described": None, "failed_sends": {}, "error": 1}
    (folder / "mlflow.json").write_text(json.dumps({"uri": default_store(home), **wrong}))
    send(folder)
    assert_sent(home)
