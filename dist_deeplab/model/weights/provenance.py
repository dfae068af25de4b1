"""Public files that were trained on VOC 2012 val: their scores on val do not count."""

import re
from dataclasses import replace

from dist_deeplab.model.weights.variant import Variant, Weights

_TRAINED_ON_VAL = (
    # `run_pascal.sh` of the authors: "Training #2 (finetune on trainval_aug)" writes train2_iter_*.caffemodel.
    (r"train2_iter_\d+\.caffemodel", "the authors' model finetuned on trainval_aug"),
    # DrSleep/tensorflow-deeplab-resnet, issue 169: "the released model by DeepLab was pre-trained on trainval".
    (r"deeplab_resnet\.(ckpt|npy).*", "converted from the authors' model finetuned on trainval_aug"),
    # kazuto1011/deeplab-pytorch, README: generated from train2_iter_20000.caffemodel. Not the release ...-20000.pth.
    (r"deeplabv2_resnet101_(msc-vocaug|VOC2012)\.pth", "converted from the authors' model finetuned on trainval_aug"),
)
"""File names. None of these files has a published digest, so that a renamed one is not recognised; a .caffemodel tells
the list of its training images itself."""


def with_provenance(weights: Weights, name: str) -> Weights:
    """The weights, marked if the file is one that is known to be trained on VOC val."""
    for pattern, reason in _TRAINED_ON_VAL:
        if re.fullmatch(pattern, name):
            return marked(weights, f"{name}: {reason}")
    return weights


def marked(weights: Weights, reason: str) -> Weights:
    """The weights with the note that they were trained on VOC val."""
    if weights.variant.note:
        return weights
    note = f"trained on VOC 2012 val too ({reason}), so a score on val is not a validation score"
    variant: Variant = replace(weights.variant, note=note)
    return replace(weights, variant=variant)
