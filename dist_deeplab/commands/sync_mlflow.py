"""Send runs to MLflow that could not be sent during training: nodes without a network, a server that was away.

    dist-deeplab sync-mlflow runs/*                          to the store of MLFLOW_TRACKING_URI, else runs/mlflow.db
    dist-deeplab sync-mlflow --uri https://mlflow.example.org runs/voc_resnet101
    MLFLOW_TRACKING_USERNAME=me MLFLOW_TRACKING_PASSWORD=... dist-deeplab sync-mlflow --uri https://... runs/*
    dist-deeplab sync-mlflow --new-run runs/voc_resnet101    where the run was deleted in MLflow
    dist-deeplab sync-mlflow --models runs/*                 models too, of runs that asked for it (tracking.log_model)

A store that a run was started with by tracking.uri is used again; one that only the folder names, as that of a folder
from somebody else, is not. Sends what is left of each run's journal, with the journal's own times; again and again
changes nothing. What a finished training still tries to send is taken over; a run in training is left to its own
process. Folders that are not runs are passed over. Exit codes: 0 all is in MLflow, 1 some is not, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.journal import JOURNAL
from dist_deeplab.tracking.mlflow.process import BUSY, Upload, send_once
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import choose_store, require_known_store
from dist_deeplab.tracking.run_files import RUN_FILE, known_run_file, read_run_file


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    runs = [folder for folder in arguments.folders if (folder / RUN_FILE).is_file()]
    # Sweeps first: their runs name them as parents.
    runs.sort(key=lambda folder: known_run_file(folder).children is None)
    failed = [folder for folder in runs if not sync(folder, arguments)]
    num_sent = len(runs) - len(failed)
    print(f"{num_sent} of {format_count(len(runs), 'run')} {'is' if num_sent == 1 else 'are'} in MLflow")
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("sync-mlflow"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--uri", default="", help="MLflow store to send them to")
    parser.add_argument("--new-run", action="store_true", help="send all to a new run, e.g. where the old was deleted")
    parser.add_argument("--models", action="store_true", help="log and register models as the runs' files ask for")
    arguments = parser.parse_args(argv)
    if not any((folder / RUN_FILE).is_file() for folder in arguments.folders):
        folders = " or ".join(map(str, arguments.folders))
        parser.error(f"cannot find {RUN_FILE} in {folders}; name the folders of runs, e.g. runs/quickstart")
    try:
        require_known_store(arguments.uri)
    except UserError as error:
        parser.error(str(error))
    return arguments


def sync(folder: Path, arguments: argparse.Namespace) -> bool:
    """Send one run, print what became of it, and return whether all of it is in the store."""
    try:
        about = read_run_file(folder)
    except UserError as error:
        print(f"{folder}: {error}", flush=True)
        return False
    uri = choose_store(folder, about.tracking.uri, arguments.uri)
    if uri == "none":
        print(f"{folder}: was run with tracking.uri=none; --uri says where to send it", flush=True)
        return False
    wants_model = arguments.models and about.log_model
    upload = Upload(folder, uri, wants_model, register_as=about.register_as if wants_model else "")
    sent = send_once(upload, *(["--new-run"] if arguments.new_run else []))
    state = UploadState(folder, uri)
    if not sent.code:
        print(f"{folder}: sent to {shown_url(uri)}", flush=True)
        return True
    size = (folder / JOURNAL).stat().st_size if (folder / JOURNAL).exists() else 0
    reason = sent.reason if sent.code == BUSY else state["error"] or sent.reason
    print(f"{folder}: {state['sent_bytes']} of {size} bytes sent to {shown_url(uri)}; {reason}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
