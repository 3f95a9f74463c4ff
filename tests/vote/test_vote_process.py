"""The server as a process: killed under load, stopped, loaded."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from tests.vote.study_helpers import ballot, fetch, make_small_study, running

from nabla_attn.vote.database import VoteStore
from nabla_attn.vote.server import listen
from nabla_attn.vote.study import QUESTIONS, Study, database_path

NUM_RATERS = 200


class Client:
    """One rater's connection: plain HTTP/1.1, kept open."""

    def __init__(self, base):
        self.host, _, port = base.removeprefix("http://").partition(":")
        self.port = int(port)
        self.streams = None
        self.rater = ""

    async def call(self, path, body=None):
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        data = b"" if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"X-Rater: {self.rater}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        return int(head.split()[1]), answer

    def close(self):
        if self.streams:
            self.streams[1].close()


async def rate(base, link, acknowledged, deadline, num_votes=None):
    """Join and vote until the end, the deadline, or the server dies; note what was acknowledged."""
    client, rng = Client(base), random.Random(len(acknowledged))
    try:
        _, joined = await client.call(f"/api/s/{link}/raters", {})
        client.rater = joined["rater"]
        _, turn = await client.call("/api/next")
        while "trial" in turn and time.monotonic() < deadline:
            answer = rng.choice(["first", "second", "both_good", "both_bad"])
            status, following = await client.call("/api/votes", ballot(turn["trial"], answer))
            assert status == 200
            acknowledged[turn["trial"]] = answer
            turn = following
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        client.close()


def stored_votes(folder):
    with sqlite3.connect(database_path(folder)) as database:
        return database.execute("SELECT trial, overall FROM votes").fetchall()


@pytest.fixture(scope="module")
def big_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    make_small_study(folder, num_prompts=40, pairs_per_rater=40)
    return folder / "study"


def test_a_killed_server_keeps_what_it_acknowledged(big_study):
    acknowledged = {}

    async def storm(process, base, link):
        deadline = time.monotonic() + 20
        raters = [rate(base, link, acknowledged, deadline) for _ in range(NUM_RATERS)]
        tasks = [asyncio.create_task(rater) for rater in raters]
        while len(acknowledged) < 300 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        process.kill()  # SIGKILL, in the middle of votes
        await asyncio.gather(*tasks)

    with running(big_study) as (process, base, link, _):
        asyncio.run(storm(process, base, link))
        assert process.wait() == -signal.SIGKILL
    assert len(acknowledged) >= 100  # enough to be in the middle, on a busy machine too
    stored = stored_votes(big_study)
    assert len(stored) == len({trial for trial, _ in stored})  # none doubled
    assert acknowledged.items() <= dict(stored).items()  # none lost
    # Raters go on after a restart, and a vote whose answer was lost may be sent again.
    with running(big_study) as (_, base, link, _):
        trial, answer = next(iter(acknowledged.items()))
        with sqlite3.connect(database_path(big_study)) as database:
            query = (
                "SELECT r.token FROM raters r JOIN trials t ON t.rater_id = r.id WHERE t.token = ?"
            )
            (rater,) = database.execute(query, (trial,)).fetchone()
        status, _ = fetch(f"{base}/api/votes", ballot(trial, answer), X_Rater=rater)
        assert status == 200
    assert len(stored_votes(big_study)) == len(stored)


def test_it_stops_cleanly(tmp_path):
    make_small_study(tmp_path)
    folder = tmp_path / "study"
    for how in (signal.SIGINT, signal.SIGTERM):
        with running(folder) as (process, base, link, _):
            _, joined = fetch(f"{base}/api/s/{link}/raters", {})
            _, turn = fetch(f"{base}/api/next", X_Rater=joined["rater"])
            fetch(f"{base}/api/votes", ballot(turn["trial"]), X_Rater=joined["rater"])
            process.send_signal(how)
            assert process.wait(timeout=10) in (0, -signal.SIGTERM)
            assert "Traceback" not in process.stderr.read()
        # The log is folded in: the database file alone holds everything.
        wal = database_path(folder).with_name("votes.sqlite3-wal")
        assert not wal.exists() or wal.stat().st_size == 0
    assert len(stored_votes(folder)) == 2


