"""Log a run's best checkpoint as an MLflow model: image in, mask out, loadable and servable without this repository.

    python -m dist_deeplab.log_model runs/voc_resnet101 [--register-as voc-deeplab] [--uri URI]

The run must be in MLflow already: training sends it, or `dist-deeplab sync-mlflow` does later.
`tracking.log_model=true` logs the model at the end of a run. Prints the model's address, and commands, ready to be
copied, that serve it and ask it for a mask. In Python, with MLFLOW_TRACKING_URI set to the store:

    mlflow.pyfunc.load_model("models:/voc-deeplab/1").predict(pandas.DataFrame({"image": [jpeg_bytes]}))["mask"][0]

Exit codes: 0 done, 1 error, 2 wrong arguments.
"""

import argparse
import importlib.metadata
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dist_deeplab
from dist_deeplab.checkpointing.checkpoint import Checkpoint, find_best, read_checkpoint
from dist_deeplab.command_line import command_name
from dist_deeplab.config import config_from_dict
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.evaluation import serving
from dist_deeplab.logs import format_names
from dist_deeplab.redaction import redact, shown_url
from dist_deeplab.tracking.mlflow.find_run import find_run
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import (
    choose_store,
    explain,
    no_telemetry,
    require_known_store,
    take_credentials,
)
from dist_deeplab.tracking.run_files import read_run_file

_LIBRARIES = ("torch", "numpy", "opencv-python-headless", "Pillow", "pydantic", "pyyaml", "pandas", "filelock", "rich")
_DESCRIPTION = "mlflow.note.content"
_ENCODING = (
    "Input: a column `image` with the bytes of JPEG, PNG or WebP files. Output: a column `mask` with the bytes of "
    "8-bit palette PNGs of the images' sizes, whose values are the classes' numbers: read them by "
    "`numpy.array(PIL.Image.open(...))`. Over HTTP both are base64."
)
_ASK = (
    "import base64, json, sys, urllib.request as web; "
    'image = base64.b64encode(open(sys.argv[1], "rb").read()).decode(); '
    'body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}).encode(); '
    'head = {"Content-Type": "application/json"}; url = "http://127.0.0.1:8080/invocations"; '
    "answer = json.load(web.urlopen(web.Request(url, body, head))); "
    'open(sys.argv[2], "wb").write(base64.b64decode(answer["predictions"][0]["mask"]))'
)
"""A Python program that sends an image and saves its mask; needs nothing but Python."""


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_name("log-model"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--register-as", default="", metavar="NAME", help="make it a new version of a registered model")
    parser.add_argument("--uri", default="", help="MLflow store, where not the one that the run is in")
    arguments = parser.parse_args(argv)
    try:
        require_known_store(arguments.uri)
        config_from_dict({"tracking": {"register_as": arguments.register_as}}, where="--register-as")
        uri = choose_store(arguments.run_dir, read_run_file(arguments.run_dir).tracking.uri, arguments.uri)
        os.environ.update(environment())
        address = log_best(arguments.run_dir, uri=uri, register_as=arguments.register_as)
        print(f"{address}\n\n{how_to_serve(address, uri)}")
    except UserError:
        raise
    except Exception as error:  # whatever MLflow, its database or the network raises
        print(f"error: MLflow did not take the model: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def environment() -> dict[str, str]:
    """MLflow's variables for sending a file of some 200 MB, which a server may pass on before it answers."""
    return {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(600, int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "0")))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }


