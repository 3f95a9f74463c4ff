"""The viewer in real Chromium. SCREENSHOTS=docs/images writes the pictures of the docs."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.browser import chromium, open_page, save_screenshot
from tests.viz.view_helpers import make_frames, make_maps, make_record
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.record import RunRecord
from nabla_attn.viz.view import write_view

pytestmark = pytest.mark.slow

# A block is lit where nothing dark lies over its middle.
LIT = """() => {
  const [, rows, columns] = data.blocks, lit = [];
  document.querySelectorAll("#frames canvas").forEach((canvas, time) => {
    const context = canvas.getContext("2d");
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const [x, y, w, h] = box(row, column, canvas.width, canvas.height);
      const alpha = context.getImageData(x + w / 2, y + h / 2, 1, 1).data[3];
      if (alpha === 0) lit.push((time * rows + row) * columns + column);
    }
  });
  return lit;
}"""


@pytest.fixture(scope="module")
def maps():
    return make_maps()


@pytest.fixture(scope="module")
def address(maps, tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "view.html"
    write_view(path, make_frames(), maps, make_record())
    return path.as_uri()


def ready(browser, address, **options):
    page, errors = open_page(browser, address, **options)
    page.wait_for_selector("body[data-ready]")
    return page, errors


def click_block(page, maps, block):
    """Click the middle of a block's tokens."""
    _, rows, columns = maps.blocks
    time, rest = divmod(block, rows * columns)
    row, column = divmod(rest, columns)
    canvas = page.locator("#frames canvas").nth(time)
    canvas.scroll_into_view_if_needed()
    size = canvas.bounding_box()
    middles = [
        (index * 8 + min((index + 1) * 8, tokens)) / 2 / tokens
        for index, tokens in ((column, maps.grid[2]), (row, maps.grid[1]))
    ]
    canvas.click(position={"x": middles[0] * size["width"], "y": middles[1] * size["height"]})


def set_slider(page, name, value):
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        value,
    )


def test_clicking_a_block_lights_exactly_the_recorded_blocks(maps, address):
    rng = random.Random(0)
    with chromium() as browser:
        page, errors = ready(browser, address)
        for _ in range(6):
            step, layer, head = rng.randrange(3), rng.randrange(3), rng.randrange(4)
            for name, value in (("step", step), ("layer", layer), ("head", head)):
                set_slider(page, name, value)
            block = rng.randrange(maps.num_blocks)
            click_block(page, maps, block)
            mask = maps.mask(step, layer, head)
            assert page.evaluate(LIT) == mask[block].nonzero()[0].tolist()
            page.locator("#frames").focus()
            page.keyboard.press("d")
            assert page.evaluate(LIT) == mask[:, block].nonzero()[0].tolist()
            page.keyboard.press("d")
            count = int(mask[block].sum())
            assert f"attends {count} of {maps.num_blocks}" in page.locator("#status").inner_text()
        assert errors == []


def test_hovering_tells_the_score(maps, address):
    with chromium() as browser:
        page, _ = ready(browser, address)
        click_block(page, maps, 7)
        canvas = page.locator("#frames canvas").first
        canvas.hover(position={"x": 5, "y": 5})  # block 0
        text = page.locator("#status").inner_text()
        score = 2.0 ** ((int(maps.scores[0, 0, 0, 7, 0]) / 255 - 1) * 24)
        rank = int((maps.scores[0, 0, 0, 7] > maps.scores[0, 0, 0, 7, 0]).sum()) + 1
        assert f"rank {rank} of {maps.num_blocks}" in text
        shown = f"{100 * score:.1f} %" if score >= 0.01 else f"{100 * score:.2g} %"
        assert shown in text or score < 1e-6
        assert ("kept" if maps.mask(0, 0, 0)[7, 0] else "dropped") in text


def test_all_of_it_works_by_keyboard(maps, address):
    with chromium() as browser:
        page, errors = ready(browser, address)
        page.locator("#frames").focus()
        start = page.evaluate("() => state.block")
        moves = {"ArrowRight": 1, "ArrowDown": 4, "PageUp": -12, "ArrowLeft": -1, "PageDown": 12}
        for key, change in moves.items():
            before = page.evaluate("() => state.block")
            page.keyboard.press(key)
            assert page.evaluate("() => state.block") == before + change, key
        page.keyboard.press("ArrowUp")
        assert page.evaluate("() => state.block") == start
        page.keyboard.press("s")
        page.keyboard.press("Shift+L")
        page.keyboard.press("h")
        assert page.evaluate("() => [state.step, state.layer, state.head]") == [1, 2, 1]
        assert page.evaluate(LIT) == maps.mask(1, 2, 1)[start].nonzero()[0].tolist()
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+PageDown")
        assert page.evaluate("() => state.block") == start
        text = page.locator("#status").inner_text()
        mask, scores = maps.mask(1, 2, 1)[start], maps.scores[1, 2, 1, start]
        rank = int((scores > scores[start + 13]).sum()) + 1
        assert f"rank {rank} of {maps.num_blocks}" in text
        assert ("kept" if mask[start + 13] else "dropped") in text
        page.keyboard.press("Shift+H")
        page.keyboard.press("Shift+H")
        assert page.locator("#head-value").inner_text() == "all 4"
        assert errors == []


def test_labels_for_screen_readers(address):
    with chromium() as browser:
        page, _ = ready(browser, address)
        for name in ("Step", "Layer", "Head"):
            slider = page.get_by_role("slider", name=name)
            assert slider.count() == 1
            assert "of" in slider.get_attribute("aria-valuetext")
        assert page.get_by_role("application", name="Blocks of the video").count() == 1
        assert page.get_by_role("status").inner_text().startswith("Block frame")
        pictures = page.get_by_role("img").all()
        labels = [p.get_attribute("aria-label") or p.get_attribute("alt") for p in pictures]
        assert all(labels)
        assert sum("by step and layer" in label for label in labels) == 2
        assert any(label.startswith("Kept blocks per row") for label in labels)


