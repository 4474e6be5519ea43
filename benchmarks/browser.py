"""What does a page log, what does it ask the network for, and how does it look? Opened in headless Chromium.

Command:
    python -m benchmarks.browser PAGE.html PICTURE.png --width 390 --dark --whole
Chromium is driven over its DevTools protocol. It prints seconds, log and requests, and draws the first screen or the whole page.
`docs/pictures/report.png` is the top of a page on the digits of `adq demo`, 1,100 pixels wide.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@dataclass
class Visit:
    """What happened while a page was open.

    Attributes:
        seconds: from the start of loading until a frame was drawn after the load event.
        processor_seconds: of the page's main thread meanwhile, which other programs do not change.
        logged: what the page wrote to the console, warnings and errors of the browser included.
        requests: URLs that it asked for, itself and data: included.
        answers: values of the scripts that were run in it.
        dialogs: alerts that it opened.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    logged: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def note(self, event: dict[str, Any]) -> None:
        """Keep what an event of the protocol says."""
        method, values = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.logged.append(" ".join(str(each.get("value", each)) for each in values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.logged.append(str(values["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.logged.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(values["message"])


def visit(
    page: Path,
    *scripts: str,
    width: int = 1440,
    dark: bool = False,
    javascript: bool = True,
    screenshot: Path | None = None,
    whole: bool = False,
) -> Visit:
    """Open a local page, run scripts in it one after the other, and take a picture of it.

    Args:
        page: the file.
        scripts: JavaScript expressions; promises are awaited.
        width: of the window, in CSS pixels.
        dark: whether the reader prefers dark pages.
        javascript: whether the page's own scripts run.
        screenshot: file for a PNG.
        whole: draw the whole page, not only the first screen.
    """
    return asyncio.run(_visit(page, scripts, width, dark, javascript, screenshot, whole))


async def _visit(
    page: Path,
    scripts: tuple[str, ...],
    width: int,
    dark: bool,
    javascript: bool,
    screenshot: Path | None,
    whole: bool,
) -> Visit:
    seen = Visit()
    async with _browser(seen) as call:
        await call("Performance.setTimeDomain", timeDomain="threadTicks")
        for domain in ("Page", "Runtime", "Network", "Log", "Performance"):
            await call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await call("Emulation.setDeviceMetricsOverride", **size)
        await call("Emulation.setScriptExecutionDisabled", value=not javascript)
        start = time.perf_counter()
        await call("Page.navigate", url=page.resolve().as_uri())
        state = "[document.readyState, location.protocol].join()"
        while (await call("Runtime.evaluate", expression=state))["result"].get("value") != "complete,file:":
            await asyncio.sleep(0.05)
        if javascript:
            frame = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
            await call("Runtime.evaluate", expression=frame, awaitPromise=True)
        seen.seconds = time.perf_counter() - start
        numbers = {each["name"]: each["value"] for each in (await call("Performance.getMetrics"))["metrics"]}
        seen.processor_seconds = numbers["TaskDuration"]
        for script in scripts:
            answer = await call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            seen.answers.append(answer["result"].get("value"))
            if "exceptionDetails" in answer:
                raise RuntimeError(str(answer["exceptionDetails"])[:2000])
        if screenshot is not None:
            picture = await call(
                "Page.captureScreenshot", captureBeyondViewport=whole, **(await _area(call) if whole else {})
            )
            screenshot.write_bytes(b64decode(picture["data"]))
    return seen


async def _area(call: Any) -> dict[str, Any]:
    size = (await call("Page.getLayoutMetrics"))["cssContentSize"]
    return {
        "clip": {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 15_000), "scale": 1}
    }


@contextlib.asynccontextmanager
async def _browser(seen: Visit) -> AsyncIterator[Any]:
    """A browser with one empty page; yields a function that calls a method of the protocol."""
    assert CHROMIUM is not None, "no chromium here"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [*_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            for _ in range(6000):  # a busy machine takes minutes
                if port_file.exists() and "\n" in port_file.read_text():
                    break
                await asyncio.sleep(0.05)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                pages: list[dict[str, str]] = []
                while not pages:  # the port is open before its page is
                    targets = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
                    pages = [each for each in targets if each["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield _Caller(socket, seen)
        finally:
            process.terminate()
            process.wait()


class _Caller:
    """Calls methods of the protocol over an open socket; events on the way are noted."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, seen: Visit) -> None:
        self._socket, self._seen, self._numbers = socket, seen, itertools.count(1)

    async def __call__(self, method: str, **values: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": values})
        while True:
            message = await self._socket.receive_json(timeout=300)
            if message.get("method") == "Page.javascriptDialogOpening":
                answer = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": False}}
                await self._socket.send_json(answer)
            self._seen.note(message)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("page", type=Path)
    made.add_argument("picture", type=Path)
    made.add_argument("--width", type=int, default=1440)
    for flag in ("--dark", "--whole", "--no-javascript"):
        made.add_argument(flag, action="store_true")
    args = made.parse_args()
    options = {"width": args.width, "dark": args.dark, "whole": args.whole}
    seen = visit(args.page, screenshot=args.picture, javascript=not args.no_javascript, **options)
    asked = [url for url in seen.requests if not url.startswith("data:")]
    print(f"{seen.seconds:.1f} s", *seen.logged, *asked, sep="\n")


if __name__ == "__main__":
    main()
