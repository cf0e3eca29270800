"""What Anthropic's and Ollama's clients expect around every answer, and OpenAI's do not: errors of
another shape, and the request's id under another name."""

from collections.abc import Callable

import msgspec
from starlette.responses import Response
from starlette.types import Message

from moebius.server.access import Visit
from moebius.server.faults import Fault

MESSAGES = "/v1/messages"
"""Where Anthropic's routes begin."""
OLLAMA = "/api/"
"""Where Ollama's routes begin."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}

Refusal = Callable[[Fault, str], Response]
"""A fault and the request's id as a response."""


def anthropic_error(fault: Fault, request_id: str) -> dict[str, object]:
    """An error as Anthropic's API says it, whole or inside a stream."""
    kind = _KINDS.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
    error = {"type": kind, "message": fault.message.removesuffix(f" ({fault.code})")}
    return {"type": "error", "error": error, "request_id": request_id}


def refusal_of(path: str) -> Refusal:
    """How a request for this path is refused."""
    if path.startswith(MESSAGES):
        return _as_anthropic
    return _as_ollama if path.startswith(OLLAMA) else _as_openai


def _as_openai(fault: Fault, request_id: str) -> Response:
    return fault.response()


def _as_anthropic(fault: Fault, request_id: str) -> Response:
    body = msgspec.json.encode(anthropic_error(fault, request_id))
    return Response(body, fault.status, dict(fault.headers), "application/json")


def ollama_error(fault: Fault) -> dict[str, object]:
    """An error as Ollama's API says it: a text, whole or as a line of a stream."""
    return {"error": fault.message}


def _as_ollama(fault: Fault, request_id: str) -> Response:
    body = msgspec.json.encode(ollama_error(fault))
    return Response(body, fault.status, dict(fault.headers), "application/json")


def with_own_id(message: Message, visit: Visit) -> Message:
    """The response's beginning with the request's id as Anthropic's clients look for it."""
    if message["type"] != "http.response.start" or not visit.path.startswith(MESSAGES):
        return message
    own = (b"request-id", visit.id.encode("ascii"))
    return {**message, "headers": [*message["headers"], own]}
