"""The web application of a study.

Raters are known by a token that their page sends with each request. No cookie is used, so another
site cannot act in a rater's name.
"""

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from nabla_attn.vote.database import AlreadyVoted, StudyFull, Turn, VoteStore
from nabla_attn.vote.guard import Guard
from nabla_attn.vote.study import Study, database_path, videos_folder

PAGE = Path(__file__).parent / "page"
STATIC = {"vote.js": "text/javascript", "vote.css": "text/css"}

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
    """The application of the study in a folder.

    Raises:
        ValueError: there is no whole study.
    """
    study = Study.load(folder)
    store = VoteStore(database_path(folder), study)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.folder = Path(folder)
    app.add_middleware(Guard)
    app.add_exception_handler(RequestValidationError, _refuse_malformed)
    _add_pages(app, study)
    _add_voting(app, study, store, Path(folder))
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


def _add_voting(app: FastAPI, study: Study, store: VoteStore, folder: Path) -> None:
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

    @app.get("/api/video/{trial}/{side}")
    def video(trial: str, side: str, rater: RaterToken) -> FileResponse:
        found = store.find_trial(rater, trial)
        if found is None or side not in ("first", "second"):
            raise HTTPException(404, "not found.")
        pair = study.pair(found.pair_id)
        is_method = (side == "first") == found.is_swapped
        path = videos_folder(folder) / (pair.method_video if is_method else pair.baseline_video)
        if not path.is_file():
            raise HTTPException(404, "the video is gone.")
        return FileResponse(path, media_type="video/mp4")

    @app.post("/api/votes")
    def vote(ballot: Ballot, rater: RaterToken) -> dict[str, Any]:
        answers = ballot.model_dump(exclude={"trial", "seconds"})
        try:
            turn = store.vote(rater, ballot.trial, answers, ballot.seconds)
        except AlreadyVoted:
            raise HTTPException(409, "this pair has your vote already.") from None
        return _describe(study, turn)


def _add_results(app: FastAPI, study: Study, store: VoteStore) -> None:
    from nabla_attn.vote.export import results_page, votes_csv
    from nabla_attn.vote.results import count_votes

    @app.get("/results/{admin}")
    def results(admin: str) -> HTMLResponse:
        _check_token(admin, study.admin_token)
        return HTMLResponse(results_page(study, count_votes(study, store.all_votes())))

    @app.get("/results/{admin}/votes.csv")
    def csv(admin: str) -> PlainTextResponse:
        _check_token(admin, study.admin_token)
        return PlainTextResponse(votes_csv(study, store.all_votes()), media_type="text/csv")


def _describe(study: Study, turn: Turn | None) -> dict[str, Any]:
    """What the browser may know of a turn: nothing that tells the videos apart."""
    if turn is None:
        raise HTTPException(404, "unknown rater or pair. Open the study's link again.")
    state: dict[str, Any] = {"title": study.title, "done": turn.done, "total": turn.total}
    if turn.trial is not None:
        prompt = study.pair(turn.trial.pair_id).prompt
        state |= {"trial": turn.trial.token, "prompt": prompt, "fps": study.fps}
    return state


def _check_token(given: str, expected: str) -> None:
    # Without a page for guesses to be told apart, and in constant time.
    if not expected or not secrets.compare_digest(given.encode(), expected.encode()):
        raise HTTPException(404, "not found.")


async def _refuse_malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    parts = [".".join(str(step) for step in entry["loc"][:3])[:80] for entry in error.errors()[:5]]
    return JSONResponse({"detail": f"malformed request: {', '.join(parts)}."}, 422)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"cannot listen on {host}, port {port}: {reason}. Choose others with --host and --port."
        ) from error
    return bound


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; votes under way are finished, then the database is closed."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, backlog=1024
    )
    uvicorn.Server(config).run(sockets=[bound])
