"""Which run won, for which class and at what cost: from folders alone, with known numbers."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dist_deeplab import compare
from dist_deeplab.comparison import report, settings
from dist_deeplab.comparison.conclusions import conclusions
from dist_deeplab.comparison.record import RunRecord, read_folder
from dist_deeplab.errors import UserError

SCORES = {  # step -> (background, cat); the mean is the mIoU
    "low": {10: (0.5, 0.1), 20: (0.7, 0.3)},
    "mid": {10: (0.62, 0.4), 20: (0.62, 0.2)},  # best at step 10
    "high": {10: (0.2, 0.1), 20: (0.65, 0.1)},
}
LOSS = {"low": 1.5, "mid": 1.25, "high": 2.0}


def write_run(folder: Path, name: str, power: float, **about: Any) -> Path:
    """Write a run's folder as training leaves it."""
    run = folder / name
    run.mkdir(parents=True)
    settings = {"name": name, "optim.power": power, "optim.lr": 0.1, "seed": 0, "output_dir": str(folder)}
    (run / "run.json").write_text(json.dumps({"name": name, "parameters": settings, "tags": {}, **about}))
    records: list[dict[str, Any]] = [{"time": 0, "status": "RUNNING", "attempt": 0}]
    for step, (background, cat) in SCORES[name].items():
        values = {"val/mIoU": (background + cat) / 2, "val/iou/background": background, "val/iou/cat": cat}
        values |= {"train/loss": LOSS[name] + 1 / step, "lr/backbone": 0.1 / step, "images_per_s": 10.0 * step}
        values |= {"cost/total_s": 6.0 * step, "cost/device_hours": step / 100}
        records += [{"step": step, "time": step, "key": k, "value": v, "attempt": 0} for k, v in values.items()]
    records.append({"time": 99, "status": "FINISHED", "attempt": 0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path, name, power) for name, power in (("high", 2.0), ("low", 0.5), ("mid", 0.9))]


@pytest.fixture
def records(runs: list[Path]) -> list[RunRecord]:
    return [read_folder(run) for run in runs]


def printed(records: list[RunRecord]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    report.print_report(records, console)
    return console.export_text()


def concluded(records: list[RunRecord]) -> list[str]:
    return conclusions(settings.compare(records))


def cells(text: str, word: str) -> list[str]:
    """Cells of the first row that holds a word."""
    (line, *_) = [line for line in text.splitlines() if word in line and re.search("[│┃]", line)]
    return [cell.strip() for cell in re.split("[│┃]", line.strip("│┃"))]


def test_losses_of_other_parts_are_no_reason(runs: list[Path]) -> None:
    about = json.loads((runs[0] / "run.json").read_text())
    about["parameters"]["multi_scale.scales"] = [1.0, 0.5]
    (runs[0] / "run.json").write_text(json.dumps(about))
    text = " ".join(concluded([read_folder(run) for run in runs]))
    assert "loss" not in text
    assert "its best was at step 10" in text


def test_a_run_s_score_is_its_best_with_the_classes_of_that_step(records: list[RunRecord]) -> None:
    mid = records[2]
    assert mid.best == (10, 0.51)
    assert mid.class_iou() == {"background": 0.62, "cat": 0.4}
    assert mid.last("val/mIoU") == pytest.approx(0.41)
    assert mid.median("images_per_s") == 150.0
    assert mid.status == "FINISHED"


def test_runs_are_ranked_with_the_settings_that_differ_and_what_they_cost(records: list[RunRecord]) -> None:
    text = printed(records)
    assert cells(text, "│ mid") == [
        *("*", "mid", "0.9", "0.5100", "10", "0.4100", "1.3000", "150.0", "2:00", "0.2", "-", "FINISHED")
    ]
    assert text.index("│ mid") < text.index("│ low") < text.index("│ high")
    assert "optim.lr" not in text
    assert "output_dir" not in text


def test_every_class_s_winner_is_marked(records: list[RunRecord]) -> None:
    text = printed(records)
    assert cells(text, "power=0.9")[1:4] == ["power=0.9", "power=0.5", "power=2.0"]
    assert cells(text, "background") == ["background", "0.6200", "0.7000*", "0.6500", "0.0800"]
    assert cells(text, "cat") == ["cat", "0.4000*", "0.3000", "0.1000", "0.3000"]


def test_the_conclusions_say_which_won_where_at_what_cost_and_why(records: list[RunRecord]) -> None:
    winner, where, cost, why, peak, chance = concluded(records)
    assert winner == "winner: power=0.9, mIoU 0.5100, 0.0100 ahead of power=0.5"
    assert (
        "gains most for cat (+0.1000) and least for background (-0.0800); it is better for 1 and worse for 1 of"
        in where
    )
    assert cost == "cost of power=0.9: 2:00, 0.2 device-hours; the others took 0.2 to 0.2; all 3 runs together 0.6"
    assert why.startswith("why: its training loss is the lowest too (1.3000)")
    assert peak == "its best was at step 10; at step 20, its last evaluation, it had 0.4100, 0.1000 less"
    assert "chance" in chance
    records[2].curves["val/mIoU"] = [(10, 0.51)]
    assert not any("its best was" in line for line in concluded(records))


def test_the_cost_of_the_others_is_without_the_winner_s(records: list[RunRecord]) -> None:
    for record, cost in zip(records, (0.3, 0.4, 0.1), strict=True):  # the last one wins
        record.curves["cost/device_hours"] = [(20, cost)]
    assert concluded(records)[2].endswith("0.1 device-hours; the others took 0.3 to 0.4; all 3 runs together 0.8")
    assert concluded(records[1:])[2].endswith("0.1 device-hours; the other took 0.4; all 2 runs together 0.5")


def test_equal_scores_have_no_winner(records: list[RunRecord]) -> None:
    records[1].curves["val/mIoU"] = [(20, 0.51)]
    assert concluded(records)[0] == "no winner: power=0.5 and power=0.9 both have mIoU 0.5100"
    records[1].curves["val/mIoU"] = [(20, 0.51004)]
    text = printed(records)
    assert "no winner: power=0.5 and power=0.9 both have mIoU 0.5100" in text, "no difference is shown"
    assert "why:" not in text
    assert "*" not in cells(text, "│ low")[0]


def test_a_winner_that_fitted_less_generalised_better(records: list[RunRecord]) -> None:
    records[0].curves["train/loss"][-1] = (20, 0.1)
    assert "1 of the other 2 settings has a lower training loss" in " ".join(concluded(records))


def test_a_run_without_a_score_comes_last_and_one_run_alone_has_no_winner(records: list[RunRecord]) -> None:
    del records[2].curves["val/mIoU"]
    assert [record.name for record in settings.compare(records).runs] == ["low", "high", "mid"]
    assert "nothing to compare" in concluded(records[:1])[0]
    assert "*" not in cells(printed(records[:1]), "background")[1]


def test_the_figure_has_every_run_in_every_part(records: list[RunRecord], tmp_path: Path) -> None:
    from dist_deeplab.comparison.figure import comparison_figure

    figure = comparison_figure(settings.compare(records))
    axes = [ax for part in figure.subfigs for ax in part.axes]
    assert [len(ax.lines) for ax in axes[:3]] == [3, 3, 3]
    assert list(axes[0].lines[1].get_ydata()) == pytest.approx([0.3, 0.5]), "the second best"
    assert len(axes[3].patches) == 3 * 3
    stars = [text for text in axes[3].texts if text.get_text() == "*"]
    assert sorted(round(text.xy[1], 2) for text in stars) == [0.4, 0.51, 0.7]
    path = report.save_figure(records, tmp_path / "new" / "figure.png")
    assert np.asarray(Image.open(path)).std() > 10


def test_the_csv_holds_every_number(records: list[RunRecord], tmp_path: Path) -> None:
    report.write_report(records, tmp_path)
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["run"] for row in rows] == ["mid", "low", "high"]
    assert (rows[1]["optim.power"], rows[1]["best_mIoU"], rows[1]["val/iou/background"]) == ("0.5", "0.5", "0.7")


