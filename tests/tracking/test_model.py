"""The best checkpoint as a registered model: loaded where this repository is not, and served over HTTP."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from dist_deeplab import train
from dist_deeplab.checkpointing.checkpoint import read_checkpoint
from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.evaluation.images import read_image
from dist_deeplab.evaluation.inference import Predictor, load_network
from dist_deeplab.log_model import how_to_serve
from tests.tracking.conftest import Server, training

LOADS = """
import base64, json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict(pandas.DataFrame({"image": [open(path, "rb").read() for path in sys.argv[2:]]}))
code = sys.modules["dist_deeplab.evaluation.serving"].__file__
masks = [base64.b64encode(mask).decode() for mask in answer["mask"]]
print(json.dumps({"code": code, "masks": masks, "metadata": model.metadata.metadata}))
"""


@dataclass(frozen=True)
class Trained:
    """A training that has logged its best checkpoint at its end: its folder, and the model's address."""

    folder: Path
    address: str


@pytest.fixture(scope="module")
def trained(server: Server, sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("trained")
    arguments = [*training(server, sample_shards, out), "name=street", "tracking.experiment=models", "eval.every=3"]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        assert train.main([*arguments, "tracking.register_as=street-deeplab"]) == 0
    found = re.search(r"the best checkpoint is in MLflow as (\S+)", said.getvalue())
    assert found is not None, said.getvalue()
    return Trained(out / "street", found[1])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images of sizes that are not 8k+1, a JPEG and a PNG."""
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[0:90, 0:131]
    colors = np.stack([2 * rows, columns, 255 - rows - columns], axis=2).clip(0, 255).astype(np.uint8)
    Image.fromarray(colors).save(folder / "a.jpg", quality=90)
    Image.fromarray(colors[:65, ::-1]).save(folder / "b.png")
    return [folder / "a.jpg", folder / "b.png"]


def expected_mask(run: Path, image: Path) -> np.ndarray:
    """What the checkpoint's network says of the image, padded to the right and below by hand."""
    saved = read_checkpoint(run / "checkpoints" / "best.pt")
    image = torch.from_numpy(read_image(image)).permute(2, 0, 1)
    _, height, width = image.shape
    padded = torch.zeros(1, 3, height + (1 - height) % 8, width + (1 - width) % 8, dtype=torch.uint8)
    padded[0, :, :height, :width] = image
    predictor = Predictor.build(load_network(saved), saved.variant.preprocessing, saved.config.eval, dtype="fp32")
    logits = predictor.logits(padded, torch.tensor([[height, width]]))
    return logits[0, :, :height, :width].argmax(0).numpy()


def logged_best(run: Path) -> float:
    return float(read_checkpoint(run / "checkpoints" / "best.pt").best_miou)


def read_mask(encoded: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as png:
        assert png.mode == "P"
        return np.array(png)


def test_the_model_is_a_version_of_the_registered_one_with_its_signature(server: Server, trained: Trained) -> None:
    import mlflow

    assert trained.address == "models:/street-deeplab/1"
    assert server.client.get_model_version("street-deeplab", "1").status == "READY"
    mlflow.set_tracking_uri(server.uri)
    info = mlflow.models.get_model_info(trained.address)
    assert [(c.name, c.type.name) for c in info.signature.inputs.inputs] == [("image", "binary")]
    assert [(c.name, c.type.name) for c in info.signature.outputs.inputs] == [("mask", "binary")]
    run = server.run("models", "street")
    assert info.run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    ended = [r["time"] for r in map(json.loads, (trained.folder / "metrics.jsonl").open()) if "time" in r][-1]
    assert run.info.end_time == round(1000 * ended), "logging a model is not part of the run"
    logged = server.client.get_logged_model(info.model_id)
    scores = {metric.key: metric.value for metric in logged.metrics}
    assert scores["val/mIoU"] == logged_best(trained.folder)
    assert server.curve(run, "val/mIoU")[-1][0] == 4
    assert len(server.curve(run, "val/mIoU")) == 2, "no point twice"


def test_it_loads_elsewhere_with_its_own_code_and_says_what_the_checkpoint_says(
    server: Server, trained: Trained, images: list[Path], tmp_path: Path
) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": server.uri}
    command = [sys.executable, "-c", LOADS, trained.address, *map(str, images)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert str(Path(__file__).parents[2]) not in answer["code"], "the code in the model, not this repository's"
    assert tuple(answer["metadata"]["class_names"]) == CLASS_NAMES
    for image, mask in zip(images, answer["masks"], strict=True):
        np.testing.assert_array_equal(read_mask(mask), expected_mask(trained.folder, image))


def test_its_page_says_what_it_is_its_score_its_classes_and_the_mask_s_encoding(
    server: Server, trained: Trained
) -> None:
    version = server.client.get_model_version("street-deeplab", "1")
    assert f"of run street, step 3: mIoU {logged_best(trained.folder):.4f}." in version.description or (
        f"of run street, step 4: mIoU {logged_best(trained.folder):.4f}." in version.description
    )
    for text in (version.description, server.client.get_registered_model("street-deeplab").description):
        assert "0 background, 1 aeroplane" in text
        assert "palette PNG" in text
    model = server.client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.name == "street"
    assert model.tags["mlflow.note.content"] == version.description


@pytest.fixture(scope="module")
def served(server: Server, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of `mlflow models serve`."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", trained.address, "--env-manager", "local"]
    scripts = str(Path(uvicorn.__file__).parents[4] / "bin")  # of the environment that has it: MLflow calls it by name
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "MLFLOW_TRACKING_URI": server.uri,
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
    }
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "serve.log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False


def test_the_printed_command_saves_the_mask(
    served: int, server: Server, trained: Trained, images: list[Path], tmp_path: Path
) -> None:
    text = how_to_serve(trained.address, server.uri.replace("//", "//me:secret@"))
    assert f"export MLFLOW_TRACKING_URI={server.uri}\n" in text, "without the password"
    assert f"mlflow models serve -m {trained.address} " in text
    ask = text.splitlines()[-1].strip().replace(":8080/", f":{served}/").replace("photo.jpg", str(images[0]))
    subprocess.run(["bash", "-c", ask], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "mask.png")), expected_mask(trained.folder, images[0]))


def test_it_is_served_image_in_mask_out(served: int, trained: Trained, images: list[Path]) -> None:
    rows = [[base64.b64encode(image.read_bytes()).decode()] for image in images]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=120)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    for image, row in zip(images, json.loads(content)["predictions"], strict=True):
        np.testing.assert_array_equal(read_mask(row["mask"]), expected_mask(trained.folder, image))
