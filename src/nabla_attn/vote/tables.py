"""The tables of a study's votes, the queries on them, and reading them without writing."""

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    Select,
    UniqueConstraint,
    bindparam,
    create_engine,
    select,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from nabla_attn.vote.study import ANSWERS, QUESTIONS, Study

RESERVED = timedelta(hours=1)
"""How long a rater's place is reserved before the first vote; after it, the place is theirs."""

SUFFIXES = ("", "-wal", "-shm")
"""The files of a database: its own, its write-ahead log, and the index of that log."""


class Base(DeclarativeBase):
    """Base of all tables."""


class Rater(Base):
    """A person with an address of their own; no name is stored."""

    __tablename__ = "raters"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(unique=True)
    created: Mapped[str]


class Trial(Base):
    """One pair assigned to one rater, at most once as a first view and once as a repeat."""

    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("rater_id", "pair_id", "is_repeat"),
        UniqueConstraint("rater_id", "position"),
    )
    token: Mapped[str] = mapped_column(primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("raters.id"))
    position: Mapped[int]
    pair_id: Mapped[str]
    is_swapped: Mapped[bool]
    is_repeat: Mapped[bool]


class Vote(Base):
    """The answers to one trial; its key makes a second vote impossible."""

    __tablename__ = "votes"
    __table_args__ = tuple(
        CheckConstraint(f"{question} IN {ANSWERS!r}", name=f"{question}_is_an_answer")
        for question in QUESTIONS
    )
    trial: Mapped[str] = mapped_column(ForeignKey("trials.token"), primary_key=True)
    semantic: Mapped[str]
    visual: Mapped[str]
    motion: Mapped[str]
    overall: Mapped[str]
    seconds: Mapped[float]
    created: Mapped[str]


TRIALS_OF_RATER = (
    select(Trial.token, Trial.pair_id, Trial.is_swapped, Vote.trial.is_not(None).label("has_vote"))
    .join(Rater, Rater.id == Trial.rater_id)
    .join(Vote, Vote.trial == Trial.token, isouter=True)
    .where(Rater.token == bindparam("rater"))
    .order_by(Trial.position)
)
ALL_VOTES = (
    select(Trial.rater_id, Trial.position, Trial.pair_id, Trial.is_swapped, Trial.is_repeat)
    .add_columns(Vote.semantic, Vote.visual, Vote.motion, Vote.overall, Vote.seconds, Vote.created)
    .join(Vote, Vote.trial == Trial.token)
    .order_by(Vote.created, Trial.rater_id, Trial.position)
)
INSERT_VOTE = sqlite_insert(Vote).on_conflict_do_nothing()


def placed_raters() -> Select[Any]:
    """Select the raters whose places are taken: they voted, or joined less than `RESERVED` ago."""
    voted = select(Trial.rater_id).join(Vote, Vote.trial == Trial.token)
    return select(Rater.id).where((Rater.created > timestamp(-RESERVED)) | Rater.id.in_(voted))


def timestamp(shift: timedelta = timedelta()) -> str:
    """Return the UTC time, shifted, as text that sorts."""
    return (datetime.now(UTC) + shift).isoformat(timespec="milliseconds")


def read_votes(path: str | Path, study: Study) -> list[Any]:
    """Return the rows of `VoteStore.all_votes` without writing anything in the study's folder.

    Raises:
        ValueError: The file is damaged, cannot be read, or holds the votes of another study.
    """
    path = Path(path).resolve()
    with one_line_errors(path):
        try:
            return _read_votes(path, study)
        except OperationalError:
            # The log of a server that was killed cannot be read in a folder that is read-only.
            with tempfile.TemporaryDirectory(prefix="nabla-vote-") as folder:
                for suffix in SUFFIXES[:2]:
                    source = path.with_name(f"{path.name}{suffix}")
                    if source.is_file():
                        shutil.copyfile(source, Path(folder) / source.name)
                return _read_votes(Path(folder) / path.name, study)


def _read_votes(path: Path, study: Study) -> list[Any]:
    # Without a log nobody writes; with one, its index must be shared with the server.
    has_log = path.with_name(f"{path.name}-wal").exists()
    address = f"{path.as_uri()}?{'mode=ro' if has_log else 'immutable=1'}"
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False)
    )
    try:
        with engine.connect() as connection:
            check_whole(connection)
            check_study(connection, path, study)
            return list(connection.execute(ALL_VOTES))
    finally:
        engine.dispose()


def check_whole(connection: Any) -> None:
    """Raise `sqlite3.DatabaseError` if the file is damaged."""
    fault = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    if fault != "ok":
        raise sqlite3.DatabaseError(fault)


def check_study(connection: Any, path: Path, study: Study) -> None:
    """Raise `ValueError` if the file holds the votes of another study."""
    assigned = set(connection.scalars(select(Trial.pair_id).distinct()))
    if not assigned <= {pair.id for pair in study.pairs}:
        raise ValueError(
            f"{path} holds the votes of another study. Put that study's study.json back, or move "
            "the file away."
        )


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn what databases and disks raise into one line about the file."""
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError, OSError) as error:
        reason = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
        raise ValueError(
            f"the votes in {path} cannot be opened: {' '.join(str(reason).split())}. Check that "
            "the file may be written, or restore it from a copy."
        ) from error
