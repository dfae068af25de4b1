"""A headless Chromium that opens pages, says what is on them and takes screenshots.

It is driven by the DevTools protocol over a pipe (JSON messages ended by NUL on file descriptors 3 and 4), which needs
neither a library nor a port.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ANSWER_TIMEOUT_S = 60.0
PAGE_TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


def _high_pipe() -> tuple[int, int]:
    """The reading and the writing end of a pipe, with numbers that nothing else is moved to."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Browser:
    """One tab; use as a context manager."""

    def __init__(self, *, width: int = 1500, height: int = 1100) -> None:
        program = find_chromium()
        assert program is not None
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = _high_pipe()
        self._read, from_browser = _high_pipe()
        flags = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-first-run"),
            *("--remote-debugging-pipe", f"--user-data-dir={self.profile}", f"--window-size={width},{height}"),
        ]
        # The shell moves the pipes to the descriptors that Chromium expects.
        move = f'exec "$@" 3<&{to_browser} 4>&{from_browser} {to_browser}<&- {from_browser}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", move, "bash", program, *flags, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": self.profile},
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._count = 0
        self._session = ""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result; what happens meanwhile is not listened to."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0], "Chromium is silent"
            data = os.read(self._read, 2**20)
            assert data, "Chromium has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, *texts: str) -> str:
        """Open a page, wait until it shows all of `texts`, and return what it shows."""
        self.call("Page.navigate", url="about:blank")  # a change of the fragment alone would load nothing
        self.call("Page.navigate", url=url)
        return self.wait_for_text(lambda text: all(each in text for each in texts), texts)

    def text(self) -> str:
        """The text that the page shows."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for_text(self, condition: Callable[[str], bool], what: object) -> str:
        """What the page shows once it meets a condition."""
        self.wait_for(lambda: condition(self.text()), what)
        return self.text()

    def wait_for(self, condition: Callable[[], Any], what: object) -> Any:
        """The first true value of a condition."""
        deadline = time.monotonic() + PAGE_TIMEOUT_S
        while True:
            value = condition()
            if value:
                return value
            assert time.monotonic() < deadline, f"the page never showed {what}: {self.text()[:3000]}"
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))

    def type_into(self, selector: str, text: str) -> None:
        """Type into the input that a CSS selector finds, once it is there."""
        self.wait_for(lambda: self.evaluate(f"document.querySelector({json.dumps(selector)}) !== null"), selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key (a DOM name of one of the arrow keys) on what has the focus."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])
