"""What stands before every route, as pure ASGI: API keys, limits on headers and bodies, CORS, and
the last catch."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moebius.server.access import AccessLog
from moebius.server.capacity import BodyRoom
from moebius.server.cors import Cors
from moebius.server.dialects import refusal_of, with_own_id
from moebius.server.faults import Fault, fault_of
from moebius.server.keys import OUTSIDER, Caller, Door, KeyRing
from moebius.server.limits import HTTP_LIMITS
from moebius.server.page import PAGE_PATHS
from moebius.server.reading_turns import ReadingTurns

OPENAPI = "/openapi.json"
DOCS = "/docs"
# What a load balancer or an orchestrator asks, who have no key; they are told a status and nothing
# else. And what is the same on every server of this version.
# So does the live page, whose figures do need one.
_OPEN_PATHS = frozenset(
    path.encode() for path in ("/health/live", "/health/ready", OPENAPI, DOCS, *PAGE_PATHS)
)
_FRAMING = (b"transfer-encoding", b"content-length")
METRICS = "/metrics"
LIVE = "/v1/live"
_OF_OPERATORS = (METRICS, LIVE)
"""Routes that show what all clients together do, and that a key may open alone."""


class Gate:
    """Refuses by itself what needs no route, and turns every exception into an error, of the shape
    that the route's clients know.

    It sets scope["moebius.caller"], the Caller whose key was shown; scope["moebius.tenant"], what
    keeps that one's prefix cache apart (b"" where the server is open); and scope["moebius.visit"],
    to which an answer adds what the request's log line shall say of it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        access: AccessLog,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self._app = app
        self._cors = Cors(cors_origins)
        self._keys = keys
        self._access = access
        self._turns = ReadingTurns()

    def _caller(self, scope: Scope, route: str) -> Caller:
        """Who asks. Raises Fault where that is nobody who may.

        By the route, which may be spelled in many ways: what a key protects is what the router
        would serve.
        """
        anybody = self._keys.anybody()
        if anybody is not None or scope["raw_path"] in _OPEN_PATHS:
            return anybody or OUTSIDER
        shown = _shown(scope)
        caller = None if shown is None else self._keys.find(shown)
        if caller is None:
            message = (
                "this server needs an API key that it knows, as `Authorization: Bearer KEY` or "
                "`x-api-key: KEY`"
            )
            raise Fault(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        door: Door = "metrics" if route in _OF_OPERATORS else "api"
        if door not in caller.key.opens:
            doors = " and ".join(_OF_OPERATORS)
            what = f"does not open {doors}" if door == "metrics" else f"opens {doors} alone"
            raise Fault(403, f"this API key {what}", "key_not_allowed")
        return caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._cors.sender(scope, send)
        visit = scope["moebius.visit"] = self._access.open(scope)

        async def watched(message: Message) -> None:
            await send(with_own_id(visit.answered(message), visit))

        try:
            _check_framing(scope)
            _check_size(scope)
            preflight = self._cors.preflight(scope)
            if preflight is not None:
                await preflight(scope, receive, watched)
                return
            caller = self._caller(scope, visit.route)
            scope["moebius.caller"] = caller
            scope["moebius.tenant"] = caller.key.tenant
            visit.name(caller.key.name)
            if scope.get("method") != "POST":
                await self._app(scope, receive, watched)
                return
            await self._turns.take(caller.key.name)
            with caller.quota.request(caller.key.limits):
                await self._app(scope, receive, watched)
        except Exception as error:
            visit.fault = fault_of(error)
            if visit.status is not None:
                raise RuntimeError("a response broke off") from None
            answer = refusal_of(visit.path)(visit.fault, visit.id)
            await answer(scope, receive, watched)
        finally:
            self._access.close(visit)


def _shown(scope: Scope) -> bytes | None:
    """The key that a request shows, as OpenAI's clients do or as Anthropic's; None where it shows
    none, or several that differ."""
    shown = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            shown.append(key.strip() if scheme.lower() == b"bearer" else b"")
        elif name == b"x-api-key":
            shown.append(value.strip())
    # Of several headers a proxy before us may have looked at another than we do.
    return shown[0] if len(set(shown)) == 1 else None


def too_large() -> Fault:
    """The body is over the limit; the connection is closed rather than read to its end."""
    message = f"the body is larger than {HTTP_LIMITS.body_bytes} bytes"
    return Fault(413, message, "request_too_large", headers={"Connection": "close"})


def _check_framing(scope: Scope) -> None:
    """Refuse what a proxy before us may have read in another way, or we would read wrongly. Raises
    Fault."""
    if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
        raise Fault(
            505, "this server speaks HTTP/1.1", "bad_request", headers={"Connection": "close"}
        )
    framing = [(name, value) for name, value in scope["headers"] if name in _FRAMING]
    if len({name for name, _ in framing}) > 1:
        message = "a request has either Content-Length or Transfer-Encoding, not both"
        raise Fault(400, message, "bad_request", headers={"Connection": "close"})
    if any(name == _FRAMING[0] and value.strip().lower() != b"chunked" for name, value in framing):
        message = (
            "the body must be sent as it is, or in chunks: no other Transfer-Encoding is understood"
        )
        raise Fault(501, message, "bad_request", headers={"Connection": "close"})


def _check_size(scope: Scope) -> None:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > HTTP_LIMITS.header_bytes:
        message = f"request line and headers are larger than {HTTP_LIMITS.header_bytes} bytes"
        raise Fault(431, message, "headers_too_large", headers={"Connection": "close"})
    for name, value in scope["headers"]:
        if (
            name == b"content-length"
            and value.isdigit()
            and int(value[:20]) > HTTP_LIMITS.body_bytes
        ):
            raise too_large()


@asynccontextmanager
async def body_of(request: Request, timeout: float, room: BodyRoom) -> AsyncIterator[bytes]:
    """The request's whole body, which holds its share of `room` for as long as the block lasts.

    Raises Fault where it is no JSON by its type, compressed, too large, slow or broken off;
    OverloadError where there is no room.
    """
    kinds = [
        value.split(b";")[0].strip().lower()
        for name, value in request.headers.raw
        if name == b"content-type"
    ]
    if kinds != [b"application/json"]:
        raise Fault(
            415,
            "the body must be sent as `Content-Type: application/json`",
            "unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        message = "the body must be sent as it is, not compressed: leave Content-Encoding out"
        raise Fault(415, message, "unsupported_media_type", headers={"Accept-Encoding": "identity"})
    with room.share() as grow:
        grow(int(request.headers.get("content-length", 0)))
        yield await _read(request, timeout, grow)


async def _read(request: Request, timeout: float, grow: Callable[[int], None]) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                body += part
                if len(body) > HTTP_LIMITS.body_bytes:
                    raise too_large()
                grow(len(body))
    except ClientDisconnect:
        raise Fault(
            400, "the client left before its body was complete", "incomplete_body"
        ) from None
    except TimeoutError:
        message = f"the body was not complete after {timeout:g} seconds"
        raise Fault(408, message, "body_timeout", headers={"Connection": "close"}) from None
    return bytes(body)
