"""Which web pages may call the server from a browser (CORS,
https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Scope, Send

from moebius.server.faults import Fault

# How long a browser may remember the answer to a preflight.
_MAX_AGE = 600
# What a page's script may read of a response, besides its body.
_EXPOSED = "Retry-After, WWW-Authenticate, X-Request-Id, Request-Id"


class Cors:
    """Answers preflights, and says on every response to an allowed origin that its pages may read
    it.

    A page of any other origin gets the same responses as before: its browser keeps them from it.
    """

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    def preflight(self, scope: Scope) -> Response | None:
        """The answer to a browser that asks, without a key, what a page may send; None for any
        other request.

        Raises Fault, which names the option, where the page's origin is not allowed.
        """
        origin = _header(scope, b"origin")
        if origin is None or scope["method"] != "OPTIONS":
            return None
        if not self._allows(origin):
            message = (
                f"pages of the origin {origin[:200]!r} may not call this server; --cors-origin "
                "allows one"
            )
            raise Fault(403, message, "origin_not_allowed", headers={"Vary": "Origin"})
        headers = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            # Clients in browsers send headers of their own beside these two; none of them means
            # more than a key.
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Max-Age": str(_MAX_AGE),
            "Vary": "Access-Control-Request-Headers",
        }
        asked = _header(scope, b"access-control-request-headers")
        if asked:
            headers["Access-Control-Allow-Headers"] = asked
        if _header(scope, b"access-control-request-private-network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=headers)

    def of_no_request(self) -> dict[str, str]:
        """What is said on the refusal of what never became a request, whose origin is not known:
        any may read it."""
        if "*" not in self._origins:
            return {}
        return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": _EXPOSED}

    def sender(self, scope: Scope, send: Send) -> Send:
        """`send`, or one that adds to each response what the request's origin may do with it."""
        origin = _header(scope, b"origin")
        if not self._origins:
            return send

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                if origin is not None and self._allows(origin):
                    headers["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else origin
                    headers["Access-Control-Expose-Headers"] = _EXPOSED
                if "*" not in self._origins:
                    headers.add_vary_header("Origin")
                message = {**message, "headers": headers.raw}
            await send(message)

        return send_with_headers

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins


def _header(scope: Scope, name: bytes) -> str | None:
    """A header that comes once; None where it is missing, or comes twice."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None
