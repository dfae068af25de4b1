"""Run a grid of settings, each as a run of its own, and compare them.

    python -m dist_deeplab.sweep [--config FILE] name=poly optim.power=0.8,0.9,1.0 [section.key=value ...]

Several values of a key, separated by commas, are a grid; the rest goes to each training as it is. The runs are
<output_dir>/<name>-power_0.8 and so on, children of the run <name>-sweep in MLflow, which gets the table of results.
The same command again continues: finished runs are skipped, an interrupted one resumes from its last checkpoint. A run
that fails does not keep the others from running. With seed=0,1,2 among the keys, runs that differ in seed alone are one
setting: its mean is compared, and a lead within the noise of the seeds is called that.

launch/sweep.sh sets the environment up and runs this; slurm/sweep.sh makes an array job of it, by --count, --child and
--report. Exit codes: 0 all runs finished, 1 some did not, 2 wrong arguments or configuration, 75 the sweep was stopped,
or none failed but some were stopped (max_hours): run it again.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_deeplab import config as configuration
from dist_deeplab.command_line import command_name
from dist_deeplab.comparison import report
from dist_deeplab.comparison.record import RunRecord, read_folder
from dist_deeplab.comparison.sweep_child import (
    Child,
    counts_as_finished,
    is_finished,
    journal_size,
    recipe_changes,
    warn_of_other_origin,
)
from dist_deeplab.config.grid import expand
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.stop_between import StopBetween
from dist_deeplab.errors import STOPPED_EARLY, UserError, one_line_errors
from dist_deeplab.files import prepare_folder
from dist_deeplab.logs import format_count, setup_logging
from dist_deeplab.packaged import mlflow_ui
from dist_deeplab.tracking import run_files
from dist_deeplab.tracking.mlflow.pages import server_of, sweep_pages
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.tracker import Reporting, open_tracker, resolve_uri

log = logging.getLogger("dist_deeplab.sweep")


@dataclass(frozen=True)
class Sweep:
    """A sweep: the folder of its own run, the grid as it was given, and its runs."""

    folder: Path
    grid: tuple[str, ...]
    children: tuple[Child, ...]


@dataclass
class Ended:
    """How the trainings ended: whether the sweep was asked to stop, and which runs were stopped or failed."""

    sweep_stopped: bool = False
    stopped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def run_again(self) -> bool:
        """Whether the same command again is all that the sweep needs."""
        return self.sweep_stopped or (bool(self.stopped) and not self.failed)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    sweep = plan(arguments.config, arguments.overrides)
    if not arguments.report:
        refuse_other_recipes(sweep)
    if arguments.count:
        print(len(sweep.children))
        return 0
    if arguments.child is not None:
        if not 0 <= arguments.child < len(sweep.children):
            raise UserError(f"--child {arguments.child}: the grid's runs are 0 to {len(sweep.children) - 1}")
        prepare(sweep)
        sys.stdout.write("".join(f"{argument}\0" for argument in sweep.children[arguments.child].arguments))
        return 0
    setup_logging(to_terminal=True, rank=0, folder=None)
    ended = Ended() if arguments.report else run_all(sweep, num_processes=arguments.nproc_per_node)
    if ended.sweep_stopped or conclude(sweep):
        return STOPPED_EARLY if ended.run_again else 1
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("sweep"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of keys that differ from the defaults")
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="processes of each training")
    parser.add_argument("--count", action="store_true", help="print the number of runs and stop")
    parser.add_argument("--child", type=int, metavar="I", help="print training's arguments of run I, each ended by NUL")
    parser.add_argument("--report", action="store_true", help="run nothing: compare what there is")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value[,value...]", help="settings and the grid")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.nproc_per_node < 1:
        parser.error(f"--nproc-per-node must be 1 or more, not {arguments.nproc_per_node}")
    return arguments


def plan(config_file: str | None, overrides: Sequence[str]) -> Sweep:
    """The sweep, every run's configuration checked.

    Raises:
        UserError: no grid, or a wrong configuration of any run.
    """
    fixed, runs = expand(overrides)
    base = configuration.load_config(config_file, [*fixed, *runs[0].overrides])
    folder = base.run_dir.with_name(f"{base.name}-sweep")
    given = ["--config", config_file] if config_file else []
    children = []
    for run in runs:
        own = [*fixed, *run.overrides, f"name={base.name}-{run.suffix}", f"tracking.parent=../{folder.name}"]
        children.append(Child(configuration.load_config(config_file, own), (*given, *own)))
    return Sweep(folder, tuple(o for o in overrides if o not in fixed), tuple(children))


def refuse_other_recipes(sweep: Sweep) -> None:
    """Check, before anything is trained, that runs which have begun can resume, or count as finished, as asked for now.

    Raises:
        UserError: what decides a run's result differs from what it was begun with, e.g. max_steps.
    """
    changes = {child.config.name: recipe_changes(child) for child in sweep.children if not child.config.resume_anyway}
    changed = [name for name, differences in changes.items() if differences]
    if not changed:
        return
    others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise UserError(
        f"{changed[0]}{others} began with another recipe ({'; '.join(changes[changed[0]])}), so nothing was started; "
        "undo that, choose another name=, or continue the runs with the changes by resume_anyway=true"
    )


def prepare(sweep: Sweep) -> None:
    """Make the folder of the sweep's own run; a larger grid under the same name adds to it."""
    prepare_folder(sweep.folder, remedy="choose another output_dir=")
    attempt, reported = run_files.known_run_file(sweep.folder).attempt, reporting(sweep)
    run_files.write_run_file(
        sweep.folder, uri=reported.uri, experiment=reported.experiment, attempt=attempt, run_info=run_info(sweep)
    )


