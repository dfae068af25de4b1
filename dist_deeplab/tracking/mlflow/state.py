"""`UploadState`: what is known of a run's copies in MLflow stores, kept in its folder as `mlflow.json`; the one owner.

    {"uri": "http://host:5000", "run_id": "0f3a...", "sent_bytes": 8123, ..., "other_stores": {"sqlite:///...": {...}}}

The values at the top are of the store that was used last; those of others wait under `other_stores`, so that sending a
run elsewhere and back makes no second run. Addresses are without secrets.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.files import replace_text
from dist_deeplab.redaction import shown_url

MLFLOW_FILE = "mlflow.json"
_NEW: dict[str, Any] = {
    "run_id": "",
    "experiment_id": "",
    "sent_bytes": 0,
    "sent_system": {},
    "status": "",
    "note": "",
    "described": -1,
    "failed_sends": 0,
    "error": "",
    "model": "",
}


class UploadState:
    """The state of a run's copy in one store; `uri` empty: in the store that was used last.

    run_id and experiment_id; sent_bytes of the journal, and sent_system of each node's file of system metrics; status
    and note: how the last attempt ended; described: the last attempt whose parameters and tags were sent; failed_sends
    and error: how often the store failed, and the last failure while it does; model: the address of the logged model.
    A missing, empty or damaged file means that nothing was sent.
    """

    def __init__(self, run_dir: Path, uri: str = "") -> None:
        self._path, self.uri = run_dir / MLFLOW_FILE, shown_url(uri)
        self.values: dict[str, Any] = {}
        self.others: dict[str, dict[str, Any]] = {}
        self.is_known = False  # whether anything was ever sent there
        self.load()

    def load(self) -> None:
        """Read the file."""
        stores = _read(self._path)
        if not self.uri and stores:
            self.uri = next(iter(stores))
        self.is_known = self.uri in stores
        self.values = stores.pop(self.uri, dict(_NEW))
        self.others = stores

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def save(self, **changes: Any) -> None:
        """Take changes and write the file; what another process has written meanwhile is kept.

        Raises:
            OSError: e.g. a full disk.
        """
        self.load()
        self.values.update(changes)
        self.is_known = True
        content = {"uri": self.uri, **self.values, "other_stores": self.others}
        replace_text(self._path, json.dumps(content))

    def start_over(self) -> None:
        """Forget the run in this store: the next sending makes a new one of the whole journal."""
        self.save(**_NEW)


def mlflow_run_id(run_dir: Path) -> str:
    """The id of the folder's run in the MLflow store that was used last; empty before there is one."""
    return str(UploadState(run_dir)["run_id"])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """{store: values} of a file, the store that was used last first."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("uri"), str):
        return {}
    others = content.get("other_stores")
    stores = {content["uri"]: content, **(others if isinstance(others, dict) else {})}
    return {shown_url(uri): _checked(values) for uri, values in stores.items() if isinstance(values, dict)}


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those of a new run in place of missing ones and ones of another type."""
    return {name: values[name] if type(values.get(name)) is type(new) else new for name, new in _NEW.items()}
