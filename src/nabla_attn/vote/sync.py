"""Waiting for the disk, together."""

import itertools
import os
import threading


class SharedSync:
    """Brings a log file to the disk; callers who wait at the same time share one fsync.

    SQLite would wait for the disk inside each transaction, one after the other.

    Args:
        path: the file; it exists and is not replaced while this lives.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._syncing = threading.Lock()
        self._tickets = itertools.count(1)
        self._asked = self._synced = 0

    def sync(self) -> None:
        """Return once everything written before this call is on disk."""
        # Threads may set `_asked` out of order; too low a value only costs one more fsync.
        ticket = self._asked = next(self._tickets)
        with self._syncing:
            if self._synced >= ticket:
                return
            upto = self._asked
            os.fsync(self._file)
            self._synced = max(self._synced, upto)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
