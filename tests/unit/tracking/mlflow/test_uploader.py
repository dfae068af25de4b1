"""What the journal holds arrives in a real MLflow store exactly once, through resumes, outages and refused records."""

import contextlib
import getpass
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from PIL import Image

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.tracking.mlflow import uploader as uploader_module
from dist_deeplab.tracking.mlflow.process import Upload, UploaderProcess
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import artifact_location, open_client, store_lock
from dist_deeplab.tracking.mlflow.uploader import Uploader, upload_until_done
from dist_deeplab.tracking.tracker import JournalTracker, Reporting, open_tracker

Record = dict[str, Any]
TIME_S = 1790000000.123


class Store:
    """A store of the test's own, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.uri = f"sqlite:///{path}"
        self.client = mlflow.MlflowClient(self.uri)

    def runs(self) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(self.client.search_runs(experiments))

    def run(self) -> Run:
        (run,) = self.runs()
        return run

    def history(self, key: str) -> list[tuple[int, float, int]]:
        """(step, value, time in ms) of every point, in order of steps."""
        points = self.client.get_metric_history(self.run().info.run_id, key)
        return sorted((point.step, point.value, point.timestamp) for point in points)

    def artifacts(self, folder: str | None = None) -> list[str]:
        files: list[str] = []
        for item in self.client.list_artifacts(self.run().info.run_id, folder):
            files += self.artifacts(item.path) if item.is_dir else [item.path]
        return sorted(files)


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Store:
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_store, path)
    return Store(path)


@pytest.fixture
def run_dir(store: Store, tmp_path: Path) -> Path:
    """A run's folder with everything but a journal."""
    folder = tmp_path / "runs" / "my_run"
    (folder / "eval/step_00000020").mkdir(parents=True)
    (folder / "eval/step_00000020/metrics.json").write_text('{"val/mIoU": 0.5}')
    (folder / "config.yaml").write_text("seed: 3\n")
    start_attempt(folder, 0, uri=store.uri)
    return folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(uploader_module, "_POLL_S", 0.0)
    monkeypatch.setattr(uploader_module, "_RETRY_S", (0.0,))
    environ = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environ)  # the uploader sets MLflow's timeouts for its own process


def start_attempt(folder: Path, attempt: int, *, uri: str | None = None) -> None:
    before = json.loads((folder / "run.json").read_text()) if uri is None else {}
    about = {
        "tracking": {"uri": uri or before["tracking"]["uri"], "experiment": "my experiment"},
        "attempt": attempt,
        "name": "my_run",
        "parameters": {"optim.lr": 0.1, "data.scale_range": [0.5, 1.5], "model.init": "", "batch.micro_size": None},
        "tags": {"world_size": 4, "attempt": attempt},
        "changed": {"optim.lr": 0.1},
        "description": "what this run is",
        "slurm_jobs": ["120_4", "125"],
        "datasets": [
            {
                "name": "voc/train",
                "context": "training",
                "digest": "0123456789abcdef",
                "source": "data/voc/train.json",
                "profile": {"num_samples": 8},
            }
        ],
    }
    (folder / "run.json").write_text(json.dumps(about))


def point(step: int, value: float, key: str = "train/loss") -> Record:
    return {"step": step, "time": TIME_S + step, "key": key, "value": value, "attempt": 0}


def file(name: str = "eval/step_00000020/metrics.json") -> Record:
    return {"step": 20, "time": TIME_S, "file": name}


def ending(status: str, attempt: int = 0) -> Record:
    return {"time": TIME_S + 99, "status": status, "attempt": attempt}


