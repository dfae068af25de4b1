"""A run of a sweep, and where it stands: not begun, begun with this recipe or another, finished."""

import logging
from dataclasses import dataclass

from dist_deeplab import config as configuration
from dist_deeplab.comparison.record import read_folder
from dist_deeplab.config import RunConfig
from dist_deeplab.errors import UserError
from dist_deeplab.tracking import run_files
from dist_deeplab.tracking.journal import JOURNAL

log = logging.getLogger("dist_deeplab.sweep")


@dataclass(frozen=True)
class Child:
    """One run of the sweep: its configuration, and the arguments of `dist_deeplab.train` that make it."""

    config: RunConfig
    arguments: tuple[str, ...]


def recipe_changes(child: Child) -> list[str]:
    """`key: begun with -> asked for` of the recipe, for a run that is finished or has checkpoints to resume from."""
    folder = child.config.run_dir
    if not (folder / run_files.RUN_FILE).exists() or not (folder / "config.yaml").exists():
        return []
    if read_folder(folder).status != "FINISHED" and not any((folder / "checkpoints").glob("*.pt")):
        return []
    return configuration.recipe_differences(read_config(child), child.config)


def is_finished(child: Child) -> bool:
    """Whether the run is done, with the very recipe that is asked for now."""
    folder = child.config.run_dir
    if not (folder / run_files.RUN_FILE).exists() or read_folder(folder).status != "FINISHED":
        return False
    return not configuration.recipe_differences(read_config(child), child.config)


def counts_as_finished(child: Child) -> bool:
    """`is_finished`, but no where nobody can tell, e.g. for a key that this version does not know; that is logged."""
    try:
        return is_finished(child)
    except UserError as error:
        log.warning("%s does not count as finished: %s", child.config.name, error)
        return False


def warn_of_other_origin(child: Child) -> None:
    """Say what a finished run was trained or scored from, where something else is asked for now."""
    before, now = configuration.flatten(read_config(child)), configuration.flatten(child.config)
    for key in (key for key, mark in configuration.AFFECTS.items() if mark.what == "origin"):
        old, new = before[key], now[key]
        if new not in ("", old):
            log.warning(
                "it was trained with %s=%s; %s=%s is not read: for that choose another name=", key, old, key, new
            )


def read_config(child: Child) -> configuration.RunConfig:
    """The configuration that the run was started with."""
    return configuration.load_config(child.config.run_dir / "config.yaml")


def journal_size(child: Child) -> int:
    """Size of the run's journal in bytes: it grows as soon as a training has begun."""
    journal = child.config.run_dir / JOURNAL
    return journal.stat().st_size if journal.exists() else 0