def test_two_threads_voting_the_same_trial_make_one_vote(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    study = make_small_study(tmp_path)
    store = VoteStore(database_path(tmp_path / "study"), study)
    rater = store.join()
    trial = store.next_turn(rater).trial.token
    answers = dict.fromkeys(QUESTIONS, "first")
    with ThreadPoolExecutor(8) as threads:
        turns = list(threads.map(lambda _: store.vote(rater, trial, answers, 1.0), range(40)))
    assert {turn.done for turn in turns} == {1}
    assert len(store.all_votes()) == 1
    store.close()


@pytest.mark.slow
def test_sustained_votes_per_second(big_study):
    """300 votes/s with full durability; skipped where other work fills the processors."""
    if os.getloadavg()[0] > 1:
        pytest.skip(f"the machine is busy: load {os.getloadavg()[0]:.1f}")
    acknowledged = {}

    async def storm(base, link):
        began = time.monotonic()
        deadline = began + 10
        await asyncio.gather(*(rate(base, link, acknowledged, deadline) for _ in range(NUM_RATERS)))
        return len(acknowledged) / (time.monotonic() - began)

    with running(big_study) as (_, base, link, _):
        speed = asyncio.run(storm(base, link))
    assert speed >= 300, f"{speed:.0f} votes/s"


def test_results_come_from_a_second_process_while_serving(tmp_path):
    from typer.testing import CliRunner

    from nabla_attn.cli import app

    make_small_study(tmp_path)
    folder = tmp_path / "study"
    with running(folder) as (_, base, link, admin):
        _, joined = fetch(f"{base}/api/s/{link}/raters", {})
        _, turn = fetch(f"{base}/api/next", X_Rater=joined["rater"])
        # To the end: the first pair shown may be a control.
        while "trial" in turn:
            vote = ballot(turn["trial"], "both_good")
            _, turn = fetch(f"{base}/api/votes", vote, X_Rater=joined["rater"])
        output = tmp_path / "out"
        asked = ["vote", "results", str(folder), "--output", str(output), "--min-controls", "0"]
        result = CliRunner().invoke(app, asked, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "synthetic raters" in result.output
    assert "…" not in result.output
    assert {path.name for path in output.iterdir()} == {"results.json", "votes.csv", "chart.png"}
    assert Study.load(folder).admin_token == admin


def test_a_link_for_others_has_the_name_of_the_machine(tmp_path, monkeypatch):
    import socket

    from typer.testing import CliRunner

    from nabla_attn.cli import app
    from nabla_attn.vote import server

    make_small_study(tmp_path)
    monkeypatch.setattr(server, "run_server", lambda application, bound: bound.close())
    for host, shown in (("0.0.0.0", socket.gethostname()), ("127.0.0.1", "127.0.0.1")):
        asked = ["vote", str(tmp_path / "study"), "--host", host, "--port", "0"]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        assert f"For raters:  http://{shown}:" in result.output


def test_asking_for_what_is_not_there(tmp_path):
    from typer.testing import CliRunner

    from nabla_attn.cli import app

    for args in (["vote", "nowhere"], ["vote", "results", "nowhere"]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 2
        assert "nabla vote make" in result.output
    assert CliRunner().invoke(app, ["vote", "--help"]).exit_code == 0


def test_results_before_any_vote_are_written_without_a_chart(tmp_path):
    from typer.testing import CliRunner

    from nabla_attn.cli import app

    study = make_small_study(tmp_path)
    VoteStore(database_path(tmp_path / "study"), study).close()
    output = tmp_path / "out"
    asked = ["vote", "results", str(tmp_path / "study"), "--output", str(output)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "without a chart" in result.output
    assert {path.name for path in output.iterdir()} == {"results.json", "votes.csv"}


def test_a_taken_port_and_a_foreign_host_are_named_with_a_remedy():
    taken = listen("127.0.0.1", 0)
    taken.listen()
    for host, port in (("127.0.0.1", taken.getsockname()[1]), ("192.0.2.1", 0)):
        with pytest.raises(ValueError, match=rf"{host}, port {port}: .*--host and --port"):
            listen(host, port)
    taken.close()
