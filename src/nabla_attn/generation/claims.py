"""Claims on pieces of work through a shared folder: ranks and machines never do one twice.

A claim is a file that only one process can create (``O_EXCL``). A later claim on the same work has
the next number and may be created once the one before is stale, so a takeover is one atomic step
too and no claim is ever renamed or rewritten. All go once the work is done.
"""

import itertools
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

BEAT_SECONDS = 30
"""How often the owner touches its claim."""
STALE_SECONDS = 600
"""Age at which an untouched claim lapses. On the owner's machine its end is seen at once."""


class Claim:
    """One process's right to do one piece of work; a context that keeps it fresh.

    Leaving the context lets the claim lapse, or removes all claims on work that was finished.

    Args:
        path: the claim's file, created by this process.
        token: what tells this claim from another of the same path.
    """

    def __init__(self, path: Path, token: str) -> None:
        self.path, self._token = path, token
        self._is_finished = False
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_fresh, daemon=True)

    def __enter__(self) -> "Claim":
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beat.join()
        if self._is_finished:
            for path in self.path.parent.glob(f"{self.path.stem}.claim-*"):
                path.unlink(missing_ok=True)
        elif self.is_mine():
            # As old as can be: the next process need not wait.
            os.utime(self.path, (0, 0))

    def is_mine(self) -> bool:
        """Whether nobody took the claim over, as happens to a machine that was suspended."""
        return _read(self.path).get("token") == self._token and not _next(self.path).exists()

    def finish(self) -> None:
        """Say that the work is done and visible to others."""
        self._is_finished = True

    def _keep_fresh(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)


def take(folder: Path, name: str) -> Claim | None:
    """Claim the work ``name``; None if another process has it.

    Look whether the work is done after claiming it: its claims are removed then.

    Args:
        folder: shared by all who do the work; must exist.
        name: of the work, without dots.

    Raises:
        OSError: the folder cannot be written.
    """
    token = uuid.uuid4().hex
    owner = {"host": _host(), "pid": os.getpid(), "time": time.time(), "token": token}
    for number in itertools.count():
        path = folder / f".{name}.claim-{number}"
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if not is_stale(path):
                return None
            continue
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write(json.dumps(owner))
        return Claim(path, token)
    raise AssertionError("numbers do not end")


def is_stale(path: Path) -> bool:
    """Whether a claim's owner ended on this machine, or has not touched it for `STALE_SECONDS`.

    A claim that is gone was finished, so it is not stale.
    """
    owner = _read(path)
    if owner.get("host") == _host() and not _is_alive(owner.get("pid")):
        return True
    try:
        return _now(path.parent) - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False


def _next(path: Path) -> Path:
    stem, number = path.name.rsplit("-", 1)
    return path.with_name(f"{stem}-{int(number) + 1}")


def _read(path: Path) -> dict:
    """The owner; nothing if the claim is gone or was never written whole."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _now(folder: Path) -> float:
    """The time by the clock that stamps files in the folder; machines' own clocks differ."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@cache
def _host() -> str:
    """Where a pid means the same process: host, boot, and process namespace of containers."""
    parts = [socket.gethostname(), f"{uuid.getnode():x}"]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_alive(pid: object) -> bool:
    import psutil

    try:
        # A killed process that nobody waits for stays as a zombie.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # type: ignore[arg-type]
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
    except psutil.Error:
        return True
