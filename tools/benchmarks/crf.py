"""The dense CRF: images a second and core, called directly and through the pool of processes that evaluation feeds.

Images are of VOC's size with 21 classes, 10 iterations of the paper's parameters. direct: one call after another in
this process. pool_n: n processes, with the copies to and from them.
"""

import argparse

import cv2
import numpy as np

from benchmarks.harness import Report, Row, interleave
from dist_deeplab.config import CrfConfig
from dist_deeplab.evaluation.crf import CrfPool, dense_crf, require_crf
from dist_deeplab.workers import num_cores

SUMMARY = "the dense CRF: images/s per core"
_CLASSES = 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cores = num_cores()
    parser.add_argument("--processes", type=int, default=cores, help="of the pool; default: all cores, %(default)s")
    parser.add_argument("--images", type=int, default=2, help="per process and round; default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each; default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    require_crf()
    parameters = CrfConfig().model_dump(exclude={"num_workers"})
    cases = [draw(seed, *arguments.size) for seed in range(arguments.images)]
    many = [(number, *cases[number % len(cases)]) for number in range(arguments.images * arguments.processes)]
    pool_name = f"pool_{arguments.processes}"
    with CrfPool(parameters, arguments.processes) as pool:
        timings = interleave(
            {
                "direct": lambda: [dense_crf(image, prob, **parameters).argmax(0) for image, prob in cases],
                pool_name: lambda: list(pool.predict(iter(many))),
            },
            rounds=arguments.rounds,
        )
    rows: list[Row] = []
    for name, count, cores in (("direct", len(cases), 1), (pool_name, len(many), arguments.processes)):
        per_s = count / timings[name].median
        rows.append(
            {"crf": name, "images_per_s": per_s, "images_per_s_and_core": per_s / cores, "spread": timings[name].spread}
        )
    height, width = arguments.size
    return Report(f"dense CRF on {width} x {height} images, {_CLASSES} classes, 10 iterations", rows)


def draw(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A image, uint8 [H, W, 3], and smooth probabilities, float32 [C, H, W].

    The image is about as smooth as a photograph; one of noise takes four times as long.
    """
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (width, height))
    logits = np.stack([cv2.resize(plane, (width, height)) for plane in 4 * rng.standard_normal((_CLASSES, 9, 9))])
    prob = np.exp(logits - logits.max(0))
    return image, (prob / prob.sum(0)).astype(np.float32)
