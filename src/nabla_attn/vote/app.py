"""The web application of a study: its pages, its API, and its results.

Raters are known by a token that their page sends with each request. No cookie is used, so another
site cannot act in a rater's name.
"""

import logging
import os
import secrets
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    StreamingResponse,
)
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import OperationalError

from nabla_attn.vote.analysis import count_votes
from nabla_attn.vote.database import AlreadyVoted, StorageFailed, StudyFull, Turn, VoteStore
from nabla_attn.vote.export import results_page, votes_csv
from nabla_attn.vote.server import SecurityMiddleware
from nabla_attn.vote.study import Study, database_path, videos_folder

PAGE = Path(__file__).parent / "page"
STATIC = {"vote.js": "text/javascript", "vote.css": "text/css"}
CHUNK = 65536
_LOG = logging.getLogger("uvicorn.error")

Answer = Literal["first", "second", "both_good", "both_bad"]
Token = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
RaterToken = Annotated[str, Header(alias="X-Rater", max_length=64)]


class Ballot(BaseModel):
    """A rater's answers to one pair."""

    model_config = ConfigDict(extra="forbid", strict=True)
    trial: Token
    semantic: Answer
    visual: Answer
    motion: Answer
    overall: Answer
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 0.0


def create_app(folder: str | Path) -> FastAPI:
    """Return the application of the study in a folder.

    Raises:
        ValueError: There is no study, or it has a fault.
    """
    study = Study.load(folder)
    store = VoteStore(database_path(folder), study)
    # Opened once: a folder swapped for a link later is not followed.
    videos = os.open(videos_folder(folder), os.O_RDONLY | os.O_DIRECTORY)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        os.close(videos)
        store.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.folder = Path(folder)
    app.add_middleware(SecurityMiddleware)
    app.add_exception_handler(RequestValidationError, _refuse_malformed)
    app.add_exception_handler(OperationalError, _refuse_busy)
    app.add_exception_handler(StorageFailed, _refuse_failed)
    _add_pages(app, study)
    _add_voting(app, study, store)
    _add_videos(app, study, store, videos)
    _add_results(app, study, store)
    return app


def _add_pages(app: FastAPI, study: Study) -> None:
    @app.get("/s/{link}")
    def page(link: str) -> FileResponse:
        _check_token(link, study.link_token)
        return FileResponse(PAGE / "vote.html", media_type="text/html")

    @app.get("/static/{name}")
    def static(name: str) -> FileResponse:
        if name not in STATIC:
            raise HTTPException(404, "not found.")
        return FileResponse(PAGE / name, media_type=STATIC[name])


def _add_voting(app: FastAPI, study: Study, store: VoteStore) -> None:
    @app.post("/api/s/{link}/raters", status_code=201)
    def join(link: str) -> dict[str, str]:
        _check_token(link, study.link_token)
        try:
            return {"rater": store.join()}
        except StudyFull:
            raise HTTPException(409, "the study has all its raters. Thank you.") from None

    @app.get("/api/next")
    def next_turn(rater: RaterToken) -> dict[str, Any]:
        return _describe(study, store.next_turn(rater))

    @app.post("/api/votes")
    def vote(ballot: Ballot, rater: RaterToken) -> dict[str, Any]:
        answers = ballot.model_dump(exclude={"trial", "seconds"})
        try:
            turn = store.vote(rater, ballot.trial, answers, ballot.seconds)
        except AlreadyVoted:
            raise HTTPException(409, "this pair has your vote already.") from None
        return _describe(study, turn)


def _add_videos(app: FastAPI, study: Study, store: VoteStore, videos: int) -> None:
    @app.get("/api/video/{trial}/{side}")
    def video(trial: str, side: str, rater: RaterToken) -> StreamingResponse:
        found = store.find_trial(rater, trial)
        if found is None or side not in ("first", "second"):
            raise HTTPException(404, "not found.")
        pair = study.pair(found.pair_id)
        is_method = (side == "first") == found.is_swapped
        return _VideoResponse(
            _open_video(pair.method_video if is_method else pair.baseline_video, videos)
        )


class _VideoResponse(StreamingResponse):
    """A video in pieces, whose file is closed when the answer ends, however it ends."""

    def __init__(self, file: BinaryIO) -> None:
        size = str(os.fstat(file.fileno()).st_size)
        super().__init__(_read(file), media_type="video/mp4", headers={"Content-Length": size})
        self._file = file

    async def __call__(self, *args: Any) -> None:
        """Answer a request; a client that goes away leaves the reading where it is."""
        try:
            await super().__call__(*args)
        finally:
            self._file.close()


def _open_video(name: str, videos: int) -> BinaryIO:
    """Open a file of the videos folder itself: no link, no pipe, no device."""
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=videos)
    except OSError:
        raise HTTPException(404, "the video is gone.") from None
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise HTTPException(404, "the video is gone.")
    return os.fdopen(opened, "rb")


def _read(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _add_results(app: FastAPI, study: Study, store: VoteStore) -> None:
    @app.get("/results/{admin}")
    def results(admin: str) -> HTMLResponse:
        _check_token(admin, study.admin_token)
        return HTMLResponse(results_page(study, count_votes(study, store.all_votes())))

    @app.get("/results/{admin}/votes.csv")
    def csv(admin: str) -> PlainTextResponse:
        _check_token(admin, study.admin_token)
        return PlainTextResponse(votes_csv(study, store.all_votes()), media_type="text/csv")


def _describe(study: Study, turn: Turn | None) -> dict[str, Any]:
    """Return what the browser may know of a turn: nothing that tells the videos apart."""
    if turn is None:
        raise HTTPException(404, "unknown rater or pair. Open the study's link again.")
    state: dict[str, Any] = {"title": study.title, "done": turn.done, "total": turn.total}
    if turn.trial is not None:
        prompt = study.pair(turn.trial.pair_id).prompt
        state |= {"trial": turn.trial.token, "prompt": prompt, "fps": study.fps}
    return state


def _check_token(given: str, expected: str) -> None:
    # In constant time, and a wrong guess looks like any missing page.
    if not expected or not secrets.compare_digest(given.encode(), expected.encode()):
        raise HTTPException(404, "not found.")


async def _refuse_malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    parts = [".".join(str(step) for step in entry["loc"][:3])[:80] for entry in error.errors()[:5]]
    return JSONResponse({"detail": f"malformed request: {', '.join(parts)}."}, 422)


async def _refuse_busy(_: Request, __: Exception) -> JSONResponse:
    return _unavailable("the server cannot store votes at the moment.")


async def _refuse_failed(_: Request, error: Exception) -> JSONResponse:
    _LOG.error("The disk failed (%s). No vote is taken until the server is restarted.", error)
    return _unavailable("the server's disk has failed. Please tell whoever sent you the link.")


def _unavailable(detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, 503, headers={"Retry-After": "2"})
