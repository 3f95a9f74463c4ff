"""Small studies, a plain HTTP client, and a server in its own process, for the tests of votes."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np

from nabla_attn.generation.video import write_video
from nabla_attn.record import RunRecord
from nabla_attn.vote.create import make_study
from nabla_attn.vote.study import QUESTIONS

ALGOS = ("dense", "nabla-0.7")


def write_run(folder, num_prompts=4, prompt="a red circle {}", algos=ALGOS, size=32, frames=6):
    """A folder as `nabla evaluate` leaves it: records with their videos beside them."""
    rng = np.random.default_rng(0)
    for index in range(num_prompts):
        for algo in algos:
            video = np.zeros((frames, size, size, 3), np.uint8) + rng.integers(
                255, size=3, dtype=np.uint8
            )
            path = folder / algo / f"p{index}.mp4"
            write_video(video, path, fps=8)
            config = {"prompt": prompt.format(index), "sparse_algo": algo}
            RunRecord("evaluate", config, 0, {}, "cpu", {}).save(path.with_suffix(".json"))
    return folder


def make_small_study(folder, num_prompts=4, **options):
    """A study of synthetic videos; its votes come from synthetic raters and it says so."""
    run = write_run(folder / "run", num_prompts, options.pop("prompt", "a red circle {}"))
    notice = "synthetic raters: made by a test"
    return make_study(folder / "study", run, notice=notice, **options)


def ballot(trial, answer="first", **changes):
    """A whole vote with one answer to all questions."""
    return {"trial": trial, "seconds": 1.0} | dict.fromkeys(QUESTIONS, answer) | changes


@contextmanager
def running(folder, *, environment=None, settings="pass"):
    """`nabla vote FOLDER` in a process of its own; yields (process, base address, link, admin).

    `settings` is a line of Python that the process runs first.
    """
    code = f"{settings}\nfrom nabla_attn.cli import app\napp()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, "vote", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    try:
        lines = process.stdout.readline() + process.stdout.readline()
        base, link = re.search(r"(http://[^/]+)/s/(\w+)", lines).groups()
        admin = re.search(r"/results/(\w+)", lines)[1]
        _wait(f"{base}/s/{link}")
        yield process, base, link, admin
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _wait(address):
    for _ in range(200):
        try:
            urllib.request.urlopen(address).close()
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError(f"nothing answers at {address}")


def fetch(address, body=None, **headers):
    """(status, parsed JSON) of a GET, or of a POST when there is a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
