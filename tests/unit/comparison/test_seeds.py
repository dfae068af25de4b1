"""Runs that differ in seed alone are one setting, and nothing is claimed from differences within the seeds' noise."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from dist_deeplab.comparison import report
from dist_deeplab.comparison.conclusions import conclusions
from dist_deeplab.comparison.noise import pooled_noise
from dist_deeplab.comparison.record import RunRecord
from dist_deeplab.comparison.settings import compare


def run(
    lr: float, seed: int, miou: float, *, loss: float = 1.0, status: str = "FINISHED", **settings: str
) -> RunRecord:
    """A run that scored `miou` at step 20, and at most that before; class a gets 0.1 more and b 0.1 less."""
    curves = {
        "val/mIoU": [(10, miou / 2), (20, miou)],
        "val/iou/a": [(10, miou / 2), (20, miou + 0.1)],
        "val/iou/b": [(10, miou / 2), (20, miou - 0.1)],
        "train/loss": [(10, loss + 1), (20, loss)],
        "cost/total_s": [(10, 30.0), (20, 60.0)],
        "cost/device_hours": [(10, 0.25), (20, 0.5)],
    }
    name = f"poly-lr_{lr}-seed_{seed}"
    keys = {"name": name, "optim.lr": str(lr), "seed": str(seed), "data.num_classes": "3", **settings}
    return RunRecord(name, f"runs/{name}", status, keys, curves)


def printed(records: list[RunRecord]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_report(records, console)
    return console.export_text()


LUCKY = [  # the losses differ beyond noise, the scores do not
    run(0.1, 0, 0.60, loss=1.0),
    run(0.1, 1, 0.40, loss=1.01),
    run(0.2, 0, 0.55, loss=0.5),
    run(0.2, 1, 0.53, loss=0.51),
]
CLEAR = [
    run(0.1, 0, 0.60, loss=1.0),
    run(0.1, 1, 0.61, loss=1.01),
    run(0.2, 0, 0.40, loss=1.5),
    run(0.2, 1, 0.41, loss=1.51),
]


def test_a_lucky_seed_does_not_win_over_the_better_mean() -> None:
    comparison = compare(LUCKY)
    assert [(s.label, s.mean, len(s.runs)) for s in comparison.settings] == [
        ("lr=0.2", pytest.approx(0.54), 2),
        ("lr=0.1", pytest.approx(0.50), 2),
    ]
    first = conclusions(comparison)[0]
    assert first.startswith(
        "no winner: lr=0.2, mean mIoU 0.5400 (standard deviation 0.0141, 2 seeds), is 0.0400 ahead of"
    )
    assert "standard error 0.1005: within noise" in first


def test_within_noise_nothing_is_claimed() -> None:
    text = "\n".join(conclusions(compare(LUCKY)))
    assert "winner: lr" not in text.replace("no winner: lr", "")
    for claim in ("why:", "gains", "better", "its best was"):
        assert claim not in text
    assert "cost of lr=0.2: 1:00, 0.5 device-hours a run; the other took 0.5; all 4 runs together 2" in text


def test_a_lead_beyond_noise_wins_with_its_error_classes_and_reason() -> None:
    winner, classes, _, why = conclusions(compare(CLEAR))
    assert winner == (
        "winner: lr=0.1, mean mIoU 0.6050 (standard deviation 0.0071, 2 seeds), 0.2000 ahead of lr=0.2, "
        "standard error 0.0071"
    )
    assert classes.endswith("it is better for 2 and worse for 0 of 2 classes beyond noise")
    assert why.startswith("why: its training loss is the lowest too (1.0050)")


def test_a_loss_that_is_lower_within_noise_is_not_a_reason() -> None:
    records = [
        run(0.1, 0, 0.6, loss=1.0),
        run(0.1, 1, 0.61, loss=1.4),
        run(0.2, 0, 0.4, loss=1.1),
        run(0.2, 1, 0.41, loss=1.5),
    ]
    assert not any("why:" in line for line in conclusions(compare(records)))


def test_the_standard_error_is_that_of_the_equal_variance_t_test() -> None:
    first, second = [0.60, 0.62, 0.65], [0.58, 0.55]
    lead = pooled_noise([first, second]).lead(first, second)
    expected = stats.ttest_ind(first, second)
    assert lead.error is not None
    assert lead.limit is not None
    assert lead.value / lead.error == pytest.approx(expected.statistic)
    assert lead.is_noise == (expected.pvalue > 0.05)
    low, _ = expected.confidence_interval(0.95)
    assert lead.value - lead.limit == pytest.approx(low)


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=2, max_size=4))
def test_a_lead_is_noise_exactly_where_its_interval_holds_zero(samples: list[list[float]]) -> None:
    noise = pooled_noise(samples)
    lead = noise.lead(samples[0], samples[1])
    degrees = sum(map(len, samples)) - len(samples)
    if degrees == 0:
        assert lead.error is None
        assert not lead.is_noise
        return
    squares = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in samples)
    error = np.sqrt(squares / degrees * (1 / len(samples[0]) + 1 / len(samples[1])))
    assert lead.error == pytest.approx(error, abs=1e-12)
    assert lead.is_real <= (abs(lead.value) > stats.t.ppf(0.975, degrees) * error - 1e-9)


def test_the_tables_show_mean_spread_and_number_of_seeds_and_mark_what_is_near() -> None:
    text = printed([*LUCKY, run(0.3, 0, 0.1), run(0.3, 1, 0.12)])
    rows = {line.split("│")[2].strip(): line.split("│") for line in text.splitlines() if line.count("│") > 8}
    assert [rows["0.2"][i].strip() for i in (1, 3, 4, 5)] == ["*", "2", "0.5400", "0.0141"]
    assert rows["0.1"][1].strip() == "~"
    assert rows["0.3"][1].strip() == ""
    assert "* best mean, ~ within noise of it" in text
    assert rows["poly-lr_0.1-seed_0"][1].strip() == "", "a lucky run carries no mark"
    assert "1 of 3 classes has no pixel in the validation set" in text


def test_one_seed_each_keeps_the_caveat_and_some_seeds_say_what_is_assumed() -> None:
    one = [run(0.1, 0, 0.6), run(0.2, 0, 0.5)]
    assert conclusions(compare(one))[-1].startswith("each setting ran with one seed")
    other_seeds = [run(0.1, 0, 0.6), run(0.2, 1, 0.5)]
    assert conclusions(compare(other_seeds))[-1].startswith("each setting ran with one seed")
    some = [*CLEAR, run(0.3, 0, 0.2)]
    assert conclusions(compare(some))[-1] == "1 of 3 settings has one seed: the others' spread is assumed for it"
    assert not any("seed:" in line for line in conclusions(compare(CLEAR)))


def test_seeds_alone_are_one_setting_without_a_winner() -> None:
    records = [run(0.1, seed, 0.5 + seed / 100) for seed in range(3)]
    comparison = compare(records)
    assert [setting.label for setting in comparison.settings] == ["poly-lr_0.1"]
    assert conclusions(comparison) == [
        "one setting: poly-lr_0.1, mean mIoU 0.5100 (standard deviation 0.0100, 3 seeds); nothing to compare it with"
    ]
    assert "*" not in printed(records)


def test_runs_with_one_seed_twice_stay_apart() -> None:
    """Something that no key names sets them apart, such as the code."""
    records = [run(0.1, 0, 0.5), run(0.1, 1, 0.6)] + [run(0.1, 0, 0.7), run(0.1, 1, 0.8)]
    assert len(compare(records).settings) == 4


def test_an_unfinished_run_does_not_pull_its_setting_down() -> None:
    records = [*CLEAR[1:], run(0.1, 0, 0.1, status="KILLED")]
    comparison = compare(records)
    assert comparison.settings[0].label == "lr=0.1"
    assert comparison.settings[0].scores == [0.61]
    assert "not counted in the means, being unfinished or without a score: poly-lr_0.1-seed_0" in conclusions(
        comparison
    )
    rows = [line for line in printed(records).splitlines() if " of 2 │" in line]
    assert [row.split("│")[-2].strip() for row in rows] == ["1 of 2", "2 of 2"], "finished"


def test_figure_csv_description_and_metrics_of_the_sweep_say_the_same(tmp_path: Path) -> None:
    from dist_deeplab.comparison.figure import comparison_figure

    figure = comparison_figure(compare(CLEAR))
    axes = [ax for part in figure.subfigs for ax in part.axes]
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx([0.3025, 0.605])
    (band, *_) = axes[0].collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    deviation = 0.01 / np.sqrt(2)
    assert (low, high) == (pytest.approx(0.3025 - deviation / 2), pytest.approx(0.605 + deviation))
    assert axes[0].get_legend_handles_labels()[1] == ["lr=0.1 (2 seeds)", "lr=0.2 (2 seeds)"]
    assert all(tick == round(tick) for ax in axes[:3] for tick in ax.get_xticks())
    report.write_report(CLEAR, tmp_path)
    (row, *_) = csv.DictReader((tmp_path / "comparison.csv").open())
    assert float(row["setting_mean_mIoU"]) == pytest.approx(0.605)
    assert (float(row["setting_std_mIoU"]), row["setting_seeds"]) == (pytest.approx(deviation), "2")
    values = report.summary(CLEAR)
    assert values["val/best_mIoU"] == pytest.approx(0.605)
    assert values["val/best_mIoU_std"] == pytest.approx(deviation)
    assert (values["val/lead_mIoU"], values["val/lead_mIoU_standard_error"]) == (
        pytest.approx(0.2),
        pytest.approx(deviation),
    )
    text = report.markdown(CLEAR)
    assert text.startswith("- winner: lr=0.1, mean mIoU 0.6050")
    assert "| best | 0.1 | 2 | 0.6050 | 0.0071 | 1.0050 | 1:00 | 0.5 |" in text
    assert "| within noise |" in report.markdown(LUCKY)


def test_without_any_class_in_common_bars_and_tables_are_drawn_all_the_same(tmp_path: Path) -> None:
    records = [run(0.1, 0, 0.6), run(0.2, 0, 0.5)]
    del records[0].curves["val/iou/a"], records[1].curves["val/iou/b"]
    report.write_report(records, tmp_path)
    assert "against the second" not in printed(records)