def reporting(sweep: Sweep) -> Reporting:
    """Where the sweep's own run is reported."""
    config = sweep.children[0].config
    return Reporting(resolve_uri(config.tracking.uri.real, config.output_dir), config.tracking.experiment)


def run_info(sweep: Sweep) -> dict[str, Any]:
    """Content of `run.json` of the sweep's own run."""
    before = run_files.known_run_file(sweep.folder).children or []
    names = list(dict.fromkeys([*before, *(child.config.name for child in sweep.children)]))
    what = f"A sweep over {format_count(len(names), 'run')}: `{' '.join(sweep.grid)}`."
    grid = {key: value for key, _, value in (argument.partition("=") for argument in sweep.grid)}
    return {
        "name": sweep.folder.name,
        "parameters": {**configuration.flatten(sweep.children[0].config), **grid, "name": sweep.folder.name},
        "tags": {"sweep": " ".join(sweep.grid)},
        "description": f"{what} It has no result yet.",
        "children": names,
    }


def run_all(sweep: Sweep, *, num_processes: int) -> Ended:
    """Train one run after the other, also where some fail or are stopped by max_hours, until asked to stop.

    Raises:
        UserError: a training ended before it had begun: what is wrong with it is wrong with all.
    """
    prepare(sweep)
    stop, ended = StopBetween(), Ended()
    for number, child in enumerate(sweep.children, 1):
        name = f"run {number} of {len(sweep.children)}: {child.config.name}"
        if is_finished(child):
            log.info("%s is finished", name)
            warn_of_other_origin(child)
            continue
        log.info("%s", name)
        before = journal_size(child)
        launcher = ["dist_deeplab", "torchrun", "--standalone", f"--nproc_per_node={num_processes}", "-m"]
        command = [sys.executable, "-m", *(launcher if num_processes > 1 else []), "dist_deeplab.train"]
        code = stop.run([*command, *child.arguments])
        if stop.requested:
            log.warning("stopped; the same command continues from here")
            ended.sweep_stopped = True
            return ended
        if code and journal_size(child) == before:
            raise UserError(f"{child.config.name} could not begin, see above; the other runs were not tried")
        if code == STOPPED_EARLY:
            log.warning("%s was stopped and is saved: the same sweep again continues it", child.config.name)
            ended.stopped.append(child.config.name)
        elif code:
            log.warning("%s failed, see above; continuing with the others", child.config.name)
            ended.failed.append(child.config.name)
    return ended


def read_if_possible(folder: Path) -> RunRecord | None:
    """The record of a run for the comparison; None, and a warning, where its folder cannot be read."""
    try:
        return read_folder(folder)
    except UserError as error:
        log.warning("%s is left out of the comparison: %s", folder.name, error)
        return None


def conclude(sweep: Sweep) -> int:
    """Print and keep the comparison of the runs that began, also in MLflow; 0 if all of them are finished, else 1."""
    begun = [c.config.run_dir for c in sweep.children if (c.config.run_dir / run_files.RUN_FILE).exists()]
    if not begun:
        raise UserError(f"no run of {sweep.folder.name} has begun in {sweep.folder.parent}; nothing to compare")
    sweep.folder.mkdir(exist_ok=True)
    records = [record for folder in begun if (record := read_if_possible(folder))]
    everything_done = sum(map(counts_as_finished, sweep.children)) == len(sweep.children)
    report.print_report(records, Console(width=None if sys.stdout.isatty() else 160))
    tracker = open_tracker(
        sweep.folder,
        env=DistEnv(),
        reporting=reporting(sweep),
        config_yaml=configuration.config_to_yaml(sweep.children[0].config),
        run_info=run_info(sweep),
    )
    num_finished = sum(record.status == "FINISHED" for record in records)
    tracker.log(num_finished, report.summary(records))
    tracker.log_tags({"mlflow.note.content": report.markdown(records)})
    tracker.log_files(num_finished, lambda: report.write_report(records, sweep.folder))
    tracker.close("FINISHED" if everything_done else "KILLED")
    print(f"figure: {sweep.folder / 'comparison.png'}\n{where_to_look(sweep, begun)}")
    return 0 if everything_done else 1


def where_to_look(sweep: Sweep, folders: Sequence[Path]) -> str:
    """How to open MLflow's pages that compare the runs: a command, and addresses."""
    uri = reporting(sweep).uri
    copies = [state for state in (UploadState(folder, uri) for folder in folders) if state["run_id"]]
    if uri == "none" or len(copies) < 2:
        return f"in MLflow: nothing yet (tracking.uri=none, or no store: {command_name('sync-mlflow')} sends it later)"
    ids, own = [state["run_id"] for state in copies], UploadState(sweep.folder, uri)["run_id"]
    pages = sweep_pages(server_of(uri), copies[0]["experiment_id"], own, ids)
    head = "in MLflow:" if uri.startswith("http") else f"in MLflow: {mlflow_ui(uri)}, then"
    return "\n".join([head, *(f"    {name}: {address}" for name, address in pages.items())])


if __name__ == "__main__":
    sys.exit(main())
