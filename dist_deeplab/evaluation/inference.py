"""A checkpoint as a network that scores, predicts and is exported; and how images become logits at their own size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.config import AFFECTS, EvalConfig, RunConfig, config_from_dict, config_to_dict, load_config
from dist_deeplab.data.windows import DEFAULT_WINDOWS, Windows
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.errors import UserError, first_line
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, upsample
from dist_deeplab.model.numerics import allow_tf32, autocast, fastest_dtype
from dist_deeplab.model.preprocessing import Preprocessing


def load_network(checkpoint: Checkpoint) -> DeepLabV2:
    """A checkpoint's network in eval mode, on the CPU.

    Raises:
        UserError: its tensors are not those of its configuration's network.
    """
    norm = norm_factory("frozen")  # all modes are alike in evaluation and share their names
    config = checkpoint.config
    net = DeepLabV2(config.model.backbone, config.data.num_classes, norm=norm, **checkpoint.variant.geometry)
    try:
        net.load_state_dict(checkpoint.network)
    except RuntimeError as error:
        raise UserError(f"the tensors of {checkpoint} are not those of its network ({first_line(error)})") from None
    return net.eval()


def inference_settings(checkpoint: Checkpoint, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a checkpoint's run, with overrides of what does not belong to its weights.

    What only says where things are and how much of the machine is used (folders, sizes, processes) is not taken from
    the checkpoint, which may be a stranger's: it has its default unless overridden.

    Raises:
        UserError: an override that would have no effect on what a finished network does.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in AFFECTS and not AFFECTS[key].inference:
            raise UserError(
                f"{override!r} has no meaning here: the checkpoint fixes all but eval.*, crf.*, precision.dtype and "
                "data.num_workers"
            )
    base = config_to_dict(checkpoint.config)
    for key, mark in AFFECTS.items():
        section, _, name = key.rpartition(".")
        if mark.what in ("execution", "nothing"):
            (base[section] if section else base).pop(name)
    return load_config(None, overrides, base=config_from_dict(base, where="the checkpoint"))


def inference_name(config: EvalConfig) -> str:
    """A name for the way a network is asked, e.g. `_s0.5-0.75-1_flip_crf`; empty for one scale as trained."""
    several = config.scales != (1.0,)
    parts = [
        "s" + "-".join(f"{scale:g}" for scale in config.scales) if several else "",
        "mean" if len(config.scales) > 1 and config.fusion == "mean" else "",
        "flip" if config.flip else "",
        "" if config.align_corners else "halfpixel",
        "crf" if config.crf else "",
    ]
    return "".join(f"_{part}" for part in parts if part)


@dataclass(frozen=True)
class Predictor:
    """A network and the way it is asked: several scales, flipped horizontally or not.

    Corner-aligned (the default), images come padded to 8k+1 and are scaled to the nearest 8k+1, so that logits sit on
    pixels at every scale. The outputs are brought to the finest grid among them, fused there (max is DeepLab-v2's;
    both are of logits, not of probabilities) and resized once to the image. Flipping does all this again with the
    flipped image, and averages.

    `align_corners=False` is kazuto1011's way: images as they are, sizes floor(n s) (at least 1), half-pixel centres
    throughout.

    windows: for images that are too large to be taken whole; see `evaluation.prediction`, where images become classes.
    """

    net: DeepLabV2
    preprocessing: Preprocessing
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fusion: str = "max"
    align_corners: bool = True
    windows: Windows = DEFAULT_WINDOWS
    dtype: str = "fp32"

    @classmethod
    def build(cls, net: DeepLabV2, preprocessing: Preprocessing, config: EvalConfig, *, dtype: str) -> "Predictor":
        """The predictor of a configuration; `net` is on its device and computes in `dtype`, a `precision.dtype`."""
        windows = Windows(config.window, config.overlap)
        return cls(net, preprocessing, config.scales, config.flip, config.fusion, config.align_corners, windows, dtype)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, settings: RunConfig, device: torch.device) -> "Predictor":
        """The one way from a checkpoint to predictions, for evaluation, prediction, export and serving alike.

        It computes in the run's own `precision.dtype`, tf32 included: torch's defaults round fp32 convolutions to it.

        Args:
            checkpoint: the network, its preprocessing and classes.
            settings: how the network is asked (`inference_settings`).
            device: where it computes.

        Raises:
            UserError: see `load_network`.
        """
        chosen = settings.precision.dtype
        dtype = fastest_dtype(device) if chosen == "auto" else chosen  # auto: weights that no run of ours has trained
        allow_tf32(dtype)
        net = place_model(load_network(checkpoint), device)
        return cls.build(net, checkpoint.variant.preprocessing, settings.eval, dtype=dtype)

    @torch.inference_mode()
    def logits(self, image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, C, H, W], the padding's included (half-pixel: of the content alone).

        Args:
            image: uint8 RGB [B, 3, H, W] on the network's device; corner-aligned: H and W of 8k+1.
            content: int64 [B, 2], CPU: height and width of the part at the top left that is not padding.

        Raises:
            ValueError: half-pixel, and images of several sizes.
        """
        x = self.preprocessing.normalize(image, content)
        if not self.align_corners:
            (height, width), *others = set(map(tuple, content.tolist()))
            if others:
                raise ValueError("half-pixel resizing takes images of one size at a time")
            x = x[:, :, :height, :width]
        logits = self._fused(x)
        if self.flip:
            logits = (logits + self._fused(x.flip(3)).flip(3)) / 2
        return self._resize(logits, x.shape[2:])

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, h, w] on the grid of the largest scale."""
        fused = self._at_scale(x, max(self.scales))
        for scale in sorted(self.scales, reverse=True)[1:]:
            other = self._resize(self._at_scale(x, scale), fused.shape[2:])
            fused = torch.maximum(fused, other) if self.fusion == "max" else fused + other
        return fused if self.fusion == "max" else fused / len(self.scales)

    def _at_scale(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if scale == 1.0:
            return self._network(x)
        if not self.align_corners:
            size = tuple(math.floor(length * scale) for length in x.shape[2:])
            how = {"scale_factor": scale} if min(size) > 0 else {"size": tuple(max(1, length) for length in size)}
            return self._network(F.interpolate(x, **how, mode="bilinear", align_corners=False))
        size = nearest_grid_size(x.shape[2], scale), nearest_grid_size(x.shape[3], scale)
        return self._network(upsample(x, size))

    def _network(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.dtype, x.device):
            return self.net(x).float()

    def _resize(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        if tuple(x.shape[2:]) == tuple(size):
            return x
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=self.align_corners)


def nearest_grid_size(length: int, scale: float) -> int:
    """The 8k+1, k >= 1, nearest to the corner-aligned (n-1)s+1: how long an axis of `length` is at a scale."""
    return 8 * max(1, round((length - 1) * scale / 8)) + 1
