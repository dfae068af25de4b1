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
from dist_deeplab.checkpointing.file import load_content, write_tensors
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


def test_the_digest_is_of_what_was_meant_not_of_what_the_disk_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = write_tensors(tmp_path / "x.pt", {"a": torch.arange(10)})
    assert digest == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    before = (tmp_path / "x.pt").read_bytes()
    monkeypatch.setattr(checkpoint, "sha256", lambda path: "0" * 64)
    with pytest.raises(OSError, match="what was read back is not what was written"):
        write_tensors(tmp_path / "x.pt", {"a": torch.zeros(3)})
    assert (tmp_path / "x.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pt"]
