"""Export a checkpoint for use without this project: ONNX, or a torch.export program.

    dist-deeplab export runs/voc_resnet101/checkpoints/best.pt model.onnx --check photos/
    dist-deeplab export CHECKPOINT model.pt2            # torch.export.load("model.pt2").module()(image)

Either takes `image`, float32 RGB values of 0..255 [B, 3, H, W], any H and W from 2 on, and gives `logits`
[B, classes, H, W]: preprocessing, padding and resizing are inside. Class names and what the network is are in its
metadata (ONNX: metadata_props; program: the extra file metadata.json). A program is also what AOTInductor compiles
(torch._inductor.aoti_compile_and_package).

The file is loaded again and compared with the network, at several sizes and on the images of --check; where they
differ it is an error. Needs the extra `export` for ONNX. Exit codes: 0 done, 1 the file differs, 2 wrong arguments.
"""

import argparse
import importlib.util
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint, read_checkpoint
from dist_deeplab.command_line import command_name
from dist_deeplab.config import EvalConfig, RunConfig
from dist_deeplab.data.transforms import next_grid_size, pad_to
from dist_deeplab.errors import TrainingError, UserError, one_line_errors
from dist_deeplab.evaluation.exportable import Exportable
from dist_deeplab.evaluation.images import find_images, read_image
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.files import prepare_file, replace_file
from dist_deeplab.logs import format_count

Model = Callable[[np.ndarray], np.ndarray]
"""float32 [B, 3, H, W] -> logits float32 [B, C, H, W]."""

_SIZES = ((97, 129), (100, 75), (33, 34), (2, 9), (250, 333))  # (height, width): on the grid 8k+1 and off it
_TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
_EXAMPLE = (2, 3, 100, 75)
_NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    prepare(arguments)
    checkpoint = read_checkpoint(arguments.checkpoint)
    predictor = Predictor.from_checkpoint(checkpoint, one_scale(checkpoint.config), torch.device("cpu"))
    sources = find_images(arguments.check, outside=Path("/nowhere")) if arguments.check else []
    metadata = describe(checkpoint)
    images = {f"drawn {width} x {height}": draw(height, width) for height, width in _SIZES}
    images |= {str(source.path): read_image(source.path) for source in sources}
    write = write_onnx if arguments.out.suffix == ".onnx" else write_program
    exportable = Exportable(predictor.net, predictor.preprocessing).eval()

    def fill(temporary: Path) -> float:
        return compare(write(exportable, temporary, metadata), predictor, images)

    try:
        worst = replace_file(arguments.out, fill)  # a file that differs never gets the name
    except OSError as error:
        raise UserError(f"cannot write {arguments.out}: {error.strerror or error}") from None
    size = arguments.out.stat().st_size / 2**20
    print(
        f"{arguments.out}: {size:.1f} MiB, checked on {format_count(len(images), 'image')}, relative error {worst:.1e}"
    )
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file with its .json beside it")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .onnx or .pt2")
    parser.add_argument("--check", nargs="+", metavar="IMAGE|DIR|GLOB", help="further images to compare on")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def prepare(arguments: argparse.Namespace) -> None:
    """Check the arguments before the work.

    Raises:
        UserError: another suffix, a file that is already there, missing packages, or a folder that is not writable.
    """
    if arguments.out.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{arguments.out} must end in .onnx or .pt2, which select the format")
    if arguments.out.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.out} already exists; --overwrite replaces it")
    missing = [name for name in _NEEDED_FOR_ONNX if importlib.util.find_spec(name) is None]
    if arguments.out.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; pip install -e '.[export]' -c constraints.txt")
    prepare_file(arguments.out, remedy="choose another OUT")


def one_scale(config: RunConfig) -> RunConfig:
    """The configuration asked for at one scale, in fp32: what an exported program computes."""
    precision = config.precision.model_copy(update={"backend": "torch", "dtype": "fp32"})
    return config.model_copy(update={"eval": EvalConfig(), "precision": precision})


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """Metadata of the exported file, {name: text}."""
    return {
        "input": "image: float32 RGB values of 0..255, [B, 3, H, W], any size; preprocessing is inside",
        "output": "logits: float32 [B, classes, H, W]; the class is the argmax, probabilities the softmax over axis 1",
        "class_names": json.dumps(checkpoint.class_names),
        "preprocessing": json.dumps(checkpoint.variant.to_plain()["preprocessing"]),
        "network": f"DeepLab-v2 {checkpoint.config.model.backbone}, {checkpoint.variant.family}",
        "checkpoint": f"{checkpoint.path.name if checkpoint.path else ''}, step {checkpoint.step}",
    }


def write_program(model: Exportable, out: Path, metadata: dict[str, str]) -> Model:
    """Write a torch.export program, load it again and return it as a function."""
    # Given a path, torch warns of any suffix but .pt2; and torch 2.13 of tensors that share memory on another device.
    with out.open("wb") as target, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(_export(model), target, extra_files={"metadata.json": json.dumps(metadata, indent=1)})
    with out.open("rb") as source:
        program = torch.export.load(source).module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return program(torch.from_numpy(image)).numpy()

    return run


def write_onnx(model: Exportable, out: Path, metadata: dict[str, str]) -> Model:
    """Write an ONNX file, load it into onnxruntime and return it as a function."""
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _export(model), input_names=["image"], output_names=["logits"], dynamo=True, verbose=False
        )
    assert program is not None
    proto = program.model_proto
    name_axes(proto.graph)
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def name_axes(graph: Any) -> None:
    """Call the axes batch, height and width, in place of the exporter's symbols such as `s40` and `s73`."""
    axes = graph.input[0].type.tensor_type.shape.dim
    names = {axes[axis].dim_param: name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a symbol, or inside the network an expression of several
                dim.dim_param = re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], symbol[0]), dim.dim_param)


def _export(model: Exportable) -> torch.export.ExportedProgram:
    any_size = torch.export.Dim.DYNAMIC
    return torch.export.export(
        model, (torch.rand(_EXAMPLE),), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},)
    )


def compare(model: Model, predictor: Predictor, images: dict[str, np.ndarray]) -> float:
    """Largest difference of logits over all images, relative to the largest logit of each.

    Raises:
        TrainingError: it is too large; the image is named.
    """
    worst = 0.0
    for name, image in images.items():
        height, width = image.shape[:2]
        got = model(np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32))
        padded = pad_to(image, (next_grid_size(height), next_grid_size(width)), 0)
        tensor = torch.from_numpy(padded).permute(2, 0, 1)[None]
        expected = predictor.logits(tensor, torch.tensor([[height, width]]))[:, :, :height, :width].numpy()
        error = float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))
        worst = max(worst, error)
        if not error <= _TOLERANCE:
            raise TrainingError(f"the exported network differs on {name}: relative error {error:.1e}; do not use it")
    return worst


def draw(height: int, width: int) -> np.ndarray:
    """A smooth colourful image, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(height).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


if __name__ == "__main__":
    sys.exit(main())
