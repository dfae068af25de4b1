"""Score a network on a validation set: each image once at its own size, whatever the number of ranks."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dist_deeplab.data.loader import Batch, EvalDataset, eval_loader
from dist_deeplab.data.shards import Manifest
from dist_deeplab.errors import TrainingError
from dist_deeplab.evaluation.confusion import confusion_matrix, image_miou
from dist_deeplab.model.deeplabv2 import upsample
from dist_deeplab.model.preprocessing import Preprocessing
from dist_deeplab.runtime.distributed import DistEnv, all_reduce_sum, gather_to_all


@dataclass(frozen=True)
class Panel:
    """One validation image to look at: image uint8 [H, W, 3] RGB, label and pred uint8 [H, W], its own mean IoU."""

    key: str
    image: np.ndarray
    label: np.ndarray
    pred: np.ndarray
    iou: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """What all ranks saw together: the confusion matrix, int64 [classes, classes], images, and some to look at."""

    confusion: np.ndarray
    num_images: int
    ignore_label: int
    panels: list[Panel]


def evaluate(
    net: nn.Module,
    manifest: Manifest,
    env: DistEnv,
    *,
    preprocessing: Preprocessing,
    num_workers: int,
    num_panels: int = 0,
) -> Evaluation:
    """Return the evaluation of `net` on all images of a shard set; every rank must call it.

    Args:
        net: a DeepLabV2 on the rank's device, not wrapped by DDP: ranks may have unequal numbers of images.
        manifest: the set; its void label is not scored.
        env: this rank among the ranks.
        preprocessing: what `net` expects of its input.
        num_workers: loader processes per rank.
        num_panels: how many images, the set's first, to return for looking at.

    Raises:
        TrainingError: all ranks together saw more or fewer images than the set has.
        ShardError: a sample can't be read.
    """
    dataset = EvalDataset(manifest, num_classes=manifest.num_classes, ignore_label=manifest.ignore_label)
    batches = eval_loader(
        dataset,
        rank=env.rank,
        world_size=env.world_size,
        num_workers=num_workers,
        pin_memory=env.device.type == "cuda",
    )
    panel_keys = {dataset.reader.key(i) for i in range(min(num_panels, manifest.num_samples))}
    confusion = torch.zeros(manifest.num_classes, manifest.num_classes, dtype=torch.int64, device=env.device)
    seen = 0
    panels = []
    was_training = net.training
    net.eval()
    try:
        for batch in batches:
            pred = predict(net, batch, preprocessing=preprocessing, device=env.device)
            height, width = batch.content[0].tolist()
            label = batch.label[:, :height, :width].to(env.device, non_blocking=True)
            own = confusion_matrix(label, pred, num_classes=manifest.num_classes, ignore_label=manifest.ignore_label)
            confusion += own
            seen += len(batch.keys)
            if batch.keys[0] in panel_keys:
                image = batch.image[0, :, :height, :width].permute(1, 2, 0)
                iou = image_miou(own.cpu().numpy())
                panels.append(Panel(batch.keys[0], image.numpy(), label[0].cpu().numpy(), pred[0].cpu().numpy(), iou))
    finally:
        net.train(was_training)
    total = int(all_reduce_sum(torch.tensor([seen])))
    if total != manifest.num_samples:
        raise TrainingError(
            f"evaluation saw {total} images, but {manifest.path} has {manifest.num_samples}; the score would be wrong"
        )
    panels = sorted((panel for own in gather_to_all(panels) for panel in own), key=lambda panel: panel.key)
    return Evaluation(all_reduce_sum(confusion).cpu().numpy(), total, manifest.ignore_label, panels)


@torch.inference_mode()
def predict(net: nn.Module, batch: Batch, *, preprocessing: Preprocessing, device: torch.device) -> torch.Tensor:
    """Return the predicted classes of a batch with one image, uint8 [1, H, W] at the image's own size.

    The image's padding (to 8k+1, below and to the right) is the mean for the network, and is cut off again.
    """
    image = preprocessing.normalize(batch.image.to(device, non_blocking=True), batch.content)
    height, width = batch.content[0].tolist()
    logits = upsample(net(image).float(), image.shape[2:])
    return logits[:, :, :height, :width].argmax(1).to(torch.uint8)
