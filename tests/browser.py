"""A page in headless Chromium: its DOM, what it logs, what it asks the network for, and how it looks.

Chromium is driven over its debugging pipe, since `--window-size` can't be narrower than 500 pixels.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves the machine, and what asks is logged
]
LOCAL = ("file:", "data:", "blob:", "chrome:", "about:")


@dataclass(frozen=True)
class Visit:
    """What a visit to a page showed.

    Attributes:
        dom: the page as it stands after its scripts ran.
        errors: what it wrote to the console as a warning or an error, uncaught exceptions included.
        requests: addresses that it asked for, other than files.
        answer: value of the probe.
        screenshot: PNG of the whole page.
    """

    dom: str
    errors: list[str]
    requests: list[str]
    answer: Any
    screenshot: bytes


def chromium() -> str:
    """Path of the browser; skips the test where there is none, or fails where PRLHF_TEST_BROWSER=1 wants one."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("PRLHF_TEST_BROWSER") == "1":
            pytest.fail("PRLHF_TEST_BROWSER=1, but there is no `chromium` on the PATH")
        pytest.skip("no `chromium` on the PATH; install it to test the page (apt-get install chromium)")
    return found


def visit(page: Path, scratch: Path, width: int = 1280, dark: bool = False, probe: str = "null") -> Visit:
    """Opens a page in a browser of its own, with an empty profile.

    Args:
        scratch: a folder for the profile and the log of the network.
        probe: a JavaScript expression, evaluated when the page has settled; a promise is awaited.
    """
    log = scratch / "net.json"
    with _browser(scratch / "profile", log) as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            browser.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.call("Emulation.setEmulatedMedia", features=[scheme])
        browser.call("Page.navigate", url=page.absolute().as_uri())
        browser.wait_for("Page.loadEventFired")
        browser.value("new Promise(done => setTimeout(done, 300))")
        answer, dom = browser.value(probe), browser.value("document.documentElement.outerHTML")
        image = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        errors = list(_errors(browser.events))
    return Visit(dom, errors, _requests(log), answer, base64.b64decode(image))


@contextmanager
def _browser(profile: Path, log: Path) -> Iterator["_Pipe"]:
    shutil.rmtree(profile, ignore_errors=True)
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()

    def attach() -> None:
        """The browser reads from descriptor 3 and writes to 4; both may be taken by one of ours, hence the detour."""
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_in, write_out)]
        for end, number in zip(high, (3, 4), strict=True):
            os.dup2(end, number)

    # A new-tab page would ask for addresses of its own.
    command = [chromium(), *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, close_fds=False, preexec_fn=attach, **quiet)
    os.close(read_in)
    os.close(write_out)
    pipe = _Pipe(write_in, read_out)
    try:
        yield pipe
        pipe.session = None
        pipe.call("Browser.close")
        process.wait(30)  # it completes its log of the network
    finally:
        process.kill()
        process.wait()
        os.close(write_in)
        os.close(read_out)


class _Pipe:
    """Calls of the DevTools protocol, one at a time; events are kept."""

    def __init__(self, write_to: int, read_from: int, patience: float = 120):
        self.write_to, self.read_from = write_to, read_from
        self.deadline = time.monotonic() + patience
        self.session: str | None = None
        self.events: list[Mapping[str, Any]] = []
        self.calls = 0
        self.rest = b""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.calls:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def wait_for(self, event: str) -> None:
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read_from], [], [], max(0.0, self.deadline - time.monotonic()))
            more = os.read(self.read_from, 1 << 20) if ready else b""
            if not more:
                raise TimeoutError("the browser does not answer" if not ready else "the browser has ended")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return dict(json.loads(message))


def _errors(events: list[Mapping[str, Any]]) -> Iterator[str]:
    for event in events:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                yield str(params["exceptionDetails"].get("exception", params["exceptionDetails"]).get("description"))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                yield " ".join(str(said.get("value", said.get("description"))) for said in params["args"])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                yield params["entry"]["text"]


def _requests(log: Path) -> list[str]:
    """What the page asked for; what the browser asks for on its own account has no origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    asked = {e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"}
    return sorted(url for url in asked if not url.startswith(LOCAL))
