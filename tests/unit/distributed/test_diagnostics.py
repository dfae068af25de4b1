"""The doctor's findings on several ranks that are equal, different or failing; and on a disk that is unusable."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_deeplab.distributed import diagnostics as checks
from dist_deeplab.distributed.diagnostics import Finding, check_disk, on_all_ranks, render
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError


def gathered(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    monkeypatch.setattr(checks, "gather_to_all", lambda own: [own, *others])


def test_equal_answers_are_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered(monkeypatch, "=torch 2", "=torch 2")
    assert on_all_ranks("libraries", lambda: "torch 2") == Finding("libraries", "ok", "torch 2")


def test_a_rank_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered(monkeypatch, "=torch 2", "=torch 1")
    finding = on_all_ranks("libraries", lambda: "torch 2")
    assert finding == Finding("libraries", "FAILED", "rank 0, 1: torch 2; rank 2: torch 1")


def test_an_error_on_one_rank_is_a_finding_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered(monkeypatch, "=fine")

    def ask() -> str:
        raise UserError("no shard\nhere")

    assert on_all_ranks("data", ask) == Finding("data", "FAILED", "rank 0: no shard; rank 1: fine")


def test_the_same_error_everywhere_fails_too() -> None:
    def ask() -> str:
        raise OSError("gone")

    assert on_all_ranks("data", ask) == Finding("data", "FAILED", "gone")


def test_a_good_disk_is_left_as_it_was(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in check_disk(DistEnv(), tmp_path / "runs")}
    assert findings["writing"].status == findings["shared disk"].status == "ok"
    assert "MB/s" in findings["writing"].text
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = check_disk(DistEnv(), tmp_path / "file")
    assert finding.status == "FAILED"
    assert str(tmp_path / "file") in finding.text


def test_a_host_with_another_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(step=5)  # of this module alone: other threads of the tests look at the clock too
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: next(now))
    monkeypatch.setattr(checks, "time", clock)
    with pytest.raises(UserError, match="does not see what the main rank wrote"):
        checks._read_trial(tmp_path, "token")
    (tmp_path / "token").write_text("other")
    with pytest.raises(UserError, match="reads other content"):
        checks._read_trial(tmp_path, "token")


def test_the_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("1")
    first = checks.code_digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = checks.code_digest()
    (tmp_path / "b.py").write_text("2")
    assert len({first, renamed, checks.code_digest()}) == 3


def test_the_table_ends_with_the_count() -> None:
    text = render([Finding("a", "ok", "x"), Finding("longer", "FAILED", "y")])
    assert text.splitlines() == ["ok       a       x", "FAILED   longer  y", "1 failed, 0 warnings"]
    findings = [Finding("a", "warning", "x")]
    assert render(findings).endswith("0 failed, 1 warning\n")
