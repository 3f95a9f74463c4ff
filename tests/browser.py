"""Headless Chromium for tests; skipped, with the reason, where it is missing."""

import shutil
from contextlib import contextmanager

import pytest

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium():
    """A Playwright browser on Debian's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address, *, dark=False, width=1280, height=800):
    """A page whose script errors fail the test when it is closed; returns (page, errors)."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda text: errors.append(text.text) if text.type == "error" else None)
    page.goto(address)
    return page, errors


def save_screenshot(page, name):
    """Write a picture of the docs, where SCREENSHOTS names their folder."""
    import os
    from pathlib import Path

    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / name))