def log_best(run_dir: Path, *, uri: str, register_as: str = "") -> str:
    """Log the best checkpoint, without a validation set the newest; the model's address.

    Raises:
        UserError: no run is there, or it is not in MLflow, or has no checkpoint.
    """
    state = UploadState(run_dir, uri)
    run_id = state["run_id"]
    if not run_id:
        raise UserError(
            f"{run_dir} is not in the MLflow store {shown_url(uri)} yet; send it: "
            f"{command_name('sync-mlflow')} {run_dir}"
        )
    checkpoint = read_checkpoint(find_best(run_dir))
    no_telemetry()
    import mlflow

    mlflow.set_tracking_uri(take_credentials(uri))
    client = mlflow.MlflowClient()
    if not find_run(client, state, run_dir):
        raise UserError(f"{run_dir} has no run of its own in {shown_url(uri)}; {command_name('sync-mlflow')} makes one")
    before = client.get_run(run_id).info
    text = description(checkpoint, before.run_name)
    try:
        with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id):
            torch.save(checkpoint.for_inference(), Path(folder) / serving.WEIGHTS)
            info = mlflow.pyfunc.log_model(
                name=re.sub(r"[^\w -]", "_", before.run_name),
                loader_module=serving.__name__,
                data_path=folder,
                code_paths=[str(Path(dist_deeplab.__file__).parent)],
                signature=signature(),
                input_example=input_example(),
                pip_requirements=requirements(),
                metadata=metadata(checkpoint),
                step=checkpoint.step,  # so that the model's page has the scores of this step
                registered_model_name=register_as or None,
            )
    finally:
        if before.status != "RUNNING":  # start_run has made it a running one that ended now
            client.set_terminated(run_id, status=before.status, end_time=before.end_time)
    version = info.registered_model_version
    address = f"models:/{register_as}/{version}" if register_as else redact(str(info.model_uri))
    client.set_logged_model_tags(info.model_id, {_DESCRIPTION: text})
    if register_as:
        client.update_model_version(register_as, str(version), description=text)
        if not client.get_registered_model(register_as).description:  # later it may be the user's own text
            client.update_registered_model(register_as, description=f"{_ENCODING}\n\n{class_list(checkpoint)}")
    state.save(model=address)  # sync-mlflow need not log it again
    return address


def description(checkpoint: Checkpoint, run_name: str) -> str:
    """Markdown for the model's page: where it is from, its score, what goes in and out, its classes."""
    score = f"mIoU {checkpoint.best_miou:.4f}" if checkpoint.best_miou >= 0 else "not scored"
    about = f"DeepLab-v2 ({checkpoint.config.model.backbone}) of run {run_name}, step {checkpoint.step}: {score}."
    return "\n\n".join([about, _ENCODING, class_list(checkpoint)])


def class_list(checkpoint: Checkpoint) -> str:
    """The classes with the values that mean them in a mask, in one paragraph."""
    return "Classes: " + ", ".join(
        f"{label} {format_names([name])}" for label, name in enumerate(checkpoint.class_names)
    )


def how_to_serve(address: str, uri: str) -> str:
    """Commands that serve the model on this machine, and that save the mask of an image."""
    lines = [
        "Serve it (where the store has a password, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD too):",
        f"    export MLFLOW_TRACKING_URI={shlex.quote(shown_url(uri))}",
        f"    mlflow models serve -m {address} --env-manager local --port 8080",
        "Save the mask of an image, a PNG whose values are the classes' numbers:",
        f"    python -c {shlex.quote(_ASK)} photo.jpg mask.png",
    ]
    return "\n".join(lines)


def signature() -> Any:
    """MLflow's description of what goes in and out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    return ModelSignature(inputs=Schema([ColSpec("binary", "image")]), outputs=Schema([ColSpec("binary", "mask")]))


def input_example() -> Any:
    """A frame with a small drawn image, for trying the model out."""
    import pandas

    rows, columns = np.mgrid[0:65, 0:97].astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([rows, columns, rows + columns], axis=2)).save(buffer, "PNG")
    return pandas.DataFrame({"image": [buffer.getvalue()]})


def requirements() -> list[str]:
    """The libraries that the model needs, with the versions installed here."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in _LIBRARIES]


def metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """For users of the model: the classes that a mask's indices mean, and which weights it has."""
    return {
        "class_names": list(checkpoint.class_names),
        "step": checkpoint.step,
        "best_mIoU": checkpoint.best_miou,
        "backbone": checkpoint.config.model.backbone,
    }


if __name__ == "__main__":
    sys.exit(main())
