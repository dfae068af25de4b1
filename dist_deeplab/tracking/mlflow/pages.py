"""Addresses of MLflow's pages: the table of an experiment's runs, a run, a sweep, its curves, its runs side by side.

python -m dist_deeplab.tracking.mlflow.pages runs/mlflow.db http://127.0.0.1:5000    the tables of a SQLite store
"""

import contextlib
import json
import sqlite3
import sys
from collections.abc import Sequence
from urllib.parse import quote

from dist_deeplab.logs import format_count
from dist_deeplab.packaged import mlflow_ui
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.mlflow.state import UploadState

LOCAL_SERVER = "http://127.0.0.1:5000"  # of launch/mlflow_ui.sh
_MENU = "workflowType=machine_learning"  # else the pages' menu is the one for language models
_BEST_FIRST = f"orderByKey={quote('metrics.`val/best_mIoU`', safe='')}&orderByAsc=false"

_FIRST_CHART = {"val/mIoU": "accuracy/mIoU"}


def shown_as(key: str) -> list[str]:
    """The names under which MLflow shows a metric: its own, and for the mIoU one whose section of charts comes first.

    MLflow (3.17, 3.18) orders the sections by name, and `val` would come below cost, learning rates, memory and times.
    """
    return [key, *([_FIRST_CHART[key]] if key in _FIRST_CHART else [])]


def server_of(uri: str) -> str:
    """The server whose pages show a store: its own, or the one that launch/mlflow_ui.sh starts for a file."""
    return shown_url(uri).rstrip("/") if uri.startswith("http") else LOCAL_SERVER


def runs_table(server: str, experiment_id: str) -> str:
    """The address of an experiment's runs, the best mIoU first."""
    return f"{server}/#/experiments/{experiment_id}/runs?{_MENU}&{_BEST_FIRST}"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?{_MENU}"


def view_of_sweep(sweep_id: str, keys: Sequence[str]) -> tuple[str, str]:
    """Name and value of the experiment's tag that keeps a view of a sweep's runs: best first, few columns.

    The view is what MLflow's "Share view" makes (seen in 3.17 and 3.18): an address alone cannot choose columns.

    Args:
        keys: what the sweep varies, e.g. `optim.lr`.
    """
    metrics = ("val/best_mIoU", "cost/total_s", "cost/device_hours")
    view = {
        **{"searchFilter": f"tags.mlflow.parentRunId = '{sweep_id}'", "orderByKey": "metrics.`val/best_mIoU`"},
        **{"orderByAsc": False, "startTime": "ALL", "lifecycleFilter": "Active", "modelVersionFilter": "All Runs"},
        "selectedColumns": [*(f"params.`{key}`" for key in keys), *(f"metrics.`{key}`" for key in metrics)],
        **{"datasetsFilter": [], "runsPinned": [], "runsHidden": [], "runsExpanded": {}, "columnOrder": []},
        **{"runsHiddenMode": "FIRST_10_RUNS", "runsVisibilityMap": {}, "runListHidden": False, "columnWidths": {}},
        **{"isAccordionReordered": False, "groupBy": None, "groupsExpanded": {}, "autoRefreshEnabled": False},
        **{"useGroupedValuesInCharts": True, "hideEmptyCharts": True, "globalLineChartConfig": {}},
    }
    return f"mlflow.sharedViewState.{sweep_id}", json.dumps(view)


def sweep_pages(server: str, experiment_id: str, sweep_id: str, run_ids: Sequence[str]) -> dict[str, str]:
    """{what it shows: address}; runs come best first where a page can order them."""
    ids, experiments = (quote(json.dumps(values)) for values in (list(run_ids), [experiment_id]))
    of_sweep = quote(f"tags.mlflow.parentRunId = '{sweep_id}'", safe="")
    table = f"{runs_table(server, experiment_id)}&searchFilter={of_sweep}"
    return {
        "the sweep": run_page(server, experiment_id, sweep_id),
        "its runs, best first": f"{server}/#/experiments/{experiment_id}/runs?{_MENU}&viewStateShareKey={sweep_id}",
        "curves, best first": f"{table}&compareRunsMode=CHART",
        "side by side": f"{server}/#/compare-runs?runs={ids}&experiments={experiments}&{_MENU}",
    }


def where_to_look(uri: str, state: UploadState) -> str:
    """How to open a run and the table of all runs: an address each, after a command where there is no server."""
    server = server_of(uri)
    head = "in MLflow:" if uri.startswith("http") else f"in MLflow ({shown_url(uri)}): {mlflow_ui(uri)}, then"
    page, table = run_page(server, state["experiment_id"], state["run_id"]), runs_table(server, state["experiment_id"])
    return f"{head}\n    this run: {page}\n    all runs, best first: {table}"


def tables_of(database: str, server: str) -> list[str]:
    """A line for each experiment with runs in a SQLite store, the newest run's first: name, and its table's address.

    Reads the file itself, since opening the store through MLflow takes seconds.
    """
    query = (
        "SELECT e.name, e.experiment_id, COUNT(*) FROM experiments e JOIN runs r ON r.experiment_id = e.experiment_id "
        "WHERE e.lifecycle_stage = 'active' AND r.lifecycle_stage = 'active' GROUP BY e.experiment_id "
        "ORDER BY MAX(r.start_time) DESC"
    )
    with contextlib.suppress(sqlite3.Error):
        with contextlib.closing(sqlite3.connect(f"file:{quote(database)}?mode=ro", uri=True)) as store:
            rows = store.execute(query).fetchall()
        return [
            f"{name} ({format_count(count, 'run')}): {runs_table(server, str(number))}" for name, number, count in rows
        ]
    return []


if __name__ == "__main__":
    print("\n".join(tables_of(*sys.argv[1:3])))
