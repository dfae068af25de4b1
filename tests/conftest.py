"""Fixtures that start real processes on real (drawn) data, and which tests share a worker of pytest-xdist."""

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dist_deeplab.commands import sample_voc, shards
from tests.processes import command_of, environ_of, processes_with

REPO = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

for _name in [name for name in os.environ if name.startswith("PET_") or name == "DIST_DEEPLAB_COMMAND"]:
    del os.environ[_name]  # what launch/test.sh sets for a launcher's commands; a test says itself what it wants


# --- which worker runs what ------------------------------------------------------------------------------------------

SESSION = "DIST_DEEPLAB_TESTS"
"""Variable in the environment of all that the tests start."""

PATIENCE_S = 60
"""How long what the last tests started may take to end."""

MOST_WORKERS = 8
"""More bring nothing: the longest group decides then."""

SLOW = (
    ("tests/cluster/", "slurm"),
    ("tests/tracking/", "mlflow"),
    ("tests/distributed/test_train_command.py", "train"),
    ("tests/distributed/test_splits.py", "splits"),
    ("tests/distributed/test_killer.py", ""),
    ("tests/distributed/test_failing_rank.py", ""),
    ("tests/distributed/", ""),
    ("tests/gpu/", "gpu"),
    ("tests/unit/commands/test_export.py", "export"),
    ("tests/unit/evaluation/test_one_answer.py", "one_answer"),
    ("tests/reference/", ""),
    ("tests/launch/", ""),
    ("tests/fuzz/", ""),
)
"""(where slow tests are, the group that runs on one worker), longest first.

Tests of a group share what is started once (a Slurm cluster, an MLflow server, a trained run) or a GPU. Those without a
group go to whichever worker is free.
"""


def pytest_configure() -> None:
    """One thread, and bytecode that is kept, for this process and for all that it starts.

    The order of sums depends on the number of threads. Beside other workers, and in networks as small as these, a
    second one costs more than it brings: two threads wait for each other at each operation, on cores that others use.

    Containers often set PYTHONDONTWRITEBYTECODE: each of some hundred processes would compile the package by itself.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ.setdefault(SESSION, str(os.getpid()))  # of the process that starts the workers; they inherit it


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test has left a process behind: a machine that runs the tests every day would fill up.

    Only once workers have ended: helpers of multiprocessing live as long as the process that runs the tests.
    """
    own = str(os.getpid())
    if os.environ[SESSION] != own or not session.config.getoption("numprocesses", None):
        return
    deadline = time.monotonic() + PATIENCE_S
    while (left := processes_with(SESSION, own) - {os.getpid()}) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in sorted(left):
        test = environ_of(pid).get("PYTEST_CURRENT_TEST", "before the tests")
        print(f"\nleft behind by {test}: {pid} {command_of(pid)}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests, of which none becomes garbage, without the garbage collector, which takes a sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        set_aside()


def set_aside() -> None:
    """Take all that lives now out of the garbage collector's way: modules, tests, and what tests leave in caches.

    A collection that looks through them takes a second. The package asks for one at several places, pytest for five at
    its end.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a worker for each core and two more, since three groups of slow tests mostly wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 2, MOST_WORKERS)


def _place(nodeid: str) -> int:
    return next((number for number, (where, _) in enumerate(SLOW) if nodeid.startswith(where)), len(SLOW))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scheduler of pytest-xdist by which the tests of a group share a worker.

    Its own `--dist loadgroup` gives no test its group with pytest 9.2 (pytest-xdist 3.8 sets an attribute of items that
    pytest no longer reads).
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = _place(nodeid)
            return (SLOW[place][1] if place < len(SLOW) else "") or nodeid

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the workers of pytest-xdist put the slow tests first, so that none is left over at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place(item.nodeid))


HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    **dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), signal.SIG_DFL),
}
"""What signals do in the tests and in what they start, under `nohup` or in a script's background too."""

# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the tests' own for what the package keeps for its user, e.g. the known MLflow stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """Look through what a module's tests have left once."""
    yield
    set_aside()


@pytest.fixture(autouse=True)
def _own_environ() -> Iterator[None]:
    """Undo what a test did to the environment: `mlflow.set_tracking_uri` sets a variable that others would read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Undo what a command run in this process did to signals: processes forked by later tests would ignore SIGTERM.

    Before a test too: fixtures that tests share may have run one.
    """
    restore_signals()
    yield
    restore_signals()


def restore_signals() -> None:
    """Handle signals as Python does by itself."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """Undo what a command run in this process did to the package's logger."""
    yield
    logger = logging.getLogger("dist_deeplab")
    logger.propagate = True
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def command_environ() -> dict[str, str]:
    """This process's environment for a command started by a test: one thread, no rank, default MLflow store."""
    environ = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MLFLOW_TRACKING_URI")
    }
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return environ


def torchrun_command(num_processes: int, *target: str) -> list[str]:
    """The command line of a torchrun with `num_processes` local processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return [*launcher, *target]


def make_sample_shards(root: Path) -> Path:
    """Draw 16 + 7 images and return the folder with their shards: train.json (16) and val.json (7)."""
    assert sample_voc.main(["--out", str(root), "--num-train", "16", "--num-val", "7"]) == 0
    voc_root = root / "VOCdevkit" / "VOC2012"
    for split in ("train", "val"):
        where = ["--voc-root", str(voc_root), "--split", split, "--out", str(root / "shards")]
        assert shards.main([*where, "--samples-per-shard", "6"]) == 0
    return root / "shards"


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (16 drawn images) and val.json (7)."""
    return make_sample_shards(tmp_path_factory.mktemp("sample_voc"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an MLflow store in SQLite with empty tables, to be copied: making them takes seconds.

    One worker of pytest-xdist makes it for all.
    """
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "empty_store.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            from mlflow import MlflowClient

            MlflowClient(f"sqlite:///{path}.new").search_experiments()
            os.replace(f"{path}.new", path)
    return path


@pytest.fixture(scope="session")
def run_ranks() -> Run:
    """A function that runs `python target...` on `num_processes` ranks and returns the finished process."""

    def run(num_processes: int, *target: str | Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        command = torchrun_command(num_processes, *map(str, target))
        return subprocess.run(command, env=command_environ(), capture_output=True, text=True, timeout=timeout_s)

    return run