def append(folder: Path, *records: Record | bytes) -> None:
    with (folder / "metrics.jsonl").open("ab") as journal:
        for record in records:
            journal.write(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n")


def send(folder: Path, give_up_s: float = 30.0, model_options: list[str] | None = None) -> bool:
    """Send everything, as for a run whose process is gone."""
    return upload_until_done(
        Uploader(folder, model_options=model_options), is_running=lambda: False, give_up_s=give_up_s
    )


def in_ms(step: int) -> int:
    return round((TIME_S + step) * 1000)


USUAL = (point(10, 2.5), point(20, 1.25), point(20, 0.5, "val/mIoU"), file(), ending("FINISHED"))


def assert_usual(store: Store) -> None:
    """Check that the store holds what `USUAL` says, once."""
    run = store.run()
    assert run.info.status == "FINISHED"
    assert store.history("train/loss") == [(10, 2.5, in_ms(10)), (20, 1.25, in_ms(20))]
    assert store.history("val/mIoU") == store.history("accuracy/mIoU") == [(20, 0.5, in_ms(20))]
    assert store.artifacts() == ["config.yaml", "eval/step_00000020/metrics.json"]
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.tags["world_size"] == "4"


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_points_arrive_with_their_steps_and_the_journals_times(store: Store, run_dir: Path) -> None:
    append(run_dir, *USUAL)
    assert send(run_dir)
    assert_usual(store)


def test_the_run_has_its_name_experiment_parameters_tags_and_status(store: Store, run_dir: Path) -> None:
    append(run_dir, ending("KILLED"))
    assert send(run_dir)
    run = store.run()
    assert run.info.run_name == "my_run"
    assert store.client.get_experiment(run.info.experiment_id).name == "my experiment"
    assert run.data.params == {
        "optim.lr": "0.1",
        "data.scale_range": "[0.5, 1.5]",
        "model.init": "",
        "batch.micro_size": "None",
    }
    assert run.data.tags.items() >= {"world_size": "4", "attempt": "0"}.items()
    assert run.info.status == "KILLED"


def test_artifacts_lie_beside_a_sqlite_store_with_their_content(store: Store, run_dir: Path, tmp_path: Path) -> None:
    append(run_dir, *USUAL)
    assert send(run_dir)
    location = tmp_path / "runs" / "mlartifacts" / store.run().info.run_id / "artifacts"
    assert (location / "eval/step_00000020/metrics.json").read_text() == '{"val/mIoU": 0.5}'
    assert (location / "config.yaml").read_text() == "seed: 3\n"


def test_what_is_known_of_a_run_is_shown_where_mlflow_s_pages_show_it(store: Store, run_dir: Path) -> None:
    append(run_dir, {"time": TIME_S, "status": "RUNNING", "attempt": 0}, *USUAL)
    assert send(run_dir)
    run = store.run()
    assert (
        run.data.tags.items()
        >= {
            "not_default": "optim.lr=0.1",
            "mlflow.note.content": "what this run is",
            "slurm_jobs": "120_4 125",
            "mlflow.source.type": "JOB",
            "mlflow.user": getpass.getuser(),
        }.items()
    )
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("voc/train", "0123456789abcdef")
    assert json.loads(dataset.dataset.source) == {"uri": "data/voc/train.json"}
    assert json.loads(dataset.dataset.profile) == {"num_samples": 8}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]


def test_a_run_lasts_from_its_first_to_its_last_line_whenever_these_are_sent(store: Store, run_dir: Path) -> None:
    append(run_dir, {"time": TIME_S, "status": "RUNNING", "attempt": 0}, *USUAL)
    assert send(run_dir)
    info = store.run().info
    assert (info.start_time, info.end_time) == (in_ms(0), in_ms(99))


def test_post_training_results_arrive_and_leave_end_and_status_as_they_are(store: Store, run_dir: Path) -> None:
    append(run_dir, {"time": TIME_S, "status": "RUNNING", "attempt": 0}, *USUAL)
    assert send(run_dir)
    append(run_dir, {**point(20, 0.75, "eval/val/mIoU"), "time": TIME_S + 5000, "late": True})
    assert send(run_dir)
    run = store.run()
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", in_ms(0), in_ms(99))
    assert store.history("eval/val/mIoU") == [(20, 0.75, in_ms(5000))]


