"""OpenAI's batch format offline: each line is a call, answered by the server's own application in this process.

A line of the input is {"custom_id", "method": "POST", "url", "body"}; one of the output is {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}. Results are written as they finish. A second run with the
same files goes on where the first was interrupted: what was answered for good stays, what failed on our side (5xx) is
asked again.
"""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp

from moebius.config import read_text, require
from moebius.errors import ConfigError
from moebius.server.protocol import first_error


class BatchCall(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(strict=True, frozen=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]


def read_batch(path: Path) -> list[BatchCall]:
    """All lines, checked before the first is run. ConfigError names the line and what is wrong with it."""
    try:
        lines = read_text(path).split("\n")
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
        call = BatchCall.model_validate_json(line)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_error(error)}") from error
    require(not call.body.get("stream"), f"{where}: body.stream must be false in a batch")
    return call


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
