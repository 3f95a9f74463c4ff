import json
import re
import shutil
import sqlite3
import stat
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from fastapi.testclient import TestClient
from tests.vote.study_helpers import ballot, make_small_study

from nabla_attn.vote.app import create_app
from nabla_attn.vote.study import Study, database_path, videos_folder

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> {}"


@pytest.fixture
def folder(tmp_path):
    make_small_study(tmp_path, pairs_per_rater=3, num_repeats=1, num_controls=1)
    return tmp_path / "study"


@pytest.fixture
def study(folder):
    return Study.load(folder)


@pytest.fixture
def client(folder):
    with TestClient(create_app(folder)) as client:
        yield client


def join(client, study):
    answer = client.post(f"/api/s/{study.link_token}/raters", json={})
    assert answer.status_code == 201
    return {"X-Rater": answer.json()["rater"]}


def vote_all(client, rater, answer="first"):
    turn, turns = client.get("/api/next", headers=rater).json(), []
    while "trial" in turn:
        turns.append(turn)
        turn = client.post("/api/votes", json=ballot(turn["trial"], answer), headers=rater).json()
    return turns


def test_a_rater_sees_each_pair_once_and_repeats_once_more(client, study):
    for _ in range(4):
        turns = vote_all(client, join(client, study))
        assert len(turns) == 3 + 1 + 1 == turns[0]["total"]
        assert [turn["done"] for turn in turns] == list(range(5))
        assert len({turn["trial"] for turn in turns}) == 5
    rows = votes_of(client)
    for rater in range(1, 5):
        shown = Counter((row.pair_id, row.is_repeat) for row in rows if row.rater_id == rater)
        assert set(shown.values()) == {1}
        assert sum(is_repeat for _, is_repeat in shown) == 1
    # 4 raters x 3 of 4 pairs: each pair is given three times.
    real = {pair.id for pair in study.pairs if not pair.is_control}
    given = Counter(row.pair_id for row in rows if row.pair_id in real and not row.is_repeat)
    assert set(given.values()) == {3}


def votes_of(client):
    """Rows straight from the database behind a client."""
    from nabla_attn.vote.database import VoteStore
    from nabla_attn.vote.study import database_path

    folder = client.app.state.folder
    store = VoteStore(database_path(folder), Study.load(folder))
    return store.all_votes()


def test_order_and_sides_differ_between_raters(client, study):
    for _ in range(12):
        vote_all(client, join(client, study))
    rows = votes_of(client)
    ways = {tuple(row.pair_id for row in rows if row.rater_id == rater) for rater in range(1, 13)}
    assert len(ways) > 6
    sides = Counter(row.is_swapped for row in rows)
    assert min(sides.values()) > 10
    for row in rows:
        if row.is_repeat:
            first = next(r for r in rows if (r.rater_id, r.pair_id) == (row.rater_id, row.pair_id))
            assert first.is_swapped != row.is_swapped


def test_resume_goes_on_where_the_rater_stopped(client, study, folder):
    rater = join(client, study)
    first = client.get("/api/next", headers=rater).json()
    client.post("/api/votes", json=ballot(first["trial"]), headers=rater)
    second = client.get("/api/next", headers=rater).json()
    assert second["done"] == 1
    with TestClient(create_app(folder)) as later:
        assert later.get("/api/next", headers=rater).json() == second


def test_a_vote_counts_once(client, study):
    rater = join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    once = client.post("/api/votes", json=ballot(trial), headers=rater)
    again = client.post("/api/votes", json=ballot(trial), headers=rater)
    assert once.status_code == again.status_code == 200
    assert once.json() == again.json()
    other = client.post("/api/votes", json=ballot(trial, "second"), headers=rater)
    assert other.status_code == 409
    assert [row.overall for row in votes_of(client)] == ["first"]


