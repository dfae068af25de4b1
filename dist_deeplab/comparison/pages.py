"""Addresses of MLflow's pages that show a sweep: its own, its runs' curves on top of each other, their tables."""

import json
from collections.abc import Sequence
from urllib.parse import quote

_MENU = "workflowType=machine_learning"  # else the pages' menu is the one for language models


def sweep_pages(server: str, experiment_id: str, sweep_id: str, run_ids: Sequence[str]) -> dict[str, str]:
    """{what it shows: address}; runs come best first where a page can order them."""
    ids, experiments = (quote(json.dumps(values)) for values in (list(run_ids), [experiment_id]))
    of_sweep = quote(f"tags.mlflow.parentRunId = '{sweep_id}'", safe="")
    best_first = f"orderByKey={quote('metrics.`val/best_mIoU`', safe='')}&orderByAsc=false"
    experiment = f"{server}/#/experiments/{experiment_id}/runs"
    return {
        "the sweep": f"{experiment}/{sweep_id}?{_MENU}",
        "curves, best first": f"{experiment}?{_MENU}&searchFilter={of_sweep}&{best_first}&compareRunsMode=CHART",
        "side by side": f"{server}/#/compare-runs?runs={ids}&experiments={experiments}&{_MENU}",
    }
