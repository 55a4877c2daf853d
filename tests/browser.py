"""Debian's Chromium, driven by Playwright, for tests of the report. The tests are skipped where either is missing."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """The path of the browser; skips the test if it or Playwright is missing."""
    pytest.importorskip("playwright", reason="the browser tests need playwright: pip install '.[dev]'")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("the browser tests need Chromium: apt-get install chromium, or set CHROMIUM to its path")
    return path


class Visit:
    """A page and what went wrong on it: errors, messages on the console, and requests outside of its folder."""

    def __init__(self, browser: Any, file: Path, width: int, height: int, scheme: str) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self._folder = file.parent.resolve()
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(file.resolve().as_uri())

    def wait_until(self, condition: str, seconds: float = 30) -> None:
        """Wait until a condition in JavaScript holds. The page's policy forbids Playwright's own wait_for_function."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            self.page.wait_for_timeout(50)

    def _note(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "data":
            return
        self.requests.append(url)
        inside = parts.scheme == "file" and Path(unquote(parts.path)).is_relative_to(self._folder)
        if not inside:
            self.faults.append(f"leaves the page: {url}")


@contextmanager
def visiting(file: Path, width: int = 1400, height: int = 900, scheme: str = "light") -> Iterator[Visit]:
    """Open ``file`` in a window of this size."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=options)
        try:
            yield Visit(browser, file, width, height, scheme)
        finally:
            browser.close()