def test_nothing_tells_the_videos_apart(client, study, folder):
    rater = join(client, study)
    page = client.get(f"/s/{study.link_token}")
    turn = client.get("/api/next", headers=rater)
    videos = [
        client.get(f"/api/video/{turn.json()['trial']}/{side}", headers=rater)
        for side in ("first", "second")
    ]
    script = client.get("/static/vote.js")
    sent = "".join(
        f"{answer.headers}{'' if answer in videos else answer.text}"
        for answer in (page, turn, script, *videos)
    )
    # A header, and the name of a held key's events.
    sent = sent.replace("cache-control", "").replace("event.repeat", "")
    for word in ("dense", "nabla", "control", "repeat", "swapped", "baseline", "damaged"):
        assert word not in sent, word
    for pair in study.pairs:
        assert pair.id not in sent
        assert pair.baseline_video not in sent
    # No answer carries the time of a file: dense videos are generated first.
    assert all("last-modified" not in answer.headers for answer in videos)
    assert {path.stat().st_mtime for path in videos_folder(folder).iterdir()} == {0}


def test_both_sides_serve_the_pair(client, study, folder):
    rater = join(client, study)
    turn = client.get("/api/next", headers=rater).json()
    bodies = {
        client.get(f"/api/video/{turn['trial']}/{side}", headers=rater).content
        for side in ("first", "second")
    }
    files = {
        frozenset(
            (videos_folder(folder) / name).read_bytes()
            for name in (pair.baseline_video, pair.method_video)
        )
        for pair in study.pairs
    }
    assert frozenset(bodies) in files
    assert len(bodies) == 2


def test_tokens_open_only_their_door(client, study):
    rater, other = join(client, study), join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    refused = [
        client.get("/s/wrong"),
        client.get(f"/s/{study.admin_token}"),
        client.get("/s/%C3%A9"),
        client.post("/api/s/wrong/raters", json={}),
        client.get("/api/next", headers={"X-Rater": "0" * 32}),
        client.get(f"/api/video/{trial}/first", headers=other),
        client.get(f"/api/video/{trial}/third", headers=rater),
        client.post("/api/votes", json=ballot(trial), headers=other),
        client.get(f"/results/{study.link_token}"),
        client.get(f"/results/{study.link_token}/votes.csv"),
        client.get("/docs"),
        client.get("/openapi.json"),
        client.get("/"),
    ]
    assert [answer.status_code for answer in refused] == [404] * len(refused)
    assert client.get("/api/next").status_code == 422
    assert client.get(f"/api/video/{trial}/first").status_code == 422
    assert votes_of(client) == []


def test_only_files_of_the_study_are_served(client, study):
    rater = join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    for path in (
        "/static/../study.json",
        "/static/%2e%2e%2fserver.py",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/static/vote.html",
        f"/api/video/{trial}/..%2f..%2fstudy.json",
        "/videos/" + study.pairs[0].baseline_video,
        "/study.json",
    ):
        assert client.get(path, headers=rater).status_code == 404, path


