"""Pictures that evolve over the steps, as MLflow's pages show them: one chart a series, with a slider of steps."""

import tempfile
from pathlib import Path
from typing import Any

_FOLDER = "images"  # where MlflowClient.log_image puts what the slider shows
_WIDTH = 1200  # pixels of the copy that pages show


class ImageSeries:
    """The pictures of a run. `log_image` gives each call's files a random name; here nothing is sent twice."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: set[str] | None = None
        self._enlarged: set[str] = set()

    def send(self, path: Path, series: str, step: int, time_ms: int) -> None:
        """Send one picture of a series, with a cover at step 0: there the slider stands when a page is opened."""
        from PIL import Image

        with Image.open(path) as file:
            picture = file.convert("RGB")
        if step > 0 and not self._is_sent(_stem(series, 0)):
            self._send(_cover(picture, step), series, 0, time_ms)
        self._send(picture, series, step, time_ms)

    def _send(self, picture: Any, series: str, step: int, time_ms: int) -> None:
        """Send a picture once, readable: `log_image` makes the copy that pages show 256 pixels wide."""
        stem = _stem(series, step)
        if not self._is_sent(stem):
            self._client.log_image(self._run_id, picture, key=series, step=step, timestamp=time_ms)
            self._known = None
        for name in self._names():
            if name.startswith(stem) and name.endswith(".webp") and name not in self._enlarged:
                with tempfile.TemporaryDirectory() as folder:
                    copy = picture.copy()
                    copy.thumbnail((_WIDTH, 4 * _WIDTH))
                    copy.save(Path(folder) / name, "WEBP", quality=90)
                    self._client.log_artifact(self._run_id, str(Path(folder) / name), _FOLDER)
                self._enlarged.add(name)

    def _is_sent(self, stem: str) -> bool:
        return any(name.startswith(stem) and name.endswith(".webp") for name in self._names())  # the last to be written

    def _names(self) -> set[str]:
        if self._known is None:
            self._known = {Path(item.path).name for item in self._client.list_artifacts(self._run_id, _FOLDER)}
        return self._known


def _stem(series: str, step: int) -> str:
    """Return how `log_image` begins the names of a picture's files."""
    return f"{series.replace('/', '~')}+step+{step}+"


def _cover(picture: Any, first_step: int) -> Any:
    """Return the first picture of a series, pale, and words that say where the pictures are."""
    from PIL import Image, ImageDraw

    cover = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.8)
    text = f"no picture of step 0: move the slider (the first is of step {first_step})"
    middle = (cover.width / 2, cover.height / 2)
    ImageDraw.Draw(cover).text(middle, text, fill="black", anchor="mm", font_size=max(12, cover.width // 36))
    return cover
