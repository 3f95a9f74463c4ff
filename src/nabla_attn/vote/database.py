"""Raters, trials and votes in SQLite: a vote that was acknowledged is on the disk."""

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, func, insert, select

from nabla_attn.vote.study import QUESTIONS, Study, draw_assignments, new_token
from nabla_attn.vote.tables import (
    ALL_VOTES,
    INSERT_VOTE,
    SUFFIXES,
    TRIALS_OF_RATER,
    Base,
    Rater,
    Trial,
    Vote,
    check_study,
    check_whole,
    one_line_errors,
    placed_raters,
    timestamp,
)


@dataclass(frozen=True)
class Turn:
    """The trial that a rater judges next, and how far they are.

    Attributes:
        trial: Row of the trial, or None after the last one.
        done: Number of trials with a vote.
        total: Number of trials.
    """

    trial: Any
    done: int
    total: int


class StudyFull(Exception):
    """No more raters are admitted."""


class AlreadyVoted(Exception):
    """The trial has other answers already."""


class StorageFailed(Exception):
    """The disk refused to store votes, so nothing is acknowledged until the server restarts."""


class GroupSync:
    """Brings a log file to the disk; threads that wait at the same time share one `fsync`.

    SQLite would wait for the disk inside each transaction, one after the other.

    After one failure every later call fails too: the system reports a lost write once only, so a
    second `fsync` that succeeds says nothing about it.

    Args:
        path: The file. It exists and is not replaced while this object lives.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._syncing = threading.Lock()
        self._tickets = itertools.count(1)
        self._asked = self._synced = 0
        self._has_failed = False
        _sync_folder(path.parent)

    def sync(self) -> None:
        """Return once everything written before this call is on the disk.

        Raises:
            StorageFailed: It is not known to be, or an earlier call failed.
        """
        # Threads may set `_asked` out of order; too low a value only costs one more fsync.
        ticket = self._asked = next(self._tickets)
        with self._syncing:
            self.check()
            if self._synced >= ticket:
                return
            upto = self._asked
            try:
                os.fsync(self._file)
            except OSError as error:
                self._has_failed = True
                raise StorageFailed(error.strerror or str(error)) from error
            self._synced = max(self._synced, upto)

    def check(self) -> None:
        """Raise `StorageFailed` if a call of `sync` has failed."""
        if self._has_failed:
            raise StorageFailed("an earlier write was lost")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class VoteStore:
    """The database of one study, for one process with many threads.

    Every method raises `StorageFailed` after the disk has refused a write, and SQLAlchemy's
    `OperationalError` at once where another program has locked the database.

    Args:
        path: The SQLite file; created when missing, and readable by its owner only.
        study: The study whose votes it holds.

    Raises:
        ValueError: The file is damaged, cannot be opened, or holds the votes of another study.
    """

    def __init__(self, path: str | Path, study: Study) -> None:
        path = Path(path).resolve()
        self._study = study
        # SQLite lets one writer in; waiting here is cheaper than in its busy loop.
        self._writing = threading.Lock()
        with one_line_errors(path):
            _make_private(path)
            self._engine = _make_engine(path)
            # One connection stays open, or SQLite would remove the log after the last one.
            self._anchor = self._engine.connect()
            _prepare(self._anchor, path, study)
            self._log = GroupSync(path.with_name(f"{path.name}-wal"))

    def close(self) -> None:
        """Fold the log into the database file and close it."""
        with self._writing, self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        self._log.close()
        self._anchor.close()
        self._engine.dispose()

    def join(self) -> str:
        """Admit a rater, draw their trials, and return their token.

        Raises:
            StudyFull: `max_raters` have voted or joined recently.
        """
        self._log.check()
        token, placed = new_token(), placed_raters()
        with self._writing, self._engine.begin() as connection:
            count = connection.scalar(select(func.count()).select_from(placed.subquery()))
            if (count or 0) >= self._study.max_raters:
                raise StudyFull
            assigned = select(Trial.pair_id, func.count()).where(~Trial.is_repeat)
            # Raters without a place judged nothing, so their pairs do not count as assigned.
            assigned = assigned.where(Trial.rater_id.in_(placed)).group_by(Trial.pair_id)
            times = {pair_id: count for pair_id, count in connection.execute(assigned)}
            rater_id = connection.scalar(
                insert(Rater).values(token=token, created=timestamp()).returning(Rater.id)
            )
            drawn = draw_assignments(self._study, times, random.SystemRandom())
            rows = [
                {"token": new_token(), "rater_id": rater_id, "position": position} | vars(entry)
                for position, entry in enumerate(drawn)
            ]
            connection.execute(insert(Trial), rows)
        self._log.sync()
        return token

    def next_turn(self, rater: str) -> Turn | None:
        """Return the first trial without a vote; None for an unknown rater."""
        trials = self._trials_of(rater)
        return _turn(trials) if trials else None

    def find_trial(self, rater: str, trial: str) -> Any:
        """Return a trial of this rater, or None."""
        return next((row for row in self._trials_of(rater) if row.token == trial), None)

    def vote(self, rater: str, trial: str, answers: dict[str, str], seconds: float) -> Turn | None:
        """Store one vote in one transaction; it is on the disk when this returns.

        The same vote again changes nothing, so that a browser may retry.

        Returns:
            What comes next; None when the trial does not belong to this rater.

        Raises:
            AlreadyVoted: The trial has other answers already.
        """
        trials = self._trials_of(rater)
        if all(row.token != trial for row in trials):
            return None
        values = answers | {"trial": trial, "seconds": seconds, "created": timestamp()}
        with self._writing, self._engine.begin() as connection:
            if connection.execute(INSERT_VOTE, values).rowcount == 0:
                columns = [getattr(Vote, question) for question in QUESTIONS]
                stored = connection.execute(select(*columns).where(Vote.trial == trial)).one()
                if tuple(stored) != tuple(answers[question] for question in QUESTIONS):
                    raise AlreadyVoted
        self._log.sync()
        return _turn(trials, just_voted=trial)

    def all_votes(self) -> list[Any]:
        """Return every vote with its trial, oldest first, as rows with the columns of both."""
        with self._engine.connect() as connection:
            return list(connection.execute(ALL_VOTES))

    def _trials_of(self, rater: str) -> Sequence[Any]:
        self._log.check()
        with self._engine.connect() as connection:
            return connection.execute(TRIALS_OF_RATER, {"rater": rater}).all()


def _turn(trials: Sequence[Any], just_voted: str | None = None) -> Turn:
    pending = [row for row in trials if not row.has_vote and row.token != just_voted]
    return Turn(pending[0] if pending else None, len(trials) - len(pending), len(trials))


def _make_private(path: Path) -> None:
    """Create the file if it is missing, and let only its owner read it and its log."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for suffix in SUFFIXES:
        # Another owner's file is theirs to protect.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.with_name(f"{path.name}{suffix}").chmod(0o600)


def _make_engine(path: Path) -> Engine:
    # From its parts: in one string, signs of the path would be read as signs of an address.
    address = URL.create("sqlite", database=str(path))
    # No time-out: where another program holds the database, raters are told at once.
    engine = create_engine(address, pool_size=8, max_overflow=40, connect_args={"timeout": 0})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        # NORMAL leaves the waiting for the disk to `GroupSync`.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _prepare(connection: Any, path: Path, study: Study) -> None:
    """Check the file, create missing tables, and begin a new log."""
    with connection.begin():
        check_whole(connection)
        Base.metadata.create_all(connection)
        check_study(connection, path, study)
    # An earlier server may have lost writes in the middle of its log, and appending to that log
    # would lose ours with them after a power cut.
    busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
    connection.rollback()
    if busy:
        raise ValueError(f"another program reads or writes {path}. Wait for it, or stop it.")


def _sync_folder(folder: Path) -> None:
    """Bring the names of new files to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
