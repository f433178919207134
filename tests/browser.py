"""A headless Chromium to look at pages with: the few words of its DevTools protocol that a test needs."""

import itertools
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import websocket  # comes with jupyter_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One page; `problems` collects what it logs as an error or throws."""

    def __init__(self, address):
        self.socket, self.ids, self.problems = (
            websocket.create_connection(address, timeout=30),
            itertools.count(1),
            [],
        )
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **given):
        """The result of one command; events that arrive before it are read on the way."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while (said := json.loads(self.socket.recv())).get("id") != number:
            self._note(said)
        assert "error" not in said, (method, said)
        return said["result"]

    def _note(self, event):
        kind, facts = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(facts["exceptionDetails"])
        if kind == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.problems.append(facts["entry"])
        if kind == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.problems.append(facts)

    def run(self, script):
        """The value of a JavaScript expression; promises are awaited, as if a person had clicked."""
        done = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition, seconds=20):
        """Until a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.05)

    def open(self, address):
        """Load a page; the one before is left even if only the part behind # differs."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def key(self, key):
        """Press and release a key."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        for kind, words in (("keyDown", text), ("keyUp", "")):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=words, windowsVirtualKeyCode=code)


@contextmanager
def chromium(folder: Path):
    """A tab of a browser that lives as long as the block, without network."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    words += [
        "--disable-dev-shm-usage",
        "--remote-allow-origins=*",
        "--proxy-server=127.0.0.1:9",
        "about:blank",
    ]
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen([CHROMIUM, *words], **silent)
    try:
        port, until = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < until, "chromium did not start"
            time.sleep(0.05)
        with urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            (page,) = (tab for tab in json.load(answer) if tab["type"] == "page")
        yield Tab(page["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(20)
