import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from nabla_attn import work_sharing
from nabla_attn.cost.memory import force_memory, memory_is_forced
from nabla_attn.files import is_whole, write_text
from nabla_attn.work_sharing import Failure, SharedWork, share_work

ITEMS = [f"item-{index}" for index in range(6)]


def start(folder: Path, kills: dict[str, int]):
    """Notes that a process loads, and what makes an item: it writes its name and by whom.

    Items in `kills` kill their process that many times first.
    """
    write_text(folder / f"loaded-{os.getpid()}", "x")

    def make(name: str) -> str:
        deaths = folder / f"deaths-{name}"
        if kills.get(name, 0) > (deaths.stat().st_size if deaths.exists() else 0):
            with deaths.open("a") as file:
                file.write("x")
            (folder / f".{name}.made.0123.tmp").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "item-fails":
            raise ValueError("a bad\nitem")
        with (folder / f"times-{name}").open("a") as file:
            file.write("x")
        time.sleep(0.05)
        write_text(folder / f"{name}.made", f"the content of {name}")
        return name.upper()

    return make


def is_done(folder: Path, name: str) -> bool:
    return is_whole(folder / f"{name}.made")


def work_in(folder, items=ITEMS, **kills):
    kills = {name.replace("_", "-"): count for name, count in kills.items()}
    load = partial(start, folder, kills)
    return SharedWork(folder, items, load, partial(is_done, folder), failures=(ValueError,))


def contents(folder):
    return {path.name: path.read_text() for path in folder.glob("*.made")}


EXPECTED = {f"{name}.made": f"the content of {name}" for name in ITEMS}


def test_locks_make_each_item_and_a_failure_is_its_own(tmp_path):
    told = {}
    items = [*ITEMS[:2], "item-fails", *ITEMS[2:]]
    shared = share_work(work_in(tmp_path, items), on_item=told.__setitem__)
    assert shared.made == ITEMS and shared.failed == {"item-fails": "a bad item"}
    assert told["item-0"] == "ITEM-0" and isinstance(told["item-fails"], Failure)
    assert contents(tmp_path) == EXPECTED and not list(tmp_path.glob(".*[!k]"))
    again = share_work(work_in(tmp_path))
    assert (again.made, again.there) == ([], ITEMS)
    assert len(list(tmp_path.glob("loaded-*"))) == 1


def test_other_errors_end_the_work(tmp_path):
    work = work_in(tmp_path, ["item-fails"])
    work = SharedWork(work.folder, work.items, work.start, work.is_done)
    with pytest.raises(ValueError, match="a bad"):
        share_work(work)


def test_what_is_asked_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"unknown engine 'slurm'. Known: locks, ray"):
        share_work(work_in(tmp_path), "slurm")
    with pytest.raises(ValueError, match="for --engine ray"):
        share_work(work_in(tmp_path), workers=2)


def test_without_ray_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install nabla-attn\[ray\]"):
        share_work(work_in(tmp_path), "ray")


@pytest.fixture(scope="module")
def ray():
    """A Ray of two CPUs on this machine, for all tests here."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install nabla-attn[ray]")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield ray
    ray.shutdown()


def test_ray_makes_what_killed_workers_left(ray, tmp_path):
    told = {}
    work = work_in(tmp_path, item_1=1, item_4=2)
    shared = share_work(work, "ray", workers=2, on_item=told.__setitem__)
    assert sorted(shared.made) == ITEMS and not shared.failed
    assert contents(tmp_path) == EXPECTED
    assert all((tmp_path / f"times-{name}").read_text() == "x" for name in ITEMS)
    assert not list(tmp_path.glob(".*")) and told["item-4"] == "ITEM-4"
    # Two at first, and one for each that was killed: none loads for every item.
    assert 3 <= len(list(tmp_path.glob("loaded-*"))) <= 5
    again = share_work(work, "ray", workers=2)
    assert (again.made, again.there) == ([], ITEMS)


@pytest.mark.slow
def test_ray_gives_up_what_kills_every_worker_and_goes_on(ray, tmp_path):
    items = ["item-0", "item-fails", "item-1"]
    shared = share_work(work_in(tmp_path, items, item_0=99), "ray", workers=1)
    assert shared.made == ["item-1"] and list(shared.failed) == ["item-fails", "item-0"]
    assert "ended 3 workers" in shared.failed["item-0"]


@pytest.mark.slow
def test_rays_workers_leave_what_is_locked_to_others(ray, tmp_path):
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, tmp_path / ".item-0.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        shared = share_work(work_in(tmp_path, ITEMS[:2]), "ray", workers=1)
        holder.kill()
    assert (shared.made, shared.elsewhere) == (["item-1"], ["item-0"])


@pytest.mark.slow
def test_rays_workers_hand_on_what_ends_the_work(ray, tmp_path):
    work = work_in(tmp_path, ["item-fails"])
    work = SharedWork(work.folder, work.items, work.start, work.is_done)
    with pytest.raises(ValueError, match="a bad"):
        share_work(work, "ray")


@pytest.mark.parametrize("is_forced", [True, False])
def test_workers_force_memory_where_the_command_does(tmp_path, is_forced):
    with force_memory(is_forced):
        work = SharedWork(tmp_path, ["a"], lambda: lambda _: memory_is_forced(), lambda _: False)
    # Ray's workers are other processes.
    assert work_sharing._Worker(work).take("a") == ("made", is_forced)
