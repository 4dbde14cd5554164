"""Headless Chromium, for tests of pages: what it shows, what it complains of, and what it asks the network for."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A page as the browser has it.

    Attributes:
        dom: its document after loading. pixels: [height, width, 3], a screenshot. console: lines of its console.
        asked: addresses that the page asked the network for.
    """

    dom: str
    pixels: np.ndarray
    console: list[str]
    asked: set[str]


def open_page(page: Path, folder: Path, *, size: tuple[int, int] = (1280, 4000), dark: bool = False) -> Opened:
    """Open a page from disk; skips the test where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium; Debian and Ubuntu have it: apt-get install -y chromium")
    words = [program, *QUIET, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    words += [f"--window-size={size[0]},{size[1]}", f"--log-net-log={folder / 'net.json'}"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []

    def run(job: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, job, page.as_uri()], capture_output=True, text=True, timeout=120, check=True, errors="replace"
        )

    dumped = run("--dump-dom")
    asked = _addresses(json.loads((folder / "net.json").read_text()))
    run(f"--screenshot={folder / 'page.png'}")
    pixels = np.asarray(Image.open(folder / "page.png").convert("RGB"))
    console = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
    return Opened(dumped.stdout, pixels, console, asked)


def _addresses(log: dict) -> set[str]:
    """What pages asked for. The browser's own requests, for its updates, have no page as their origin."""
    asked = [event["params"] for event in log["events"] if "initiator" in event.get("params", {})]
    return {request["url"] for request in asked if request["initiator"] != "not an origin"}
