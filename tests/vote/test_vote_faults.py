"""What a study's server does with failing disks, locks, links and clients that mean harm."""

import contextlib
import csv
import io
import os
import resource
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from fastapi.testclient import TestClient
from tests.vote.study_helpers import ballot, fetch, make_small_study, running
from tests.vote.test_vote_server import join, vote_all

from nabla_attn.vote import database
from nabla_attn.vote.app import create_app
from nabla_attn.vote.database import GroupSync, StorageFailed
from nabla_attn.vote.study import database_path, videos_folder


@pytest.fixture
def study(tmp_path):
    return make_small_study(tmp_path, pairs_per_rater=3, num_repeats=1, num_controls=1)


@pytest.fixture
def folder(study, tmp_path):
    return tmp_path / "study"


def test_threads_that_wait_behind_a_failed_fsync_are_not_acknowledged(tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(b"")
    log = GroupSync(tmp_path / "log")
    others_wait, calls = threading.Event(), []

    def fail_once(file):
        calls.append(file)
        if len(calls) == 1:
            assert others_wait.wait(60)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(database.os, "fsync", fail_once)
    refused = []

    def sync():
        try:
            log.sync()
        except StorageFailed:
            refused.append(True)

    threads = [threading.Thread(target=sync) for _ in range(6)]
    for thread in threads:
        thread.start()
    while log._asked < 6:
        pass
    others_wait.set()
    for thread in threads:
        thread.join()
    assert len(refused) == 6
    with pytest.raises(StorageFailed):
        log.sync()
    monkeypatch.undo()
    log.close()


def test_after_a_failed_fsync_nothing_is_acknowledged_until_a_restart(study, folder, monkeypatch):
    with TestClient(create_app(folder)) as client:
        rater = join(client, study)
        trial = client.get("/api/next", headers=rater).json()["trial"]
        with monkeypatch.context() as patch:
            patch.setattr(database.os, "fsync", _refuse)
            failed = client.post("/api/votes", json=ballot(trial), headers=rater)
        answers = [
            failed,
            client.post("/api/votes", json=ballot(trial), headers=rater),
            client.get("/api/next", headers=rater),
            client.post(f"/api/s/{study.link_token}/raters", json={}),
        ]
        assert [answer.status_code for answer in answers] == [503] * 4
        assert "disk has failed" in failed.json()["detail"]
    with TestClient(create_app(folder)) as client:
        assert client.post("/api/votes", json=ballot(trial), headers=rater).status_code == 200


def _refuse(file):
    raise OSError(5, "Input/output error")


def test_a_locked_database_is_said_at_once_and_reading_goes_on(study, folder):
    with TestClient(create_app(folder)) as client:
        rater = join(client, study)
        trial = client.get("/api/next", headers=rater).json()["trial"]
        other = sqlite3.connect(database_path(folder))
        other.execute("BEGIN IMMEDIATE")
        locked = client.post("/api/votes", json=ballot(trial), headers=rater)
        assert locked.status_code == 503
        assert locked.headers["retry-after"]
        assert client.get("/api/next", headers=rater).status_code == 200
        other.rollback()
        other.close()
        assert client.post("/api/votes", json=ballot(trial), headers=rater).status_code == 200


def test_the_server_waits_for_no_lock(study, folder):
    store = database.VoteStore(database_path(folder), study)
    assert store._anchor.exec_driver_sql("PRAGMA busy_timeout").scalar() == 0
    store.close()


def test_votes_are_readable_by_their_owner_only(study, folder):
    path = database_path(folder)
    path.touch(mode=0o644)
    old_mask = os.umask(0)
    try:
        with TestClient(create_app(folder)) as client:
            vote_all(client, join(client, study))
            modes = {
                path.name: stat.S_IMODE(path.stat().st_mode)
                for path in folder.glob("votes.sqlite3*")
            }
    finally:
        os.umask(old_mask)
    assert modes == {f"votes.sqlite3{suffix}": 0o600 for suffix in ("", "-wal", "-shm")}


def test_a_video_swapped_for_a_link_is_not_served(study, folder, tmp_path):
    with TestClient(create_app(folder)) as client:
        rater = join(client, study)
        trial = client.get("/api/next", headers=rater).json()["trial"]
        for path in videos_folder(folder).iterdir():
            path.unlink()
            path.symlink_to(folder / "study.json")
        address = f"/api/video/{trial}/first"
        assert client.get(address, headers=rater).status_code == 404
        # Nor is another folder under the name of the videos.
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for path in videos_folder(folder).iterdir():
            (elsewhere / path.name).write_text("secret")
            path.unlink()
            os.mkfifo(path)
        videos_folder(folder).rename(tmp_path / "videos")
        videos_folder(folder).symlink_to(elsewhere)
        assert client.get(address, headers=rater).status_code == 404


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_line_ends_in_a_prompt_stay_in_its_cell(tmp_path, end):
    prompt = f"red{end}=HYPERLINK(1) {{}}"
    study = make_small_study(tmp_path, prompt=prompt, num_repeats=0, num_controls=0)
    with TestClient(create_app(tmp_path / "study")) as client:
        vote_all(client, join(client, study))
        text = client.get(f"/results/{study.admin_token}/votes.csv").content.decode()
    lines = list(csv.DictReader(io.StringIO(text, newline="")))
    assert {line["prompt"] for line in lines} == {prompt.format(index) for index in range(4)}
    outside_quotes = "".join(text.split('"')[::2])
    assert "HYPERLINK" not in outside_quotes


READ = """
import os, sys
from pathlib import Path
import nabla_attn.vote.tables as tables
from nabla_attn.vote.study import Study, database_path
folder = Path(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
assert not os.access(folder, os.W_OK)
print(len(tables.read_votes(database_path(folder), Study.load(folder))))
"""


@pytest.mark.parametrize("leftovers", [(), ("-wal",), ("-wal", "-shm")])
def test_results_of_a_study_that_cannot_be_written(study, folder, leftovers):
    with contextlib.ExitStack() as server, tempfile.TemporaryDirectory() as place:
        client = server.enter_context(TestClient(create_app(folder)))
        num_votes = len(vote_all(client, join(client, study)))
        if not leftovers:
            server.close()
        Path(place).chmod(0o755)
        # As it lies there while the server runs, or as a killed server leaves it.
        shown = Path(shutil.copytree(folder, Path(place) / "study"))
        for suffix in {"-wal", "-shm"}.difference(leftovers):
            (shown / f"votes.sqlite3{suffix}").unlink(missing_ok=True)
        before = sorted(shown.rglob("*"))
        for path in (*before, shown):
            if os.geteuid() == 0:
                os.chown(path, 65534, 65534)
            path.chmod(0o555 if path.is_dir() else 0o444)
        command = [sys.executable, "-c", READ, str(shown)]
        read = subprocess.run(command, capture_output=True, text=True, check=False)
        assert read.stdout.strip() == str(num_votes), read.stderr
        assert sorted(shown.rglob("*")) == before
        shown.chmod(0o755)


def _half_request(address):
    client = socket.create_connection(address)
    client.sendall(b"GET / HTTP/1.1\r\nHost")
    return client


def _address(base):
    host, _, port = base.removeprefix("http://").partition(":")
    return host, int(port)


def test_half_requests_do_not_silence_the_server(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"1,100 connections need more files than {hard}")
    with running(folder) as (process, base, link, _):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        try:
            clients = [_half_request(_address(base)) for _ in range(1100)]
            status, joined = fetch(f"{base}/api/s/{link}/raters", {})
            assert status == 201
            assert fetch(f"{base}/api/next", X_Rater=joined["rater"])[0] == 200
            for client in clients:
                client.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        process.terminate()
        assert len(process.stderr.read()) < 2000


def test_broken_requests_do_not_flood_the_log(folder):
    with running(folder) as (process, base, _, _):
        for _ in range(300):
            with socket.create_connection(_address(base)) as client:
                client.sendall(b"\0nonsense\r\n\r\n")
                client.recv(1000)
        process.terminate()
        assert len(process.stderr.read()) < 2000


QUICK = "import nabla_attn.vote.server as s; s.REQUEST_SECONDS = 0.5; s.STALLED_SECONDS = 0.5"


def test_clients_that_keep_the_server_waiting_are_dropped(folder):
    with running(folder, settings=QUICK) as (_, base, link, _):
        silent = socket.create_connection(_address(base))
        half = _half_request(_address(base))
        slow_body = socket.create_connection(_address(base))
        slow_body.sendall(
            b"POST /api/votes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"X-Rater: x\r\nContent-Length: 100\r\n\r\n{"
        )
        kept = socket.create_connection(_address(base))
        kept.sendall(f"GET /s/{link} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        for client in (silent, half, slow_body, kept):
            client.settimeout(60)
            while _receive(client):
                pass


def test_a_client_that_does_not_take_its_answer_is_dropped(folder):
    for path in videos_folder(folder).iterdir():
        path.write_bytes(os.urandom(2**24))
    with running(folder, settings=QUICK) as (process, base, link, _):
        _, joined = fetch(f"{base}/api/s/{link}/raters", {})
        _, turn = fetch(f"{base}/api/next", X_Rater=joined["rater"])
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(_address(base))
        asked = f"GET /api/video/{turn['trial']}/first HTTP/1.1\r\nHost: x\r\n"
        client.sendall(f"{asked}X-Rater: {joined['rater']}\r\n\r\n".encode())
        files = Path(f"/proc/{process.pid}/fd")
        is_open, latest = True, time.monotonic() + 60
        while is_open:  # until the server has let go of the video
            assert time.monotonic() < latest
            is_open = any(str(videos_folder(folder)) in _target(file) for file in files.iterdir())


def _target(file):
    try:
        name = str(file.readlink())
    except OSError:
        return ""
    return name if name.endswith(".mp4") else ""


def _receive(client):
    try:
        return client.recv(65536)
    except ConnectionResetError:
        return b""


def test_a_run_with_a_video_that_cannot_be_read_is_refused(tmp_path):
    from tests.vote.study_helpers import write_run

    from nabla_attn.vote.create import make_study

    run = write_run(tmp_path / "run", num_prompts=2)
    (run / "nabla-0.7" / "p1.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"cannot read the video .*p1\.mp4"):
        make_study(tmp_path / "study", run)
    assert not (tmp_path / "study").exists()
