"""A list of items made by many processes and machines, each item once.

Two engines do it. `locks`, the default, needs nothing but a folder that all processes see: each of
them runs the same command, locks an item while it makes it, and the system frees the lock when the
process ends, however it ends. `ray` hands the items of one command to the workers of a Ray cluster,
each of which loads its model once; an item whose worker is killed goes to another one. Workers lock
what they make too, so that both engines may be at one folder.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nabla_attn.cost.memory import force_memory, memory_is_forced

ENGINES = ("locks", "ray")
WAIT_SECONDS = 2.0
MAX_CRASHES = 3
"""Workers that one item may cost: what kills them all is damaged, or too large for the machine."""

Make = Callable[[str], Any]
"""Makes the item of a name, and returns what its caller reports."""


@dataclass(frozen=True)
class SharedWork:
    """What there is to do. Ray sends it to other processes, so all of it can be pickled.

    Attributes:
        folder: The folder of the items, which all processes see.
        items: Names of the items; their locks and temporary files begin with a dot and the name.
        start: Loads what is needed and returns the function that makes an item; called once in each
            process, when its first item is due.
        is_done: Whether the item of a name is finished.
        failures: Errors that are an item's own and stop no other item; all others end the work.
        is_forced: Whether memory is forced, as where the work was described: Ray's workers are
            other processes.
    """

    folder: Path
    items: Sequence[str]
    start: Callable[[], Make]
    is_done: Callable[[str], bool]
    failures: tuple[type[Exception], ...] = ()
    is_forced: bool = field(default_factory=memory_is_forced)


@dataclass
class Shared:
    """What became of each item, by name.

    Attributes:
        made: Items that this command made.
        there: Items that were finished before, or by another process meanwhile.
        failed: Items that failed, with the reason.
        elsewhere: Items that another process was still at in the end.
    """

    made: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


OnItem = Callable[[str, Any], None]
"""Called with an item's name and what `Make` returned, or with a `Failure`."""


class Failure(str):
    """Why an item failed, in one line."""


