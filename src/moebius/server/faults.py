"""Errors as clients see them: a status, and OpenAI's `{"error": {"message", "type", "param",
"code"}}`."""

import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moebius.errors import (
    DeadlineError,
    EngineError,
    NumericalError,
    OverloadError,
    RequestError,
    frames,
)

log = logging.getLogger(__name__)

_MAX_MESSAGE = 500
_MAX_PARAM = 100
_MAX_PATH = 200


@dataclass(eq=False)
class Fault(Exception):
    """One error response, raised where a failure is HTTP's own. `reason` is what metrics call it,
    of a fixed few.

    error_id   names a failure of ours in the log
    """

    status: int
    message: str
    code: str | None
    reason: str = "http"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    error_id: str | None = None

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, dict(self.headers), "application/json")


class DrainingError(OverloadError):
    """The server is shutting down and takes no new work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", retry_after=5.0)


def _cut(text: str, size: int) -> str:
    """Bounded, and encodable whatever a client put into it."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= size else text[: size - 3] + "..."


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(min(seconds, 3600))))}


def _internal(error: BaseException) -> Fault:
    """Fixed text and an id, under which the log says what happened; it may be there already, by the
    engine's word."""
    error_id = error.error_id if isinstance(error, EngineError) else None
    if error_id is None:
        error_id = secrets.token_hex(6)
        log.error("error id %s: %s", error_id, frames(error))
    code = "numerical_error" if isinstance(error, NumericalError) else "internal_error"
    message = f"the server failed on this request (error id {error_id})"
    return Fault(500, message, code, "error", error_id=error_id)


def _shown(path: str) -> str:
    """A path as a message may quote it: one line, printable, bounded."""
    path = path[:_MAX_PATH]
    return _cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in path), _MAX_PATH)


def routing_fault(error: HTTPException, method: str, path: str) -> Fault:
    """What a client is told when no route serves its request."""
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Fault(404, f"there is no route {_shown(path)}", "not_found", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        message = f"{_shown(method)} is no method of {_shown(path)}; use {allowed}"
        return Fault(405, message, "method_not_allowed", headers=headers)
    return Fault(error.status_code, "the request cannot be served", "bad_request", headers=headers)


def fault_of(error: BaseException) -> Fault:
    """What a client is told about an exception."""
    message = _cut(str(error), _MAX_MESSAGE)
    match error:
        case Fault():
            return error
        case RequestError():
            status = 404 if error.code == "model_not_found" else 400
            reason = "invalid_request"
            if error.code == "context_length_exceeded":
                reason = "context_length"
                # openai-python shows the message alone, and frameworks look for the code in what it
                # shows.
                message = f"{message} ({error.code})"
            return Fault(
                status, message, error.code, reason, error.param and _cut(error.param, _MAX_PARAM)
            )
        case DrainingError():
            retry = _retry(error.retry_after)
            return Fault(503, message, "draining", "draining", headers=retry)
        case OverloadError():
            retry = _retry(error.retry_after)
            return Fault(503, message, "overloaded", "overload", headers=retry)
        case DeadlineError():
            message = "the request's time ran out before it was finished"
            return Fault(503, message, "deadline_exceeded", "deadline", headers=_retry(1))
        case _:
            return _internal(error)
