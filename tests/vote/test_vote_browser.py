"""Two raters in real Chromium, one of whom reloads in the middle; the results add up.

SCREENSHOTS=docs/images writes the pictures of the docs.
"""

import json
import math
import random
import re
import urllib.request

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from tests.browser import chromium, open_page, save_screenshot
from tests.vote.study_helpers import running

from nabla_attn.generation.video import write_video
from nabla_attn.moving_shapes import describe, render, sample_scene
from nabla_attn.record import RunRecord
from nabla_attn.vote.create import make_study

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
    page.wait_for_selector("#pair:not([hidden], [aria-busy])")
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
        first.wait_for_selector("#pair:not([hidden], [aria-busy])")
        assert first.locator("#count").inner_text() == f"0 of {NUM_PAIRS + 2}"
        judge_pair(first, "1234")
        first.reload()
        first.wait_for_selector("#pair:not([hidden], [aria-busy])")
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
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
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
            step = math.floor(one * 12) - math.floor(before * 12)
            assert step == (1 if key == "ArrowRight" else -1), (before, one, frame)
        assert errors == []


def test_the_page_is_labelled(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, _ = open_page(browser, f"{base}/s/{link}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        for name in ("One frame back", "One frame on", "Pause", "Restart", "Next pair"):
            assert page.get_by_role("button", name=name).count() == 1, name
        for question in ("prompt", "frame by frame", "moves", "overall"):
            group = page.get_by_role("group", name=re.compile(question))
            assert group.get_by_role("radio").count() == 4, question
        stored = json.loads(page.evaluate("() => JSON.stringify(Object.keys(localStorage))"))
        assert stored == [f"rater-{link}"]
        assert page.context.cookies() == []


def wait_until(page, condition):
    for _ in range(500):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("what was waited for did not come")


def bodies_sent(page, path):
    """What the page posts to a path, as it goes on."""
    sent = []
    page.on("request", lambda asked: asked.url.endswith(path) and sent.append(asked.post_data_json))
    return sent


def test_a_pair_is_judged_only_once_both_its_videos_are_shown(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, errors = open_page(browser, f"{base}/s/{link}")
        page.clock.install()
        votes, held = bodies_sent(page, "/api/votes"), []
        page.route("**/api/video/*/second", lambda route: held.append(route))
        page.get_by_role("button", name="Begin").click()
        for index in range(2):
            wait_until(page, lambda: held)
            for key in ("1", "1", "1", "1", "ArrowRight", " ", "r", "Enter"):
                page.keyboard.press(key)
            page.locator("#ballot label").first.click(force=True)
            page.locator("#send").click(force=True)
            page.clock.fast_forward("01:00:00")
            assert page.locator("#ballot :checked").count() == 0
            # The videos of the pair before are gone, so they cannot stand under this prompt.
            shown = (
                "() => [...document.querySelectorAll('video')].some((video) => video.videoWidth)"
            )
            assert not page.evaluate(shown)
            assert len(votes) == index
            held.pop().continue_()
            page.wait_for_selector("#pair:not([hidden], [aria-busy])")
            assert page.evaluate(shown)
            assert page.locator("#ballot :checked").count() == 0
            for key in "1234":
                page.keyboard.press(key)
            with page.expect_response("**/api/votes"):
                page.keyboard.press("Enter")
        # The hours of loading are not counted as time to judge.
        assert all(vote["seconds"] < 1800 for vote in votes)
        assert len({vote["trial"] for vote in votes}) == 2
        assert errors == []


def test_late_videos_of_another_pair_are_not_shown(folder, tmp_path):
    write_video(render(sample_scene(9, 2), 5, 64, 64), tmp_path / "small.mp4", fps=12)
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, errors = open_page(browser, f"{base}/s/{link}")
        held = []
        page.route("**/api/video/**", lambda route: held.append(route))
        page.get_by_role("button", name="Begin").click()
        wait_until(page, lambda: len(held) == 2)
        other = {"title": "", "done": 1, "total": 2, "fps": 12, "trial": "0" * 32}
        small = (tmp_path / "small.mp4").read_bytes()
        answer = {"body": small, "content_type": "video/mp4"}
        page.route(f"**/api/video/{'0' * 32}/*", lambda route: route.fulfill(**answer))
        page.evaluate("turn => { present(turn); }", other | {"prompt": "another"})
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        for route in held:
            with page.expect_event("requestfinished"):
                route.continue_()
        page.wait_for_timeout(300)
        widths = "() => [...document.querySelectorAll('video')].map((video) => video.videoWidth)"
        assert page.evaluate(widths) == [64, 64]
        assert page.locator("#prompt").inner_text() == "another"
        assert errors == []


def test_a_refused_vote_can_be_changed_and_sent_again(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, _ = open_page(browser, f"{base}/s/{link}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        votes = bodies_sent(page, "/api/votes")
        refused = {"status": 403, "json": {"detail": "not now."}}
        page.route("**/api/votes", lambda route: route.fulfill(**refused), times=1)
        for key in ("1", "2", "3", "4", "Enter"):
            page.keyboard.press(key)
        wait_until(page, lambda: page.locator("#message").inner_text() == "not now.")
        for key in ("Backspace", "1", "Enter"):
            page.keyboard.press(key)
        wait_until(page, lambda: page.locator("#count").inner_text().startswith("1 "))
        assert [vote["overall"] for vote in votes] == ["both_bad", "first"]
        assert {vote["motion"] for vote in votes} == {"both_good"}
        assert page.locator("#message").inner_text() == ""


def test_a_held_key_answers_one_question(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, _ = open_page(browser, f"{base}/s/{link}")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        for _ in range(3):
            page.keyboard.down("2")  # the second and third repeat it
        page.keyboard.up("2")
        assert page.locator("#ballot :checked").count() == 1


def test_a_pair_judged_in_another_window_is_passed_over(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        first, _ = open_page(browser, f"{base}/s/{link}")
        first.get_by_role("button", name="Begin").click()
        first.wait_for_selector("#pair:not([hidden], [aria-busy])")
        second = first.context.new_page()
        second.goto(f"{base}/s/{link}")
        judge_pair(second, "1111")
        for key in ("2", "2", "2", "2", "Enter"):
            first.keyboard.press(key)
        wait_until(first, lambda: first.locator("#count").inner_text().startswith("1 "))
        first.wait_for_selector("#pair:not([hidden], [aria-busy])")
        assert first.locator("#ballot :checked").count() == 0
        assert first.locator("#message").inner_text() == ""


def test_begin_pressed_twice_admits_one_rater(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, errors = open_page(browser, f"{base}/s/{link}")
        joined = bodies_sent(page, "/raters")
        page.get_by_role("button", name="Begin").dblclick()
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        assert len(joined) == 1
        assert errors == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": 404, "json": {"detail": "the video is gone."}}, "the video is gone"),
        ({"status": 403, "body": "<html>", "content_type": "text/html"}, "did not understand"),
        ({"body": b"not a video", "content_type": "video/mp4"}, "cannot play"),
    ],
)
def test_a_video_that_cannot_be_shown_is_said_so_and_not_fetched_for_ever(folder, answer, said):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, errors = open_page(browser, f"{base}/s/{link}")
        page.clock.install()
        fetched, votes = [], bodies_sent(page, "/api/votes")
        page.on("request", lambda asked: "/api/video/" in asked.url and fetched.append(asked.url))
        page.route("**/api/video/*/second", lambda route: route.fulfill(**answer))
        page.get_by_role("button", name="Begin").click()
        message = page.locator("#message")
        for times in (1, 2):
            wait_until(page, message.inner_text)
            assert said in message.inner_text()
            assert "whoever sent you the link" in message.inner_text()
            page.clock.run_for(60_000)
            assert len(fetched) == len(set(fetched)) * times == 2 * times
            for key in "1111":
                page.keyboard.press(key)
            page.keyboard.press("Enter")
            assert page.locator("#ballot :checked").count() == 0
            assert said in message.inner_text()
            assert page.locator("#pair").is_visible()
            if times == 1:
                page.reload()
                page.clock.install()
        assert votes == []
        assert all("Failed to load resource" in error for error in errors), errors


def test_only_the_video_that_failed_is_fetched_again(folder):
    with running(folder) as (_, base, link, _), chromium() as browser:
        page, _ = open_page(browser, f"{base}/s/{link}")
        fetched = []

        def fail_twice(route):
            fetched.append(route.request.url.split("/")[-1])
            again = fetched.count("second")
            if fetched[-1] == "first" or again > 2:
                route.continue_()
            elif again == 1:
                route.fulfill(status=503)
            else:
                route.abort()

        page.route("**/api/video/**", fail_twice)
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#pair:not([hidden], [aria-busy])")
        assert sorted(fetched) == ["first", "second", "second", "second"]
        assert page.locator("#message").inner_text() == ""
        for key in "1111":
            page.keyboard.press(key)
        assert page.locator("#send").is_enabled()
