"""A trained network as MLflow loads and serves it: encoded images in, masks out, the preprocessing inside.

`dist_deeplab.log_model` writes the folder that this reads; MLflow calls `_load_pyfunc` on it, here or on a server that
has nothing but the code in the model. The frame that goes in has a column `image`, each cell the bytes of a JPEG or PNG
file, read as `dist_deeplab.predict` reads it (upright by its EXIF orientation); the one that comes out has a column
`mask`, each cell a palette PNG of the upright image's size, whose indices are classes (named in the model's metadata).
Over HTTP both are base64.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.data import voc
from dist_deeplab.data.decode import decode_image
from dist_deeplab.data.image_file import DecodeOptions
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.evaluation.prediction import classes_of_one
from dist_deeplab.model.weights.formats.torch_file import load_plain

if TYPE_CHECKING:
    import pandas

WEIGHTS = "network.pt"
SERVED = DecodeOptions(
    formats=("JPEG", "PNG", "WEBP"), max_pixels=50_000_000, if_too_large="send it in parts, or use dist-deeplab predict"
)
"""What strangers may send: 50 megapixels decode in at most 1.1 GB."""


class SegmentationModel:
    """A network that takes encoded images; on a GPU where there is one."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """content: what `Checkpoint.for_inference` gave."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint = Checkpoint.from_content(content)
        self.predictor = Predictor.from_checkpoint(checkpoint, checkpoint.config, self.device)

    def predict(self, model_input: "pandas.DataFrame", params: dict[str, Any] | None = None) -> "pandas.DataFrame":
        """A frame with a column `mask` for one with a column `image`.

        Raises:
            UserError: an image can't be decoded.
        """
        import pandas

        masks = [encode_mask(self.segment(decode_image(bytes(data), SERVED))) for data in model_input["image"]]
        return pandas.DataFrame({"mask": masks})

    def segment(self, image: np.ndarray) -> np.ndarray:
        """The classes, uint8 [H, W], of a uint8 RGB image [H, W, 3]."""
        return classes_of_one(self.predictor, image, self.device)


def encode_mask(mask: np.ndarray) -> bytes:
    """Class indices, uint8 [H, W], as a PNG that viewers show in VOC's colours and PIL reads as indices."""
    buffer = io.BytesIO()
    voc.save_palette_png(mask, buffer)
    return buffer.getvalue()


def _load_pyfunc(path: str) -> SegmentationModel:
    """The model in a folder; the name is MLflow's."""
    folder = Path(path)
    file = folder / WEIGHTS if folder.is_dir() else folder
    return SegmentationModel(load_plain(file))
