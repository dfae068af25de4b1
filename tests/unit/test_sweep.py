"""A grid becomes runs that are skipped when finished, resumed when interrupted, and compared at the end.

The trainings are stand-ins that leave a folder as a training does; tests/tracking has a sweep of real ones.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dist_deeplab.config import RunConfig, config_to_yaml, flatten, load_config
from dist_deeplab.distributed import stop_between
from dist_deeplab.sweep import StopBetween, is_finished, main, plan

GRID = ["name=poly", "optim.power=0.8,0.9,1.0", "max_steps=9", "tracking.uri=none"]


def leave_run(config: RunConfig, status: str) -> None:
    """Write the files of a training; its score is optim.power / 2."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config_to_yaml(config))
    about = {"name": config.name, "parameters": flatten(config), "tags": {}}
    (config.run_dir / "run.json").write_text(json.dumps(about))
    score = {"step": 9, "time": 1.0, "key": "val/mIoU", "value": config.optim.power / 2, "attempt": 0}
    with (config.run_dir / "metrics.jsonl").open("a") as journal:
        journal.write(json.dumps(score) + "\n" + json.dumps({"time": 2.0, "status": status, "attempt": 0}) + "\n")


class Trainings:
    """Stands in for the processes: what was started, and how each ends."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fate: dict[str, str] = {}

    def run(self, stop: StopBetween, command: Sequence[str]) -> int:
        arguments = list(command[command.index("dist_deeplab.train") + 1 :])
        config = load_config(None, arguments)
        self.started.append(config.name)
        fate = self.fate.get(config.name, "FINISHED")
        if fate == "stopped":
            stop.requested = True
            leave_run(config, "KILLED")
        elif fate == "max_hours":
            leave_run(config, "KILLED")
            return 75
        elif fate != "wrong configuration":
            leave_run(config, fate)
        return 0 if fate == "FINISHED" else 1


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    trainings = Trainings()
    monkeypatch.setattr(StopBetween, "run", lambda stop, command: trainings.run(stop, command))
    monkeypatch.setattr(stop_between.signal, "signal", lambda number, handler: None)
    return trainings


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return [*GRID, f"output_dir={tmp_path}"]


ALL = ["poly-power_0.8", "poly-power_0.9", "poly-power_1.0"]


def test_every_run_is_trained_and_the_comparison_is_printed_and_kept(
    trainings: Trainings, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    assert trainings.started == ALL
    out = capsys.readouterr().out
    assert "winner: power=1.0, mIoU 0.5000" in out
    folder = tmp_path / "poly-sweep"
    assert {"comparison.png", "comparison.csv", "run.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    about = json.loads((folder / "run.json").read_text())
    assert about["children"] == ALL
    assert about["tags"]["sweep"] == "optim.power=0.8,0.9,1.0"
    assert about["parameters"]["optim.power"] == "0.8,0.9,1.0"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = {record["key"]: (record["step"], record["value"]) for record in records if "key" in record}
    assert points["val/best_mIoU"] == (3, 0.5)
    assert any("| poly-power_1.0 | 1.0 |" in r.get("tags", {}).get("mlflow.note.content", "") for r in records)
    assert records[-1]["status"] == "FINISHED"


def test_finished_runs_are_skipped(trainings: Trainings, arguments: list[str]) -> None:
    main(arguments)
    trainings.started.clear()
    assert main(arguments) == 0
    assert trainings.started == []


def test_a_finished_run_says_that_it_started_from_other_weights(
    trainings: Trainings, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, "model.init=a.pth"])
    for init, warned in (("a.pth", False), ("", False), ("b.pth", True)):
        capsys.readouterr()
        main([*arguments, f"model.init={init}"])
        printed = "".join(capsys.readouterr())
        assert ("trained with model.init=a.pth; model.init=b.pth is not read" in printed) == warned
    assert trainings.started == ALL


@pytest.mark.parametrize("command", [[], ["--count"], ["--child", "2"]])
def test_another_recipe_than_that_of_runs_that_began_is_refused_before_the_first_start(
    trainings: Trainings, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    trainings.fate["poly-power_1.0"] = "stopped"
    main(arguments)
    checkpoint = tmp_path / "poly-power_1.0" / "checkpoints" / "step_00000005.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    trainings.started.clear()
    trainings.fate.clear()
    arguments[1:3] = ["optim.power=0.7,1.0,0.9", "max_steps=12"]
    assert main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert "poly-power_1.0 (and 1 more) began with another recipe (max_steps: 9 -> 12), so nothing was started" in error
    assert trainings.started == []
    assert json.loads((tmp_path / "poly-sweep" / "run.json").read_text())["children"] == ALL
    main([*arguments, "resume_anyway=true"])
    assert trainings.started == ["poly-power_0.7", "poly-power_1.0", "poly-power_0.9"]


def test_a_run_without_a_checkpoint_starts_over_with_what_is_asked_for_now(
    trainings: Trainings, arguments: list[str]
) -> None:
    trainings.fate = dict.fromkeys(ALL, "FAILED")
    main(arguments)
    trainings.started.clear()
    trainings.fate.clear()
    assert main([*arguments, "max_steps=12"]) == 0
    assert trainings.started == ALL


def test_seeds_of_a_setting_are_compared_by_their_mean(
    trainings: Trainings, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in scores power / 2 whatever the seed: a lead without any noise."""
    assert main([*arguments, "seed=0,1"]) == 0
    out = capsys.readouterr().out
    assert "winner: power=1.0, mean mIoU 0.5000 (standard deviation 0.0000, 2 seeds), 0.0500 ahead of power=0.9" in out
    records = [json.loads(line) for line in (tmp_path / "poly-sweep" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/best_mIoU", "val/best_mIoU_std", "val/lead_mIoU_standard_error"} <= {r.get("key") for r in records}


def test_a_larger_grid_trains_only_what_is_new_and_compares_all(
    trainings: Trainings, arguments: list[str], tmp_path: Path
) -> None:
    main(arguments)
    trainings.started.clear()
    arguments[1] = "optim.power=0.9,2.0"
    assert main(arguments) == 0
    assert trainings.started == ["poly-power_2.0"]
    assert json.loads((tmp_path / "poly-sweep" / "run.json").read_text())["children"] == [*ALL, "poly-power_2.0"]


def test_an_interrupted_sweep_resumes_where_it_was(trainings: Trainings, arguments: list[str]) -> None:
    trainings.fate["poly-power_0.9"] = "stopped"
    assert main(arguments) == 75
    assert trainings.started == ALL[:2]
    trainings.fate.clear()
    trainings.started.clear()
    assert main(arguments) == 0
    assert trainings.started == ALL[1:]


def test_a_run_that_fails_leaves_the_others_and_is_tried_again(
    trainings: Trainings, arguments: list[str], tmp_path: Path
) -> None:
    trainings.fate["poly-power_0.9"] = "FAILED"
    assert main(arguments) == 1
    assert trainings.started == ALL
    last = (tmp_path / "poly-sweep" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "KILLED"
    trainings.fate.clear()
    trainings.started.clear()
    assert main(arguments) == 0
    assert trainings.started == ["poly-power_0.9"]


def test_a_run_that_is_stopped_by_max_hours_did_not_fail(
    trainings: Trainings, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.fate["poly-power_0.8"] = "max_hours"
    assert main(arguments) == 75
    assert trainings.started == ALL
    said = capsys.readouterr().out
    assert "poly-power_0.8 was stopped and is saved: the same sweep again continues it" in said
    assert "failed" not in said
    trainings.fate["poly-power_0.9"] = "FAILED"
    leave_run(plan(None, arguments).children[1].config, "FAILED")
    assert main(arguments) == 1, "running it again is not all that is needed"
    trainings.fate.clear()
    assert main(arguments) == 0


def test_a_training_that_cannot_begin_ends_the_sweep(
    trainings: Trainings, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.fate["poly-power_0.8"] = "wrong configuration"
    assert main(arguments) == 2
    assert trainings.started == ALL[:1]
    assert "poly-power_0.8 could not begin" in capsys.readouterr().err


def test_a_finished_run_of_another_recipe_is_not_skipped(arguments: list[str]) -> None:
    """Training itself then says what differs."""
    child = plan(None, arguments).children[0]
    leave_run(child.config, "FINISHED")
    assert is_finished(child)
    other = plan(None, [*arguments, "seed=3"]).children[0]
    assert other.config.run_dir == child.config.run_dir
    assert not is_finished(other)


def test_arguments_reach_the_training_as_they_were_given(tmp_path: Path) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text("optim: {lr: 0.125}\n")
    scales = "multi_scale.scales=[], [1.0, 0.5]"
    first, second = plan(str(config), ["name=x", scales, "data.train=it's here.json"]).children
    assert first.arguments[:2] == ("--config", str(config))
    assert second.arguments[2:4] == ("name=x", "data.train=it's here.json")
    assert "multi_scale.scales=[1.0, 0.5]" in second.arguments
    assert second.config.multi_scale.scales == (1.0, 0.5)
    assert second.config.tracking.parent == "../x-sweep"
    assert second.config.optim.lr == 0.125


def test_wrong_settings_of_any_run_are_said_before_anything_is_trained(
    trainings: Trainings, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = "optim.power=0.8,-1"
    assert main(arguments) == 2
    assert "optim.power" in capsys.readouterr().err
    assert trainings.started == []
    assert list(tmp_path.iterdir()) == []


def test_zero_processes_and_a_file_as_output_folder_are_refused(
    trainings: Trainings, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--nproc-per-node", "0"])
    assert "--nproc-per-node must be 1 or more, not 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*arguments, f"output_dir={tmp_path}/file"]) == 2
    assert "Not a directory; choose another output_dir=" in capsys.readouterr().err
    assert trainings.started == []


def test_slurm_s_tasks_ask_for_the_number_of_runs_and_for_each_run_s_arguments(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--count"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert not (tmp_path / "poly-sweep").exists()
    assert main([*arguments, "--child", "2"]) == 0
    words = capsys.readouterr().out.split("\0")
    assert words[-1] == ""
    assert tuple(words[:-1]) == plan(None, arguments).children[2].arguments
    assert json.loads((tmp_path / "poly-sweep" / "run.json").read_text())["children"] == ALL
    assert main([*arguments, "--child", "3"]) == 2


def test_the_report_compares_what_there_is(
    trainings: Trainings, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--report"]) == 2
    assert "no run of poly-sweep has begun" in capsys.readouterr().err
    leave_run(plan(None, arguments).children[0].config, "FINISHED")
    assert main([*arguments, "--report"]) == 1
    assert trainings.started == []


def test_the_report_names_runs_that_it_cannot_read_and_compares_the_others(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    of_another_version, damaged, sound = (child.config for child in plan(None, arguments).children)
    for config in (of_another_version, damaged, sound):
        leave_run(config, "FINISHED")
    with (of_another_version.run_dir / "config.yaml").open("a") as file:
        file.write("colour: red\n")
    (damaged.run_dir / "run.json").write_text("{")
    assert main([*arguments, "--report"]) == 1
    said = capsys.readouterr().out
    assert "poly-power_0.8 does not count as finished" in said and "colour" in said
    assert "poly-power_0.9 is left out of the comparison" in said
    assert "winner: power=1.0" in said


WAITS_FOR_A_SIGNAL = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
time.sleep(60)
"""
STOPS_IT = """
import sys
from dist_deeplab.sweep import StopBetween
stop = StopBetween()
code = stop.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
print(code, stop.requested)
"""


def test_ctrl_c_reaches_the_training_once_and_is_remembered(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", STOPS_IT, WAITS_FOR_A_SIGNAL, str(ready)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(ready.exists)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120)[0] == "75 True\n"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
