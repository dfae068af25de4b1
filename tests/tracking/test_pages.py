"""MLflow's pages in a real browser: which setting won, for which class, at what cost. Screenshots in build/."""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_deeplab import compare
from dist_deeplab.comparison.record import RunRecord, read_folder
from tests.conftest import REPO
from tests.tracking.browser import Browser, find_chromium
from tests.tracking.conftest import Server, Sweep

SCREENSHOTS = REPO / "build" / "mlflow_pages"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def records(sweep: Sweep) -> list[RunRecord]:
    return [read_folder(run) for run in sweep.runs]


def address(server: Server, folder: Path, page: str = "") -> str:
    about = json.loads((folder / "mlflow.json").read_text())
    return f"{server.uri}/#/experiments/{about['experiment_id']}/runs/{about['run_id']}{page}"


def test_the_run_s_page_shows_its_settings_scores_and_origin(
    browser: Browser, server: Server, sweep: Sweep, records: list[RunRecord]
) -> None:
    text = browser.open(address(server, sweep.runs[0]), "poly-power_0.5", "Metrics (", "Parameters (", "not_default")
    browser.screenshot(SCREENSHOTS / "run.png")
    assert "Finished" in text
    assert "poly-sweep" in text, "its parent"
    assert re.search(r"shards/train \([0-9a-f]{13}", text), "its training set"
    for tag in ("world_size", "hosts", "device", "git_revision", "version/torch", "command"):
        assert tag in text
    assert "Not as in the defaults" in text
    browser.type_into("input[placeholder='Search metrics']", "mIoU")
    miou = f"{records[0].last('val/mIoU')}"[:8]
    text = browser.wait_for_text(lambda text: miou in text, f"val/mIoU {miou}")
    assert "val/best_mIoU" in text


def test_images_evolve_under_a_slider_and_are_large_enough_to_read(
    browser: Browser, server: Server, sweep: Sweep
) -> None:
    steps = steps_of_panels(server, sweep.runs[0])
    assert set(steps.values()) == {0, 2, 4}
    browser.open(address(server, sweep.runs[0], "/model-metrics"), "poly-power_0.5", "panels")
    browser.type_into("input[placeholder='Search metric charts']", "panels")
    browser.wait_for(lambda: "panels/" in browser.text(), "the panels")
    count = "document.querySelectorAll('[role=slider]').length"
    browser.wait_for(lambda: browser.evaluate(count) >= 2, "a slider for each image")
    browser.wait_for(lambda: shown(browser, steps, 0), "the cover: the page opens at step 0")
    browser.evaluate("document.querySelector('[role=slider]').focus()")
    for step in (2, 4):
        browser.press("ArrowRight")
        images = browser.wait_for(lambda step=step: shown(browser, steps, step), f"the image of step {step}")
        assert min(image.file_width for image in images) >= 1000
    browser.evaluate("document.querySelector('[data-component-id=fullscreen_button_chartcard]').click()")
    browser.wait_for(lambda: any(image.width > 600 for image in shown(browser, steps, 4)), "the large view")
    time.sleep(1)  # it fades in
    browser.screenshot(SCREENSHOTS / "panels.png")


class ShownImage(NamedTuple):
    """An image on a page: the SHA-256 of its file, the file's width and the one on the page, in pixels."""

    digest: str
    file_width: int
    width: float


SHOWN_IMAGES = """
Promise.all([...document.images].filter(image => image.complete && image.naturalWidth > 0).map(async image => {
    const bytes = await fetch(image.src).then(answer => answer.arrayBuffer()).catch(() => new ArrayBuffer());
    const digest = [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))];
    const hex = digest.map(byte => byte.toString(16).padStart(2, "0")).join("");
    return [hex, image.naturalWidth, image.getBoundingClientRect().width];
}))
"""
"""By content, since MLflow's pages (3.18) no longer give images the addresses of their files."""


def steps_of_panels(server: Server, folder: Path) -> dict[str, int]:
    """{SHA-256 of a panel's copy for MLflow's pages: its step} of the run of a folder."""
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    copies = list((server.folder / "artifacts").glob(f"**/{run_id}/**/panels~*.webp"))
    return {hashlib.sha256(copy.read_bytes()).hexdigest(): int(copy.name.split("+")[2]) for copy in copies}


def shown(browser: Browser, steps: dict[str, int], step: int) -> list[ShownImage]:
    """The panels of a step that the page shows."""
    images = [ShownImage(*image) for image in browser.evaluate(SHOWN_IMAGES)]
    return [image for image in images if steps.get(image.digest) == step]


