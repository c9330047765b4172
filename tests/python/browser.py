"""Debian's Chromium, driven by Playwright: pages from files, and what they ask for."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Starts the browser, without a window."""
    from playwright.sync_api import sync_playwright

    # Chromium has no sandbox for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield found
        finally:
            found.close()


class OpenPage:
    """A page that is open, and everything that must not happen in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, height: int = 900, **options: Any) -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.faults: list[str] = []
        """Errors, messages and requests other than the one for the page."""
        self.page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.faults.append("dialog"), dialog.dismiss()))
        self.page.on("requestfailed", lambda request: self.faults.append(f"{request.failure}: {request.url}"))
        self.page.on("request", lambda request: self._record(request.url, path))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("#table-body > *")

    def _record(self, url: str, path: Path) -> None:
        if url != path.resolve().as_uri():
            self.faults.append(f"request: {url}")

    def names(self) -> list[str]:
        """Returns the names in the rows of the table that are in the document."""
        return self.page.locator("#table-body .row bdi").all_inner_texts()

    def crumbs(self) -> list[str]:
        return self.page.locator("#crumbs li").all_inner_texts()

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def close(self) -> None:
        self.page.context.close()
