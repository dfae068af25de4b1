"""Run all benchmarks within a time budget and write one report, ready for docs/performance.md.

    python tools/benchmark.py all --out DIR --minutes 8 [--data data/voc/train.json]

Each runs in a process of its own, so that none finds another's caches or memory; what does not finish within its share
of the time left is named as such. DIR gets report.md, and a JSON file per benchmark with device, versions and command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluate import draw
from benchmarks.harness import Report, Row, cell
from dist_deeplab.errors import UserError
from dist_deeplab.files import prepare_folder, replace_text

SUMMARY = "all benchmarks within a time budget, as one report"
_SHORT_MINUTES = 4.0  # below this the small sizes
_FULL: Mapping[str, Sequence[str]] = {
    "batch_norm": [],
    "step": [],
    "scaling": [],
    "scale": [],
    "evaluate": [],
    "loader": [],
    "crf": [],
}
_SHORT: Mapping[str, Sequence[str]] = {
    "batch_norm": ["--crop", "33", "--images", "2", "--rounds", "4"],
    "step": ["--crop", "33", "--images", "2", "--rounds", "4", "--ours", "fp32", "--without", "amp"],
    "scaling": ["--crop", "33", "--images", "1", "--ranks", "1", "8", "64"],
    "scale": ["--crop", "33", "--rounds", "2", "--ranks", "8", "1024"],
    "evaluate": ["--images", "5", "--shrink", "8", "--rounds", "1"],
    "loader": ["--crop", "65", "--images", "20", "--batch", "5", "--rounds", "2"],
    "crf": ["--processes", "1", "--images", "1", "--size", "64", "64", "--rounds", "2"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget for all of them; default: %(default)s")
    parser.add_argument("--data", metavar="MANIFEST", help="shards for the loader; default: drawn images")


def run(arguments: argparse.Namespace) -> Report:
    """Run all, write the files and report what became of each.

    Raises:
        UserError: no minutes, or a folder that cannot be written.
    """
    if arguments.minutes <= 0:
        raise UserError(f"--minutes {arguments.minutes:g} leaves no time; give 1 or more")
    prepare_folder(arguments.out, remedy="choose another --out")
    plan = _SHORT if arguments.minutes < _SHORT_MINUTES else _FULL
    deadline = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or str(draw(Path(folder), argparse.Namespace(images=40, shrink=4)).path)
        for number, (name, options) in enumerate(plan.items()):
            share_s = (deadline - time.monotonic()) / (len(plan) - number)
            more = ["--data", data] if name == "loader" else []
            file = arguments.out / f"{name}.json"
            started = time.monotonic()
            problem = _run_one([name, *options, *more, "--json", str(file)], timeout_s=share_s)
            rows.append({"benchmark": name, "result": problem or "done", "took_s": time.monotonic() - started})
            sections.append(_failed(name, problem) if problem else _section(name, json.loads(file.read_text("utf-8"))))
    replace_text(arguments.out / "report.md", "\n".join(["# Benchmarks", "", *sections]))
    notes = [f"report: {arguments.out / 'report.md'}, and a JSON file per benchmark beside it"]
    return Report(f"all benchmarks in {arguments.minutes:g} minutes", rows, notes)


def _run_one(arguments: Sequence[str], *, timeout_s: float) -> str:
    """Run a benchmark in a process of its own; what went wrong, or nothing."""
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "benchmark.py"), *arguments]
    if timeout_s < 1:
        return "no time was left"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"not finished in {timeout_s:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _section(name: str, content: dict[str, Any]) -> str:
    """A benchmark's table in Markdown, with its notes and its machine."""
    rows = content["rows"]
    columns = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    table = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows),
    ]
    where = content["machine"]
    machine = f"{where['device']}, {where['processor']} ({where['cores']} cores), torch {where['torch']}"
    notes = [f"- {note}" for note in content["notes"]]
    return "\n".join(
        [f"## {name}", "", content["title"], "", *table, "", *notes, f"- on {machine}", f"- `{where['command']}`", ""]
    )


def _failed(name: str, problem: str) -> str:
    return f"## {name}\n\n{problem}\n"
