import os
import subprocess
import sys

import numpy as np
import pytest

from nabla_attn import work_sharing
from nabla_attn.generation import prompt_list
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.record import RunRecord
from nabla_attn.work_sharing import share_work

REQUEST = GenerationRequest("", height=16, width=16, frames=1, steps=1, seed=5)
FRAMES = np.zeros((1, 16, 16, 3), np.uint8)


def make(request):
    config, numbers = request.to_dict(), {"by": os.getpid()}
    return FRAMES, RunRecord("generate", config, request.seed, {}, "cpu", numbers)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "weights").write_bytes(b"0" * 200_000)
    return folder


def write(folder, text):
    path = folder / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_comments_and_json(tmp_path):
    lines = (
        '\ufeff# a list\r\n\r\n  a red circle \r\n{"prompt": "# one", "seed": 7}\n{"prompt": "é"}'
    )
    found = list(prompt_list.read_requests(write(tmp_path, lines), REQUEST).requests.values())
    assert [(r.prompt, r.seed) for r in found] == [("a red circle", 5), ("# one", 7), ("é", 5)]
    assert {r.height for r in found} == {16}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no prompt"),
        ("\n# only this\n", "has no prompt"),
        ("fine\n" + "x" * 20000, "line 2: longer than 16384 bytes"),
        (b"fine\n\nr\xf6t\n", "line 3: not UTF-8"),
        ('{"prompt": "a"', "line 1: not valid JSON"),
        ('{"text": "a"}', "line 1: expected"),
        ('{"prompt": "a", "seed": true}', "line 1: expected"),
        ('{"prompt": "a", "steps": 3}', "line 1: expected"),
        ('{"prompt": "a", "seed": -1}', "line 1: seed must be"),
        ('{"a":' * 3000, "line 1: not valid JSON"),
    ],
)
def test_bad_lists(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        prompt_list.read_prompt_list(write(tmp_path, text))


def test_a_broken_line_fails_alone_and_shifts_no_name(model, tmp_path):
    lines = ["one", "x" * 20000, '{"prompt": "half \\ud83d"}', '{"prompt": 3}', "# no", "two"]
    content = "\n".join(lines).encode() + b"\nr\xf6t\nthree"
    found = prompt_list.read_requests(write(tmp_path, content), REQUEST)
    assert {n: r.prompt for n, r in found.requests.items()} == {1: "one", 5: "two", 7: "three"}
    assert list(found.broken) == ["line 2", "line 3", "line 4", "line 7"]
    assert "half a character" in found.broken["line 3"]
    names = prompt_list.name_videos(found.requests, model, fps=8)
    assert [name[:4] for name in names] == ["0001", "0005", "0007"]
    with pytest.raises(ValueError, match="line 2: longer than"):
        prompt_list.read_prompt_list(write(tmp_path, content))


def test_empty_files_are_not_done(tmp_path):
    run(tmp_path, VIDEOS)
    (tmp_path / "0002-aa.mp4").write_bytes(b"")
    assert run(tmp_path, VIDEOS).made == ["0002-aa"]


def test_missing_list(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot read"):
            prompt_list.read_requests(path, REQUEST)


def test_names_follow_all_that_changes_a_video(model, tmp_path):
    import shutil

    def names(model=model, fps=8, **changes):
        from dataclasses import replace

        requests = dict.fromkeys((1, 2), replace(REQUEST, **changes))
        return list(prompt_list.name_videos(requests, model, fps=fps))

    first = names()
    assert len(set(first)) == 2
    assert [name[:5] for name in first] == ["0001-", "0002-"]
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert names(moved) == first
    changed = [{"prompt": "b"}, {"seed": 6}, {"height": 32}, {"sparse_algo": "nabla-0.7"}]
    others = [names(fps=9), *(names(**change) for change in changed)]
    (moved / "vae" / "weights").write_bytes(b"0" * 199_999 + b"1")
    others.append(names(moved))
    assert len({tuple(each) for each in [first, *others]}) == 7


def run(folder, videos, make=make, **options):
    return share_work(prompt_list.make_work(folder, videos, lambda: make, 8), **options)


VIDEOS = {f"000{i}-aa": REQUEST for i in (1, 2, 3)}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = sorted(f"{name}{suffix}" for name in VIDEOS for suffix in (".json", ".mp4"))


def test_made_once_and_left_clean(tmp_path):
    assert run(tmp_path, VIDEOS).made == list(VIDEOS)
    assert files(tmp_path) == WHOLE
    again = run(tmp_path, VIDEOS, make=None)
    assert (again.made, again.there) == ([], list(VIDEOS))
    (tmp_path / "0002-aa.mp4").unlink()
    assert run(tmp_path, VIDEOS).made == ["0002-aa"]


def test_one_failure_stops_nobody_and_is_tried_again(tmp_path):
    calls = []

    def fail_second(request):
        calls.append(request)
        if len(calls) == 2:
            raise RuntimeError("out of\nmemory")
        return make(request)

    outcome = run(tmp_path, VIDEOS, make=fail_second)
    assert outcome.failed == {"0002-aa": "out of memory"}
    assert outcome.made == ["0001-aa", "0003-aa"]
    assert len(calls) == 3
    assert run(tmp_path, VIDEOS).made == ["0002-aa"]
    assert files(tmp_path) == WHOLE


def test_an_interrupted_video_is_free_at_once(tmp_path):
    def interrupt(request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, VIDEOS, make=interrupt)
    assert files(tmp_path) == [".0001-aa.lock"]
    (tmp_path / ".0001-aa.mp4.99.tmp").touch()
    assert run(tmp_path, VIDEOS).made == list(VIDEOS)
    assert files(tmp_path) == WHOLE


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is at the first video."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".0001-aa.lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_what_others_make_is_left_to_them(tmp_path, holder):
    outcome = run(tmp_path, VIDEOS)
    assert outcome.made == ["0002-aa", "0003-aa"]
    assert outcome.elsewhere == ["0001-aa"]
    holder.kill()
    holder.wait()
    assert run(tmp_path, VIDEOS).made == ["0001-aa"]
    assert files(tmp_path) == WHOLE


def test_waiting_takes_over_from_those_that_end(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(work_sharing, "WAIT_SECONDS", 0.02)

    def on_item(name, result):
        if name == "0003-aa":
            holder.kill()

    assert run(tmp_path, VIDEOS, wait=True, on_item=on_item).made == [
        "0002-aa",
        "0003-aa",
        "0001-aa",
    ]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "a.mp4", tmp_path / "file" / "in"):
        with pytest.raises(ValueError):
            prompt_list.check_folder(path)
