"""A headless Chromium, spoken to over a pipe in the DevTools protocol.

Polling in real time is needed because a page's videos are decoded in real time;
`--virtual-time-budget` may end before they are.
"""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import time


def find() -> str | None:
    """Returns the browser's path; None where there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a headless browser; a context manager.

    Attributes:
      complaints: console warnings and errors, exceptions and log entries so far.
    """

    def __init__(self, profile: pathlib.Path, size: tuple[int, int] = (1200, 2400)):
        self.complaints: list[str] = []
        self._number, self._buffer = 0, b""
        self._profile, self._size = profile, size

    def __enter__(self) -> "Browser":
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        # Far from 3 and 4, where the browser expects them.
        low = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_read, theirs_write)]
        command = [
            "bash", "-c", f'exec "$@" 3<&{low[0]} 4>&{low[1]}', "_", find(),
            "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--disable-background-networking", f"--user-data-dir={self._profile}",
            "--window-size={},{}".format(*self._size), "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=low, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (*low, theirs_read, theirs_write):
            os.close(fd)
        self._read, self._write = ours_read, ours_write
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters) -> dict:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(timeout=60)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression in the page."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        return result["result"].get("value")

    def wait_for(self, expression: str, value, seconds: float = 60):
        """Polls until the expression has the value; returns what it had last."""
        end = time.monotonic() + seconds
        while True:
            found = self.evaluate(expression)
            if found == value or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def screenshot(self, path: pathlib.Path, *, dark: bool = False) -> None:
        """Writes the whole page as PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self, timeout: float) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], timeout)[0]:
                raise TimeoutError("the browser does not answer")
            received = os.read(self._read, 1 << 20)
            if not received:
                raise RuntimeError("the browser has ended")
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, method: str | None, parameters: dict) -> None:
        if method == "Runtime.consoleAPICalled":
            if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
