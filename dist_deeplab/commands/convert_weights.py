"""Convert weights of any known family to a file for this project or for other people's networks.

    dist-deeplab convert-weights train_iter_20000.caffemodel deeplab.pth
    dist-deeplab convert-weights runs/voc_resnet101/checkpoints/best.pt deeplabv2.pth --to kazuto1011
    dist-deeplab convert-weights model.ckpt-20000 deeplab.safetensors --to safetensors --report

IN is what model.init takes: a path, or a URL (with #sha256=HEX to check it). OUT is, by --to:
    state_dict   a plain state dict under this project's names (torch.load, model.init)
    safetensors  the same, as safetensors
    torchvision  the backbone under torchvision's names
    kazuto1011   the whole network for DeepLabV2_ResNet101_MSC of kazuto1011/deeplab-pytorch
    checkpoint   a checkpoint (OUT must end in .pt) for dist_deeplab.evaluate and dist_deeplab.predict: this is how
                 published weights are scored. It holds no optimizer: train from it by model.init, not by resume.
What is missing, damaged or of another network is refused as in training. Exit codes: 0 done, 2 wrong arguments or file.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_deeplab.checkpointing.file import FORMAT, save_content
from dist_deeplab.command_line import command_name
from dist_deeplab.config import RunConfig, config_to_dict
from dist_deeplab.data import voc
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.files import prepare_file
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.weights import Report, Weights, backbone_of, fit_weights, load_weights
from dist_deeplab.model.weights.export import FORMATS, export
from dist_deeplab.model.weights.formats.torch_file import load_file

CHECKPOINT = "checkpoint"
_TRAINING_SET = ("train_keys_sha256", "train_key_hashes", "train_contents", "train_index_sha256")
_DESCRIPTION = ("step", "config", "class_names", *_TRAINING_SET, "best_miou")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("convert-weights"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="weights of any known family")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--to", choices=(*FORMATS, CHECKPOINT), default="state_dict", help="default: state_dict")
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="for a checkpoint: a name a line (else: VOC's)"
    )
    parser.add_argument("--report", action="store_true", help="print a line for each tensor")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser.parse_args(argv)


def network_of(weights: Weights) -> tuple[DeepLabV2, Report]:
    """The network that the weights fill, and a report of what was loaded.

    Raises:
        UserError: none of our backbones, or incomplete.
    """
    backbone = backbone_of(weights.tensors)
    if backbone is None:
        raise UserError(f"{weights.path} ({weights.variant.family}) is of a ResNet of another depth or width than ours")
    first = weights.tensors.get("head.branches.0.weight")
    num_classes = first.shape[0] if first is not None and first.ndim == 4 and 0 < first.shape[0] < 10_000 else 21
    net = DeepLabV2(backbone, num_classes, norm=norm_factory("frozen"), **weights.variant.geometry)
    return net, fit_weights(net, weights, restore_last=True)


def own_description(path: str) -> dict[str, Any]:
    """Description of the weights in a checkpoint of ours, including the images that they were trained on."""
    if not zipfile.is_zipfile(path):  # as torch.save writes it
        return {}
    content = load_file(path)
    if not (isinstance(content, dict) and content.get("format") == FORMAT):
        return {}
    return {key: content[key] for key in _DESCRIPTION if key in content}


def write_checkpoint(net: DeepLabV2, weights: Weights, path: Path, class_names: Path | None) -> None:
    """Write the network as a checkpoint without a run, and its sidecar; what one of ours says of itself stays.

    Raises:
        UserError: no last layer, no name for each class, or a file that cannot be written.
    """
    if "head.branches.0.weight" not in weights.tensors:
        raise UserError(f"{weights.path} has no last layer, so there is nothing to score; train it by model.init")
    num_classes = len(weights.tensors["head.branches.0.weight"])
    if path.suffix != ".pt":
        raise UserError(f"a checkpoint's name must end in .pt, not {path.name}")
    own = own_description(weights.path)
    names = list(own.get("class_names", voc.CLASS_NAMES))
    if class_names:
        try:
            names = [line.strip() for line in class_names.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{class_names} can't be read: {error}") from None
    if len(names) != num_classes:
        raise UserError(
            f"the weights know {format_count(num_classes, 'class', 'classes')}, but "
            f"{format_count(len(names), 'name is', 'names are')} known; give --class-names FILE"
        )
    backbone = backbone_of(weights.tensors)
    config = RunConfig.model_validate({"model": {"backbone": backbone}, "data": {"num_classes": num_classes}})
    content = {
        "model": net.state_dict(),
        "optimizer": {},
        "step": 0,
        "variant": weights.variant.to_plain(),
        "config": config_to_dict(config),
        "train_keys_sha256": "",
        **own,
        "class_names": names,
    }
    try:
        save_content(path, content, step=content["step"])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.target.exists() and not arguments.overwrite:
        raise UserError(f"{arguments.target} is there already; choose another name, or add --overwrite")
    prepare_file(arguments.target, remedy="choose another OUT")
    weights = load_weights(arguments.source)
    net, report = network_of(weights)
    random = {name.rpartition(".")[0] for name in report.missing if name.startswith("backbone.")}
    if random:
        raise UserError(f"{weights.path} lacks {', '.join(sorted(random)[:3])}; what is written out must be whole")
    has_head = any(name.startswith("head.") for name in report.loaded)
    tensors = {name: v for name, v in net.state_dict().items() if has_head or not name.startswith("head.")}
    if arguments.to == CHECKPOINT:
        write_checkpoint(net, weights, arguments.target, arguments.class_names)
        notes = []
    else:
        notes = export(tensors, weights.variant, arguments.target, to=arguments.to)
    if arguments.report:
        print(*report.lines(), sep="\n")
    print(report)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {arguments.target} ({arguments.to})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
