"""Two ranks: a propagate_nan image on the second skips the update on both, names it and saves it there; then the second
rank's network is changed, and saving a checkpoint is refused.

Batch norm is local: synchronised statistics carry a NaN to the other rank's samples too.
Argument: a folder for what is saved.
"""

import dataclasses
import json
import logging
import math
from pathlib import Path

import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.loader import Batch
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.replicas import check_replicas
from dist_deeplab.errors import TrainingError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE, Preprocessing
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteDump, NonFiniteMonitor
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Poisoned(Preprocessing):
    """Makes NaN of an image whose first value is 77."""

    def normalize(self, image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        bad = (image[:, 0, 0, 0] == 77).view(-1, 1, 1, 1)
        return torch.where(bad, math.nan, super().normalize(image, content))


def batch(seed: int, *, poison: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8, generator=generator)
    image[:, 0, 0, 0] = 77 if poison else 0
    label = torch.randint(0, 5, (2, 33, 33), dtype=torch.uint8, generator=generator)
    return Batch(image, label, torch.tensor([[33, 33]] * 2), [f"image_{seed}_{i}" for i in range(2)])


def main(env: DistEnv, where: str) -> None:
    folder = Path(where)
    logging.basicConfig(filename=folder / f"rank_{env.rank}.log", level=logging.WARNING)
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("local", accumulation=2))
    model = prepare_model(MultiScale(net), env).train()
    update = TrainStep(
        model,
        build_optimizer(net, OptimConfig(lr=1e-3)),
        Precision("fp32", env.device),
        Poisoned(CAFFE.channels, CAFFE.mean, CAFFE.std),
        CrossEntropy(255),
    )
    window = LossWindow(NonFiniteMonitor(3, NonFiniteDump(folder / "nonfinite", {}, env.rank)))
    kept: dict[str, torch.Tensor] = {}
    for step in range(3):
        bad = step == 1 and env.rank == 1
        batches = [batch(100 * env.rank + 10 * step), batch(100 * env.rank + 10 * step + 1, poison=bad)]
        result = update(batches)
        window.add(step, result, batches)
        assert bool(result.skipped) == (step == 1)
        now = {name: value.clone() for name, value in net.state_dict().items()}
        same = {name for name in now if name in kept and torch.equal(now[name], kept[name])}
        if step == 1:
            assert same == set(now), f"moved in the skipped step: {set(now) - same}"
        else:
            assert len(same) < len(now) / 4, f"step {step} moved too little: {same}"
        kept = now
    window.reduce(3)
    check_replicas(net, buffers=False, when="at step 3")
    (folder / f"rank_{env.rank}.json").write_text(json.dumps(window.pop_mean()))
    if env.rank == 1:
        with torch.no_grad():
            net.head.branches[2].bias[0] += 1e-7
    try:
        check_replicas(net, buffers=False, when="at step 3")
        raise AssertionError("no rank noticed it")
    except TrainingError as error:
        (folder / f"error_{env.rank}").write_text(str(error))