def test_the_comparison_s_page_shows_the_settings_and_scores_side_by_side(
    browser: Browser, server: Server, sweep: Sweep, records: list[RunRecord]
) -> None:
    """At the very address that the sweep printed."""
    found = re.search(r"(http\S+compare-runs\S+)", sweep.output)
    assert found is not None, sweep.output
    text = browser.open(found[1], "Comparing 2 Runs from 1 Experiment", "poly-power_0.5", "poly-power_2.0", "Metrics")
    assert "optim.power" in text
    switches = "document.querySelectorAll('[role=switch][aria-checked=false]')"
    browser.wait_for(lambda: browser.evaluate(f"{switches}.length") >= 2, "the switches")
    browser.evaluate(f"{switches}.forEach(each => each.click())")  # show what differs only
    text = browser.wait_for_text(lambda text: "checkpoint.keep_last" not in text, "the difference alone")
    # The page has the names first and then the values, row by row.
    _, _, after = text.partition("Metrics\nShow diff only\n")
    cells = re.split(r"[\n\t]+", after.partition("\nArtifacts")[0])
    keys = list(itertools.takewhile(lambda cell: "/" in cell or cell == "images_per_s", cells))
    values = [float(cell) for cell in cells[len(keys) :]]
    # The table holds the rows in view only, which end before those of val/.
    assert {"accuracy/mIoU", "train/loss", "cost/device_hours"} <= set(keys)
    for index, key in enumerate(keys):
        own = "val/mIoU" if key == "accuracy/mIoU" else key  # sent under both names, for the first chart
        expected = [record.last(own) or 0.0 for record in records]
        assert values[2 * index : 2 * index + 2] == pytest.approx(expected, abs=6e-4, rel=1e-3), key
    browser.screenshot(SCREENSHOTS / "compare.png")


def test_the_sweep_s_page_says_who_won(browser: Browser, server: Server, sweep: Sweep) -> None:
    (winner,) = [line for line in sweep.output.splitlines() if line.startswith("winner: ")]
    page = re.search(r"the sweep: (http\S+)", sweep.output)
    assert page is not None
    assert page[1].partition("?")[0] == address(server, sweep.folder)
    text = browser.open(page[1], "poly-sweep", "winner: ", "cost of ", "why: ")
    browser.screenshot(SCREENSHOTS / "sweep.png")
    assert winner in text
    table = re.search(r"its runs, best first: (http\S+)", sweep.output)
    assert table is not None
    text = browser.open(
        table[1], "2 matching runs", "optim.power", "val/best_mIoU", "cost/total_s", "cost/device_hours"
    )
    time.sleep(1)
    browser.screenshot(SCREENSHOTS / "sweep_table.png")
    curves = re.search(r"curves, best first: (http\S+)", sweep.output)
    assert curves is not None
    text = browser.open(curves[1], "2 matching runs", "accuracy/mIoU", "poly-power_0.5", "poly-power_2.0")
    browser.wait_for(lambda: browser.evaluate("document.querySelectorAll('svg.main-svg').length"), "a drawn chart")
    browser.screenshot(SCREENSHOTS / "curves.png")
    best = re.search(r"winner: power=([0-9.]+)", winner)
    assert best is not None
    assert re.findall(r"poly-power_([0-9.]+)", text)[0] == best[1], "the winner first"
    sections = re.findall(r"^(\w[^\n]*)\n\(\d+\)\nAdd chart", text, re.MULTILINE)
    assert sections[0] == "accuracy"
    assert sections.index("cost") < sections.index("val"), "not by name any more: remove `shown_as` in mlflow/pages.py"
    text = browser.open(address(server, sweep.folder, "/artifacts/comparison.png"), "comparison.png", "comparison.csv")
    browser.wait_for(lambda: browser.evaluate("[...document.images].some(i => i.naturalWidth > 1000)"), "the figure")
    browser.screenshot(SCREENSHOTS / "sweep_figure.png")


def test_the_terminal_says_the_same_from_the_store_as_from_the_folders(
    server: Server, sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = json.loads((sweep.folder / "mlflow.json").read_text())["run_id"]
    out = ["--out", str(tmp_path / "c.png"), "--uri", server.uri]
    printed = []
    for names in ([str(sweep.folder)], ["pages"], [parent]):
        assert compare.main([*names, *out]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert next(line for line in printed[0].splitlines() if line.startswith("winner: ")) in sweep.output
    assert compare.main(["no such experiment", *out]) == 2
    assert re.search(r"experiments there: .*'pages'", capsys.readouterr().err)
