"""What every request passes: a size limit, an origin check, and strict response headers."""

from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

MAX_BODY = 4096  # bytes; a vote has about 200

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


class Guard:
    """ASGI middleware in front of all routes.

    Args:
        app: what is guarded.
        max_body: bytes of a request body, whatever its headers say.
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


def _refuse(method: str, headers: Headers) -> tuple[int, str] | None:
    """Why a request that changes something is not let through, or None."""
    if method in ("GET", "HEAD"):
        return None
    if method != "POST":
        return 405, "only GET and POST are served."
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return 403, "requests from other sites are refused."
    if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "the body must be application/json."
    return None


async def _read_body(receive: Any, headers: Headers, limit: int) -> bytes | None:
    """The whole body, or None as soon as it is over the limit."""
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
