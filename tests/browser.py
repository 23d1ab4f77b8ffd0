"""A Chromium without a window, driven as a person would drive it: real mouse and key events, and screenshots.

It speaks the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) over two pipes
(`--remote-debugging-pipe`): each message is JSON that ends with a zero byte. That takes no network and no package.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Give the process the pipes as file descriptors 3 and 4, by way of numbers that cannot be those.
START = "import os,sys;r,w=(os.dup(int(a))for a in sys.argv[1:3]);r,w=os.dup2(r,98),os.dup2(w,99);os.dup2(r,3);os.dup2(w,4);os.execvp(sys.argv[3],sys.argv[3:])"  # noqa: E501


def find_chromium() -> str:
    """The path of a Chromium; skips the test where there is none."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path or os.name == "nt":
        pytest.skip("no Chromium on this machine (apt-get install chromium, or CHROMIUM=/path/to/it)")
    return path


class Browser:
    """A Chromium with one tab. `with Browser(folder) as browser`; `folder` holds its profile and its downloads."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        self.folder, self._numbers, self._buffer, self.messages = folder, itertools.count(1), b"", []
        inner_in, self._write = os.pipe()
        self._read, inner_out = os.pipe()
        command = [
            find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--mute-audio",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
            f"--user-data-dir={folder / 'profile'}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(inner_in), str(inner_out), *command],
            pass_fds=(inner_in, inner_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inner_in)
        os.close(inner_out)
        self.session = None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._read)
        os.close(self._write)

    # ----------------------------------------------------------------------------------------------------- messages
    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(60)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next message; what the page or the browser says by itself is kept in `messages`."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        text, self._buffer = self._buffer.split(b"\0", 1)
        answer = json.loads(text)
        if "method" in answer:
            self.messages.append(answer)
        return answer

    def problems(self) -> list[str]:
        """Exceptions of the page's script, and errors that the browser logs (refused scripts or connections, too)."""
        self.run("0")  # what was said until now has arrived
        kinds = {"Runtime.exceptionThrown": "exceptionDetails", "Log.entryAdded": "entry"}
        found = [m["params"][kinds[m["method"]]] for m in self.messages if m["method"] in kinds]
        return [json.dumps(f)[:600] for f in found if f.get("level", "error") == "error"]

    def requests(self) -> list[str]:
        """The addresses that the page has asked for."""
        sent = [m["params"]["request"]["url"] for m in self.messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    # ------------------------------------------------------------------------------------------------------- the page
    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def scheme(self, scheme: str) -> None:
        """Prefer "light" or "dark" colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page (of a promise, what it gives)."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < end, f"not so after {seconds} s: {condition}"
            time.sleep(0.03)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height in the window of the first element that fits a CSS selector, scrolled to."""
        script = f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{ block: "center", behavior: "instant" }});
            const b = e.getBoundingClientRect();
            return [b.left, b.top, b.width, b.height];
        }})()"""
        return tuple(self.run(script))

    # ------------------------------------------------------------------------------------------------- mouse and keys
    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move it over the others, and let go at the last one."""
        held = dict(button="left", buttons=1)
        self.mouse("mouseMoved", *points[0])
        self.mouse("mousePressed", *points[0], clickCount=1, **held)
        for point in points[1:]:
            self.mouse("mouseMoved", *point, **held)
        self.mouse("mouseReleased", *points[-1], clickCount=1, button="left")

    def click(self, selector: str) -> None:
        left, top, width, height = self.box(selector)
        self.drag((left + width / 2, top + height / 2))

    def key(self, key: str, code: str = "", modifiers: int = 0, text: str = "") -> None:
        """Press and release a key. modifiers: 1 Alt, 2 Control, 8 Shift."""
        numbers = {
            "Enter": 13,
            "Escape": 27,
            "Tab": 9,
            " ": 32,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        number = numbers.get(key, ord(key.upper()[0]) if len(key) == 1 else 0)
        same = dict(key=key, code=code, modifiers=modifiers, windowsVirtualKeyCode=number)
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **same)
        self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what the window shows, or with `whole` the page in its full height, as PNG."""
        more = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            more = dict(
                captureBeyondViewport=True, clip=dict(x=0, y=0, width=size["width"], height=size["height"], scale=1)
            )
        shot = self.send("Page.captureScreenshot", format="png", **more)
        path.write_bytes(base64.b64decode(shot["data"]))
