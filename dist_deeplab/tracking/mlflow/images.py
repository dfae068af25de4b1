"""Images over the steps, as MLflow's pages show them: one chart per series, with a slider of steps.

The pages find them by their names in the folder `images`: `<series>+step+<step>+timestamp+<ms>+<uuid>.png`, and the
copy that is shown, `...+compressed.webp`. `MlflowClient.log_image` writes such files too, but makes that copy 256 px
wide and gives each call's files a new name.
"""

import logging
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

log = logging.getLogger("mlflow_uploader")

_FOLDER = "images"
_MAX_NAME = 100  # characters of a series; a file's name has at most 255
_WIDTH = 1200  # pixels of the copy that pages show
_TAG = "mlflow.loggedImages"  # pages look for images where a run has it


class ImageSeries:
    """The images of a run: each (series, step) is sent once, as two files in two requests."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._sent: set[str] | None = None

    def send(self, path: Path, series: str, step: int, time_ms: int) -> None:
        """Send a PNG of a series, with a cover at step 0, where the slider is when a page is opened."""
        from PIL import Image

        try:
            with Image.open(path, formats=["PNG"]) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            log.warning("%s can't be shown (%s); MLflow does without it", path, error)
            return
        if step > 0 and _stem(series, 0) not in self._known():
            self._send(_cover(image, step), series, 0, time_ms)
        if _stem(series, step) not in self._known():
            self._send(image, series, step, time_ms)

    def _send(self, image: Any, series: str, step: int, time_ms: int) -> None:
        stem = _stem(series, step)
        copy = image.copy()
        copy.thumbnail((_WIDTH, 4 * _WIDTH))
        with tempfile.TemporaryDirectory() as folder:
            name = Path(folder) / f"{stem}timestamp+{time_ms}+{uuid.uuid5(uuid.NAMESPACE_OID, stem)}"
            image.save(f"{name}.png")
            copy.save(f"{name}+compressed.webp", quality=90)
            self._client.log_artifact(self._run_id, f"{name}.png", _FOLDER)
            self._client.log_artifact(self._run_id, f"{name}+compressed.webp", _FOLDER)  # last: see `_known`
        self._known().add(stem)

    def _known(self) -> set[str]:
        """Stems of what is there already; asks the store once, and marks the run as one with images."""
        if self._sent is None:
            names = [Path(item.path).name for item in self._client.list_artifacts(self._run_id, _FOLDER)]
            self._client.set_tag(self._run_id, _TAG, "True")
            self._sent = {name.partition("timestamp+")[0] for name in names if name.endswith(".webp")}
        return self._sent


def _stem(series: str, step: int) -> str:
    """How the names of an image's files begin."""
    name = re.sub(r"[^\w.~ -]", "_", series.replace("/", "~"))[:_MAX_NAME]
    return f"{name}+step+{step}+"


def _cover(image: Any, first_step: int) -> Any:
    """The first image of a series, pale, and words that say where the images are."""
    from PIL import Image, ImageDraw

    cover = Image.blend(image, Image.new("RGB", image.size, "white"), 0.8)
    text = f"no image of step 0: move the slider (the first is of step {first_step})"
    middle = (cover.width / 2, cover.height / 2)
    ImageDraw.Draw(cover).text(middle, text, fill="black", anchor="mm", font_size=max(12, cover.width // 36))
    return cover
