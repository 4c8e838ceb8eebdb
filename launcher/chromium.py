"""A headless Chromium, driven over its DevTools protocol.

Messages are JSON, each ended by a zero byte, over two pipes (`--remote-debugging-pipe`, Chromium's
file descriptors 3 and 4). So neither a driver program nor a websocket library is needed.
Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Self

from selfdistill.data.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root, in a container say, it does not start without; own pages only
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)

# Becomes Chromium, with the pipes at 3 and 4. Copies first: a pipe may stand at the other's place.
STARTER = """
import os, sys
pipes = [os.dup(int(fd)) for fd in sys.argv[1:3]]
while min(pipes) < 5:
    pipes = [os.dup(fd) for fd in pipes]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One page of a Chromium of its own, with an empty profile; close it, or use `with`.

    Args:
        width: of the window in CSS pixels.
        height: of the window in CSS pixels.
        timeout: seconds until a call is given up.

    Raises:
        UserError: there is no Chromium on PATH.
    """

    def __init__(self, width: int = 1400, height: int = 1000, timeout: float = 60.0) -> None:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            raise UserError(
                "no Chromium on PATH: `make chromium` installs it on Debian and Ubuntu; elsewhere "
                "install your system's package 'chromium'"
            )
        self.timeout = timeout
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        starter = [sys.executable, "-I", "-S", "-c", STARTER, str(its_in), str(its_out)]
        self._process = subprocess.Popen(
            [*starter, program, *FLAGS, f"--user-data-dir={self._profile}"],
            pass_fds=(its_in, its_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its own group, so that all of its processes can be ended
        )
        os.close(its_in)
        os.close(its_out)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result.

        Raises:
            RuntimeError: Chromium refused, ended, or did not answer in time.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except BrokenPipeError:
            raise RuntimeError(f"{method}: Chromium ended") from None
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._number:
                break  # anything else is an event that nobody waits for
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def resize(self, width: int, height: int) -> None:
        """Gives the window another size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        """Goes to an address; returns before the page has loaded."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression (a promise is awaited), as JSON carries it.

        Raises:
            RuntimeError: the expression threw.
        """
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """Ends Chromium with all of its processes, and removes its profile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._in, self._out):
            with contextlib.suppress(OSError):
                os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, deadline: float, method: str) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"{method}: Chromium gave no answer in {self.timeout} s")
                data = os.read(self._in, 1 << 20)
                if not data:
                    raise RuntimeError(f"{method}: Chromium ended")
                self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer
