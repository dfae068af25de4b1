"""Real MLflow servers, one with passwords, with stores of their own; and a proxy that stands in for their troubles."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import command_environ

START_TIMEOUT_S = 120


class Server:
    """An MLflow server that can be killed and started again at the same address.

    empty_store: copied to be its store. password: of the user `me`, where the server shall ask for one.
    """

    def __init__(self, folder: Path, empty_store: Path, *, password: str = "") -> None:
        self.folder = folder
        shutil.copy(empty_store, folder / "mlflow.db")
        self.options = ("--app-name", "basic-auth") if password else ()
        self.environ = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the pages"}
        self.environ |= {"MLFLOW_AUTH_ADMIN_USERNAME": "me", "MLFLOW_AUTH_ADMIN_PASSWORD": password}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"),
            *("--artifacts-destination", str(self.folder / "artifacts"), *self.options),
        ]
        environ = os.environ | self.environ
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(  # the users are in basic_auth.db, in the folder where it is started
                command, cwd=self.folder, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and its workers at once, as a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def run(self, experiment: str, name: str) -> Run:
        """The one run of this name."""
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        (run,) = self.client.search_runs([found.experiment_id], f"attributes.run_name = '{name}'")
        return run

    def curve(self, run: Run, key: str) -> list[tuple[int, float]]:
        """(step, value) of every point, in order of steps: one that is there twice comes twice."""
        return sorted((p.step, p.value) for p in self.client.get_metric_history(run.info.run_id, key))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow_server"), empty_store)
    server.start()
    yield server
    server.kill()


class Proxy:
    """Stands between a run and the server, and does what `mode` says: ok, 500, slow, hang or cut."""

    def __init__(self, server: Server) -> None:
        self.mode = "ok"
        self.num_requests = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def handle_any(self) -> None:
                proxy.num_requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                while proxy.mode == "hang":
                    time.sleep(0.05)
                if proxy.mode == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if proxy.mode == "500":
                    self.send_error(500, "the store's disk is full")
                    return
                if proxy.mode == "slow":
                    time.sleep(0.5)
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                hidden = ("host", "connection", "content-length", "transfer-encoding")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in hidden}
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.mode = "cut"
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def training(server: Server, shards: Path, out: Path) -> list[str]:
    """The arguments of a short training, all but its name."""
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", "data.crop_size=65"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.num_workers=0",
        "batch.global_size=4",
        "optim.lr=1e-3",
        "max_steps=4",
    ]
    often = ["tracking.log_every=2", "eval.every=2", "eval.num_panels=2", "tracking.experiment=pages"]
    return [*data, *small, *often, f"output_dir={out}", f"tracking.uri={server.uri}"]


@dataclass(frozen=True)
class Sweep:
    """Two real trainings that differ in one setting, made by `dist_deeplab.sweep` and sent to the server."""

    folder: Path
    output: str
    runs: tuple[Path, ...]


@pytest.fixture(scope="session")
def sweep(server: Server, sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("sweep")
    arguments = [*training(server, sample_shards, out), "name=poly", "optim.power=0.5,2.0"]
    command = [sys.executable, "-m", "dist_deeplab.sweep", *arguments]
    done = subprocess.run(command, env=command_environ(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Sweep(out / "poly-sweep", done.stdout, (out / "poly-power_0.5", out / "poly-power_2.0"))
