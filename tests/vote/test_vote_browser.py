"""Two raters in real Chromium, one of whom reloads in the middle; the results add up.

SCREENSHOTS=docs/images writes the pictures of the docs.
"""

import json
import random
import re
import urllib.request

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from tests.browser import chromium, open_page, save_screenshot
from tests.vote.study_helpers import running

from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.vote.make import make_study
from nabla_attn.world import describe, render, sample_scene

pytestmark = pytest.mark.slow

NUM_PAIRS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of the moving-shapes world; the second algorithm's are another size of shapes."""
    root = tmp_path_factory.mktemp("browser")
    for index in range(NUM_PAIRS):
        scene = sample_scene(index, 2)
        for algo, frames in (("dense", 17), ("nabla-0.7", 17)):
            video = render(scene, frames, 128, 192)
            if algo != "dense":
                video = video // 2 + 64
            path = root / "run" / algo / f"p{index}.mp4"
            write_video(video, path, fps=12)
            config = {"prompt": describe(scene), "sparse_algo": algo}
            RunRecord("evaluate", config, 0, {}, "cpu", {}).save(path.with_suffix(".json"))
    make_study(
        root / "study", root / "run", num_controls=1, num_repeats=1, notice="synthetic raters"
    )
    return root / "study"


def judge_pair(page, keys):
    trial_videos = [page.locator("#first"), page.locator("#second")]
    for video in trial_videos:
        page.wait_for_function("video => video.currentTime > 0", arg=video.element_handle())
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_selector("#send:enabled")
    before = page.locator("#count").inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "before => document.getElementById('count').innerText !== before", arg=before
    )


def test_two_raters_vote_and_the_results_add_up(folder):
    with running(folder) as (_, base, link, admin), chromium() as browser:
        first, errors = open_page(browser, f"{base}/s/{link}")
        first.get_by_role("button", name="Begin").click()
        first.wait_for_selector("#pair:not([aria-busy])")
        assert first.locator("#count").inner_text() == f"0 of {NUM_PAIRS + 2}"
        judge_pair(first, "1234")
        first.reload()
        first.wait_for_selector("#pair:not([hidden])")
        assert first.locator("#count").inner_text() == f"1 of {NUM_PAIRS + 2}"
        first.keyboard.press("2")
        first.wait_for_timeout(400)
        save_screenshot(first, "vote.png")
        first.keyboard.press("Backspace")
        second, more_errors = open_page(browser, f"{base}/s/{link}", dark=True)
        second.get_by_role("button", name="Begin").click()
        keys = random.Random(0)
        for _ in range(NUM_PAIRS + 1):
            judge_pair(first, "".join(keys.choice("1234") for _ in range(3)) + "4")
        for index in range(NUM_PAIRS + 2):
            judge_pair(second, "3334")
            if index == 0:
                second.keyboard.press("4")
                second.wait_for_timeout(400)
                save_screenshot(second, "vote-dark.png")
                second.keyboard.press("Backspace")
        for page in (first, second):
            assert page.locator("#end").is_visible()
        csv = urllib.request.urlopen(f"{base}/results/{admin}/votes.csv").read().decode()
        results, result_errors = open_page(browser, f"{base}/results/{admin}")
        text = results.locator("main").inner_text()
        save_screenshot(results, "vote-results.png")
        assert errors == more_errors == result_errors == []
    lines = csv.splitlines()[1:]
    assert len(lines) == 2 * (NUM_PAIRS + 2)
    assert sum(line.count("both_good") for line in lines if line.startswith("2,")) == 15
    # Both bad is a right answer to a control, so both raters count, with three pairs each.
    assert "6 votes of 2 raters" in text
    assert "100.0 %" in text
    assert "synthetic raters" in text
    assert re.search(r"\(2 voted\)", text)


def test_playback_is_together_and_by_frame(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, errors = open_page(browser, f"{base}/s/{link}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([aria-busy])")
        times = "() => ['first', 'second'].map((id) => document.getElementById(id).currentTime)"
        page.wait_for_function("() => document.getElementById('first').currentTime > 0.5")
        one, two = page.evaluate(times)
        assert abs(one - two) < 0.2
        # 17 frames at 12 per second: after two seconds it has begun again.
        page.wait_for_function("() => document.getElementById('first').currentTime < 0.4")
        page.keyboard.press(" ")
        for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
            before = page.evaluate(times)[0]
            page.keyboard.press(key)
            page.wait_for_function(
                "t => document.getElementById('second').currentTime !== t", arg=before
            )
            one, two = page.evaluate(times)
            assert one == two
            step = round((one - before) * 12)
            assert step == (1 if key == "ArrowRight" else -1), (before, one, frame)
        assert errors == []


def test_the_page_is_labelled(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, _ = open_page(browser, f"{base}/s/{link}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([aria-busy])")
        for name in ("One frame back", "One frame on", "Pause", "Restart", "Next pair"):
            assert page.get_by_role("button", name=name).count() == 1, name
        for question in ("prompt", "frame by frame", "moves", "overall"):
            group = page.get_by_role("group", name=re.compile(question))
            assert group.get_by_role("radio").count() == 4, question
        stored = json.loads(page.evaluate("() => JSON.stringify(Object.keys(localStorage))"))
        assert stored == [f"rater-{link}"]
        assert page.context.cookies() == []
