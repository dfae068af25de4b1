"""A word to the script that launched the run (slurm/train.sh): what became of it. Exit codes get lost in torchrun."""

import logging
import os
from pathlib import Path

from dist_deeplab.files import replace_text

VARIABLE = "DIST_DEEPLAB_OUTCOME"

log = logging.getLogger(__name__)


def tell_launcher(status: str, *, first_step: int = 0, last_step: int = 0) -> None:
    """Write `status first_step last_step` to the file that the environment names, if it names one.

    Args:
        status: running; stopped (saved, the same command goes on); done; refused (the same command would fail again).
        first_step: where this start of the run began.
        last_step: how far it is known to be safe.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        replace_text(Path(name), f"{status} {first_step} {last_step}\n")
    except OSError as error:  # no reason to end a run
        log.warning("the launcher can't be told that the run is %s: %s", status, error)
