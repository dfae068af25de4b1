"""Where a command will write to, looked at before its work: what can't be written is said at once, not hours later."""

import os
from pathlib import Path

from dist_deeplab.errors import UserError


def prepare_folder(folder: Path, *, remedy: str) -> None:
    """Make a folder that will be written to; `remedy` ends the error's sentence, e.g. choose another --out.

    Raises:
        UserError: it can't be made, is a file, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written to"
    except FileExistsError:
        problem = "it is a file"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise UserError(f"cannot write to the folder {folder}: {problem}; {remedy}")


def prepare_file(file: Path, *, remedy: str) -> None:
    """Make the folder of a file that will be written; the file itself is not touched.

    Raises:
        UserError: it is a folder, or its folder can't be made or written to.
    """
    if file.is_dir():
        raise UserError(f"cannot write the file {file}: it is a folder; {remedy}")
    prepare_folder(file.parent, remedy=remedy)
