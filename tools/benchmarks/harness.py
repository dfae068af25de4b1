"""Fair measuring: competitors take turns in one run, and every figure comes with its spread and its machine."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_deeplab import __version__
from dist_deeplab.redaction import redact
from dist_deeplab.tracking.provenance import git_revision
from dist_deeplab.workers import num_cores

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Timing:
    """The seconds of one competitor's runs, in the order they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median: 0.02 is +-2 %."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass
class Report:
    """What a sub-command found.

    rows: one a competitor, with the same keys in the same order; a key ends in its unit (`_ms`, `_gib`, `_per_s`).
    notes: sentences that a reader of the table needs: what the baseline is, what was left out and why.
    """

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run every competitor once a round, and return its times.

    Each round starts with another competitor, so that a machine that slows down, or a neighbour, meets all alike.

    Args:
        competitors: {name: what to time}.
        rounds: timed runs of each.
        warmup: untimed rounds before them, in which libraries load and choose algorithms.
        synchronize: waits for the device, before and after each timed run.
        clock: seconds; `time.process_time` for what one core computes by itself.
    """
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            started = clock()
            competitors[name]()
            synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Function that waits until the work on `device` is done."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str | int | None]:
    """Where a figure was measured: device, processor, versions, revision and command."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "processor": _processor_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "dist_deeplab": __version__,
        **git_revision(),
        "command": redact(" ".join(["tools/benchmark.py", *sys.argv[1:]])),
    }


def show(report: Report, where: Mapping[str, object]) -> None:
    """Print the table, its notes and the machine."""
    table = Table(title=report.title, title_justify="left")
    columns = [name for name in report.rows[0] if any(row[name] is not None for row in report.rows)]
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if i else "left", no_wrap=not i)
    for row in report.rows:
        table.add_row(*(cell(row[column]) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for note in report.notes:
        console.print(f"- {note}", highlight=False)
    console.print(
        f"on {where['device']}, {where['processor']} ({where['cores']} cores), torch {where['torch']}", highlight=False
    )


def write_json(report: Report, where: Mapping[str, object], path: Path) -> None:
    """Write report and machine to `path`."""
    path.write_text(json.dumps({**asdict(report), "machine": where}, indent=1) + "\n", encoding="utf-8")


def ratio_column(rows: Sequence[Row], *, of: str, to: str, name: str) -> None:
    """Add to every row its `of` divided by that of the row whose first value is `to`."""
    base = next(row[of] for row in rows if next(iter(row.values())) == to)
    assert isinstance(base, int | float)
    for row in rows:
        value = row[of]
        row[name] = float(value) / base if isinstance(value, int | float) else None


def cell(value: object) -> str:
    """A table's entry: four digits of a float, - for nothing."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
