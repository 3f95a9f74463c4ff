"""Raters, showings and votes in SQLite. What was acknowledged is on disk."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    CheckConstraint,
    Engine,
    ForeignKey,
    Select,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from nabla_attn.vote.order import draw_showings
from nabla_attn.vote.study import ANSWERS, QUESTIONS, Study, new_token
from nabla_attn.vote.sync import SharedSync

PLACE_KEPT = timedelta(hours=1)
"""How long a rater's place is kept before their first vote; after it, it is theirs."""


class Base(DeclarativeBase):
    """All tables."""


class Rater(Base):
    """Somebody with a link of their own; no name is kept."""

    __tablename__ = "raters"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(unique=True)
    created: Mapped[str]


class Trial(Base):
    """One pair on one rater's way. The constraint shows a pair once, and once more as a repeat."""

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


@dataclass(frozen=True)
class Turn:
    """What a rater judges next, and how far they are; ``trial`` is None at the end."""

    trial: Any
    done: int
    total: int


class StudyFull(Exception):
    """No more raters are admitted."""


class AlreadyVoted(Exception):
    """The trial has another vote already."""


class VoteStore:
    """The database of one study, for one process and many threads.

    Args:
        path: the SQLite file; made when missing.
        study: the study whose votes it holds.

    Raises:
        ValueError: the file is damaged, cannot be opened, or holds the votes of another study.
    """

    def __init__(self, path: str | Path, study: Study) -> None:
        self._study = study
        path = Path(path).resolve()
        self._engine = _make_engine(path)
        # SQLite lets one writer in; waiting here is cheaper than in its busy loop.
        self._writing = threading.Lock()
        _prepare(self._engine, study)
        self._log = SharedSync(f"{path}-wal")

    def close(self) -> None:
        """Fold the log into the database file and let go of it."""
        with self._writing, self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        self._log.close()
        self._engine.dispose()

    def join(self) -> str:
        """Admit a rater, draw their way, and return their token.

        Raises:
            StudyFull: `max_raters` have voted or joined of late.
        """
        token, now = new_token(), _now()
        placed = _placed()
        with self._writing, self._engine.begin() as connection:
            count = connection.scalar(select(func.count()).select_from(placed.subquery()))
            if (count or 0) >= self._study.max_raters:
                raise StudyFull
            shown = select(Trial.pair_id, func.count()).where(~Trial.is_repeat)
            # Pairs on the ways of those who only looked were judged by nobody.
            shown = shown.where(Trial.rater_id.in_(placed)).group_by(Trial.pair_id)
            times_shown = {pair_id: count for pair_id, count in connection.execute(shown)}
            rater_id = connection.scalar(
                insert(Rater).values(token=token, created=now).returning(Rater.id)
            )
            showings = draw_showings(self._study, times_shown, random.SystemRandom())
            rows = [
                {"token": new_token(), "rater_id": rater_id, "position": position} | vars(showing)
                for position, showing in enumerate(showings)
            ]
            connection.execute(insert(Trial), rows)
        self._log.sync()
        return token

    def next_turn(self, rater: str) -> Turn | None:
        """The first trial without a vote; None for an unknown rater."""
        with self._engine.connect() as connection:
            way = connection.execute(_WAY, {"rater": rater}).all()
        return _turn(way) if way else None

    def find_trial(self, rater: str, trial: str) -> Any:
        """A trial of this rater, or None."""
        with self._engine.connect() as connection:
            way = connection.execute(_WAY, {"rater": rater}).all()
        return next((row for row in way if row.token == trial), None)

    def vote(self, rater: str, trial: str, answers: dict[str, str], seconds: float) -> Turn | None:
        """Store one vote in one transaction; it is on disk when this returns.

        The same vote again changes nothing, so that a browser may retry.

        Returns:
            What comes next; None when the trial is not this rater's.

        Raises:
            AlreadyVoted: the trial has other answers already.
        """
        with self._engine.connect() as connection:
            way = connection.execute(_WAY, {"rater": rater}).all()
            if all(row.token != trial for row in way):
                return None
        values = answers | {"trial": trial, "seconds": seconds, "created": _now()}
        with self._writing, self._engine.begin() as connection:
            if connection.execute(_CAST, values).rowcount == 0:
                columns = [getattr(Vote, question) for question in QUESTIONS]
                stored = connection.execute(select(*columns).where(Vote.trial == trial)).one()
                if tuple(stored) != tuple(answers[question] for question in QUESTIONS):
                    raise AlreadyVoted
        self._log.sync()
        return _turn(way, just_voted=trial)

    def all_votes(self) -> list[Any]:
        """Every vote with its trial, oldest first: rows of the columns of both tables."""
        query = (
            select(Trial.rater_id, Trial.position, Trial.pair_id, Trial.is_swapped)
            .add_columns(Trial.is_repeat, Vote.semantic, Vote.visual, Vote.motion, Vote.overall)
            .add_columns(Vote.seconds, Vote.created)
            .join(Vote, Vote.trial == Trial.token)
            .order_by(Vote.created, Trial.rater_id, Trial.position)
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query))


def _turn(way: Sequence[Any], just_voted: str | None = None) -> Turn:
    open_trials = [row for row in way if not row.has_vote and row.token != just_voted]
    following = open_trials[0] if open_trials else None
    return Turn(following, done=len(way) - len(open_trials), total=len(way))


_WAY = (
    select(Trial.token, Trial.pair_id, Trial.is_swapped, Vote.trial.is_not(None).label("has_vote"))
    .join(Rater, Rater.id == Trial.rater_id)
    .join(Vote, Vote.trial == Trial.token, isouter=True)
    .where(Rater.token == bindparam("rater"))
    .order_by(Trial.position)
)
_CAST = sqlite_insert(Vote).on_conflict_do_nothing()


def _make_engine(path: Path) -> Engine:
    # From its parts: in one string, signs of the path would be read as signs of an address.
    address = URL.create("sqlite", database=str(path))
    engine = create_engine(address, pool_size=8, max_overflow=40)

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        # NORMAL leaves the waiting for the disk to `SharedSync`.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA busy_timeout=5000")

    return engine


def _prepare(engine: Engine, study: Study) -> None:
    """Make missing tables, and see that the file is whole and of this study."""
    path = engine.url.database
    try:
        with engine.begin() as connection:
            fault = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
            Base.metadata.create_all(connection)
            shown = set(connection.scalars(select(Trial.pair_id).distinct()))
    except DatabaseError as error:
        fault = str(error.orig)
    if fault != "ok":
        raise ValueError(
            f"the votes in {path} cannot be opened: {' '.join(fault.split())}. Check that the file "
            "may be written, or restore it from a copy."
        )
    if not shown <= {pair.id for pair in study.pairs}:
        raise ValueError(
            f"{path} holds the votes of another study. Put that study's study.json back, or move "
            "the file away."
        )


def _placed() -> Select[Any]:
    """Raters whose places are taken: they voted, or joined less than `PLACE_KEPT` ago."""
    voted = select(Trial.rater_id).join(Vote, Vote.trial == Trial.token)
    return select(Rater.id).where((Rater.created > _now(-PLACE_KEPT)) | Rater.id.in_(voted))


def _now(shift: timedelta = timedelta()) -> str:
    return (datetime.now(UTC) + shift).isoformat(timespec="milliseconds")
