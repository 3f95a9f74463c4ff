"""The studio in real Chromium.

SCREENSHOTS=docs/images writes the picture of the docs; with OMP_WAIT_POLICY=PASSIVE, which the
command line sets, its seconds are those that a user sees.
"""

import json
import re
import shutil

import pytest
from tests.browser import chromium, save_screenshot

from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.studio.page import build_studio, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tiny_wan, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    model = tmp_path_factory.mktemp("studio") / "model"
    shutil.copytree(tiny_wan, model)
    sizes = {"height": 144, "width": 176, "frames": 5, "steps": 4}
    (model / "defaults.json").write_text(json.dumps(sizes))
    pipeline = load_pipeline(model, device="cpu", dtype="float32")
    page = build_studio([str(model)], lambda name, lora: pipeline)
    yield launch(page, "127.0.0.1", 0)
    page.close()


@pytest.fixture(scope="module")
def builtin_address():
    pytest.importorskip("gradio", reason="gradio is not installed")
    page = build_studio(["builtin"], lambda name, lora: load_pipeline(name, lora=lora), ["builtin"])
    yield launch(page, "127.0.0.1", 0)
    page.close()


def open_sizes(page):
    """Open the accordion of sizes; a click before the page is alive is lost."""
    for _ in range(60):
        if page.get_by_label("Height", exact=True).is_visible():
            return
        page.get_by_text("Size and seed").click()
        page.wait_for_timeout(1000)
    raise AssertionError("the sizes cannot be opened")


def test_controls_write_the_algorithm(address):
    with chromium() as browser:
        page = browser.new_context().new_page()
        page.goto(address)
        text = page.get_by_label("Algorithm")
        page.get_by_label("Block, in tokens").click()
        page.get_by_role("option", name="4-4-4").click()
        page.wait_for_function(
            "box => box.value.endsWith('block-4-4-4')", arg=text.element_handle()
        )


def test_a_pair_is_made_and_its_viewer_works(builtin_address):
    address = builtin_address
    with chromium() as browser:
        requests = []
        page = browser.new_context(viewport={"width": 1366, "height": 900}).new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        # As the page opens: the first example.
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector("iframe[title='What attention kept']", timeout=300_000)
        page.get_by_text("of the token pairs").wait_for()
        assert page.locator("video").count() == 2
        inner = page.frame_locator("iframe[title='What attention kept']")
        inner.locator("#frames canvas").first.wait_for()
        assert "attends" in inner.locator("#status").inner_text()
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        save_screenshot(page, "studio.png")
        outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        assert [url for url in outside if "127.0.0.1" not in url and "about:" not in url] == []


def test_an_error_is_a_message(address):
    with chromium() as browser:
        page = browser.new_context().new_page()
        page.goto(address)
        open_sizes(page)
        page.get_by_label("Height", exact=True).fill("65")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("height 65 does not fit").wait_for(timeout=60_000)


def test_cancel_stops(address):
    with chromium() as browser:
        page = browser.new_context().new_page()
        page.goto(address)
        open_sizes(page)
        page.get_by_label("Frames", exact=True).fill("13")
        # Enough of them that a fast machine is still at it.
        page.get_by_label("Steps").first.fill("100")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(re.compile(r"step \d+ of 100")).first.wait_for(timeout=60_000)
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled.").wait_for(timeout=60_000)
        page.wait_for_timeout(1500)
        assert page.locator("iframe").count() == 0
