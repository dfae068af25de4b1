"""A checkpoint file is loaded only if it is ours, whole and harmless; one that is written holds what was meant."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab.checkpointing import file as checkpoint
from dist_deeplab.checkpointing.file import DamagedCheckpoint, load_content, save_content
from dist_deeplab.errors import UserError


def write_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*absent\.pt"):
        load_content(tmp_path / "absent.pt")


@pytest.mark.parametrize("content", [{"model": {}}, {"format": "other/1"}, [1, 2], torch.zeros(2)])
def test_a_file_that_is_not_a_checkpoint_of_ours_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    write_sidecar(path)
    with pytest.raises(UserError, match=r"is not a 'dist_deeplab\.checkpoint/1' file"):
        load_content(path)


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"format": "dist_deeplab.checkpoint/1"}, protocol=2)])
def test_a_file_that_torch_did_not_write_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    write_sidecar(path)
    with pytest.raises(UserError, match=r"x\.pt") as caught:
        load_content(path)
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
        load_content(path)
    assert not (tmp_path / "trace").exists()


def save(path: Path, step: int) -> None:
    torch.save({"format": "dist_deeplab.checkpoint/1", "step": step, "weight": torch.zeros(1000)}, path)
    write_sidecar(path)


def test_what_is_read_are_the_bytes_that_were_verified_though_the_file_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "x.pt", tmp_path / "other.pt"
    save(path, step=1)
    save(other, step=2)
    real = checkpoint.load_opened

    def replace_then_load(file: Any, name: Path) -> Any:
        os.replace(other, path)
        return real(file, name)

    monkeypatch.setattr(checkpoint, "load_opened", replace_then_load)
    assert load_content(path)["step"] == 1


def test_a_checkpoint_that_is_written_to_while_it_is_read_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    save(path, step=1)
    real = checkpoint.load_opened

    def write_then_load(file: Any, name: Path) -> Any:
        with path.open("r+b") as same:
            same.seek(path.stat().st_size // 2)
            same.write(b"\x01")
        os.utime(path, ns=(0, 10**18))  # later than before, however coarse the file system's clock is
        return real(file, name)

    monkeypatch.setattr(checkpoint, "load_opened", write_then_load)
    with pytest.raises(DamagedCheckpoint, match="was written to while it was read"):
        load_content(path)


def test_the_digest_is_of_what_was_meant_not_of_what_the_disk_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_content(tmp_path / "x.pt", {"a": torch.arange(10)}, step=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(before["x.json"])["sha256"] == hashlib.sha256(before["x.pt"]).hexdigest()
    monkeypatch.setattr(checkpoint, "sha256", lambda path: "0" * 64)
    with pytest.raises(OSError, match="what was read back is not what was written"):
        save_content(tmp_path / "x.pt", {"a": torch.zeros(3)}, step=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_on_disk_before_anything_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else best.pt, a second name of it, or its sidecar could survive a power cut that its bytes do not."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(f"synced {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def named(source: Path, target: Path) -> None:
        events.append(f"named {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    save_content(tmp_path / "x.pt", {"a": torch.arange(3)}, step=1, also=lambda file, digest: events.append("also"))
    assert events[0].startswith("synced .x.pt."), events
    assert events[1] == "also"
    assert [event for event in events if "named" in event] == ["named x.json", "named x.pt"]
