"""Compare runs: settings that differ, mIoU, every class's IoU with the winner marked, and what each run cost.

    python -m dist_deeplab.compare runs/lr1e-3 runs/lr2e-3         folders of runs: no MLflow needed
    python -m dist_deeplab.compare runs/poly-sweep                 the folder of a sweep: all its runs
    python -m dist_deeplab.compare my_experiment                   an experiment in MLflow
    python -m dist_deeplab.compare 0f3a... 77b2... --uri https://mlflow.example.org

Prints tables, and with --out FILE saves a figure of them. Runs that differ in seed alone are one setting. The store is
--uri, else MLFLOW_TRACKING_URI, else runs/mlflow.db. Exit codes: 0 done, 1 error, 2 wrong arguments.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dist_deeplab.command_line import command_name
from dist_deeplab.comparison import report
from dist_deeplab.comparison.record import RunRecord, children, read_folder
from dist_deeplab.comparison.store import Store
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.files import prepare_file
from dist_deeplab.tracking.run_files import RUN_FILE
from dist_deeplab.tracking.tracker import resolve_uri


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("compare"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run's or sweep's folder, run id, or experiment")
    parser.add_argument("--uri", default="", help="MLflow store")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also save a figure, e.g. comparison.png")
    arguments = parser.parse_args(argv)
    if arguments.out:
        prepare_file(arguments.out, remedy="choose another --out")
        if not arguments.out.suffix:
            raise UserError(f"the figure {arguments.out} needs an ending that says its kind, e.g. {arguments.out}.png")
    records = collect(arguments.runs, arguments.uri)
    report.print_report(records, Console(width=None if sys.stdout.isatty() else 160))
    if arguments.out:
        print(f"figure: {report.save_figure(records, arguments.out)}")
    return 0


def collect(names: Sequence[str], uri: str) -> list[RunRecord]:
    """Records of all that is named, each run once.

    Raises:
        UserError: a name that is not known, or nothing has begun.
    """
    records: dict[str, RunRecord] = {}
    store: Store | None = None
    for name in names:
        folder = Path(name).expanduser()
        if (folder / RUN_FILE).exists():
            folders = children(folder)
            found = [read_folder(each) for each in ([folder] if folders is None else folders)]
        elif folder.is_file():
            raise UserError(f"{name} is a file; give the folder of a run or sweep")
        elif folder.is_dir() and re.search(r"[/.]", name):
            raise UserError(f"{name} is not a run's folder: it has no {RUN_FILE}")
        else:
            store = store or Store(resolve_uri(uri, "runs"))
            found = store.runs_of(name)
        records.update((record.source, record) for record in found)
    if not records:
        raise UserError(f"{' '.join(names)}: no run has begun there")
    return list(records.values())


if __name__ == "__main__":
    sys.exit(main())
