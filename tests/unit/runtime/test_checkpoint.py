"""A checkpoint is written whole or not at all, a damaged one is passed over, and nothing unsound is ever saved."""

import collections
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_deeplab.errors import UserError
from dist_deeplab.runtime.checkpoint import CheckpointFolder, load_checkpoint, verify


def content_of(step: int) -> dict[str, Any]:
    """Return something of the shape of a real checkpoint that differs from step to step."""
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


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints", keep_last=3, is_writer=True)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_what_is_loaded_equals_what_was_saved(folder: CheckpointFolder) -> None:
    folder.save(content_of(7), step=7, is_best=False)
    path = folder.newest()
    assert path == folder.path / "step_00000007.pt"
    loaded = load_checkpoint(path)
    assert loaded.pop("format") == "dist_deeplab.checkpoint/1"
    assert_same(loaded, content_of(7))


def test_saving_leaves_its_argument_alone(folder: CheckpointFolder) -> None:
    content = content_of(1)
    folder.save(content, step=1, is_best=True)
    assert_same(content, content_of(1))


def test_the_sidecar_holds_the_files_sha256_and_size(folder: CheckpointFolder) -> None:
    folder.save(content_of(7), step=7, is_best=True)
    for name in ("step_00000007", "best"):
        data = (folder.path / f"{name}.pt").read_bytes()
        sidecar = json.loads((folder.path / f"{name}.json").read_text())
        assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
        assert (sidecar["size_bytes"], sidecar["step"]) == (len(data), 7)


def test_nothing_but_pairs_is_left_in_the_folder(folder: CheckpointFolder) -> None:
    folder.save(content_of(1), step=1, is_best=True)
    assert set(os.listdir(folder.path)) == {"step_00000001.pt", "step_00000001.json", "best.pt", "best.json"}


def test_an_empty_or_missing_folder_has_no_checkpoint(folder: CheckpointFolder) -> None:
    assert folder.newest() is None
    assert not folder.has_any()
    folder.path.mkdir(parents=True)
    (folder.path / "step_1.pt").write_bytes(b"not ours")
    assert folder.newest() is None
    assert not folder.has_any()


def test_a_rank_that_is_not_the_writer_writes_nothing(folder: CheckpointFolder) -> None:
    reader = CheckpointFolder(folder.path, keep_last=3, is_writer=False)
    reader.save(content_of(1), step=1, is_best=True)
    assert not folder.path.exists()


def test_a_checkpoint_saved_again_is_replaced(folder: CheckpointFolder) -> None:
    folder.save(content_of(1), step=5, is_best=False)
    folder.save(content_of(2), step=5, is_best=False)
    assert load_checkpoint(folder.path / "step_00000005.pt")["step"] == 2


# --- which ones stay --------------------------------------------------------------------------------------------------


def test_the_last_few_and_the_best_stay(folder: CheckpointFolder) -> None:
    for step in (5, 10, 15, 20, 100, 1000):
        folder.save(content_of(step), step=step, is_best=step == 10)
    names = {"step_00000020", "step_00000100", "step_00001000", "best"}
    assert set(os.listdir(folder.path)) == {f"{name}.{ending}" for name in names for ending in ("pt", "json")}
    assert load_checkpoint(folder.path / "best.pt")["step"] == 10
    assert folder.newest() == folder.path / "step_00001000.pt"


def test_a_better_checkpoint_takes_the_place_of_the_best(folder: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        folder.save(content_of(step), step=step, is_best=step < 3)
    assert load_checkpoint(folder.path / "best.pt")["step"] == 2


def test_the_best_is_copied_where_hard_links_are_impossible(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder.save(content_of(4), step=4, is_best=True)
    assert load_checkpoint(folder.path / "best.pt")["step"] == 4


def test_the_checkpoint_just_saved_stays_even_beside_damaged_ones_of_later_steps(folder: CheckpointFolder) -> None:
    """After a step back to a sound checkpoint, the damaged ones that were passed over still lie there."""
    folder = CheckpointFolder(folder.path, keep_last=2, is_writer=True)
    for step in (100, 200, 300):
        CheckpointFolder(folder.path, keep_last=9, is_writer=True).save(content_of(step), step=step, is_best=False)
    for step in (200, 300):
        flip_a_bit(folder.path / f"step_{step:08d}.pt")
    assert folder.newest() == folder.path / "step_00000100.pt"
    for step in (150, 160, 170):
        folder.save(content_of(step), step=step, is_best=False)
        assert folder.newest() == folder.path / f"step_{step:08d}.pt"
    verify(folder.path / "step_00000160.pt")


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


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, remove_sidecar, truncate_sidecar, replace_sidecar])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(
    damage: Callable[[Path], None],
    folder: CheckpointFolder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    for step in (1, 2):
        folder.save(content_of(step), step=step, is_best=False)
    newest = folder.path / "step_00000002.pt"
    damage(newest)
    with caplog.at_level(logging.WARNING, logger="dist_deeplab"):
        assert folder.newest() == folder.path / "step_00000001.pt"
    assert str(newest) in caplog.text
    with pytest.raises(UserError) as caught:
        load_checkpoint(newest)
    assert str(newest) in str(caught.value)


def test_where_all_are_damaged_there_is_none_but_they_are_seen(folder: CheckpointFolder) -> None:
    for step in (1, 2):
        folder.save(content_of(step), step=step, is_best=False)
        flip_a_bit(folder.path / f"step_{step:08d}.pt")
    assert folder.newest() is None
    assert folder.has_any()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("content", [{"model": {}}, {"format": "other/1"}, [1, 2], torch.zeros(2)])
def test_a_file_that_is_not_a_checkpoint_of_ours_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    write_sidecar(path)
    with pytest.raises(UserError, match=r"is not a 'dist_deeplab\.checkpoint/1' file"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"format": "dist_deeplab.checkpoint/1"}, protocol=2)])
