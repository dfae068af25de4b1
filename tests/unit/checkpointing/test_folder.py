"""A checkpoint is written whole or not at all, a damaged one is passed over, and nothing unsound is ever saved."""

import collections
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_deeplab.checkpointing.file import load_content
from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.errors import TrainingError, UserError


def content_of(step: int) -> dict[str, Any]:
    """Something of the shape of a real checkpoint that differs from step to step."""
    weight = torch.full((3, 2), float(step)) + torch.arange(6.0).view(3, 2)
    return {
        "model": collections.OrderedDict({"conv.weight": weight, "bn.num_batches_tracked": torch.tensor(step)}),
        "optimizer": {"state": {0: {"momentum_buffer": weight / 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "step": step,
        "name": "x",
        "best": None,
        "flags": (True, 2.5, [1, "two"]),
        "half": weight.to(torch.bfloat16),
    }


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))


def newest(folder: CheckpointFolder) -> Path | None:
    return folder.read_newest(lambda path: path if load_content(path) else None)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints", keep_last=3, is_writer=True)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_what_is_loaded_equals_what_was_saved(folder: CheckpointFolder) -> None:
    folder.save(content_of(7), step=7, is_best=False, wait=True)
    path = newest(folder)
    assert path == folder.path / "step_00000007.pt"
    loaded = load_content(path)
    assert loaded.pop("format") == "dist_deeplab.checkpoint/1"
    assert_same(loaded, content_of(7))


def test_saving_leaves_its_argument_alone(folder: CheckpointFolder) -> None:
    content = content_of(1)
    folder.save(content, step=1, is_best=True, wait=True)
    assert_same(content, content_of(1))


def test_the_sidecar_holds_the_files_sha256_and_size(folder: CheckpointFolder) -> None:
    folder.save(content_of(7), step=7, is_best=True, wait=True)
    for name in ("step_00000007", "best"):
        data = (folder.path / f"{name}.pt").read_bytes()
        sidecar = json.loads((folder.path / f"{name}.json").read_text())
        assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
        assert (sidecar["size_bytes"], sidecar["step"]) == (len(data), 7)


def test_nothing_but_pairs_is_left_in_the_folder(folder: CheckpointFolder) -> None:
    folder.save(content_of(1), step=1, is_best=True, wait=True)
    assert set(os.listdir(folder.path)) == {"step_00000001.pt", "step_00000001.json", "best.pt", "best.json"}


def test_an_empty_or_missing_folder_has_no_checkpoint(folder: CheckpointFolder) -> None:
    assert newest(folder) is None
    assert not folder.has_any()
    folder.path.mkdir(parents=True)
    (folder.path / "step_1.pt").write_bytes(b"not ours")
    assert newest(folder) is None
    assert not folder.has_any()


def test_a_rank_that_is_not_the_writer_writes_nothing(folder: CheckpointFolder) -> None:
    reader = CheckpointFolder(folder.path, keep_last=3, is_writer=False)
    reader.save(content_of(1), step=1, is_best=True, wait=True)
    assert not folder.path.exists()


def test_a_checkpoint_saved_again_is_replaced(folder: CheckpointFolder) -> None:
    folder.save(content_of(1), step=5, is_best=False, wait=True)
    folder.save(content_of(2), step=5, is_best=False, wait=True)
    assert load_content(folder.path / "step_00000005.pt")["step"] == 2


# --- which ones stay --------------------------------------------------------------------------------------------------


def test_the_last_few_and_the_best_stay(folder: CheckpointFolder) -> None:
    for step in (5, 10, 15, 20, 100, 1000):
        folder.save(content_of(step), step=step, is_best=step == 10, wait=True)
    names = {"step_00000020", "step_00000100", "step_00001000", "best"}
    assert set(os.listdir(folder.path)) == {f"{name}.{ending}" for name in names for ending in ("pt", "json")}
    assert load_content(folder.path / "best.pt")["step"] == 10
    assert newest(folder) == folder.path / "step_00001000.pt"


def test_a_better_checkpoint_takes_the_place_of_the_best(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        folder.save(content_of(step), step=step, is_best=step < 3, wait=True)
    assert load_content(folder.path / "best.pt")["step"] == 2


def test_the_best_is_copied_where_hard_links_are_impossible(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder.save(content_of(4), step=4, is_best=True, wait=True)
    assert load_content(folder.path / "best.pt")["step"] == 4


def test_the_checkpoint_just_saved_stays_even_beside_damaged_ones_of_later_steps(folder: CheckpointFolder) -> None:
    """After a step back to a sound checkpoint, the damaged ones that were passed over still lie there."""
    folder = CheckpointFolder(folder.path, keep_last=2, is_writer=True)
    for step in (100, 200, 300):
        CheckpointFolder(folder.path, keep_last=9, is_writer=True).save(
            content_of(step), step=step, is_best=False, wait=True
        )
    for step in (200, 300):
        flip_a_bit(folder.path / f"step_{step:08d}.pt")
    assert newest(folder) == folder.path / "step_00000100.pt"
    for step in (150, 160, 170):
        folder.save(content_of(step), step=step, is_best=False, wait=True)
        assert newest(folder) == folder.path / f"step_{step:08d}.pt"
    load_content(folder.path / "step_00000160.pt")


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove_sidecar(path: Path) -> None:
    path.with_suffix(".json").unlink()


def truncate_sidecar(path: Path) -> None:
    os.truncate(path.with_suffix(".json"), 10)


def replace_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text("[]")


@pytest.mark.quick("P5")
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, remove_sidecar, truncate_sidecar, replace_sidecar])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(
    damage: Callable[[Path], None],
    folder: CheckpointFolder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    for step in (1, 2):
        folder.save(content_of(step), step=step, is_best=False, wait=True)
    damaged = folder.path / "step_00000002.pt"
    damage(damaged)
    with caplog.at_level(logging.WARNING, logger="dist_deeplab"):
        assert newest(folder) == folder.path / "step_00000001.pt"
    assert str(damaged) in caplog.text
    with pytest.raises(UserError) as caught:
        load_content(damaged)
    assert str(damaged) in str(caught.value)


def test_where_all_are_damaged_there_is_none_but_they_are_seen(folder: CheckpointFolder) -> None:
    for step in (1, 2):
        folder.save(content_of(step), step=step, is_best=False, wait=True)
        flip_a_bit(folder.path / f"step_{step:08d}.pt")
    assert newest(folder) is None
    assert folder.has_any()


# --- what is never saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_is_not_finite_is_refused_and_nothing_changes(value: float, folder: CheckpointFolder) -> None:
    """Otherwise the next few saves would rotate the last sound checkpoints away."""
    for step in (1, 2, 3):
        folder.save(content_of(step), step=step, is_best=True, wait=True)
    before = read_tree(folder.path)
    content = content_of(4)
    content["model"]["conv.weight"][2, 1] = value
    with pytest.raises(ValueError, match=r"conv\.weight holds NaN or infinity"):
        folder.save(content, step=4, is_best=True, wait=True)
    assert read_tree(folder.path) == before


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.5), "float64"),
        (np.int64(1), "int64"),
        (np.zeros(2), "ndarray"),
        (np.bool_(True), "bool"),
        (Path("x"), "Path"),
        ({1, 2}, "set"),
        (torch.nn.Parameter(torch.zeros(1)), "Parameter"),
    ],
)
def test_what_a_safe_load_would_refuse_is_not_saved_and_its_place_is_named(
    value: object, kind: str, folder: CheckpointFolder
) -> None:
    content = content_of(1) | {"scores": {"history": [0.5, value]}}
    with pytest.raises(ValueError, match=rf"scores\.history\[1\] is a .*{kind}"):
        folder.save(content, step=1, is_best=False, wait=True)
    assert not folder.path.exists()


