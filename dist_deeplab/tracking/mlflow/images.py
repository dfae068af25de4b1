"""Pictures that evolve over the steps, as MLflow's pages show them: one chart a series, with a slider of steps.

The pages find them by their names in the folder `images`: `<series>+step+<step>+timestamp+<ms>+<uuid>.png`, and the
copy that is shown, `...+compressed.webp`. `MlflowClient.log_image` writes such files too, but makes that copy 256 px
wide and gives each call's files a new name.
"""

import tempfile
import uuid
from pathlib import Path
from typing import Any

_FOLDER = "images"
_WIDTH = 1200  # pixels of the copy that pages show
_TAG = "mlflow.loggedImages"  # pages look for pictures where a run has it


class ImageSeries:
    """The pictures of a run: each (series, step) is sent once, as two files in two requests."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._sent: set[str] | None = None

    def send(self, path: Path, series: str, step: int, time_ms: int) -> None:
        """Send one picture of a series, with a cover at step 0: there the slider stands when a page is opened."""
        from PIL import Image

        with Image.open(path) as file:
            picture = file.convert("RGB")
        if step > 0 and _stem(series, 0) not in self._known():
            self._send(_cover(picture, step), series, 0, time_ms)
        if _stem(series, step) not in self._known():
            self._send(picture, series, step, time_ms)

    def _send(self, picture: Any, series: str, step: int, time_ms: int) -> None:
        stem = _stem(series, step)
        copy = picture.copy()
        copy.thumbnail((_WIDTH, 4 * _WIDTH))
        with tempfile.TemporaryDirectory() as folder:
            name = Path(folder) / f"{stem}timestamp+{time_ms}+{uuid.uuid5(uuid.NAMESPACE_OID, stem)}"
            picture.save(f"{name}.png")
            copy.save(f"{name}+compressed.webp", quality=90)
            self._client.log_artifact(self._run_id, f"{name}.png", _FOLDER)
            self._client.log_artifact(self._run_id, f"{name}+compressed.webp", _FOLDER)  # last: see `_known`
        self._known().add(stem)

    def _known(self) -> set[str]:
        """Return the stems of what is there already; asks the store once, and marks the run as one with pictures."""
        if self._sent is None:
            names = [Path(item.path).name for item in self._client.list_artifacts(self._run_id, _FOLDER)]
            self._client.set_tag(self._run_id, _TAG, "True")
            self._sent = {name.partition("timestamp+")[0] for name in names if name.endswith(".webp")}
        return self._sent


def _stem(series: str, step: int) -> str:
    """Return how the names of a picture's files begin."""
    return f"{series.replace('/', '~')}+step+{step}+"


def _cover(picture: Any, first_step: int) -> Any:
    """Return the first picture of a series, pale, and words that say where the pictures are."""
    from PIL import Image, ImageDraw

    cover = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.8)
    text = f"no picture of step 0: move the slider (the first is of step {first_step})"
    middle = (cover.width / 2, cover.height / 2)
    ImageDraw.Draw(cover).text(middle, text, fill="black", anchor="mm", font_size=max(12, cover.width // 36))
    return cover