def share_work(
    work: SharedWork,
    engine: str = "locks",
    *,
    wait: bool = False,
    workers: int | None = None,
    has_gpus: bool = True,
    on_item: OnItem = lambda name, result: None,
) -> Shared:
    """Make the items that are neither finished nor being made by another process.

    Args:
        work: The items, and how one is made.
        engine: `locks` works in this process; `ray` on the cluster that `RAY_ADDRESS` names, or
            without one on this machine.
        wait: Whether to stay until nobody is at an item, to take over from those that end early.
        workers: Number of Ray's workers; None takes one for each GPU, or for each machine where
            there is none.
        has_gpus: Whether each of Ray's workers takes a GPU, where the cluster has them.
        on_item: Told about each item made here or failed.

    Raises:
        ValueError: The engine is unknown or not installed, or does not take a number of workers.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}. Known: {', '.join(ENGINES)}.")
    if engine == "ray":
        return _RayDriver(work, workers, has_gpus, on_item).run(wait)
    if workers is not None:
        raise ValueError("a number of workers is for --engine ray; start more processes instead.")
    return _share_by_locks(work, wait, on_item)


def _share_by_locks(work: SharedWork, wait: bool, on_item: OnItem) -> Shared:
    shared, worker = Shared(), _Worker(work)
    left = list(work.items)
    while left:
        busy = [name for name in left if not _note(shared, name, worker.take(name), on_item)]
        if len(busy) == len(left):
            if not wait:
                break
            time.sleep(WAIT_SECONDS)
        left = busy
    shared.elsewhere = left
    return shared


def _note(shared: Shared, name: str, taken: tuple[str, Any], on_item: OnItem) -> bool:
    """Sort in what became of an item; False if another process is at it."""
    state, result = taken
    if state == "busy":
        return False
    if state == "there":
        shared.there.append(name)
        return True
    if state == "failed":
        result = shared.failed[name] = Failure(result)
    else:
        shared.made.append(name)
    on_item(name, result)
    return True


class _Worker:
    """Makes items in one process, with what it has loaded for the first."""

    def __init__(self, work: SharedWork) -> None:
        self._work = work
        self._make: Make | None = None

    def take(self, name: str) -> tuple[str, Any]:
        """Make an item if nobody else has made it or is at it.

        Returns:
            "made" with what `Make` returned, "there", "busy", or "failed" with the reason.
        """
        with force_memory(self._work.is_forced):
            return self._take(name)

    def _take(self, name: str) -> tuple[str, Any]:
        work = self._work
        if work.is_done(name):
            return "there", None
        if self._make is None:
            self._make = work.start()
        work.folder.mkdir(parents=True, exist_ok=True)
        path = work.folder / f".{name}.lock"
        try:
            with FileLock(path, blocking=False):
                if work.is_done(name):
                    return "there", None
                # What a killed process was writing.
                for leftover in work.folder.glob(f".{name}.*.tmp"):
                    leftover.unlink(missing_ok=True)
                return "made", self._make(name)
        except Timeout:
            return "busy", None
        except NotImplementedError as error:
            raise ValueError(
                f"{work.folder} is on a file system without locks. Choose one that has them, such "
                "as NFS 4, or Lustre with -o flock."
            ) from error
        except work.failures as error:
            return "failed", " ".join(str(error).split()) or type(error).__name__
        finally:
            # Who still opens it finds the item done; before that, removing it would let two work.
            if work.is_done(name):
                path.unlink(missing_ok=True)


class _RayDriver:
    """Hands items to the workers of a Ray cluster."""

    def __init__(
        self, work: SharedWork, workers: int | None, has_gpus: bool, on_item: OnItem
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"at least one worker is needed, got {workers}.")
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: pip install nabla-attn[ray]") from error
        self._ray = ray
        self._work, self._on_item = work, on_item
        self._num_workers, self._has_gpus = workers, has_gpus
        self._shared = Shared()
        self._crashes: Counter[str] = Counter()

    def run(self, wait: bool) -> Shared:
        """Make all items."""
        left = [name for name in self._work.items if not self._work.is_done(name)]
        self._shared.there = [name for name in self._work.items if name not in set(left)]
        if not left:
            return self._shared
        is_own = not self._ray.is_initialized()
        if is_own:
            # Nothing is reported to anybody.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(
                include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        idle: list[Any] = []
        try:
            start = self._worker_starter(len(left))
            while left:
                busy = self._hand_out(left, idle, start)
                if len(busy) == len(left):
                    if not wait:
                        break
                    time.sleep(WAIT_SECONDS)
                left = busy
            self._shared.elsewhere = left
        finally:
            for worker in idle:
                self._ray.kill(worker)
            if is_own:
                self._ray.shutdown()
        return self._shared

    def _worker_starter(self, most: int) -> Callable[[], Any]:
        """A function that starts a worker; sets how many there are."""
        ray = self._ray
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0)) if self._has_gpus else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = min(self._num_workers or gpus or len(nodes), most)
        self._num_workers = count
        # A worker's threads follow from its share of the CPUs; it must fit into one machine.
        share = int(total.get("CPU", 1)) // count
        cpus = max(1, min(share, *(int(node.get("CPU", 1)) for node in nodes)))
        options = {"num_cpus": cpus, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
        actor = ray.remote(_Worker).options(**options)
        work = ray.put(self._work)
        return lambda: actor.remote(work)

    def _hand_out(self, names: list[str], idle: list[Any], start: Callable[[], Any]) -> list[str]:
        """Let the workers try each item; those that other processes are at come back."""
        ray = self._ray
        queue, busy = deque(names), []
        at_work: dict[Any, tuple[Any, str]] = {}
        assert self._num_workers is not None
        try:
            while queue or at_work:
                while queue and len(at_work) < self._num_workers:
                    worker = idle.pop() if idle else start()
                    name = queue.popleft()
                    at_work[worker.take.remote(name)] = worker, name
                (done, *_), _ = ray.wait(list(at_work))
                worker, name = at_work.pop(done)
                try:
                    taken = ray.get(done)
                except ray.exceptions.RayActorError:
                    self._crashes[name] += 1
                    if self._crashes[name] < MAX_CRASHES:
                        queue.append(name)
                        continue
                    taken = "failed", f"it ended {MAX_CRASHES} workers, such as by lack of memory."
                except ray.exceptions.RayTaskError as error:
                    idle.append(worker)
                    raise getattr(error, "cause", error) from None
                else:
                    idle.append(worker)
                if not _note(self._shared, name, taken, self._on_item):
                    busy.append(name)
        finally:
            idle += [worker for worker, _ in at_work.values()]
        return busy
