"""OpenAI's batch format offline: each line is a call, answered by the server's own application in this process.

A line of the input is {"custom_id", "method": "POST", "url", "body"}; one of the output is {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}. Results are written as they finish. A second run with the
same files goes on where the first was interrupted: what was answered for good stays, what failed on our side (5xx) is
asked again.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp, Message

from moebius.errors import ConfigError

URLS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class BatchCall:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_batch(path: Path) -> list[BatchCall]:
    """All lines, checked before the first is run. ConfigError names the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    calls: dict[str, BatchCall] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        call = _call(line, f"{path}, line {number}")
        if call.custom_id in calls:
            raise ConfigError(
                f"{path}, line {number}: custom_id {call.custom_id!r} was used before; each must be unique"
            )
        calls[call.custom_id] = call
    if not calls:
        raise ConfigError(f"{path} holds no calls; give one JSON object a line")
    return list(calls.values())


def _call(line: str, where: str) -> BatchCall:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: not a JSON object")
    custom_id, url, body = record.get("custom_id"), record.get("url"), record.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ConfigError(f"{where}: custom_id must be a string that is not empty")
    if record.get("method", "POST") != "POST" or url not in URLS:
        raise ConfigError(f"{where}: method and url must be POST and one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ConfigError(f"{where}: body must be an object, the request's fields")
    if body.get("stream"):
        raise ConfigError(f"{where}: stream must be false in a batch")
    return BatchCall(custom_id, url, body)


def answered(path: Path) -> set[str]:
    """The custom_ids that an earlier run answered for good; what it left half-written or failed is cut out."""
    if not path.exists():
        return set()
    kept: list[str] = []
    done: set[str] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            final = record["response"]["status_code"] < 500
            custom_id = record["custom_id"]
        except (ValueError, KeyError, TypeError):
            continue
        if final and custom_id not in done:
            done.add(custom_id)
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
    return done


async def run_batch(
    app: ASGIApp, calls: list[BatchCall], out: IO[str], *, concurrency: int, on_result: Callable[[int], None]
) -> int:
    """Answer `calls`, at most `concurrency` at a time; the number of those that were refused or failed.

    `on_result` gets each answer's completion tokens.
    """
    waiting = iter(calls)
    failures = 0

    async def worker() -> None:
        nonlocal failures
        for call in waiting:
            status, body = await _post(app, call)
            failures += status != 200
            record = {
                "id": f"batch_req_{call.custom_id}",
                "custom_id": call.custom_id,
                "response": {"status_code": status, "request_id": body.get("id"), "body": body},
                "error": body.get("error"),
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            usage = body.get("usage") or {}
            on_result(usage.get("completion_tokens", 0))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(worker())
    return failures


async def _post(app: ASGIApp, call: BatchCall) -> tuple[int, dict[str, Any]]:
    """One call through the ASGI application, as a connection would make it."""
    body = json.dumps(call.body).encode()
    sent = False
    status = 500
    chunks: list[bytes] = []
    never = asyncio.Event()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await never.wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            chunks.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": call.url,
        "raw_path": call.url.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    await app(scope, receive, send)
    return status, json.loads(b"".join(chunks))