# --- full disks and kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failing_disk_is_a_metric_and_leaves_what_was_there(
    failing: str, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(content_of(1), step=1, is_best=True, wait=True)
    folder.pop_values()
    before = read_tree(folder.path)

    def no_space(*arguments: Any) -> None:
        if failing == "torch.save":
            arguments[1].write(b"the first half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, no_space)
        folder.save(content_of(2), step=2, is_best=True)
        folder.close()
    values = folder.pop_values()
    assert values.pop("time/checkpoint_stall_s") >= 0
    assert values == {"checkpoint/failed": 1.0}
    assert read_tree(folder.path) == before
    folder.save(content_of(3), step=3, is_best=False, wait=True)
    assert newest(folder) == folder.path / "step_00000003.pt"
    assert "checkpoint/failed" not in folder.pop_values()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.quick("P5")
def test_a_full_disk_costs_that_checkpoint_only_and_at_the_end_it_is_an_error(small_disk: Path) -> None:
    folder = CheckpointFolder(small_disk / "checkpoints", keep_last=2, is_writer=True)
    folder.save(content_of(1), step=1, is_best=True, wait=True)
    before = read_tree(folder.path)
    large = content_of(2) | {"large": torch.zeros(1_000_000)}  # 4 MB
    folder.save(large, step=2, is_best=True)
    folder.close()
    assert "checkpoint/failed" in folder.pop_values()
    assert read_tree(folder.path) == before
    with pytest.raises(TrainingError, match=r"step 2 could not be written \(.*No space left.*make room in"):
        folder.save(large, step=2, is_best=True, wait=True)
    assert read_tree(folder.path) == before
    folder.save(content_of(3), step=3, is_best=False, wait=True)
    assert newest(folder) == folder.path / "step_00000003.pt"


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond some bytes: torch meets a failing write as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_inside_torch_says_what_the_system_said(
    folder: CheckpointFolder, file_size_limit: Callable[[int], None]
) -> None:
    folder.save(content_of(1), step=1, is_best=True, wait=True)
    before = read_tree(folder.path)
    content = content_of(2)
    content["model"]["large"] = torch.zeros(1_000_000)
    file_size_limit(1_000_000)
    with pytest.raises(TrainingError, match=r"step 2 could not be written .*File too large"):
        folder.save(content, step=2, is_best=True, wait=True)
    file_size_limit(resource.RLIM_INFINITY)
    assert read_tree(folder.path) == before


def test_a_best_checkpoint_that_failed_is_told_once(
    folder: CheckpointFolder, file_size_limit: Callable[[int], None]
) -> None:
    folder.save(content_of(1), step=1, is_best=True)
    assert not folder.lost_best()
    file_size_limit(1000)
    folder.save(content_of(2), step=2, is_best=False)
    folder.close()
    assert not folder.lost_best(), "not the best one"
    folder.save(content_of(3), step=3, is_best=True)
    assert folder.lost_best()
    assert not folder.lost_best()
    file_size_limit(resource.RLIM_INFINITY)
    folder.save(content_of(4), step=4, is_best=True)
    assert not folder.lost_best()


# --- in the background ------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that finishes nothing before the event is set."""
    released = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (released.wait(60), fsync(descriptor))[1])
    return released


