"""Send runs to MLflow that could not be sent while they went on: nodes without a network, a server that was away.

    dist-deeplab sync-mlflow runs/*                              each to the store it was started with
    dist-deeplab sync-mlflow --uri https://mlflow.example.org runs/voc_resnet101
    MLFLOW_TRACKING_USERNAME=me MLFLOW_TRACKING_PASSWORD=... dist-deeplab sync-mlflow --uri https://... runs/*

Sends what is left of each run's journal, with the journal's own times; again and again changes nothing. Folders that
are no runs are passed over. A run that is going on is left to its own process. Exit codes: 0 all is in MLflow, 1 some
is not, 2 wrong arguments.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError
from dist_deeplab.tracking import run_files
from dist_deeplab.tracking.journal import JOURNAL
from dist_deeplab.tracking.mlflow.store import require_known_store


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("sync-mlflow"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--uri", default="", help="MLflow store, where not the one that the run was started with")
    arguments = parser.parse_args(argv)
    runs = [folder for folder in arguments.folders if (folder / run_files.RUN_FILE).is_file()]
    if not runs:
        parser.error(f"no run's folder among {len(arguments.folders)}: none has a {run_files.RUN_FILE}")
    try:
        require_known_store(arguments.uri)
    except UserError as error:
        parser.error(str(error))
    # Sweeps first: their runs name them as parents.
    runs.sort(key=lambda folder: "children" not in run_files.read_run_file(folder))
    failed = [folder for folder in runs if not sync(folder, arguments.uri)]
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are in MLflow")
    return 1 if failed else 0


def sync(folder: Path, uri: str) -> bool:
    """Send one run, say what became of it, and return whether all of it is in the store."""
    command = [sys.executable, "-m", "dist_deeplab.tracking.mlflow.uploader", str(folder), "--once"]
    done = subprocess.run([*command, *(["--uri", uri] if uri else [])], capture_output=True, text=True)
    size = (folder / JOURNAL).stat().st_size if (folder / JOURNAL).exists() else 0
    tracked = run_files.read_mlflow_file(folder)
    sent = tracked.get("sent_bytes", 0)
    reason = tracked.get("error") or (done.stderr.strip().splitlines() or [""])[-1]
    print(f"{folder}: {'sent' if done.returncode == 0 else f'{sent} of {size} bytes sent; {reason}'}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