def test_images_of_a_series_arrive_with_their_steps_once_and_readable(
    store: Store, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, calls = mlflow.MlflowClient.log_artifact, iter(range(1000))

    def unreliable(self: mlflow.MlflowClient, *arguments: Any) -> None:
        if next(calls) in (2, 5, 6):  # in the middle of an image: one of its two files is there
            raise MlflowException("the server is away")
        really(self, *arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", unreliable)
    for step in (10, 20):
        image = run_dir / f"eval/step_{step:08d}/street.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (1000, 500), (10 * step, 0, 0)).save(image)
        append(run_dir, file(str(image.relative_to(run_dir))) | {"image": "panels/street", "step": step})
    append(run_dir, ending("FINISHED"))
    assert send(run_dir)
    state = run_dir / "mlflow.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"sent_bytes": 0}))  # receipts were lost
    assert send(run_dir)
    names = sorted(Path(name).name for name in store.artifacts("images"))
    full = [name for name in names if name.endswith(".png")]
    assert [name.rpartition("+")[0] for name in full] == [
        f"panels~street+step+{step}+timestamp+{in_ms(0)}" for step in (0, 10, 20)
    ]
    assert len(names) == 6, "each also compressed, for the page"
    assert store.run().data.tags["mlflow.loggedImages"] == "True"
    folder = tmp_path / "runs" / "mlartifacts" / store.run().info.run_id / "artifacts" / "images"
    for name in names:
        with Image.open(folder / name) as shown:
            assert shown.size == (1000, 500), "the page shows this one: its letters must be readable"
            red = shown.convert("RGB").getpixel((5, 5))[0]
    assert abs(red - 200) < 5


def test_a_file_at_the_top_of_the_folder_arrives_and_one_that_mlflow_refuses_holds_up_nothing(
    store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "curves.png").write_bytes(b"an image")
    append(run_dir, file("curves.png"), *USUAL)
    assert send(run_dir)
    assert store.artifacts() == ["config.yaml", "curves.png", "eval/step_00000020/metrics.json"]


def test_every_node_s_system_metrics_arrive_once(store: Store, run_dir: Path) -> None:
    (run_dir / "system").mkdir()
    for node in ("a", "b"):
        with (run_dir / "system" / f"{node}.jsonl").open("w") as journal:
            journal.writelines(json.dumps(point(step, 50.0, f"system/{node}/cpu")) + "\n" for step in (10, 20))
    append(run_dir, *USUAL)
    for _ in range(2):
        assert send(run_dir)
        for node in ("a", "b"):
            assert [(step, value) for step, value, _ in store.history(f"system/{node}/cpu")] == [(10, 50.0), (20, 50.0)]
    assert_usual(store)


def test_facts_that_become_known_later_are_tags(store: Store, run_dir: Path) -> None:
    append(run_dir, {"time": TIME_S, "tags": {"diverged": "1 point"}}, *USUAL)
    assert send(run_dir)
    assert_usual(store)
    assert store.run().data.tags["diverged"] == "1 point"


def test_a_child_makes_its_sweep_s_run_and_names_it_as_its_parent(store: Store, run_dir: Path) -> None:
    sweep = shutil.copytree(run_dir, run_dir.with_name("sweep"))
    about = json.loads((run_dir / "run.json").read_text())
    for name in ("first", "second"):
        child = shutil.copytree(run_dir, run_dir.with_name(name))
        (child / "run.json").write_text(json.dumps(about | {"name": name, "parent": "../sweep"}))
        append(child, *USUAL)
        assert send(child)
    append(sweep, ending("FINISHED"))
    assert send(sweep)
    runs = {run.info.run_name: run for run in store.runs()}
    assert len(store.runs()) == 3
    parent = json.loads((sweep / "mlflow.json").read_text())["run_id"]
    for name in ("first", "second"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent
    assert store.client.get_run(parent).info.status == "FINISHED"


def test_two_runs_share_an_experiment(store: Store, run_dir: Path) -> None:
    other = shutil.copytree(run_dir, run_dir.with_name("other_run"))
    for folder in (run_dir, other):
        append(folder, ending("FINISHED"))
        assert send(folder)
    assert len({run.info.experiment_id for run in store.runs()}) == 1
    assert len(store.runs()) == 2


def test_more_points_than_mlflow_takes_in_a_call_arrive(store: Store, run_dir: Path) -> None:
    append(run_dir, *(point(step, step / 7) for step in range(1203)), ending("FINISHED"))
    assert send(run_dir)
    assert store.history("train/loss") == [(step, step / 7, in_ms(step)) for step in range(1203)]


def test_points_are_sent_during_the_run(store: Store, run_dir: Path) -> None:
    append(run_dir, point(1, 1.0))
    uploader = Uploader(run_dir)
    assert uploader.send_new() is None
    assert json.loads((run_dir / "mlflow.json").read_text())["sent_bytes"] == (run_dir / "metrics.jsonl").stat().st_size
    assert store.history("train/loss") == [(1, 1.0, in_ms(1))]
    assert store.run().info.status == "RUNNING"
    append(run_dir, point(2, 2.0), ending("FINISHED"))
    assert uploader.send_new() == "FINISHED"
    assert len(store.history("train/loss")) == 2


def test_a_line_that_is_still_being_written_waits_for_its_end(store: Store, run_dir: Path) -> None:
    line = json.dumps(point(2, 2.0)).encode() + b"\n"
    append(run_dir, point(1, 1.0), line[:20])
    uploader = Uploader(run_dir)
    uploader.send_new()
    assert len(store.history("train/loss")) == 1
    append(run_dir, line[20:])
    uploader.send_new()
    assert len(store.history("train/loss")) == 2


# --- again, and after a resume ----------------------------------------------------------------------------------------


def test_sending_again_changes_nothing(store: Store, run_dir: Path) -> None:
    append(run_dir, *USUAL)
    assert send(run_dir)
    assert send(run_dir)
    assert_usual(store)


def test_points_whose_receipt_was_lost_are_sent_twice_and_kept_once(store: Store, run_dir: Path) -> None:
    """As after `kill -9` of the uploader between sending and noting that it has."""
    append(run_dir, *USUAL[:-1])
    Uploader(run_dir).send_new()
    state = run_dir / "mlflow.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"sent_bytes": 0}))
    append(run_dir, USUAL[-1])
    assert send(run_dir)
    assert_usual(store)


def test_a_resumed_attempt_continues_in_the_same_run(store: Store, run_dir: Path) -> None:
    append(run_dir, point(10, 2.5), ending("KILLED"))
    assert send(run_dir)
    assert store.run().info.status == "KILLED"
    start_attempt(run_dir, 1)
    uploader = Uploader(run_dir)
    assert uploader.send_new() is None
    assert store.run().info.status == "RUNNING"
    append(run_dir, *USUAL[1:-1], ending("FINISHED", attempt=1))
    assert send(run_dir)
    assert_usual(store)
    assert store.run().data.tags["attempt"] == "1"


def test_the_end_of_an_earlier_attempt_does_not_end_this_one(store: Store, run_dir: Path) -> None:
    """The server was away during the first attempt: its end is still in the queue."""
    append(run_dir, point(10, 2.5), ending("KILLED"))
    start_attempt(run_dir, 1)
    assert Uploader(run_dir).send_new() is None
    assert store.run().info.status == "RUNNING"
    append(run_dir, *USUAL[1:-1], ending("FINISHED", attempt=1))
    assert send(run_dir)
    assert_usual(store)


def test_a_run_that_ends_without_a_word_has_failed(store: Store, run_dir: Path) -> None:
    append(run_dir, point(10, 2.5))
    assert send(run_dir)
    assert store.run().info.status == "FAILED"
    assert store.history("train/loss") == [(10, 2.5, in_ms(10))]


def test_a_run_that_was_killed_and_then_resumed_is_not_failed(store: Store, run_dir: Path) -> None:
    append(run_dir, point(10, 2.5))
    assert send(run_dir)
    start_attempt(run_dir, 1)
    append(run_dir, *USUAL[1:-1], ending("FINISHED", attempt=1))
    assert send(run_dir)
    assert_usual(store)


MODEL = """
import json, pathlib, sys
run_dir = pathlib.Path(sys.argv[1])
with (run_dir / "tries").open("a") as tries:
    tries.write("1")
if (run_dir / "away").exists():
    sys.exit("error: the registry is away")
state = json.loads((run_dir / "mlflow.json").read_text())
(run_dir / "mlflow.json").write_text(json.dumps(state | {"model": "models:/street/1"}))
"""


def test_a_model_that_could_not_be_logged_leaves_a_finished_run_and_is_logged_once_later(
    store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that logs it is a stand-in here; tests/tracking has the real one."""
    really = subprocess.run

    def stand_in(command: list[str], **options: Any) -> Any:
        assert command[1:5] == ["-m", "dist_deeplab.log_model", str(run_dir), "--uri"]
        return really([sys.executable, "-c", MODEL, str(run_dir)], **options)

    monkeypatch.setattr(uploader_module.subprocess, "run", stand_in)
    (run_dir / "away").touch()
    append(run_dir, *USUAL)
    assert not send(run_dir, give_up_s=0.0, model_options=[])
    assert_usual(store)
    error = json.loads((run_dir / "mlflow.json").read_text())["error"]
    assert error == "the model could not be logged: error: the registry is away"
    (run_dir / "away").unlink()
    assert send(run_dir, model_options=[])
    assert send(run_dir, model_options=[])
    assert (run_dir / "tries").read_text() == "11"
    state = json.loads((run_dir / "mlflow.json").read_text())
    assert (state["model"], state["error"]) == ("models:/street/1", "")


# --- outages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "succeeds_first"),
    [
        ("get_experiment_by_name", 0),
        ("create_experiment", 0),
        ("create_run", 0),
        ("log_batch", 0),  # the parameters
        ("log_batch", 1),  # the tags
        ("log_batch", 2),  # the points
        ("log_artifact", 0),  # config.yaml
        ("log_artifact", 1),
        ("set_terminated", 0),
    ],
)
def test_an_outage_at_any_call_leaves_one_complete_run(
    method: str, succeeds_first: int, store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = getattr(mlflow.MlflowClient, method)
    calls = iter(range(1000))

    def unreliable(self: mlflow.MlflowClient, *arguments: Any, **options: Any) -> Any:
        if succeeds_first <= next(calls) < succeeds_first + 2:
            raise MlflowException("the server is away")
        return really(self, *arguments, **options)

    append(run_dir, *USUAL)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, method, unreliable)
        assert send(run_dir)
    assert_usual(store)


@pytest.mark.parametrize("calls_before_the_outage", range(6))
def test_a_resume_with_other_loader_settings_after_an_outage_goes_through(
    calls_before_the_outage: int, store: Store, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses to change a parameter: those of the first attempt stay, and hold up nothing."""
    calls = iter(range(1000))

    def fail_later(method: str) -> Callable[..., Any]:
        really = getattr(mlflow.MlflowClient, method)

        def call(self: mlflow.MlflowClient, *arguments: Any, **options: Any) -> Any:
            if next(calls) >= calls_before_the_outage:
                raise MlflowException("the server is away")
            return really(self, *arguments, **options)

        return call

    append(run_dir, USUAL[0])
    with monkeypatch.context() as patch:
        for method in ("create_run", "log_batch", "log_artifact", "update_run"):
            patch.setattr(mlflow.MlflowClient, method, fail_later(method))
        send(run_dir, give_up_s=0.0)
    about = json.loads((run_dir / "run.json").read_text())
    about["attempt"] = 1
    about["parameters"]["data.num_workers"] = 2
    about["parameters"]["batch.micro_size"] = 5
    (run_dir / "run.json").write_text(json.dumps(about))
    append(run_dir, *USUAL[1:-1], ending("FINISHED", attempt=1))
    assert send(run_dir)
    assert_usual(store)


def test_during_the_run_an_outage_is_waited_out(
    store: Store, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is longer than a uploader waits after the end of its run."""
    database = tmp_path / "runs" / "mlflow.db"
    database.rename(tmp_path / "away")
    database.mkdir()  # nothing can be opened or made here
    asked = iter(range(1000))

    def is_running() -> bool:
        turn = next(asked)
        if turn == 20:
            database.rmdir()
            (tmp_path / "away").rename(database)
        return turn < 25

    append(run_dir, *USUAL)
    assert upload_until_done(Uploader(run_dir), is_running=is_running, give_up_s=0.0)
    assert_usual(store)


def test_an_outage_is_counted_and_told_to_the_run_while_it_lasts(
    store: Store, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    database = tmp_path / "runs" / "mlflow.db"
    database.rename(tmp_path / "away")
    database.mkdir()
    tracker = JournalTracker(run_dir)
    uploader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # in its stead: `send`
    tracker.uploader = UploaderProcess(Upload(run_dir, store.uri), process=uploader)
    told: list[str] = []
    for step, works in ((1, False), (2, False), (3, True)):
        if works:
            database.rmdir()
            (tmp_path / "away").rename(database)
        send(run_dir, give_up_s=0.0)
        with caplog_of(told):
            tracker.log(step, {"train/loss": 1.0})
    uploader.communicate(b"\n")
    assert [line.partition("(")[0].strip() for line in told] == [
        "MLflow does not take points",
        "MLflow takes points again; what had waited is being sent",
    ]
    assert send(run_dir)
    assert [(step, value) for step, value, _ in store.history("tracking/failed_sends")] == [(1, 1.0), (2, 2.0)]
    assert [step for step, *_ in store.history("train/loss")] == [1, 2, 3]


@contextlib.contextmanager
def caplog_of(lines: list[str]) -> Iterator[None]:
    """Append what is said of MLflow to `lines`."""
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dist_deeplab.tracking.mlflow.process")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_after_the_run_an_outage_is_waited_out_for_a_while_and_nothing_is_lost(
    store: Store, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "runs" / "mlflow.db"
    database.rename(tmp_path / "away")
    database.mkdir()
    append(run_dir, *USUAL)
    assert not send(run_dir, give_up_s=0.0)
    database.rmdir()
    (tmp_path / "away").rename(database)
    assert send(run_dir)
    assert_usual(store)


# --- records that MLflow does not take --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        file("eval/step_00000020/removed_meanwhile.png"),
        point(15, 1.0, "val/iou/traffic (light)"),
        point(15, 1.0, "val/iou/" + "k" * 300),
        b"\0" * 60 + b"\n",
        b"{half a line\n",
    ],
    ids=["missing file", "parentheses", "long key", "zeros", "half a line"],
)
def test_one_record_that_cannot_be_sent_does_not_hold_up_the_others(
    bad: Record | bytes, store: Store, run_dir: Path
) -> None:
    append(run_dir, USUAL[0], bad, *USUAL[1:])
    assert send(run_dir)
    assert_usual(store)


def test_a_value_that_is_not_a_number_arrives_as_such(store: Store, run_dir: Path) -> None:
    append(run_dir, point(5, float("nan"), "val/strange"), *USUAL)
    assert send(run_dir)
    assert_usual(store)
    assert [step for step, *_ in store.history("val/strange")] == [5]


# --- as a process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_tracker_and_its_uploader_process_bring_a_run_to_mlflow(
    store: Store, tmp_path: Path, is_killed: bool
) -> None:
    folder = tmp_path / "runs" / "real"
    folder.mkdir()
    info = {"name": "real", "parameters": {"seed": 1}, "tags": {"world_size": 1}}
    tracker = open_tracker(
        folder, env=DistEnv(), reporting=Reporting(store.uri, "e"), config_yaml="seed: 1\n", run_info=info
    )
    tracker.log(1, {"train/loss": 0.5})
    if is_killed:
        tracker.uploader.process.kill()
        tracker.uploader.process.wait()
    tracker.close("FINISHED")
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record.get("key") == "train/loss"]
    assert run.info.start_time == round(records[0]["time"] * 1000), "when it began, not when it was sent"
    assert run.info.end_time == round(records[-1]["time"] * 1000)
    assert store.history("train/loss") == [(1, 0.5, round(record["time"] * 1000))]
    assert store.artifacts() == ["config.yaml"]


KILLED_RUN = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from dist_deeplab.distributed.process_group import DistEnv
    from dist_deeplab.tracking.tracker import Reporting, open_tracker

    info = {"name": "killed", "parameters": {}, "tags": {}}
    tracker = open_tracker(
        Path(sys.argv[1]), env=DistEnv(), reporting=Reporting(sys.argv[2], "e"), config_yaml="", run_info=info
    )
    tracker.log(1, {"train/loss": 0.5})
    print(tracker.uploader.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_the_uploader_of_a_killed_run_sends_what_is_left_and_says_failed(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "killed"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED_RUN, str(folder), store.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for_end(int(done.stdout))
    assert store.run().info.status == "FAILED"
    assert [(step, value) for step, value, _ in store.history("train/loss")] == [(1, 0.5)]


def wait_for_end(pid: int) -> None:
    """Wait for a process that is not this one's child."""
    descriptor = os.pidfd_open(pid)
    try:
        assert select.select([descriptor], [], [], 120)[0], "the uploader did not end"
    finally:
        os.close(descriptor)


# --- where the store is -----------------------------------------------------------------------------------------------


def test_artifacts_of_a_server_are_the_servers_business() -> None:
    assert artifact_location("http://host:5000") is None
    assert artifact_location("sqlite:////data/runs/mlflow.db") == "file:///data/runs/mlartifacts"


def test_the_lock_of_a_sqlite_store_lies_beside_it_in_a_folder_that_is_made(tmp_path: Path) -> None:
    lock = store_lock(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert lock.lock_file == f"{tmp_path}/new/mlflow.db.lock"
    with lock:
        assert (tmp_path / "new").is_dir()


def test_a_store_whose_making_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow can't open a SQLite file with some of its tables; nobody else ever sees one."""
    path, texts = tmp_path / "mlflow.db", iter(["some tables", "all tables"])

    class Client:
        def __init__(self, uri: str) -> None:
            self.file = Path(uri.removeprefix("sqlite:///"))

        def search_experiments(self, max_results: int) -> None:
            if self.file.exists():
                assert self.file.read_text() == "all tables"
                return
            self.file.write_text(next(texts))
            if "all" not in self.file.read_text():
                raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    with pytest.raises(KeyboardInterrupt):
        open_client(f"sqlite:///{path}")
    assert not path.exists()
    assert open_client(f"sqlite:///{path}").file == path
    assert path.read_text() == "all tables"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_after_each_outage_the_waits_begin_again_with_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader_module, "_RETRY_S", (2.0, 5.0, 15.0))
    monkeypatch.setattr(uploader_module, "_POLL_S", 1.0)
    answers: list[Any] = [OSError("away"), OSError("away"), None, OSError("away"), None, "FINISHED"]
    pauses: list[float] = []

    class Store:
        """In place of an Uploader: what it answers, one after the other."""

        run_dir, state = Path("run"), {"status": ""}
        finish = note_failure = note_success = lambda *_: None

        def send_new(self) -> str | None:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer  # type: ignore[no-any-return]

    assert upload_until_done(Store(), is_running=lambda: True, pause=lambda s, _: pauses.append(s))  # type: ignore[arg-type]
    assert pauses == [2.0, 5.0, 1.0, 2.0, 1.0]


def test_what_another_process_wrote_about_the_copy_is_kept(tmp_path: Path) -> None:
    """The uploader notes failures while `log_model` notes the model's address."""
    ours, theirs = UploadState(tmp_path, "http://host:5000"), UploadState(tmp_path, "http://host:5000")
    theirs.save(model="models:/1")
    ours.save(failed_sends=1)
    now = UploadState(tmp_path, "http://host:5000")
    assert (now["model"], now["failed_sends"]) == ("models:/1", 1)


@pytest.mark.parametrize(("how", "niceness"), [(["--follow", "1"], [10]), (["--once"], [])])
def test_training_goes_before_what_follows_it_but_not_before_a_command_that_somebody_waits_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, how: list[str], niceness: list[int]
) -> None:
    """Beside a dozen busy processes `sync-mlflow` took more than 200 s."""
    by: list[int] = []
    monkeypatch.setattr(os, "nice", by.append)
    monkeypatch.setattr(uploader_module, "_send", lambda arguments, lock: 0)
    monkeypatch.setattr(sys, "argv", ["uploader", str(run_dir), *how])
    assert uploader_module.main() == 0
    assert by == niceness