def test_other_sites_cannot_act(client, study):
    rater = join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    evil = {"Origin": "https://evil.example"}
    assert client.post("/api/votes", json=ballot(trial), headers=rater | evil).status_code == 403
    address = f"/api/s/{study.link_token}/raters"
    assert client.post(address, json={}, headers=evil).status_code == 403
    assert client.post(address, data={"a": "b"}).status_code == 415
    text = {"Content-Type": "text/plain"}
    sent = client.post("/api/votes", content=json.dumps(ballot(trial)), headers=rater | text)
    assert sent.status_code == 415
    preflight = client.options(
        "/api/votes", headers=evil | {"Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers
    own = {"Origin": "http://testserver"}
    assert client.post("/api/votes", json=ballot(trial), headers=rater | own).status_code == 200
    assert not client.cookies


def malformed(trial):
    good = ballot(trial)
    yield b""
    yield b"{"
    yield b"\xff\xfe"
    yield b"[" * 2000
    yield b"null"
    for changes in (
        {"overall": "third"},
        {"overall": None},
        {"overall": ["first"]},
        {"seconds": -1},
        {"seconds": "1"},
        {"seconds": 1e400},
        {"trial": "../../etc/passwd"},
        {"trial": 5},
        {"admin": True},
    ):
        yield json.dumps(good | changes).encode()
    yield json.dumps({key: good[key] for key in list(good)[:-1]}).encode()


def test_malformed_bodies_are_refused(client, study):
    rater = join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    headers = rater | {"Content-Type": "application/json"}
    for body in malformed(trial):
        answer = client.post("/api/votes", content=body, headers=headers)
        assert answer.status_code in (400, 422), body[:80]
        assert isinstance(answer.json()["detail"], str)
    assert votes_of(client) == []


def test_oversized_bodies_are_refused_whatever_they_claim(client, study):
    rater = join(client, study) | {"Content-Type": "application/json"}
    assert client.post("/api/votes", content=b" " * 5000, headers=rater).status_code == 413

    def chunks():
        for _ in range(100):
            yield b" " * 1000

    assert client.post("/api/votes", content=chunks(), headers=rater).status_code == 413
    for length in ("-1", "x", "9" * 30):
        answer = client.post(
            "/api/votes", content=b"{}", headers=rater | {"Content-Length": length}
        )
        assert answer.status_code == 413


def test_strict_headers_on_every_answer(client, study):
    for path in (f"/s/{study.link_token}", "/static/vote.js", "/nowhere", "/api/next"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_script_in_a_prompt_stays_text(tmp_path):
    study = make_small_study(tmp_path, prompt=EVIL, num_repeats=0, num_controls=0)
    with TestClient(create_app(tmp_path / "study")) as client:
        rater = join(client, study)
        turn = client.get("/api/next", headers=rater)
        assert turn.headers["content-type"] == "application/json"
        assert turn.json()["prompt"].startswith("<script>")
        vote_all(client, rater)
        assert "<script>alert" not in client.get(f"/results/{study.admin_token}").text


def test_formulas_in_a_prompt_stay_text_in_csv(tmp_path):
    study = make_small_study(tmp_path, prompt='=HYPERLINK("x") {}', num_repeats=0, num_controls=0)
    with TestClient(create_app(tmp_path / "study")) as client:
        vote_all(client, join(client, study))
        csv = client.get(f"/results/{study.admin_token}/votes.csv")
        assert csv.headers["content-type"].startswith("text/csv")
        assert len(csv.text.splitlines()) == 5
        assert ",=HYPER" not in csv.text.replace('"', "")


def test_the_study_fills_up(tmp_path):
    study = make_small_study(tmp_path)
    replace(study, max_raters=2).save(tmp_path / "study")
    with TestClient(create_app(tmp_path / "study")) as client:
        join(client, study), join(client, study)
        full = client.post(f"/api/s/{study.link_token}/raters", json={})
        assert full.status_code == 409
        assert "all its raters" in full.json()["detail"]


def test_a_place_whose_rater_never_votes_is_free_again(tmp_path):
    study = replace(make_small_study(tmp_path), max_raters=2)
    study.save(tmp_path / "study")
    with TestClient(create_app(tmp_path / "study")) as client:
        idle, voted = join(client, study), join(client, study)
        turn = client.get("/api/next", headers=voted).json()
        assert client.post("/api/votes", json=ballot(turn["trial"]), headers=voted).is_success
        with sqlite3.connect(database_path(tmp_path / "study")) as database:
            database.execute("UPDATE raters SET created = '2020-01-01T00:00:00.000+00:00'")
        join(client, study)
        link = f"/api/s/{study.link_token}/raters"
        assert client.post(link, json={}).status_code == 409
        # Whoever comes back late is still known.
        assert len(vote_all(client, idle)) > 0


WRONG = {
    "pairs": [{}, "pairs", None, []],
    "fps": ["abc", None, True, 0, -8, float("nan"), float("inf")],
    "title": [5, None, ["Which?"]],
    "baseline": [1],
    "pairs_per_rater": ["3", 2.5, -1, True],
    "link_token": [0],
}
WRONG_IN_A_PAIR = {"id": [1], "method_video": [7, None], "is_control": ["no", 1]}


def wrong_studies(values):
    """(the place that the message must name, a study with one fault there)."""
    yield "the whole", 3
    yield "admin", values | {"admin": 1}
    yield "schema", values | {"schema": 2}
    for name in ("title", "baseline", "pairs", "fps"):
        yield name, without(values, name)
    for name, wrongs in WRONG.items():
        for wrong in wrongs:
            yield name, values | {name: wrong}
    first, *others = values["pairs"]
    where = f"pairs.{len(others)}"
    yield where, values | {"pairs": [*others, None]}
    yield f"{where}.id", values | {"pairs": [*others, without(first, "id")]}
    yield f"{where}.more", values | {"pairs": [*others, first | {"more": 1}]}
    for name, wrongs in WRONG_IN_A_PAIR.items():
        for wrong in wrongs:
            yield f"{where}.{name}", values | {"pairs": [*others, first | {name: wrong}]}


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


def test_a_study_file_with_a_fault_is_refused_in_one_clear_line(folder):
    path = folder / "study.json"
    for place, values in wrong_studies(json.loads(path.read_text())):
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=re.escape(f"{path}: {place}: ")) as caught:
            Study.load(folder)
        assert "\n" not in str(caught.value)


def test_whole_numbers_and_missing_options_are_fine(folder):
    path = folder / "study.json"
    values = json.loads(path.read_text()) | {"fps": 8}
    del values["notice"], values["pairs"][0]["is_control"]
    path.write_text(json.dumps(values))
    assert Study.load(folder).fps == 8


def test_a_video_that_is_gone_is_said_so(client, study, folder):
    rater = join(client, study)
    trial = client.get("/api/next", headers=rater).json()["trial"]
    for path in videos_folder(folder).iterdir():
        path.unlink()
    answer = client.get(f"/api/video/{trial}/first", headers=rater)
    assert answer.status_code == 404
    assert "gone" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["what?x", "50%20x", "a#b", "mode=ro&x", "ü ö:@"])
def test_a_folder_may_have_any_name(tmp_path, name):
    make_small_study(tmp_path / name)
    folder = tmp_path / name / "study"
    with TestClient(create_app(folder)) as client:
        vote_all(client, join(client, Study.load(folder)))
        assert votes_of(client)
    assert (folder / "votes.sqlite3").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_database_is_refused_in_one_clear_line(folder, study):
    with TestClient(create_app(folder)) as client:
        vote_all(client, join(client, study))
    path = database_path(folder)
    whole = path.read_bytes()
    with sqlite3.connect(path) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'votes'"
        (page,) = database.execute(query).fetchone()
    no_votes = whole[: (page - 1) * size] + b"x" * size + whole[page * size :]
    for damaged in (b"not a database" * 1000, whole[: len(whole) // 2], no_votes):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            create_app(folder)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    create_app(folder)


def test_votes_of_another_study_are_refused(folder, study, tmp_path):
    with TestClient(create_app(folder)) as client:
        vote_all(client, join(client, study))
    make_small_study(tmp_path / "other")
    shutil.copyfile(database_path(folder), database_path(tmp_path / "other" / "study"))
    with pytest.raises(ValueError, match="votes of another study"):
        create_app(tmp_path / "other" / "study")


def test_the_study_file_is_private_and_checked(folder):
    path = folder / "study.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    values = json.loads(path.read_text())
    values["pairs"][0]["baseline_video"] = "../study.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="not a file in its videos folder"):
        Study.load(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"study\.json"):
        Study.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match="nabla vote make"):
        Study.load(folder)
