import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nabla_attn.generation import claims, prompt_list
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.record import RunRecord

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
    found = prompt_list.read_prompts(write(tmp_path, lines), REQUEST)
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
        prompt_list.read_prompts(write(tmp_path, text), REQUEST)


def test_missing_list(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot read the prompts"):
            prompt_list.read_prompts(path, REQUEST)


def test_names_follow_all_that_changes_a_video(model, tmp_path):
    import shutil

    def names(model=model, fps=8, **changes):
        from dataclasses import replace

        return list(prompt_list.name_videos([replace(REQUEST, **changes)] * 2, model, fps=fps))

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
    return prompt_list.make_videos(folder, videos, make, 8, **options)


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


def test_interrupted_claims_lapse_at_once(tmp_path):
    def interrupt(request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, VIDEOS, make=interrupt)
    assert files(tmp_path) == [".0001-aa.claim-0"]
    assert run(tmp_path, VIDEOS).made == list(VIDEOS)
    assert files(tmp_path) == WHOLE


def plant(folder, host, pid, age=0.0, name="0001-aa"):
    path = folder / f".{name}.claim-0"
    path.write_text(json.dumps({"host": host, "pid": pid, "time": 0, "token": "x"}))
    now = time.time()
    os.utime(path, (now - age, now - age))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_stale_claims_are_taken_over_and_others_kept(tmp_path):
    (tmp_path / ".0001-aa.mp4.99.tmp").touch()
    plant(tmp_path, claims._host(), dead_pid())
    plant(tmp_path, "elsewhere", 1, age=claims.STALE_SECONDS + 60, name="0002-aa")
    plant(tmp_path, "elsewhere", dead_pid(), age=claims.STALE_SECONDS - 60, name="0003-aa")
    outcome = run(tmp_path, VIDEOS)
    assert outcome.made == ["0001-aa", "0002-aa"]
    assert outcome.elsewhere == ["0003-aa"]
    assert files(tmp_path) == [".0003-aa.claim-0", *WHOLE[:4]]
    # Alive on this machine: kept, until it goes untouched for long.
    plant(tmp_path, claims._host(), os.getppid(), name="0003-aa")
    assert run(tmp_path, VIDEOS).elsewhere == ["0003-aa"]
    plant(tmp_path, claims._host(), os.getppid(), claims.STALE_SECONDS + 60, name="0003-aa")
    assert run(tmp_path, VIDEOS).made == ["0003-aa"]
    assert files(tmp_path) == WHOLE


def test_a_killed_process_nobody_waits_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    plant(tmp_path, claims._host(), process.pid)
    assert claims.take(tmp_path, "0001-aa") is None
    process.kill()
    time.sleep(0.5)
    assert claims.take(tmp_path, "0001-aa") is not None
    process.wait()
    process.stdin.close()


def test_a_claim_cut_short_waits_for_its_age(tmp_path):
    path = tmp_path / ".0001-aa.claim-0"
    for text in ("", "[]", "{", '{"host": 3, "pid": "x"}'):
        path.write_text(text)
        assert claims.take(tmp_path, "0001-aa") is None
    os.utime(path, (0, 0))
    assert claims.take(tmp_path, "0001-aa").path.name == ".0001-aa.claim-1"


def test_owners_touch_their_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with claims.take(tmp_path, "a") as claim:
        os.utime(claim.path, (0, 0))
        for _ in range(500):
            if not claims.is_stale(claim.path):
                break
            time.sleep(0.01)
        assert claims.take(tmp_path, "a") is None


def test_one_of_many_takes_over(tmp_path):
    plant(tmp_path, claims._host(), dead_pid())
    start, taken = threading.Barrier(16), []

    def take():
        start.wait()
        taken.append(claims.take(tmp_path, "0001-aa"))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in taken) == 1


def test_a_suspended_owner_that_lost_its_claim_writes_nothing(tmp_path):
    def be_overtaken(request):
        path = tmp_path / ".0001-aa.claim-0"
        os.utime(path, (0, 0))
        with claims.take(tmp_path, "0001-aa") as other:
            assert other.path.name.endswith("claim-1")
        return make(request)

    outcome = run(tmp_path, {"0001-aa": REQUEST}, make=be_overtaken)
    assert outcome.made == [] and outcome.elsewhere == ["0001-aa"]
    assert not list(tmp_path.glob("*.mp4"))


def test_waiting_takes_over_from_those_that_end(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_list, "WAIT_SECONDS", 0.02)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    plant(tmp_path, claims._host(), process.pid, name="0001-aa")

    def tell(name, result):
        if name == "0003-aa":
            process.kill()

    assert run(tmp_path, VIDEOS, wait=True, tell=tell).made == ["0002-aa", "0003-aa", "0001-aa"]
    process.wait()
    process.stdin.close()


def test_hosts_are_told_apart():
    assert socket.gethostname() in claims._host()


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "a.mp4", tmp_path / "file" / "in"):
        with pytest.raises(ValueError):
            prompt_list.check_folder(path)
