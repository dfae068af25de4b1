"""Evaluation: images a second from shards to confusion matrix, ours against the loop that others write.

loop: one image at a time, the prediction copied to the host and counted there by numpy's bincount. ours: batches of
equal sizes, counted on the device (with the trimap's bands), at one scale, at the paper's three, and mirrored too.
Decoding and the upload are in it, starting the loader's processes as well; drawing figures is not.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Report, Row, best_device, interleave, ratio_column, synchronizer
from dist_deeplab.data import voc
from dist_deeplab.data.loader import EvalDataset, eval_loader
from dist_deeplab.data.packing.writer import LabelSpace, PackingOptions, SourceSample, write_shards
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import Session
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation.evaluator import Loading, evaluate
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE

SUMMARY = "evaluation: images/s at one and several scales"
_PAPER = (0.5, 0.75, 1.0)
_SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_3_scales": {"scales": _PAPER},
    "ours_3_scales_flip": {"scales": _PAPER, "flip": True},
}
_SHAPES = ((375, 500), (500, 375), (333, 500), (375, 500))  # VOC's usual sizes, the commonest twice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, metavar="MANIFEST", help="shards to use; default: drawn images")
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet_tiny", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=200 if on_gpu else 16, help="drawn images; default: %(default)s")
    parser.add_argument(
        "--shrink", type=int, default=1 if on_gpu else 4, help="VOC's size by this; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="eval.batch_size; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=4 if on_gpu else 0, help="loader processes; default: %(default)s"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=["loop", *_SETTINGS], metavar="ROW", help="rows to leave out"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed evaluations of each; default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    if {"loop", *_SETTINGS} <= set(arguments.without):
        raise UserError("--without leaves no row; name fewer")
    device = best_device()
    net = place_model(DeepLabV2(arguments.backbone, 21, norm=norm_factory("frozen")), device).eval()
    with tempfile.TemporaryDirectory() as folder:
        manifest = load_manifest(arguments.data) if arguments.data else draw(Path(folder), arguments)
        loading = Loading(arguments.workers, arguments.batch_size)
        competitors: dict[str, Callable[[], object]] = {
            "loop": partial(plain_loop, net, manifest, device, arguments.workers),
            **{
                name: partial(evaluate, Predictor(net, CAFFE, **setting), manifest, Session(DistEnv()), loading=loading)
                for name, setting in _SETTINGS.items()
            },
        }
        competitors = {name: work for name, work in competitors.items() if name not in arguments.without}
        timings = interleave(competitors, rounds=arguments.rounds, synchronize=synchronizer(device))
    rows: list[Row] = [
        {"evaluation": name, "images_per_s": manifest.num_samples / timing.median, "spread": timing.spread}
        for name, timing in timings.items()
    ]
    if "loop" in competitors:
        ratio_column(rows, of="images_per_s", to="loop", name="x_loop")
    images = format_count(manifest.num_samples, "image")
    title = f"{images}, {arguments.backbone}, float32, batches of {arguments.batch_size}"
    return Report(title, rows, ["loop: one image at a time, counted on the host; all others are this project's"])


def draw(folder: Path, arguments: argparse.Namespace) -> Manifest:
    """Shards of images of VOC's sizes."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(arguments.images):
        height, width = (side // arguments.shrink for side in _SHAPES[number % len(_SHAPES)])
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (width, height))
        label = cv2.resize(
            rng.integers(0, 21, (5, 5), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
        )
        paths = folder / f"{number}.jpg", folder / f"{number}.png"
        for path, array in zip(paths, (image, label)):
            Image.fromarray(array).save(path)
        samples.append(SourceSample(str(number), *paths))
    labels = LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL)
    return write_shards(samples, folder, split="val", labels=labels, options=PackingOptions(samples_per_shard=500))


@torch.inference_mode()
def plain_loop(net: DeepLabV2, manifest: Manifest, device: torch.device, num_workers: int) -> np.ndarray:
    """The confusion matrix as others compute it."""
    dataset = EvalDataset(manifest, num_classes=21, ignore_label=manifest.ignore_label)
    one_each = [[index] for index in range(manifest.num_samples)]
    confusion = np.zeros((21, 21), dtype=np.int64)
    for batch in eval_loader(dataset, one_each, num_workers=num_workers, pin_memory=device.type == "cuda"):
        logits = net(CAFFE.normalize(batch.image.to(device), batch.content))
        full = torch.nn.functional.interpolate(logits, batch.label.shape[1:], mode="bilinear", align_corners=True)
        pred, label = full.argmax(1).cpu().numpy(), batch.label.numpy()
        valid = label < 21
        confusion += np.bincount(21 * label[valid].astype(np.int64) + pred[valid], minlength=441).reshape(21, 21)
    return confusion
