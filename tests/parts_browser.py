"""A page in a real browser without a window; a test that needs one is skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def open_page(**options: Any) -> Iterator[Any]:
    """A new page of the system's Chromium; `options` are those of playwright's `Browser.new_page`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser.new_page(**{"viewport": {"width": 1100, "height": 900}} | options)
        finally:
            browser.close()
