"""Serving a study to people nobody knows: bounded requests, connections and waiting times."""

import asyncio
import logging
import resource
import socket
import time
from typing import Any

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 4096  # bytes; a vote has about 200
MAX_CONNECTIONS = 500
REQUEST_SECONDS = 10  # for a whole request to arrive, on a new connection or a kept one
STALLED_SECONDS = 30  # without a byte taken by a client that is being answered
REPEAT_SECONDS = 60  # until the same line may be logged again

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # addresses hold tokens
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class SecurityMiddleware:
    """ASGI middleware that bounds bodies, refuses other sites, and sets strict headers.

    Args:
        app: The application behind it.
        max_body: Largest body of a request in bytes, whatever its headers say.
    """

    def __init__(self, app: Any, max_body: int = MAX_BODY) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 4xx, or pass the request on with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        refusal = _refuse(scope["method"], headers)
        body = b"" if refusal else await _read_body(receive, headers, self._max_body)
        if body is None:
            refusal = (413, f"the body is larger than {self._max_body} bytes.")
        if refusal:
            status, reason = refusal
            response = JSONResponse({"detail": reason}, status, headers={"Connection": "close"})
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, _replay(body or b"", receive), send_with_headers)


def is_foreign(headers: Headers) -> bool:
    """Return whether a request comes from a page of another site."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _refuse(method: str, headers: Headers) -> tuple[int, str] | None:
    """Return why a request that changes something is refused, or None."""
    if method in ("GET", "HEAD"):
        return None
    if method != "POST":
        return 405, "only GET and POST are served."
    if is_foreign(headers):
        return 403, "requests from other sites are refused."
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "the body must be application/json."
    return None


async def _read_body(receive: Any, headers: Headers, limit: int) -> bytes | None:
    """Return the whole body, or None as soon as it is over the limit."""
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:12]) > limit:
        return None
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            return None
    return body


def _replay(body: bytes, receive: Any) -> Any:
    is_sent = False

    async def replay() -> Any:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for a client only so long.

    A connection that does not deliver a whole request within `REQUEST_SECONDS`, or does not take
    its answer for `STALLED_SECONDS`, is closed. Where there are too many connections, the one that
    has kept the server waiting longest makes room for a new one.
    """

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            others: set[Any] = set(self.connections)
            waiting = [each for each in others if each._timer is not None]
            min(waiting, key=lambda each: each._since, default=self).give_up()
        self._wait(REQUEST_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Stop waiting once the request is whole."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request of the same connection."""
        self._stop_waiting()
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._wait(STALLED_SECONDS)

    def resume_writing(self) -> None:
        """Stop waiting once the client reads."""
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for good."""
        self._stop_waiting()
        super().connection_lost(exc)

    def give_up(self) -> None:
        """Close the connection without an answer."""
        self._stop_waiting()
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._wait(REQUEST_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._since = time.monotonic()
        self._timer = self.loop.call_later(seconds, self.give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def max_connections() -> int:
    """Return the number of connections served at a time; other files need descriptors too."""
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class OncePerMinute(logging.Filter):
    """Lets each kind of log line pass once per `REPEAT_SECONDS`, so that no client fills a disk."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is new enough."""
        kind, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._last.get(kind, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return False
        self._last[kind] = now
        return True


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes a free one.

    Raises:
        ValueError: The port is taken, or the host is not an address of this machine.
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


def run_server(app: Any, bound: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; votes under way are finished, then the database is closed."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        backlog=1024,
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(OncePerMinute())
    uvicorn.Server(config).run(sockets=[bound])
