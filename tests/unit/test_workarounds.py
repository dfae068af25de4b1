"""Each shows, with the library alone, why the code goes out of its way. One that fails says what to remove.

Beside these: `tests/distributed/test_workarounds.py`, and the order of sections on MLflow's pages in
`tests/tracking/test_pages.py`. Not shown by any test, since it does not come each time or on a GPU alone: gloo's
threads that abort an ending interpreter (`distributed/launcher.py: hard_exit`), `fold` compiled by inductor
(`model/deeplabv2.py: ASPP`), batch norm behind DDP's buckets with NCCL.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import mlflow
import pytest
import sqlalchemy
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import REPO

GROWTH = """
import re
def peak():
    return int(re.search(r"VmPeak:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""


def grown_gib(prepare: str, work: str) -> float:
    """By how many GiB a fresh process's memory grows at most during `work`; its pages need not be touched."""
    code = f"{GROWTH}\n{prepare}\nbefore = peak()\n{work}\nprint((peak() - before) / 2**30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_opencv_still_allocates_what_a_png_claims() -> None:
    prepare = """
import cv2, numpy as np
data = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
at = data.index(b"IDAT")
claims = data[: at - 4] + (0x40000000).to_bytes(4, "big") + data[at:]
"""
    grown = grown_gib(prepare, "cv2.imdecode(np.frombuffer(claims, np.uint8), cv2.IMREAD_UNCHANGED)")
    assert grown > 0.9, "OpenCV reads a chunk as far as it is there: remove the check in data/decode.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_safe_load_still_takes_256_mib_for_60_bytes(tmp_path: Path) -> None:
    pickle = b"\x80\x02c__builtin__\nbytearray\nJ" + (2**28).to_bytes(4, "little") + b"\x85R."
    path = tmp_path / "a.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle if name.endswith("data.pkl") else content)
    grown = grown_gib("import torch", f"torch.load({str(path)!r}, weights_only=True)")
    assert grown > 0.2, "torch.load bounds memory: see whether model/weights/formats/torch_pickle.py is still needed"


def test_a_worker_of_pytest_xdist_still_loses_the_groups_of_its_tests(request: pytest.FixtureRequest) -> None:
    item = request.node
    item._nodeid = "what pytest-xdist 3.8 sets for --dist loadgroup"
    reads_it = "loadgroup" in item.nodeid
    del item._nodeid
    assert not reads_it, "--dist loadgroup works: remove pytest_xdist_make_scheduler from tests/conftest.py"


def test_torch_still_warns_of_workers_in_four_lines() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DataLoader(TensorDataset(torch.zeros(1)), num_workers=1000)
    said = any("This DataLoader will create" in str(warning.message) for warning in caught)
    assert said, "remove the filter from data/loader.py: loader_options"


def test_mlflow_still_cannot_open_a_store_whose_making_was_cut_off(tmp_path: Path) -> None:
    """mlflow 3.17: its tables are made and changed in dozens of transactions."""
    whole, cut_off = tmp_path / "whole.db", tmp_path / "cut_off.db"
    changes = 0

    def copy_half_way(connection: object, cursor: object, statement: str, *others: object) -> None:
        nonlocal changes
        changes += "ALTER TABLE" in statement or "CREATE TABLE" in statement
        if changes == 20 and not cut_off.exists():
            for file in tmp_path.glob("whole.db*"):  # its journal too, as a kill leaves it
                shutil.copy(file, tmp_path / file.name.replace("whole", "cut_off"))

    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", copy_half_way)
    try:
        mlflow.MlflowClient(f"sqlite:///{whole}").search_experiments()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", copy_half_way)
    assert cut_off.exists(), "MLflow makes its tables in fewer changes now: cut it off earlier"
    try:
        mlflow.MlflowClient(f"sqlite:///{cut_off}").search_experiments()
    except Exception:
        return
    pytest.fail("MLflow goes on where it was cut off: remove _make_database from tracking/mlflow/store.py")


def test_mlflow_still_starts_its_telemetry_unasked() -> None:
    """mlflow 3.17: with no variable set there is a client, whose thread changes os.environ. No proxy, no traffic."""
    code = "import mlflow; from mlflow.telemetry.client import get_telemetry_client as client; print(bool(client()))"
    environ = {"PATH": os.environ["PATH"], "HTTPS_PROXY": "http://127.0.0.1:1"}  # not CI, where it is off
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", f"remove no_telemetry from tracking/mlflow/store.py? {done.stderr}"


@pytest.mark.parametrize(
    ("file", "word", "since"),
    [
        ("model/rank_exchange.py", "all_gather_single", (2, 13)),
        ("distributed/parallel.py", "forward_sync_buffers", (2, 13)),
    ],
)
def test_old_names_in_torch_are_needed_as_long_as_setup_py_allows_such_a_torch(
    file: str, word: str, since: tuple[int, int]
) -> None:
    allowed = re.search(r'"torch>=(\d+)\.(\d+)"', (REPO / "setup.py").read_text())
    assert allowed is not None
    is_used = word in (REPO / "dist_deeplab" / file).read_text()
    assert is_used and (int(allowed[1]), int(allowed[2])) < since, f"{file}: use the new name of {word} alone"
