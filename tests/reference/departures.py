"""How far the default recipe is from the authors' Caffe solver, term by term, on the first step's real crops.

    python tests/reference/departures.py --data data/voc/train.json --weights resnet101.pth       # a minute or two
    python tests/reference/departures.py --data data/sample_voc/shards/train.json --crop-size 129 \\
        --weights runs/quickstart/checkpoints/best.pt

Each figure is the relative L2 difference of the whole gradient: |g' - g| / |g|, float32 on the CPU, batch norm as the
paper has it (frozen). Without --weights the backbone is a random ResNet-101. docs/training.md states the results.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dist_deeplab.data.batch import Batch
from dist_deeplab.data.loader import TrainDataset
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE, CAFFE_ROUNDED, Preprocessing
from dist_deeplab.model.weights import fit_weights, load_weights
from dist_deeplab.training.loss import sample_label

Loss = Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A network and the crops of one optimizer step."""

    net: DeepLabV2
    batch: Batch
    preprocessing: Preprocessing = CAFFE
    ignore_label: int = 255

    def gradient(self, scales: tuple[float, ...], loss: Loss) -> torch.Tensor:
        """Gradient of `loss(outputs, label)`, flat."""
        self.net.zero_grad(set_to_none=True)
        image = self.preprocessing.normalize(self.batch.image, self.batch.content)
        loss(MultiScale(self.net, scales)(image), self.batch.label).backward()
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])

    def entropies(self, logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy per pixel, 0 where void, and the number of valid pixels of each image."""
        target = sample_label(label, (logits.shape[2], logits.shape[3]))
        per_pixel = F.cross_entropy(logits, target, ignore_index=self.ignore_label, reduction="none")
        return per_pixel, (target != self.ignore_label).sum((1, 2))

    def mean_over_pixels(self, outputs: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Ours: the sum over all valid pixels of the step by their number, for each output on its own grid."""
        pairs = [self.entropies(logits, label) for logits in outputs.values()]
        return torch.stack([per_pixel.sum() / valid.sum() for per_pixel, valid in pairs]).sum()

    def mean_over_images(self, outputs: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Theirs: the mean of the images' own means (batch 1, iter_size 10); an image that is all void gives 0."""
        pairs = [self.entropies(logits, label) for logits in outputs.values()]
        return torch.stack([(ce.sum((1, 2)) / valid.clamp(min=1)).mean() for ce, valid in pairs]).sum()

    def zoomed_losses(self, outputs: dict[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """As `mean_over_pixels`, the 0.75 logits resized to the full grid, as the authors' prototxt has it."""
        full = outputs["scale_1"].shape[2:]
        size = (full[0], full[1])
        zoomed = F.interpolate(outputs["scale_0.75"], size=size, mode="bilinear", align_corners=True)
        return self.mean_over_pixels(outputs | {"scale_0.75": zoomed}, label)


def differences(case: Case) -> dict[str, float]:
    """{departure: relative difference of the gradient}."""
    one, three = (1.0,), (1.0, 0.75, 0.5)
    ours = case.gradient(one, case.mean_over_pixels)
    rounded = replace(case, preprocessing=CAFFE_ROUNDED)
    ours_msc = case.gradient(three, case.mean_over_pixels)
    return {
        "average of images instead of pixels": _relative(case.gradient(one, case.mean_over_images), ours),
        "rounded mean colour": _relative(rounded.gradient(one, case.mean_over_pixels), ours),
        "0.75 loss on the full grid (three scales)": _relative(case.gradient(three, case.zoomed_losses), ours_msc),
    }


def _relative(other: torch.Tensor, ours: torch.Tensor) -> float:
    return float((other - ours).norm() / ours.norm())


def crops(data: str, *, crop_size: int, num_images: int, num_classes: int) -> Batch:
    """The crops of the first optimizer step, seed 0."""
    augmentation = Augmentation(crop_size, (0.5, 1.5), True, 255)
    dataset = TrainDataset(load_manifest(data), num_classes=num_classes, augmentation=augmentation, seed=0)
    parts = [dataset.fetch(number) for number in range(num_images)]
    image, label, content = (torch.cat([getattr(p, name) for p in parts]) for name in ("image", "label", "content"))
    return Batch(image, label, content, [key for part in parts for key in part.keys])


def build_network(weights: str | None, *, num_classes: int) -> DeepLabV2:
    """The network with the given weights, batch norm frozen; without any a random one, normalised by its own batch."""
    torch.manual_seed(0)
    if weights is None:
        return DeepLabV2("resnet101", num_classes, norm=norm_factory("local")).train()
    found = load_weights(weights)
    blocks = len({name.split(".")[2] for name in found.tensors if name.startswith("backbone.layer3.")})
    backbone = {2: "resnet_tiny", 6: "resnet50", 23: "resnet101"}[blocks]
    net = DeepLabV2(backbone, num_classes, norm=norm_factory("frozen"), **found.variant.geometry)
    fit_weights(net, found, restore_last=any(name.startswith("head.") for name in found.tensors))
    return net.train()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="manifest of the training set")
    parser.add_argument("--weights", help="what model.init takes")
    parser.add_argument("--crop-size", type=int, default=321)
    parser.add_argument("--num-images", type=int, default=10)
    arguments = parser.parse_args(argv)
    num_classes = load_manifest(arguments.data).num_classes
    batch = crops(
        arguments.data, crop_size=arguments.crop_size, num_images=arguments.num_images, num_classes=num_classes
    )
    case = Case(build_network(arguments.weights, num_classes=num_classes), batch)
    for name, value in differences(case).items():
        print(f"{name:45} {value:.2%}")
    discrete = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5])
    print(
        f"random scale: standard deviation {1 / 12**0.5:.3f} (ours), {float(discrete.std(correction=0)):.3f} (theirs)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
