"""Which run of a store is that of a folder: known by its id, unless the folder is a copy."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from dist_deeplab.command_line import command_name
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import StoreError
from dist_deeplab.tracking.run_files import RUN_FILE

log = logging.getLogger("mlflow_uploader")

FOLDER_TAG = "folder"
"""The tag of a run that holds its folder."""


def find_run(client: Any, state: UploadState, run_dir: Path) -> bool:
    """Whether the store has the run of this folder, under an id that `state` knows; `state` then has it.

    An id that another address's store gave counts too: it may be the same store under another name. A run that says
    that it is of another folder, which is still there, is not this one's: this folder is a copy, and gets its own.

    Raises:
        StoreError: the run that this store had was deleted.
    """
    known = [(state.values, state.is_known)] if state.is_known else [(other, False) for other in state.others.values()]
    for values, is_own in known:
        if not values["run_id"]:
            continue
        run = _get_run(client, values["run_id"])
        if run is None and is_own:
            raise StoreError(
                f"the run {values['run_id']} of {run_dir} was deleted in {state.uri}; `mlflow runs restore --run-id "
                f"{values['run_id']}` may bring it back, `{command_name('sync-mlflow')} --new-run {run_dir}` sends all "
                "to a new one"
            )
        if run is None:
            continue
        original = Path(run.data.tags.get(FOLDER_TAG) or run_dir)
        if _is_another_run(original, run_dir):
            log.warning("%s is a copy of %s: it gets a run of its own in MLflow", run_dir, original)
            continue
        if not is_own:
            state.save(**values)
        return True
    return False


def _get_run(client: Any, run_id: str) -> Any:
    """The run, or None where the store has none of this id, or has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return None if run.info.lifecycle_stage == "deleted" else run


def _is_another_run(original: Path, run_dir: Path) -> bool:
    with contextlib.suppress(OSError):
        return (original / RUN_FILE).is_file() and not original.samefile(run_dir)
    return False