def test_the_description_of_a_sweep_is_a_markdown_table(records: list[RunRecord]) -> None:
    lines = report.markdown(records).splitlines()
    assert "| mid | 0.9 | 0.5100 | 10 | 1.3000 | 2:00 | 0.2 | FINISHED |" in lines
    assert lines[0].startswith("- winner: power=0.9")


def test_runs_with_equal_settings_are_called_by_their_names(records: list[RunRecord]) -> None:
    for record in records:
        record.settings["optim.power"] = "1"
    assert {setting.label for setting in settings.compare(records).settings} == {"high", "low", "mid"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_compares_folders_without_a_store(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main([run.name for run in runs]) == 0
    assert "winner: power=0.9" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted(runs), "no file is left where nobody asked for one"
    assert compare.main([*map(str, runs), "--out", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "winner: power=0.9" in out
    assert f"figure: {tmp_path / 'c.png'}" in out
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_the_folder_of_a_sweep_means_its_runs_that_have_begun(runs: list[Path], tmp_path: Path) -> None:
    sweep = tmp_path / "x-sweep"
    sweep.mkdir()
    (sweep / "run.json").write_text(json.dumps({"name": "x-sweep", "children": ["low", "mid", "not_yet"]}))
    assert [record.name for record in compare.collect([str(sweep), str(runs[1])], "")] == ["low", "mid"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./no_run"], "it has no run.json"),
        (["nothing"], "no MLflow store at"),
        (["./file"], "./file is a file; give the folder of a run or sweep"),
        (["nothing", "--out", "no_run"], "cannot write the file no_run: it is a folder; choose another --out"),
        (["nothing", "--out", "figure"], "needs an ending that says its kind, e.g. figure.png"),
    ],
)
def test_names_that_are_not_runs_are_refused_in_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "no_run").mkdir()
    (tmp_path / "file").write_text("")
    assert compare.main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "nothing is created by looking"


def test_the_score_of_the_training_counts_not_that_of_a_later_evaluation_of_the_same_step(runs: list[Path]) -> None:
    """One with other settings, e.g. several scales: runs would be compared by scores of two kinds."""
    late = {"step": 20, "time": 1.0, "late": True, "key": "val/mIoU", "value": 0.9, "attempt": 0}
    with (runs[0] / "metrics.jsonl").open("a") as journal:
        journal.write(json.dumps(late) + "\n")
    assert read_folder(runs[0]).best == (20, 0.375)


def test_a_damaged_journal_or_folder_says_what_it_is(runs: list[Path]) -> None:
    with (runs[0] / "metrics.jsonl").open("ab") as journal:
        journal.write(b"\0\0\n{half")
    assert read_folder(runs[0]).best == (20, 0.375)
    (runs[0] / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not what training writes"):
        read_folder(runs[0])
