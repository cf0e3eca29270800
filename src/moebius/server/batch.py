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

import httpx
from starlette.types import ASGIApp

from moebius.config import require
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
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    calls: dict[str, BatchCall] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            call = _call(line, where)
            require(
                call.custom_id not in calls,
                f"{where}: custom_id {call.custom_id!r} was used before; each must be unique",
            )
            calls[call.custom_id] = call
    require(bool(calls), f"{path} holds no calls; give one JSON object a line")
    return list(calls.values())


def _call(line: str, where: str) -> BatchCall:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    require(isinstance(record, dict), f"{where}: not a JSON object")
    custom_id, url, body = record.get("custom_id"), record.get("url"), record.get("body")
    require(isinstance(custom_id, str) and custom_id != "", f"{where}: custom_id must be a string that is not empty")
    posted = record.get("method", "POST") == "POST" and url in URLS
    require(posted, f"{where}: method and url must be POST and one of {', '.join(URLS)}")
    require(isinstance(body, dict), f"{where}: body must be an object, the request's fields")
    require(not body.get("stream"), f"{where}: stream must be false in a batch")
    return BatchCall(custom_id, url, body)


def answered(path: Path) -> set[str]:
    """The custom_ids that an earlier run answered for good; what it left half-written or failed is cut out."""
    if not path.exists():
        return set()
    kept: list[str] = []
    done: set[str] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
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
    app: ASGIApp, calls: list[BatchCall], out: IO[str], *, concurrency: int, on_result: Callable[[], None]
) -> int:
    """Answer `calls`, at most `concurrency` at a time, `on_result` after each; how many were refused or failed."""
    waiting = iter(calls)
    failures = 0

    async def worker() -> None:
        nonlocal failures
        for call in waiting:
            response = await http.post(call.url, content=json.dumps(call.body))
            status, body = response.status_code, response.json()
            failures += status != 200
            record = {
                "id": f"batch_req_{call.custom_id}",
                "custom_id": call.custom_id,
                "response": {"status_code": status, "request_id": body.get("id"), "body": body},
                "error": body.get("error"),
            }
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            on_result()

    headers = {"Content-Type": "application/json"}
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://batch", headers=headers)
    async with http, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(worker())
    return failures
