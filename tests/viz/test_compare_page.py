import re

import numpy as np
from tests.browser import chromium, open_page

from nabla_attn.record import RunRecord
from nabla_attn.viz.side_by_side import PAGE, write_comparison

PROMPT = "a <b>red</b> circle"
ALGOS = ("dense", "nabla-0.7", "topk-0.25_tail-first")


def write(folder):
    config = {
        "prompt": PROMPT, "frames": 24, "width": 64, "height": 48, "steps": 2, "guidance": 3.0,
        "seed": 1, "dtype": "float32",
    }  # fmt: skip
    videos = []
    for index, algo in enumerate(ALGOS):
        density = 1 - 0.3 * index
        numbers = {
            "seconds": {"transformer": 10 * density},
            "tokens": {"frames": 6, "height": 3, "width": 4},
            "attention": {"density": density},
            "to_dense": {"speed_up": 1 / density, "psnr": 20.0 * index or None, "ssim": 0.9},
        }
        record = RunRecord("generate", config | {"sparse_algo": algo}, 1, {}, "a CPU", numbers)
        frames = np.full((24, 48, 64, 3), 80 * index, np.uint8)
        frames[:, :, :, 0] = 10 * np.arange(24)[:, None, None]
        videos.append((frames, record))
    write_comparison(videos, folder, 12)
    return folder / PAGE


def test_the_page_needs_nothing_else_and_escapes_the_prompt(tmp_path):
    page = write(tmp_path).read_text()
    assert (
        not re.search(r"(src|href)=\"(?!data:)", page)
        and "http:" not in page
        and "https:" not in page
    )
    assert "<b>red" not in page and "a &lt;b&gt;red&lt;/b&gt; circle" in page
    for word in ("every token pair", "70.0% of token pairs", "7.0 s", "1.43x as fast", "20.0 dB"):
        assert word in page, word


def test_videos_play_in_step_under_the_wipe(tmp_path):
    address = write(tmp_path).as_uri()
    times = "() => [...document.querySelectorAll('video')].map(video => video.currentTime)"
    shown = (
        "() => [...document.querySelectorAll('video')].map(video => "
        "[getComputedStyle(video).visibility, getComputedStyle(video).clipPath])"
    )
    with chromium() as browser:
        page, errors = open_page(browser, address)
        page.get_by_role("button", name="Pause").wait_for()
        page.wait_for_timeout(400)
        now = page.evaluate(times)
        assert max(now) - min(now) < 0.1, "about a frame"
        dense, first, second = page.evaluate(shown)
        assert dense == ["visible", "none"] and second[0] == "hidden"
        assert first[0] == "visible" and "50%" in first[1]
        box = page.locator(".stage").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
        page.mouse.up()
        assert "25%" in page.evaluate(shown)[1][1]
        wipe = page.get_by_role("slider", name="Wipe")
        wipe.evaluate("(s) => { s.value = 80; s.dispatchEvent(new Event('input')); }")
        assert "80%" in page.evaluate(shown)[1][1]
        page.get_by_role("radio", name="topk-0.25_tail-first").check()
        dense, first, second = page.evaluate(shown)
        assert first[0] == "hidden" and second[0] == "visible" and "80%" in second[1]
        assert page.locator(".right").inner_text() == "topk-0.25_tail-first"
        assert errors == []
