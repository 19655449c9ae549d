"""Chromium, and a profile in which no script may fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.requirements import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

GUARD_S = 60.0
"""The longest wait. It says nothing about speed, as the machine may be busy."""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # or each pulsing dot is painted 60 times a second
]


@contextmanager
def launched(**options: Any) -> Iterator[Browser]:
    """A browser, with options of Playwright's `launch`.

    While it is open, Playwright's event loop runs in this thread, and no other can.
    """
    from playwright.sync_api import sync_playwright  # slow to import

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing("Chromium is not installed (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, **options)
        yield browser
        browser.close()


@contextmanager
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """A new profile, so a new user. Fails if a script of a page failed."""
    context = browser.new_context()
    context.set_default_timeout(GUARD_S * 1000)
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert errors == []
