"""The names of the project's commands, as the user can call them here."""

import os
import shutil
import sys
from pathlib import Path

VARIABLE = "DIST_DEEPLAB_COMMAND"
"""Set by the launchers to the command of an environment that they have activated for themselves alone."""


def command_name(name: str) -> str:
    """How the user calls a command: `dist-deeplab shards`, or `python -m dist_deeplab shards` where that is missing.

    For usage lines and for messages that name a remedy: what they name must exist in the user's shell.
    """
    script = os.environ.get(VARIABLE) or "dist-deeplab"
    called = Path(sys.argv[0]).name == "dist-deeplab"
    if called or shutil.which(script):
        return f"{script} {name}"
    return f"python -m dist_deeplab {name}"