def test_a_file_that_torch_did_not_write_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    write_sidecar(path)
    with pytest.raises(UserError, match=r"x\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


class Hostile:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"format": "dist_deeplab.checkpoint/1", "model": Hostile(tmp_path / "trace")}, path)
    write_sidecar(path)
    with pytest.raises(UserError, match="can't be read"):
        load_checkpoint(path)
    assert not (tmp_path / "trace").exists()


# --- what is never saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_is_not_finite_is_refused_and_nothing_changes(value: float, folder: CheckpointFolder) -> None:
    """Otherwise the next few saves would rotate the last sound checkpoints away."""
    for step in (1, 2, 3):
        folder.save(content_of(step), step=step, is_best=True)
    before = read_tree(folder.path)
    content = content_of(4)
    content["model"]["conv.weight"][2, 1] = value
    with pytest.raises(ValueError, match=r"conv\.weight holds NaN or infinity"):
        folder.save(content, step=4, is_best=True)
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
        folder.save(content, step=1, is_best=False)
    assert not folder.path.exists()


# --- full disks and kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_what_was_there_and_no_temporary_file(
    failing: str, folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(content_of(1), step=1, is_best=True)
    before = read_tree(folder.path)

    def no_space(*arguments: Any) -> None:
        if failing == "torch.save":
            arguments[1].write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, no_space)
    with pytest.raises(OSError, match="No space"):
        folder.save(content_of(2), step=2, is_best=True)
    assert read_tree(folder.path) == before


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond some bytes: torch meets a failing write as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_inside_torch_is_an_os_error_too(
    folder: CheckpointFolder, file_size_limit: Callable[[int], None]
) -> None:
    folder.save(content_of(1), step=1, is_best=True)
    before = read_tree(folder.path)
    content = content_of(2)
    content["model"]["large"] = torch.zeros(1_000_000)
    file_size_limit(1_000_000)
    with pytest.raises(OSError, match=r"step_00000002\.pt"):
        folder.save(content, step=2, is_best=True)
    file_size_limit(resource.RLIM_INFINITY)
    assert read_tree(folder.path) == before


def save_until_killed(folder: CheckpointFolder, call: int) -> int | None:
    """Save step 2 in a process that gets `kill -9` instead of its rename number `call`; return its exit code."""

    def save() -> None:
        replace, calls = os.replace, itertools.count()
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else replace(*names)
        folder.save(content_of(2), step=2, is_best=True)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    return process.exitcode


def test_kill_9_at_any_rename_leaves_a_sound_newest_and_best(tmp_path: Path) -> None:
    names = ("step_00000001", "step_00000002", "best")
    pairs = {f"{name}.{ending}" for name in names for ending in ("pt", "json")}
    for call in itertools.count():
        folder = CheckpointFolder(tmp_path / str(call), keep_last=3, is_writer=True)
        folder.save(content_of(1), step=1, is_best=True)
        exit_code = save_until_killed(folder, call)
        assert exit_code == (-signal.SIGKILL if exit_code else 0)
        newest = folder.newest()
        assert newest is not None
        best = load_checkpoint(folder.path / "best.pt")["step"]
        assert best in (1, 2), f"killed at rename {call}"
        assert load_checkpoint(newest)["step"] == (2 if call > 3 else 1), "the step's own sidecar is the last rename"
        assert best >= load_checkpoint(newest)["step"], "a step can be found before it is the best"
        folder.save(content_of(2), step=2, is_best=True)
        assert set(os.listdir(folder.path)) == pairs
        assert load_checkpoint(folder.path / "best.pt")["step"] == 2
        if exit_code == 0:
            assert call >= 4, "file, best sidecar, best file, sidecar"
            return
