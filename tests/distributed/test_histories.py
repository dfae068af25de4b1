"""Whatever a run's folder goes through, it ends as the undisturbed run, or in a refusal that says what to do.

hypothesis draws histories of starts: each with other harmless settings and mostly with a fault (a kill at a file
operation, also half-way through a write; SIGTERM during a step, a save or an evaluation; a disk that is full for some
operations), and between them damaged checkpoints, half a line in the journal and settings that a run cannot continue
with. After each start every whole checkpoint and every point of the journal must be one of the undisturbed run.

    DIST_DEEPLAB_HISTORIES=500 pytest tests/distributed/test_histories.py     # so many histories, drawn afresh
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dist_deeplab.checkpointing.file import load_content
from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.errors import STOPPED_EARLY, UserError
from tests.distributed.disturbed_run import ENDED, FILES, KILLED, MOMENTS, Fault, start
from tests.networks import checkpoint_of, discerning_network, write_checkpoint

MAX_STEPS = 6
TOLERANCE = 1e-4  # once the split has changed: of a tensor's largest value
MIOU_TOLERANCE = 1e-3
FIXED = [
    *("model.backbone=resnet_tiny", "precision.dtype=fp32", "data.crop_size=33", "batch.global_size=2"),
    *(f"max_steps={MAX_STEPS}", "data.num_workers=0", "tracking.uri=none"),
]

RATES = {"sync": "2e-5", "frozen": "5e-6"}

HARMLESS = {
    "tracking.log_every": (1, 2, 3),
    "checkpoint.every": (1, 2, 3),
    "checkpoint.keep_last": (2, 3),
    "checkpoint.keep_every": (0, 2),
    "eval.every": (2, 3, 0),
    "eval.num_panels": (0, 1),
    "eval.batch_size": (1, 4),
    "eval.table": ("mean", "classes"),
    "data.max_bad_samples": (0, 3),
    "distributed.hang_timeout_s": (1800, 60),
}
SPLITS = {"one rank": (1, ""), "two ranks": (2, ""), "micro-batches of one": (1, "batch.micro_size=1")}
HARMFUL = ("optim.lr=2e-3", "seed=1", "max_steps=7", "batch.global_size=4", "data.flip=false", "resume=never")

_NUMBERS = st.one_of(st.integers(0, 7), st.integers(0, 40), st.integers(0, 3000))
_RANKS = st.sampled_from((0, 0, 0, 1))
FAULTS = st.one_of(
    st.builds(
        Fault,
        kind=st.sampled_from(("kill", "kill_within", "kill_after", "stop")),
        where=st.sampled_from((*MOMENTS, *FILES)),
        number=_NUMBERS,
        rank=_RANKS,
    ),
    st.builds(
        Fault,
        kind=st.just("full"),
        where=st.sampled_from(FILES),
        number=_NUMBERS,
        lasting=st.sampled_from((1, 2, 5, 10**6)),
    ),
)

LONG = int(os.environ.get("DIST_DEEPLAB_HISTORIES", "0"))


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """The run that nothing happened to. contents: of its checkpoints, by step; losses, mious: its curves."""

    contents: dict[int, dict[str, Any]]
    losses: dict[int, float]
    mious: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A start that began to train. first: the step it continued from; window: where its first log line begins."""

    first: int
    window: int
    log_every: int
    eval_every: int


