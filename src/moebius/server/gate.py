"""What stands before every route, as pure ASGI: API keys, limits on headers and bodies, CORS, and
the last catch."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moebius.server.access import AccessLog
from moebius.server.capacity import BodyRoom
from moebius.server.cors import Cors
from moebius.server.dialects import refusal_of, with_own_id
from moebius.server.faults import Fault, fault_of
from moebius.server.limits import HTTP_LIMITS
from moebius.server.page import PAGE_PATHS

OPENAPI = "/openapi.json"
DOCS = "/docs"
# What a load balancer or an orchestrator asks, who have no key; they are told a status and nothing
# else. And what is the same on every server of this version.
_OPEN_PATHS = (b"/health/live", b"/health/ready", OPENAPI.encode(), DOCS.encode())
# Files that say nothing of the server; the figures that they show need a key.
_PAGE_PATHS = frozenset(path.encode() for path in PAGE_PATHS)
_FRAMING = (b"transfer-encoding", b"content-length")
METRICS = "/metrics"
LIVE = "/v1/live"
_OF_OPERATORS = (METRICS, LIVE)
"""Routes that show what all clients together do, and may have a key of their own."""


class Gate:
    """Refuses by itself what needs no route, and turns every exception into an error, of the shape
    that the route's clients know.

    It sets scope["moebius.tenant"], a digest of the API key that was shown (b"" where the server is
    open), and scope["moebius.visit"], to which an answer adds what the request's log line shall say
    of it.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: tuple[str, ...],
        access: AccessLog,
        cors_origins: tuple[str, ...] = (),
        metrics_api_key: str | None = None,
    ) -> None:
        self._app = app
        self._cors = Cors(cors_origins)
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._of_metrics = (
            self._digests if metrics_api_key is None else [_digest(metrics_api_key.encode())]
        )
        self._access = access

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
            # By the route, which may be spelled in many ways: what a key protects is what the
            # router would serve.
            scope["moebius.tenant"] = _tenant(
                scope, self._of_metrics if visit.route in _OF_OPERATORS else self._digests
            )
            await self._app(scope, receive, watched)
        except Exception as error:
            visit.fault = fault_of(error)
            if visit.status is not None:
                raise RuntimeError("a response broke off") from None
            answer = refusal_of(visit.path)(visit.fault, visit.id)
            await answer(scope, receive, watched)
        finally:
            self._access.close(visit)


def _tenant(scope: Scope, digests: list[bytes]) -> bytes:
    """The digest of the key that was shown, which is one of these; b"" where none is needed. Raises
    Fault."""
    if not digests or scope["raw_path"] in _OPEN_PATHS or scope["raw_path"] in _PAGE_PATHS:
        return b""
    for digest in map(_digest, _shown_keys(scope)):
        # Every key is compared, whichever matches, so that the time taken says nothing.
        if any([hmac.compare_digest(digest, known) for known in digests]):
            return digest
    message = "this server needs an API key that it knows, as `Authorization: Bearer KEY`"
    raise Fault(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _shown_keys(scope: Scope) -> list[bytes]:
    """As OpenAI's clients show one, and as Anthropic's do."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    keys = [value for name, value in scope["headers"] if name == b"x-api-key"]
    shown = [keys[0].strip()] if len(keys) == 1 else []
    scheme, _, token = (bearers[0] if len(bearers) == 1 else b"").partition(b" ")
    if scheme.lower() == b"bearer":
        shown.insert(0, token.strip())
    return shown


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32, person=b"moebius-api-key").digest()


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
