"""One line and one count for each request, answered or refused. Lines are logfmt, `key=value`, and
name no prompt.

A line's length is bounded, and every value in it is printable ASCII on one line, whatever a client
sent. Lines are not thinned out in a flood: each refused request has its own, as in any access log,
and rotation is the operator's.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from starlette.routing import compile_path
from starlette.types import Message, Scope

from moebius.server.faults import Fault
from moebius.server.metrics import OTHER, ServerMetrics
from moebius.server.spans import Spans

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"

_FIT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_MAX_VALUE = 200
_MAX_NAMES = 5
_MAX_NAME = 32
# Printable ASCII without space, quote, equals sign and backslash.
_BARE = re.compile(r"[!#-<>-\[\]-~]+")
# What a client that left before its answer began is counted under, as nginx does.
_CLIENT_GONE = 499


def logfmt(fields: Mapping[str, object]) -> str:
    """`key=value` pairs on one line, those that are None left out; a value that needs it is quoted
    and escaped."""
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items() if value is not None)


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if len(text) > _MAX_VALUE:
        text = text[: _MAX_VALUE - 3] + "..."
    return text if _BARE.fullmatch(text) else json.dumps(text).replace("\x7f", "\\u007f")


@dataclass(slots=True, eq=False)
class Visit:
    """One request on its way.

    id        the client's X-Request-Id, or one that the server made
    route     a route's template, or OTHER
    path      as the client wrote it, without its query
    status    of the response, once that has begun
    fault     what a client was told, where it got no whole answer
    facts     what the line says beside
    ignored   fields of the body that nobody knows, as far as the line names them
    traceparent  what the client sent of W3C's trace context
    """

    id: str
    method: str
    route: str
    path: str
    started: float
    status: int | None = None
    fault: Fault | None = None
    facts: dict[str, object] = field(default_factory=dict)
    ignored: str | None = None
    traceparent: str | None = None

    def name(self, key: str) -> None:
        """Note by which key it came, where that has a name."""
        if key:
            self.facts["key"] = key

    def ignore(self, names: Sequence[str]) -> None:
        """Note the names of fields that were ignored; of a few of them as much as shows which they
        are."""
        self.ignored = ",".join(name[:_MAX_NAME] for name in names[:_MAX_NAMES])
        if len(names) > _MAX_NAMES:
            self.ignored += f" and {len(names) - _MAX_NAMES} more"

    def answered(self, message: Message) -> Message:
        """Note the response's beginning, and put the id into its headers."""
        if message["type"] != "http.response.start":
            return message
        self.status = message["status"]
        own = (REQUEST_ID.lower().encode(), self.id.encode("ascii"))
        return {**message, "headers": [*message.get("headers", ()), own]}


class AccessLog:
    """Opens a visit for each request and closes it with a line and a count."""

    def __init__(
        self,
        metrics: ServerMetrics,
        paths: Iterable[str],
        clock: Callable[[], float] = time.monotonic,
        spans: Spans | None = None,
    ) -> None:
        """spans   where each request leaves a span as well"""
        self._spans = spans
        self._metrics = metrics
        self._clock = clock
        self._templates = [compile_path(path)[:2] for path in paths]

    def open(self, scope: Scope) -> Visit:
        path = scope.get("path", "")
        route = next(
            (template for pattern, template in self._templates if pattern.match(path)), OTHER
        )
        visit = Visit(_request_id(scope), scope.get("method", ""), route, path, self._clock())
        shown = [value for name, value in scope["headers"] if name == b"traceparent"]
        if len(shown) == 1:
            visit.traceparent = str(shown[0], "latin-1")
        return visit

    def close(self, visit: Visit) -> None:
        status = visit.status or _CLIENT_GONE
        self._metrics.answered(visit.method, visit.route, status)
        fault = visit.fault
        if fault is not None:
            self._metrics.rejected(fault.reason)
        # A template says it all but where a part of it is the client's.
        path = visit.path if visit.route == OTHER or "{" in visit.route else None
        line = {
            "status": status,
            "method": visit.method,
            "route": visit.route,
            "path": path,
            **_told(fault),
        }
        line |= {
            "request_id": visit.id,
            "seconds": self._clock() - visit.started,
            "ignored_fields": visit.ignored,
        }
        level = _level(status, visit.method, fault) if visit.ignored is None else logging.WARNING
        line |= visit.facts
        log.log(level, "%s", logfmt(line))
        if self._spans is not None:
            self._spans.record(visit.traceparent, self._clock() - visit.started, line)

    def refused(self, fault: Fault) -> Fault:
        """Of what never became a request: its line, its count, and the fault with an id among its
        headers."""
        visit = Visit(_new_id(), "", OTHER, "", self._clock(), fault.status)
        self._metrics.answered(visit.method, visit.route, fault.status)
        self._metrics.rejected(fault.reason)
        line = {
            "status": fault.status,
            "route": visit.route,
            **_told(fault),
            "request_id": visit.id,
        }
        log.log(_level(fault.status, "", fault), "%s", logfmt(line))
        return replace(fault, headers={**fault.headers, REQUEST_ID: visit.id})


def _told(fault: Fault | None) -> dict[str, object]:
    """Why; not in the words of the message, nor by the field's name, which may be a client's."""
    if fault is None:
        return {}
    return {"code": fault.code, "reason": fault.reason, "error_id": fault.error_id}


def _level(status: int, method: str, fault: Fault | None) -> int:
    """A failure of ours is a warning. Reads that were answered are what probes and scrapers ask all
    day."""
    if max(status, fault.status if fault else 0) == 500:
        return logging.WARNING
    return (
        logging.DEBUG
        if status < 400 and fault is None and method in ("GET", "HEAD")
        else logging.INFO
    )


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


def _request_id(scope: Scope) -> str:
    """The client's, if it sent one that is fit for a header, a line and a shell."""
    shown = [value for name, value in scope["headers"] if name == REQUEST_ID.lower().encode()]
    if len(shown) != 1 or _FIT_ID.fullmatch(shown[0]) is None:
        return _new_id()
    return str(shown[0], "ascii")
