"""A headless Chromium for the tests that look at pages; it is driven by Playwright."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
# What a tab does within this many milliseconds, or the test fails.
PATIENCE = 120_000


class Heard(NamedTuple):
    """What a tab told: errors on its console, and the addresses that it asked for."""

    errors: list[str]
    addresses: list[str]

    def outside(self, home: str) -> list[str]:
        """List the addresses that begin neither with `home` nor hold their data themselves."""
        return [a for a in self.addresses if not a.startswith((home, "data:", "blob:"))]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser; skip the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def tab(browser: Any, width: int = 1200, scheme: str = "light") -> Iterator[tuple[Any, Heard]]:
    """Open an empty tab that nobody else shares cookies with -> (the page, what it tells)."""
    context = browser.new_context(
        viewport={"width": width, "height": 1000}, color_scheme=scheme, accept_downloads=True
    )
    context.set_default_timeout(PATIENCE)
    page, heard = context.new_page(), Heard([], [])
    page.on("console", lambda m: heard.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: heard.errors.append(str(error)))
    page.on("request", lambda request: heard.addresses.append(request.url))
    try:
        yield page, heard
    finally:
        context.close()


def until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true.

    Playwright's own wait_for_function needs eval, which a page may forbid.
    """
    for _ in range(PATIENCE // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(
        f"{expression} did not become true; the page says: {page.inner_text('body')}"
    )


def overflow(page: Any) -> int:
    """Tell by how many pixels a page is wider than its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
