"""A headless Chromium, controlled over its debugging protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Page:
    """One tab."""

    def __init__(self, socket):
        self._socket, self._sent = socket, 0

    def call(self, method: str, **params):
        """Sends a command of the protocol and returns its result."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while (reply := json.loads(self._socket.recv(timeout=30))).get("id") != self._sent:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def value(self, script: str):
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Waits for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.05)

    def screenshot(self, file: Path) -> None:
        """A PNG of the visible page."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def opened(url: str, width: int = 900, height: int = 800):
    """A tab with a page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"]
        flags += [f"--user-data-dir={home}", "--remote-debugging-port=0", "--hide-scrollbars"]
        process = subprocess.Popen(
            [BROWSER, *flags, f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_tab(Path(home) / "DevToolsActivePort"), max_size=None) as socket:
                page = Page(socket)
                page.call("Page.navigate", url=url)
                page.until(f"location.href.startsWith({url!r}) && document.readyState=='complete'")
                yield page
        finally:
            process.terminate()
            process.wait(30)


def _tab(file: Path) -> str:
    """The debugging address of the first tab; waits until the browser listens."""
    end = time.monotonic() + 60
    while not file.exists() or len(file.read_text().split()) < 2:
        assert time.monotonic() < end, "the browser did not start"
        time.sleep(0.05)
    port = file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
        tabs = json.loads(reply.read())
    return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
