"""What a power cut or a failing disk leaves of votes and checkpoints: see `power_cut.py`."""

import hashlib
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.power_cut import Disk


def test_acknowledged_votes_outlive_a_power_cut(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("sqlalchemy")
    from tests.vote.study_helpers import make_small_study, running

    from nabla_attn.vote.database import VoteStore
    from nabla_attn.vote.study import database_path

    study = make_small_study(tmp_path, num_prompts=40, pairs_per_rater=40)
    folder, disk = tmp_path / "study", Disk(tmp_path / "study", tmp_path)
    acknowledged = {}
    with running(folder, environment=disk.environment) as (process, base, link, _):
        raters = [
            threading.Thread(target=_vote_until_it_dies, args=(base, link, acknowledged))
            for _ in range(8)
        ]
        for rater in raters:
            rater.start()
        while len(acknowledged) < 150:  # in the middle of votes, and past a checkpoint or two
            raters[0].join(0.01)
        process.kill()
        for rater in raters:
            rater.join()
    for seed in range(8):
        restored = disk.restore(tmp_path / f"cut-{seed}", seed)
        store = VoteStore(database_path(restored), study)
        stored = {(row.rater_id, row.position) for row in store.all_votes()}
        with store._engine.connect() as connection:
            kept = set(connection.exec_driver_sql("SELECT trial FROM votes").scalars())
        assert acknowledged.keys() <= kept
        assert len(stored) == len(kept)
        store.close()


def _vote_until_it_dies(base, link, acknowledged):
    from tests.vote.study_helpers import ballot, fetch

    try:
        _, joined = fetch(f"{base}/api/s/{link}/raters", {})
        _, turn = fetch(f"{base}/api/next", X_Rater=joined["rater"])
        while "trial" in turn:
            status, following = fetch(
                f"{base}/api/votes", ballot(turn["trial"]), X_Rater=joined["rater"]
            )
            assert status == 200
            acknowledged[turn["trial"]] = True
            turn = following
    except (OSError, json.JSONDecodeError):
        pass


def test_votes_whose_write_failed_are_not_acknowledged_even_by_a_later_fsync(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("sqlalchemy")
    from tests.vote.study_helpers import ballot, fetch, make_small_study, running

    make_small_study(tmp_path)
    folder, disk = tmp_path / "study", Disk(tmp_path / "study", tmp_path)
    with running(folder, environment=disk.environment) as (process, base, link, _):
        _, joined = fetch(f"{base}/api/s/{link}/raters", {})
        rater = {"X_Rater": joined["rater"]}
        _, turn = fetch(f"{base}/api/next", **rater)
        disk.fail_once()
        for _ in range(3):
            status, said = fetch(f"{base}/api/votes", ballot(turn["trial"]), **rater)
            assert (status, "disk has failed" in said["detail"]) == (503, True)
            assert disk.has_failed()
        process.terminate()
        said = process.stderr.read()
    assert said.count("The disk failed") == 1
    assert "Traceback" not in said
    with running(folder) as (_, base, _, _):
        status, _ = fetch(f"{base}/api/votes", ballot(turn["trial"]), **rater)
        assert status == 200


SAVE = """
import sys
from pathlib import Path
from nabla_attn.training.checkpoint import Checkpoints, SaveFailed

def write(step):
    def into(folder):
        for name in ("weights", "optimiser"):
            (folder / f"{name}.safetensors").write_bytes(f"{name} {step} ".encode() * 20_000)
    return into

checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range(1, 10**6):
    try:
        checkpoints.save(step, {"validation": 1 / step}, write(step))
        print("saved", step, flush=True)
    except SaveFailed as error:
        print("failed", step, error, flush=True)
"""


@pytest.fixture
def saving(tmp_path):
    """A process that saves checkpoints without end, on a disk that can fail."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    disk = Disk(tmp_path / "run", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(disk),
    )
    yield process, disk
    process.kill()
    process.communicate()


def _environment(disk):
    import os

    return os.environ | disk.environment


def test_a_saved_checkpoint_outlives_a_power_cut(saving, tmp_path):
    from nabla_attn.training.checkpoint import Checkpoints, read_state

    process, disk = saving
    lines = [process.stdout.readline() for _ in range(6)]
    process.kill()
    lines += process.stdout.readlines()
    last = int(re.findall(r"saved (\d+)\n", "".join(lines))[-1])
    for seed in range(4):
        restored = disk.restore(tmp_path / f"cut-{seed}", seed)
        latest = Checkpoints(restored / "checkpoints").latest()
        step = read_state(latest)["step"]
        assert step >= last
        assert _contents(latest) == _expected(step)


def _contents(folder):
    return {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).glob("*.safetensors")
    }


def _expected(step):
    return {
        name: hashlib.sha256(f"{name} {step} ".encode() * 20_000).hexdigest()
        for name in ("weights", "optimiser")
    }


def test_a_checkpoint_that_cannot_be_brought_to_the_disk_is_no_checkpoint(saving):
    from nabla_attn.training.checkpoint import Checkpoints

    process, disk = saving
    assert process.stdout.readline() == "saved 1\n"
    disk.fail_once()
    line = process.stdout.readline()
    while line.startswith("saved"):
        line = process.stdout.readline()
    failed = re.match(r"failed (\d+) .*Input/output error.* is the last good one\.\n", line)
    assert failed, line
    folder = disk.watched / "checkpoints"
    assert not (folder / f"step-{int(failed[1]):08d}").exists()
    assert process.stdout.readline().startswith("saved")
    process.kill()
    assert Checkpoints(folder).latest() is not None