def test_the_histogram_says_what_it_counted(maps, address):
    with chromium() as browser:
        page, _ = ready(browser, address)
        kept = maps.mask(0, 0, 0).sum(axis=1)
        for text in page.locator("#histogram title").all_text_contents():
            low, high, rows = map(int, re.findall(r"\d+", text))
            assert ((low <= kept) & (kept <= high)).sum() == rows, text


def test_the_heat_map_leads_to_its_map(address):
    with chromium() as browser:
        page, _ = ready(browser, address)
        page.locator("#heat-recall rect.recorded").nth(4).click()
        assert page.evaluate("() => [state.step, state.layer]") == [1, 1]
        assert (
            page.locator("#heat-density title").first.text_content().startswith("step 0, layer 0:")
        )


def test_it_asks_the_network_for_nothing_and_fits_a_laptop(address):
    with chromium() as browser:
        requests = []
        for dark in (False, True):
            page, errors = ready(browser, address, dark=dark, width=1366, height=768)
            page.on("request", lambda request: requests.append(request.url))
            page.evaluate("() => set('step', 2)")
            page.evaluate("() => choose(17, true)")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 1366
            assert errors == []
        assert [url for url in requests if not url.startswith(("data:", "file:", "blob:"))] == []


def test_a_block_of_several_frames_says_which(tmp_path):
    maps = make_maps(blocks=(3, 3, 4), grid=(7, 22, 29), block=(3, 8, 8))
    write_view(tmp_path / "deep.html", make_frames(25), maps)
    with chromium() as browser:
        page, errors = ready(browser, (tmp_path / "deep.html").as_uri())
        names = ["latent frames 1–3", "latent frames 4–6", "latent frame 7"]
        assert page.locator("#frames figcaption").all_text_contents() == names
        click_block(page, maps, 12)
        page.locator("#frames canvas").last.hover(position={"x": 5, "y": 5})
        text = page.locator("#status").inner_text()
        assert text.startswith("Block frames 4–6, row 1, column 1 attends")
        assert " Block frame 7, row 1, column 1: score" in text
        assert errors == []


def test_many_blocks(tmp_path):
    """720p: 21 x 6 x 10 blocks, 3 heads."""
    maps = make_maps(blocks=(21, 6, 10), grid=(21, 48, 80), counts=(20, 8, 3), has_scores=False)
    write_view(tmp_path / "many.html", make_frames(81, 96, 160), maps)
    with chromium() as browser:
        page, errors = ready(browser, (tmp_path / "many.html").as_uri())
        click_block(page, maps, 200)
        assert page.evaluate(LIT) == maps.mask(0, 0, 0)[200].nonzero()[0].tolist()
        assert errors == []


def test_playing_walks_through_the_recorded_steps(address):
    with chromium() as browser:
        page, errors = ready(browser, address)
        page.evaluate("() => set('step', 2)")
        page.get_by_role("button", name="Play steps").click()
        page.wait_for_function("() => state.step === 0", timeout=5000)
        page.wait_for_function("() => state.step === 1", timeout=5000)
        page.get_by_role("button", name="Pause").click()
        assert page.evaluate("() => timer") == 0
        page.keyboard.press("p")
        page.get_by_role("button", name="Pause").wait_for()
        assert errors == []


def test_the_legend_has_the_colours_of_the_blocks(address):
    with chromium() as browser:
        page, _ = ready(browser, address)
        legend = page.locator("#legend")
        assert legend.inner_text().split("\n") == ["chosen block", "kept", "dropped"]
        set_slider(page, "head", 4)
        assert "some heads" in legend.inner_text()
        colour = "name => getComputedStyle(document.querySelector(name)).borderTopColor"
        assert page.evaluate(colour, ".swatch.chosen") == "rgb(234, 88, 12)"
        assert page.evaluate("() => color('--chosen')") == "#ea580c"


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS names no folder")
def test_pictures_of_a_real_run_for_the_docs(tmp_path):
    video = str(tmp_path / "v.mp4")
    asked = ["--prompt", "a large blue square moving left", "--seed", "4", "--record-maps"]
    asked += ["--sparse-algo", "nabla-0.8_block-1-4-4", "--output", video]
    assert CliRunner().invoke(app, ["generate", *asked]).exit_code == 0
    record = RunRecord.load(tmp_path / "v.json")
    # Its seconds are no measurement.
    replace(record, numbers={}).save(tmp_path / "v.json")
    assert CliRunner().invoke(app, ["view", video]).exit_code == 0
    with chromium() as browser:
        for dark in (False, True):
            page, _ = ready(
                browser, (tmp_path / "v.html").as_uri(), dark=dark, width=1366, height=860
            )
            page.evaluate("() => set('layer', data.layers.length - 1)")
            save_screenshot(page, "view-dark.png" if dark else "view.png")


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS names no folder")
def test_picture_of_the_report_for_the_docs(tmp_path):
    study = Path(__file__).parents[2] / "benchmarks/results/quality"
    asked = ["report", str(study), "--output", str(tmp_path / "r")]
    assert CliRunner().invoke(app, asked).exit_code == 0
    with chromium() as browser:
        page, _ = open_page(browser, (tmp_path / "r.html").as_uri(), width=1366, height=1150)
        page.wait_for_timeout(2000)
        save_screenshot(page, "report.png")
