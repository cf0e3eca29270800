"""Errors as clients see them: a status, and OpenAI's `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
import secrets
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moebius.errors import DeadlineError, NumericalError, OverloadError, RequestError

log = logging.getLogger(__name__)

_MAX_MESSAGE = 500
_MAX_PARAM = 100


class HTTPFault(Exception):
    """A failure that belongs to HTTP rather than to a request's fields."""

    def __init__(self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


class DrainingError(OverloadError):
    """The server is shutting down and takes no new work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", retry_after=5.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One error response. `reason` is what the metrics call it, one of a fixed few."""

    status: int
    message: str
    type: str
    reason: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, dict(self.headers), "application/json")


def _cut(text: str, size: int) -> str:
    """Bounded, and encodable whatever a client put into it."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= size else text[: size - 3] + "..."


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(min(seconds, 3600))))}


def _internal(error: BaseException) -> Fault:
    """Fixed text and an id; the log has the frames, not the exception's words, which might quote a prompt."""
    error_id = secrets.token_hex(6)
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("error id %s: %s\n%s", error_id, type(error).__name__, frames)
    code = "numerical_error" if isinstance(error, NumericalError) else "internal_error"
    return Fault(500, f"the server failed on this request (error id {error_id})", "server_error", "error", code=code)


_BY_STATUS = {
    404: ("there is no such route", "not_found"),
    405: ("this route has no such method", "method_not_allowed"),
}


def fault_of(error: BaseException) -> Fault:
    """What a client is told about an exception."""
    match error:
        case RequestError():
            status = 404 if error.code == "model_not_found" else 400
            reason = "context_length" if error.code == "context_length_exceeded" else "invalid_request"
            param = None if error.param is None else _cut(error.param, _MAX_PARAM)
            message = _cut(str(error), _MAX_MESSAGE)
            return Fault(status, message, "invalid_request_error", reason, param, error.code)
        case DrainingError():
            return Fault(503, str(error), "server_error", "draining", None, "draining", _retry(error.retry_after))
        case OverloadError():
            message = _cut(str(error), _MAX_MESSAGE)
            return Fault(503, message, "server_error", "overload", None, "overloaded", _retry(error.retry_after))
        case DeadlineError():
            message = "the request's time ran out before it was finished"
            return Fault(503, message, "server_error", "deadline", None, "deadline_exceeded", _retry(1))
        case HTTPFault():
            kind = "invalid_request_error" if error.status < 500 else "server_error"
            return Fault(error.status, error.message, kind, "http", None, error.code, error.headers)
        case HTTPException() if error.status_code < 500:
            message, code = _BY_STATUS.get(error.status_code, ("the request cannot be served", "bad_request"))
            headers = dict(error.headers or {})
            return Fault(error.status_code, message, "invalid_request_error", "http", None, code, headers)
        case _:
            return _internal(error)
