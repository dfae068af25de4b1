"""The files of predictions: which there are, which exist already, and how they are written."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dist_deeplab.data import voc
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation import drawing
from dist_deeplab.evaluation.images import Source
from dist_deeplab.evaluation.prediction import Prediction
from dist_deeplab.files import replace_file

EXTRAS = {"overlay": ".jpg", "side_by_side": ".jpg", "probabilities": ".npz"}
"""What there can be beside the mask: the folder's name, and the files' suffix."""

_JPEG_QUALITY = 92


@dataclass(frozen=True)
class ResultFiles:
    """Where results go: masks to `masks`/<name>.png, each kind of extra to `out`/<kind>/<name>.<suffix>."""

    out: Path
    masks: Path
    extras: Sequence[str]
    class_names: Sequence[str]

    def of(self, source: Source) -> dict[str, Path]:
        """{kind: file} of an image's results."""
        files = {"mask": self.masks / f"{source.name}.png"}
        return files | {kind: self.out / kind / f"{source.name}{EXTRAS[kind]}" for kind in self.extras}

    def wanted(self, sources: Sequence[Source], *, overwrite: bool, skip_existing: bool) -> list[Source]:
        """The images to predict: all, or with `skip_existing` those that lack a result.

        Raises:
            UserError: results are there, and may neither be replaced nor left.
        """
        if overwrite:
            return list(sources)
        existing = [file for source in sources for file in self.of(source).values() if file.exists()]
        if existing and not skip_existing:
            raise UserError(
                f"{len(existing)} of the results are there already, e.g. {existing[0]}; --overwrite replaces them, "
                "--skip-existing does the missing ones"
            )
        return [source for source in sources if not all(file.exists() for file in self.of(source).values())]

    def write(self, done: Prediction) -> None:
        """Write the results of one image, each file in one rename."""
        for kind, file in self.of(done.source).items():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, functools.partial(self._fill, kind=kind, done=done), durable=False)

    def _fill(self, target: Path, *, kind: str, done: Prediction) -> None:
        pred = done.pred
        if kind == "mask":
            voc.save_palette_png(pred, target)
        elif kind == "overlay":
            shot = Image.fromarray(drawing.overlay(done.image, pred, self.class_names))
            shot.save(target, format="JPEG", quality=_JPEG_QUALITY)
        elif kind == "side_by_side":
            shot = drawing.side_by_side(done.image, pred, self.class_names)
            shot.save(target, format="JPEG", quality=_JPEG_QUALITY)
        else:
            with target.open("wb") as file:  # a path without .npz would get one
                np.savez_compressed(file, prob=done.prob.astype(np.float16), class_names=np.array(self.class_names))