class Data:
    """The shards, and the undisturbed runs on them, each made once."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder, self._undisturbed = shards, folder, dict[str, Undisturbed]()
        self.init = write_checkpoint(folder / "init.pt", checkpoint_of(discerning_network(len(CLASS_NAMES))))

    def arguments(self, folder: Path, batch_norm: str) -> list[str]:
        data = [f"data.{split}={self.shards}/{split}.json" for split in ("train", "val")]
        norm = [f"model.batch_norm={batch_norm}", f"optim.lr={RATES[batch_norm]}", f"model.init={self.init}"]
        return [*FIXED, *data, *norm, f"output_dir={folder}", "name=run"]

    def undisturbed(self, batch_norm: str) -> Undisturbed:
        if batch_norm not in self._undisturbed:
            folder = self.folder / batch_norm
            folder.mkdir()
            every = ("checkpoint.every=1", "checkpoint.keep_every=1", "eval.every=1", "tracking.log_every=1")
            assert start([*self.arguments(folder, batch_norm), *every], folder / "run", folder / "log") == 0
            points = points_of(folder / "run")
            self._undisturbed[batch_norm] = Undisturbed(
                {step: content_of(path) for step, path in whole_checkpoints(folder / "run").items()},
                points["train/loss"],
                points["val/mIoU"],
            )
        return self._undisturbed[batch_norm]


def points_of(run_dir: Path) -> dict[str, dict[int, float]]:
    """{key: {step: value}} of the journal's whole lines, each of which must be sound and no point be there twice."""
    found: dict[str, dict[int, float]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            if "key" in record:
                points = found.setdefault(record["key"], {})
                assert record["step"] not in points, f"{record} comes a second time"
                points[record["step"]] = record["value"]
    return found


def whole_checkpoints(run_dir: Path) -> dict[int, Path]:
    """{step: path} of the checkpoints that a run can continue from, in the order of their steps."""
    found = {}
    for path in sorted((run_dir / "checkpoints").glob("step_*.pt")):
        with contextlib.suppress(UserError):
            load_content(path)
            found[int(path.stem.removeprefix("step_"))] = path
    return found


@functools.lru_cache(maxsize=64)
def _content(path: Path, mtime_ns: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def content_of(path: Path) -> dict[str, Any]:
    return _content(path, path.stat().st_mtime_ns)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else ():
        yield from tensors_of(item)


class Histories(RuleBasedStateMachine):
    def __init__(self, data: Data, folder: Path) -> None:
        super().__init__()
        self.data, self.folder = data, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.run_dir = folder / "run"
        self.attempts: list[Attempt] = []
        self.losses: dict[int, set[float]] = {}
        self.is_exact = True
        self.is_done = False
        self.lacks_points = False
        self.is_damaged = False

    # --- what may happen ------------------------------------------------------------------------------------------

    @initialize(batch_norm=st.sampled_from(("sync", "frozen")))
    def begin(self, batch_norm: str) -> None:
        self.batch_norm = batch_norm
        self.expected = self.data.undisturbed(batch_norm)

    @precondition(lambda self: not self.is_done)
    @rule(
        split=st.sampled_from(("one rank", "one rank", "one rank", *SPLITS)),
        changes=st.fixed_dictionaries({key: st.sampled_from(values) for key, values in HARMLESS.items()}),
        fault=FAULTS,
    )
    def disturbed_start(self, split: str, changes: dict[str, Any], fault: Fault) -> None:
        if self.batch_norm == "sync" and split == "micro-batches of one":
            split = "one rank"  # other statistics, so other weights
        self.launch(split, changes, fault)

    @precondition(lambda self: whole_checkpoints(self.run_dir))
    @rule(
        what=st.sampled_from(("flipped byte", "half", "empty", "no sidecar", "half a sidecar")),
        where=st.floats(0, 1, exclude_max=True),
    )
    def damage_newest(self, what: str, where: float) -> None:
        newest = list(whole_checkpoints(self.run_dir).values())[-1]
        sidecar = newest.with_suffix(".json")
        if what == "flipped byte":
            with newest.open("r+b") as file:
                file.seek(int(where * newest.stat().st_size))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        elif what == "no sidecar":
            sidecar.unlink()
        else:
            file_path = sidecar if what == "half a sidecar" else newest
            os.truncate(file_path, 0 if what == "empty" else file_path.stat().st_size // 2)
        self.is_done, self.is_damaged = False, True

    @precondition(lambda self: (self.run_dir / "metrics.jsonl").exists())
    @rule(half=st.sampled_from((b'{"step": 3, "time": 17', b"{", b"\0\0\0\0", b'{"step": 3}')))
    def half_a_line_in_the_journal(self, half: bytes) -> None:
        with (self.run_dir / "metrics.jsonl").open("ab") as file:
            file.write(half)

    @precondition(lambda self: whole_checkpoints(self.run_dir))
    @rule(argument=st.sampled_from(HARMFUL))
    def other_recipe(self, argument: str) -> None:
        before = self.listing()
        code, said = self.run("one rank", {}, None, argument)
        assert code == 2, said
        assert re.search("^error: .*(another recipe|resume=never)", said, re.MULTILINE), said
        assert self.listing() == before

    # --- what must hold -------------------------------------------------------------------------------------------

    def launch(self, split: str, changes: dict[str, Any], fault: Fault | None) -> int:
        """Start the run once, and check what it did to its folder; the exit code."""
        self.move_unreadable_away()
        whole = whole_checkpoints(self.run_dir)
        first = max(whole, default=0)
        pending = len(content_of(whole[first])["losses"]["rows"]) if whole else 0
        self.is_exact = self.is_exact and split == "one rank"
        code, said = self.run(split, changes, fault)
        if begun := re.search(r"from step (\d+) to", said):
            assert int(begun[1]) == first, said
            self.begun(Attempt(first, first - pending, changes["tracking.log_every"], changes["eval.every"]))
        self.check_exit(code, said, fault)
        self.check_checkpoints(first)
        self.check_journal()
        self.is_done = code == 0
        return code

    def run(self, split: str, changes: dict[str, Any], fault: Fault | None, *more: str) -> tuple[int, str]:
        ranks, argument = SPLITS[split]
        log = self.folder / "log"
        log.write_bytes(b"")
        arguments = [*self.data.arguments(self.folder, self.batch_norm), *([argument] if argument else []), *more]
        arguments += [f"{key}={value}" for key, value in changes.items()]
        code = start(arguments, self.run_dir, log, fault=fault, ranks=ranks)
        said = log.read_text()
        (note if currently_in_test_context() else print)(f"{split} {changes} {fault}: {code}\n{said}")
        return code, said

    def begun(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        window = attempt.window
        for step in range(attempt.first + 1, MAX_STEPS + 1):
            if step % attempt.log_every == 0 or step == MAX_STEPS:
                values = [self.expected.losses[number] for number in range(window + 1, step + 1)]
                self.losses.setdefault(step, set()).add(math.fsum(values) / len(values))
                window = step

    def check_exit(self, code: int, said: str, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        possible = {"": {0}, "stop": {0, STOPPED_EARLY, ENDED}, "full": {0, 1, 2}}.get(kind, {0, KILLED})
        assert code in possible, said
        assert "Traceback" not in said, said
        if code in (1, 2):
            assert re.search(r"^error: .*(space|write|written)", said, re.MULTILINE), said
        self.lacks_points |= kind == "full" and fault is not None and fault.where == "journal"

    def check_checkpoints(self, first: int) -> None:
        """Each whole checkpoint is the undisturbed run's, and none that was whole is lost."""
        whole = whole_checkpoints(self.run_dir)
        assert max(whole, default=0) >= first
        for step, path in whole.items():
            content = content_of(path)
            assert content["step"] == step
            for name in ("model", "optimizer"):
                self.check_tensors(content[name], self.expected.contents[step][name])
        best = self.run_dir / "checkpoints" / "best.pt"
        if best.exists() and not any(map(best.samefile, best.parent.glob("step_*"))):
            load_content(best)
            self.check_tensors(content_of(best)["model"], self.expected.contents[content_of(best)["step"]]["model"])

    def check_tensors(self, found: Any, expected: Any) -> None:
        for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
            if self.is_exact:
                assert torch.equal(ours, theirs)
            else:
                assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()

    def check_journal(self) -> None:
        """Every point is one that the undisturbed run would have at some `log_every`."""
        points = points_of(self.run_dir)
        assert not self.is_exact or "tracking/diverged_points" not in points
        for step, value in points.get("train/loss", {}).items():
            possible = self.losses[step]
            assert value in possible or (not self.is_exact and value == pytest.approx(min(possible), rel=0.5)), (
                step,
                value,
                possible,
            )
        for step, value in points.get("val/mIoU", {}).items():
            assert value == pytest.approx(self.expected.mious[step], abs=0 if self.is_exact else MIOU_TOLERANCE)

    def teardown(self) -> None:
        if not hasattr(self, "expected"):
            return
        plain = {key: values[0] for key, values in HARMLESS.items()}
        if not self.is_done:
            assert self.launch("one rank", plain, None) == 0
        self.check_end()
        shutil.rmtree(self.folder)

    def check_end(self) -> None:
        """The last checkpoint is there, the best one is sound, and the journal lacks nothing."""
        whole = whole_checkpoints(self.run_dir)
        assert max(whole) == MAX_STEPS
        last = content_of(whole[MAX_STEPS])
        assert not last["owes_evaluation"]
        best = self.run_dir / "checkpoints" / "best.pt"
        load_content(best)
        best_miou = self.expected.mious[content_of(best)["step"]]
        assert best_miou >= last["best_miou"] - (0 if self.is_exact else MIOU_TOLERANCE)
        assert not list(self.run_dir.glob("checkpoints/.*.tmp"))
        points = points_of(self.run_dir)
        if self.lacks_points:
            return
        for attempt, last_step in zip(self.attempts, self.ends()):
            steps = range(attempt.first + 1, last_step + 1)
            for key, every in (("train/loss", attempt.log_every), ("val/mIoU", attempt.eval_every)):
                due = {step for step in steps if (every and step % every == 0) or step == MAX_STEPS}
                assert due <= points[key].keys(), (key, attempt, due, points[key])

    def ends(self) -> Iterator[int]:
        """For each attempt the last of its steps that none after it has computed again."""
        for number in range(len(self.attempts)):
            yield min([MAX_STEPS, *(later.first for later in self.attempts[number + 1 :])])

    # --- around it ------------------------------------------------------------------------------------------------

    def move_unreadable_away(self) -> None:
        """What a run whose checkpoints are all damaged asks for, after it has asked. No other fault leads there."""
        folder = self.run_dir / "checkpoints"
        if whole_checkpoints(self.run_dir) or not list(folder.glob("step_*.pt")):
            return
        assert self.is_damaged
        code, said = self.run("one rank", {}, None)
        assert code == 2, said
        assert re.search(r"^error: no checkpoint in .* can be read; move them away", said, re.MULTILINE), said
        shutil.rmtree(folder)

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of the files that a refused start must leave alone."""
        files = [*self.run_dir.glob("checkpoints/[!.]*"), *self.run_dir.glob("*.jsonl"), *self.run_dir.glob("*.yaml")]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_any_history_ends_in_the_undisturbed_run_or_a_refusal(sample_shards: Path, tmp_path: Path) -> None:
    data = Data(sample_shards, tmp_path)
    chosen = settings(
        max_examples=LONG or 4,
        stateful_step_count=8 if LONG else 3,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate,),  # to shrink a failure takes many minutes, and brings little
    )
    run_state_machine_as_test(lambda: Histories(data, tmp_path / "histories"), settings=chosen)


def test_a_history_with_a_stop_a_kill_a_full_disk_a_damaged_file_and_another_recipe(
    sample_shards: Path, tmp_path: Path
) -> None:
    """What the drawn ones may lack: each kind of fault once, and a resume within a log line."""
    history = Histories(Data(sample_shards, tmp_path), tmp_path / "history")
    settings_now = {key: values[0] for key, values in HARMLESS.items()}
    history.begin("sync")
    within = {**settings_now, "tracking.log_every": 3, "eval.every": 3}
    assert history.launch("one rank", within, Fault("stop", "step", 3)) == STOPPED_EARLY
    history.other_recipe("optim.lr=2e-3")
    assert history.launch("one rank", within, Fault("kill_within", "checkpoint_write", 500)) == KILLED
    history.half_a_line_in_the_journal(b'{"step": 3, "time": 17')
    assert history.launch("one rank", settings_now, Fault("full", "sidecar", 0, lasting=10**6)) == 1
    history.damage_newest("flipped byte", 0.5)
    assert history.launch("one rank", settings_now, Fault("stop", "evaluation", 2)) == STOPPED_EARLY
    history.teardown()
