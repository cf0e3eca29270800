"""OpenAI's batch format offline: each line is a call, answered by the server's own application in
this process.

A line of the input is {"custom_id", "method": "POST", "url", "body"}; one of the output is {"id",
"custom_id", "response": {"status_code", "request_id", "body"}, "error"}. Results are written as
they finish. A second run with the same files goes on where the first was interrupted: what was
answered for good stays, what failed on our side (5xx) is asked again. A file that holds anything
else than results of these calls is refused and left as it is.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp

from moebius.errors import ConfigError, StorageError
from moebius.files import anyone, check_target, read_text, write_file
from moebius.server.first_error import first_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_RESULT = "batch_req_"
_BEGINNING = json.dumps({"id": _RESULT})[:-2].encode()
"""How each line begins that we write."""


class BatchCall(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(strict=True, frozen=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/completions", "/v1/chat/completions", "/v1/responses"]
    body: dict[str, Any]

    @property
    def result_id(self) -> str:
        """Names the result, and says of which call: a second run must not take another call's
        answer for this one's."""
        asked = json.dumps([self.url, self.body], sort_keys=True).encode()
        return _RESULT + hashlib.blake2b(asked, digest_size=12).hexdigest()


def read_batch(path: Path) -> list[BatchCall]:
    """All lines, checked before the first is run. ConfigError names the line and what is wrong with
    it."""
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    calls: dict[str, BatchCall] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            call = _call(line, where)
            if call.custom_id in calls:
                raise ConfigError(
                    f"{where}: custom_id {call.custom_id!r} was used before; each must be unique"
                )
            calls[call.custom_id] = call
    if not calls:
        raise ConfigError(f"{path} holds no calls; give one JSON object a line")
    return list(calls.values())


def _call(line: str, where: str) -> BatchCall:
    try:
        call = BatchCall.model_validate_json(line)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_error(error)}") from error
    if call.body.get("stream"):
        raise ConfigError(f"{where}: body.stream must be false in a batch")
    return call


@contextmanager
def open_results(
    path: Path, source: Path, calls: list[BatchCall]
) -> Iterator[tuple[FileIO, list[BatchCall]]]:
    """The file for the results of `calls`, which came from `source`, and those of them that are
    still to be answered.

    What an earlier run left half-written or failed is cut out. Raises ConfigError, before anything
    is changed, where the file holds what is no result of these calls or another run is writing to
    it; StorageError where it cannot be written.
    """
    if path.exists() and path.samefile(source):
        raise ConfigError(
            f"--output {path} is the batch file itself; name another file for its results"
        )
    check_target(path, anyone)
    with ExitStack() as stack:
        out = stack.enter_context(_open_locked(path))
        done = set() if _is_new(path) else _keep_answers(path, calls)
        if _is_another(out, path):  # what was cut out left a new file
            out = stack.enter_context(_open_locked(path))
        yield out, [call for call in calls if call.custom_id not in done]


def _is_new(path: Path) -> bool:
    """Nothing is there yet, or what keeps nothing: a device, a pipe."""
    return not path.is_file() or path.stat().st_size == 0


def _keep_answers(path: Path, calls: list[BatchCall]) -> set[str]:
    """The custom_ids that an earlier run answered for good; all other results are cut out of the
    file."""
    known = {call.custom_id: call.result_id for call in calls}
    done: set[str] = set()
    dropped: set[int] = set()
    for number, line in _lines(path):
        record = _record(line)
        if record is None:
            if not _is_broken_off(line):
                raise ConfigError(f"--output {path}, line {number}: {_FOREIGN}")
            dropped.add(number)
            continue
        name = record["custom_id"]
        if known.get(name) != record["id"]:
            raise ConfigError(
                f"--output {path}, line {number}: the answer to another batch's call {name!r}; "
                f"{_LEFT}"
            )
        if record["response"]["status_code"] >= 500 or name in done:
            dropped.add(number)
        else:
            done.add(name)

    def copy(to: Path) -> None:
        with to.open("wb") as file:
            file.writelines(line for number, line in _lines(path) if number not in dropped)

    if dropped:
        write_file(path, copy, ours=anyone)
    return done


_LEFT = "the file is left as it is; choose another name"
_FOREIGN = f"no result of a batch; {_LEFT}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise StorageError(f"--output {path} cannot be read: {error.strerror}") from error


def _record(line: bytes) -> Mapping[str, Any] | None:
    """A result that we wrote, whole; None for anything else."""
    if not (line.startswith(_BEGINNING) and line.endswith(b"\n")):
        return None
    try:
        record = json.loads(line)
        whole = isinstance(record["custom_id"], str) and isinstance(
            record["response"]["status_code"], int
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return record if whole else None


def _is_broken_off(line: bytes) -> bool:
    """The beginning of a result, at the end of the file: the run that wrote it was killed."""
    begins = line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
    return begins and not line.endswith(b"\n")


def _open_locked(path: Path) -> FileIO:
    """The file, at its end, which no other run opens meanwhile.

    Two runs at once would answer every call twice, and one would cut out what the other is just
    writing.
    """
    busy = ConfigError(f"--output {path} is being written by another run; wait for its end")
    try:
        out = FileIO(
            path, "ab"
        )  # not buffered: what could not be written must not be tried again on closing
    except OSError as error:
        raise StorageError(f"--output {path} cannot be written: {error.strerror}") from error
    if fcntl is None:
        log.warning(
            "this system cannot tell whether another run writes --output %s; see that none does",
            path,
        )
        return out
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        out.close()
        raise busy from None
    if _is_another(out, path):
        out.close()
        raise busy
    return out


def _is_another(out: FileIO, path: Path) -> bool:
    """Whether the file of this name has been replaced since it was opened."""
    return not path.exists() or not os.path.samestat(os.fstat(out.fileno()), path.stat())


async def run_batch(
    app: ASGIApp,
    calls: list[BatchCall],
    out: FileIO,
    *,
    concurrency: int,
    on_result: Callable[[], object],
) -> int:
    """Answer `calls`, at most `concurrency` at a time, `on_result` after each; how many were
    refused or failed."""
    waiting = iter(calls)
    failures = 0

    async def worker() -> None:
        nonlocal failures
        for call in waiting:
            response = await http.post(call.url, content=json.dumps(call.body))
            status = response.status_code
            body = response.json()
            failures += status != 200
            record = {
                "id": call.result_id,
                "custom_id": call.custom_id,
                "response": {"status_code": status, "request_id": body.get("id"), "body": body},
                "error": body.get("error"),
            }
            _write(out, record)
            on_result()

    headers = {"Content-Type": "application/json"}
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://batch", headers=headers
    )
    async with http, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(worker())
    return failures


def _write(out: FileIO, record: Mapping[str, Any]) -> None:
    rest = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as error:
        raise StorageError(
            f"--output {out.name} cannot be written: {error.strerror}; what was answered is kept, "
            "run again to go on"
        ) from error
