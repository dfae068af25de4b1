"""Train a small network for a few steps under one split of the batch after another; the main rank saves what came out.

Arguments: MANIFEST OUT SPLIT ..., where a SPLIT is MICRO_SIZE,BATCH_NORM,STEPS[,OPTION ...] and an OPTION an input
scale, `images` (loss.average=images, the 0.75 loss on the full grid) or `classes` (class weights). OUT/SPLIT.pt gets
the first step's gradients and losses, the final weights and their way from the start, and the keys and pixel digests of
every sample by global position.
"""

import hashlib
from pathlib import Path

import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv, all_reduce_sum, gather_to_all
from dist_deeplab.model.batch_norm import FrozenBatchNorm, norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer, set_lr
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep


def train(env: DistEnv, manifest: str, out: Path, micro_size: str, batch_norm: str, steps: str, *options: str) -> None:
    torch.manual_seed(3)
    split = BatchSplit.derive(global_size=8, micro_size=int(micro_size), world_size=env.world_size)
    net = DeepLabV2("resnet_tiny", 21, norm=norm_factory(batch_norm, accumulation=split.accumulation))  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    scales = tuple(float(option) for option in options if option not in ("images", "classes"))
    full_grid = (0.75,) if "images" in options else ()
    model = prepare_model(MultiScale(net, scales, full_grid=full_grid), env)
    optimizer = build_optimizer(net, OptimConfig())
    set_lr(optimizer, torch.tensor(1e-5))
    loss = CrossEntropy(
        255,
        class_weights=tuple(0.1 + (5 * c) % 7 for c in range(21)) if "classes" in options else (),
        average="images" if "images" in options else "pixels",
    )
    update = TrainStep(model, optimizer, Precision("fp32", env.device), CAFFE, loss)
    augmentation = Augmentation(65, (0.5, 1.5), True, 255)
    dataset = TrainDataset(load_manifest(manifest), num_classes=21, augmentation=augmentation, seed=5)
    sampler = StepSampler(0, int(steps), split=split, rank=env.rank)
    seen, first = {}, {}
    for step, batches in TrainLoader(dataset, sampler, num_workers=0, pin_memory=False):
        for positions, batch in zip(split.positions(step, env.rank), batches, strict=True):
            for i, position in enumerate(positions.tolist()):
                pixels = batch.image[i].numpy().tobytes() + batch.label[i].numpy().tobytes()
                seen[position] = (batch.keys[i], hashlib.sha256(pixels).hexdigest())
        result = update(batches)
        if step == 0:
            first = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
            losses = {name: all_reduce_sum(loss.clone()).item() for name, loss in result.losses.items()}
    everyone: dict[int, tuple[str, str]] = {}
    for part in gather_to_all(list(seen.items())):
        everyone |= {position: tuple(content) for position, content in part}
    if env.is_main:
        moved = {name: p.detach() - start[name] for name, p in net.named_parameters()}
        torch.save({"moved": moved, "grads": first, "losses": losses, "model": net.state_dict(), "seen": everyone}, out)


def main(env: DistEnv, manifest: str, folder: str, *splits: str) -> None:
    for split in splits:
        train(env, manifest, Path(folder) / f"{split}.pt", *split.split(","))