def test_training_continues_while_a_checkpoint_is_written_and_cannot_change_it(
    folder: CheckpointFolder, slow_disk: threading.Event
) -> None:
    content = content_of(5)
    folder.save(content, step=5, is_best=False)
    content["model"]["conv.weight"].zero_()
    content["optimizer"]["state"][0]["momentum_buffer"].zero_()
    assert not list(folder.path.glob("step_*")), "saved already: this test sees nothing"
    slow_disk.set()
    folder.close()
    loaded = load_content(folder.path / "step_00000005.pt")
    del loaded["format"]
    assert_same(loaded, content_of(5))


def test_a_save_waits_for_the_one_before(folder: CheckpointFolder, slow_disk: threading.Event) -> None:
    folder.save(content_of(1), step=1, is_best=False)
    second = threading.Thread(target=lambda: folder.save(content_of(2), step=2, is_best=False, wait=True))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    slow_disk.set()
    second.join(60)
    for step in (1, 2):
        assert load_content(folder.path / f"step_{step:08d}.pt")["step"] == step


def test_the_wait_for_a_best_checkpoint_is_a_stall_of_the_next_save_alone(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # each look at the clock is a second later; those of the writing thread do not count

    def second() -> float:
        return float(next(clock)) if threading.current_thread() is threading.main_thread() else 0.0

    monkeypatch.setattr("dist_deeplab.checkpointing.folder.time.perf_counter", second)
    stalls = []
    for step in (1, 2, 3):
        folder.lost_best()
        folder.save(content_of(step), step=step, is_best=step == 1, wait=True)
        stalls.append(folder.pop_values()["time/checkpoint_stall_s"])
    assert stalls[1] == stalls[0] + 1 == stalls[2] + 1


def test_a_tensor_that_becomes_one_of_another_type_is_saved_as_it_is_now(folder: CheckpointFolder) -> None:
    for step, dtype in ((1, torch.float32), (2, torch.float64), (3, torch.int64)):
        content = {**content_of(step), "half": torch.full((3, 2), 2**24 + 1, dtype=torch.float64).to(dtype)}
        folder.save(content, step=step, is_best=False, wait=True)
        assert_same(load_content(folder.path / f"step_{step:08d}.pt")["half"], content["half"])


def test_an_error_that_is_not_the_disks_ends_the_run(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", lambda *arguments: 1 / 0)
    folder.save(content_of(1), step=1, is_best=False)
    with pytest.raises(ZeroDivisionError):
        folder.close()


def test_every_nth_checkpoint_stays_for_good(folder: CheckpointFolder) -> None:
    folder = CheckpointFolder(folder.path, keep_last=2, keep_every=20, is_writer=True)
    for step in range(5, 66, 5):
        folder.save(content_of(step), step=step, is_best=False, wait=True)
    assert [path.stem for path in sorted(folder.path.glob("*.pt"))] == [f"step_{s:08d}" for s in (20, 40, 60, 65)]


def test_half_written_files_of_a_killed_run_are_removed_at_the_start(folder: CheckpointFolder) -> None:
    folder.save(content_of(1), step=1, is_best=True, wait=True)
    before = read_tree(folder.path)
    for name in (".step_00000002.pt.tmp", ".best.json.tmp"):
        (folder.path / name).write_bytes(b"half")
    newest(folder)
    assert read_tree(folder.path) == before


def save_until_killed(folder: CheckpointFolder, call: int) -> int | None:
    """Save step 2 in a process that gets `kill -9` instead of its rename number `call`; return its exit code."""

    def save() -> None:
        replace, calls = os.replace, itertools.count()
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else replace(*names)
        folder.save(content_of(2), step=2, is_best=True, wait=True)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.quick("P5")
def test_kill_9_at_any_rename_leaves_a_sound_newest_and_best(tmp_path: Path) -> None:
    names = ("step_00000001", "step_00000002", "best")
    pairs = {f"{name}.{ending}" for name in names for ending in ("pt", "json")}
    for call in itertools.count():
        folder = CheckpointFolder(tmp_path / str(call), keep_last=3, is_writer=True)
        folder.save(content_of(1), step=1, is_best=True, wait=True)
        exit_code = save_until_killed(folder, call)
        assert exit_code == (-signal.SIGKILL if exit_code else 0)
        found = newest(folder)
        assert found is not None
        best = load_content(folder.path / "best.pt")["step"]
        assert best in (1, 2), f"killed at rename {call}"
        assert load_content(found)["step"] == (2 if call > 3 else 1), "the step's own file is the last rename"
        assert best >= load_content(found)["step"], "a step can be found before it is the best"
        folder.save(content_of(2), step=2, is_best=True, wait=True)
        assert set(os.listdir(folder.path)) == pairs
        assert load_content(folder.path / "best.pt")["step"] == 2
        if exit_code == 0:
            assert call >= 4, "best sidecar, best file, sidecar, file"
            return


@pytest.mark.parametrize("call", range(4))
def test_kill_9_during_the_first_save_leaves_nothing_in_the_way_of_a_new_start(tmp_path: Path, call: int) -> None:
    """A run that has no sound checkpoint but files that look like one would ask for a human."""
    folder = CheckpointFolder(tmp_path, keep_last=3, is_writer=True)
    assert save_until_killed(folder, call) == -signal.SIGKILL
    assert newest(folder) is None
    assert not folder.has_any()
    folder.save(content_of(2), step=2, is_best=True, wait=True)
    assert set(os.listdir(tmp_path)) == {
        f"{name}.{end}" for name in ("step_00000002", "best") for end in ("pt", "json")
    }


@pytest.mark.parametrize("call", range(5))
def test_kill_9_while_a_step_is_saved_again_leaves_the_old_or_the_new_one(tmp_path: Path, call: int) -> None:
    folder = CheckpointFolder(tmp_path, keep_last=3, is_writer=True)
    folder.save(content_of(2) | {"name": "before"}, step=2, is_best=True, wait=True)
    assert save_until_killed(folder, call) == (-signal.SIGKILL if call < 4 else 0)
    found = newest(folder)
    assert found is not None
    assert load_content(found)["name"] == ("x" if call == 4 else "before")
    load_content(tmp_path / "best.pt")


def test_a_checkpoint_without_its_sidecar_does_not_count_as_kept(tmp_path: Path) -> None:
    """Step 20 lost its sidecar: with keep_last=2 the whole one of step 10 must stay."""
    folder = CheckpointFolder(tmp_path, keep_last=2, is_writer=True)
    for step in (10, 20, 30):
        folder.save(content_of(step), step=step, is_best=False, wait=True)
        if step == 20:
            (tmp_path / "step_00000020.json").unlink()
    assert sorted(path.stem for path in tmp_path.glob("step_*.json")) == ["step_00000010", "step_00000030"]
    flip_a_bit(tmp_path / "step_00000030.pt")
    assert newest(folder) == tmp_path / "step_00000010.pt"
    folder.save(content_of(40), step=40, is_best=False, wait=True)
    folder.save(content_of(50), step=50, is_best=False, wait=True)
    assert sorted(path.stem for path in tmp_path.glob("step_*.pt")) == ["step_00000040", "step_00000050"]
