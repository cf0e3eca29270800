"""Load on an OpenAI-compatible server: requests sent when due, every outcome recorded."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import httpx

from moebius.bench.metrics import Record
from moebius.bench.workload import Sample
from moebius.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask and how.

    body      goes into every request beside its prompt
    timeout   seconds of silence after which a request has failed
    """

    base_url: str
    endpoint: str
    model: str = ""
    api_key: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.endpoint.endswith("/completions"):
            raise ConfigError(
                f"--endpoint is {self.endpoint!r}; use /v1/completions or /v1/chat/completions"
            )
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url is {self.base_url!r}; it must begin with http:// or https://"
            )

    @property
    def root(self) -> str:
        """The server's address; clients' habit of writing /v1 into it does no harm."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    def request(self, sample: Sample) -> dict[str, Any]:
        if self.chat:
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": sample.prompt}]}
        else:
            asked = {"prompt": sample.prompt}
        return {
            **asked,
            "model": self.model,
            "max_tokens": sample.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body,
        }

    def session(self) -> httpx.AsyncClient:
        headers = {"Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            headers=headers, timeout=httpx.Timeout(self.timeout, pool=None), limits=limits
        )


async def served_models(target: Target) -> list[str]:
    """What the server lists at /v1/models; [] if it lists nothing.

    Raises ConfigError if nobody answers, or not to us.
    """
    try:
        async with target.session() as http:
            response = await http.get(f"{target.root}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"no server answers at {target.root} ({_reason(error)}); start one with `moebius "
            "serve`, or name another with --base-url or --host and --port"
        ) from error
    if response.status_code in (401, 403):
        raise ConfigError(
            f"the server at {target.root} wants a key: give --api-key, or set OPENAI_API_KEY"
        )
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def introduce(target: Target) -> Target:
    """The target, its model's name filled in where none was given.

    Raises ConfigError where the server will not do.
    """
    listed = asyncio.run(served_models(target))
    if target.model:
        return target
    if not listed:
        raise ConfigError(
            f"the server at {target.root} does not list its models; name one with --model"
        )
    return replace(target, model=listed[0])


async def warm_up(target: Target, samples: Sequence[Sample]) -> None:
    """Send samples one after the other.

    Raises ConfigError with the server's own reason where one fails.
    """
    records, _ = await run_load(target, samples, [0.0] * len(samples), max_concurrency=1)
    for record in records:
        if record.error:
            listed = await served_models(target)
            others = ""
            if listed and target.model not in listed:
                others = f"; the server lists {', '.join(listed)}"
            raise ConfigError(f"the first request failed: {record.error}{others}")


async def run_load(
    target: Target,
    samples: Sequence[Sample],
    due: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Record], object] = lambda record: None,
) -> tuple[list[Record], float]:
    """Send samples[i] due[i] seconds after the start, at most `max_concurrency` at a time.

    Returns the records, in the order of the samples, and the run's seconds. A request that waits
    for others to end is timed from when it is sent.
    """
    gate = asyncio.Semaphore(max_concurrency or len(samples) or 1)
    async with target.session() as http:
        begin = perf_counter()

        async def one(sample: Sample, at: float) -> Record:
            await asyncio.sleep(begin + at - perf_counter())
            async with gate:
                record = await ask(http, target, sample, begin)
            on_done(record)
            return record

        records = await asyncio.gather(*map(one, samples, due))
        return records, perf_counter() - begin


async def ask(http: httpx.AsyncClient, target: Target, sample: Sample, begin: float) -> Record:
    """One request to its end, whatever end it is."""
    start = perf_counter()
    record = Record(start - begin, sample.input_tokens)
    parts: list[tuple[float, bytes]] = []
    try:
        async with http.stream(
            "POST", target.root + target.endpoint, json=target.request(sample)
        ) as response:
            if response.status_code != 200:
                record.error = _refusal(response.status_code, await response.aread())
                return record
            async for part in response.aiter_raw():
                parts.append((perf_counter() - start, part))
    except httpx.HTTPError as error:
        record.error = _reason(error)
    read_stream(record, parts)
    return record


def read_stream(record: Record, parts: Sequence[tuple[float, bytes]]) -> None:
    """Fill a record from server-sent events: bytes, and the seconds after which they came.

    They may be cut anywhere. Without a usage report every arrival of text counts as one token.
    """
    rest = b""
    ended = False
    for now, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                ended = _data(record, line.removeprefix(b"data:").strip(), now) or ended
    if not ended:
        record.error = record.error or "the stream ended before the answer did"
    record.output_tokens = record.output_tokens or len(record.arrivals)


def _data(record: Record, data: bytes, now: float) -> bool:
    """Note what one event's data say; whether they end the answer."""
    if data == b"[DONE]":
        return True
    try:
        return _event(record, json.loads(data), now)
    except (ValueError, LookupError, TypeError, AttributeError):
        what = f"the stream holds what is no chunk of an answer: {data[:80]!r}"
        record.error = record.error or what
        return False


def _event(record: Record, event: Mapping[str, Any], now: float) -> bool:
    """Note what one event says; whether it ends the answer."""
    if "error" in event:
        record.error = record.error or f"in the stream: {_message(event)}"
    if event.get("usage"):
        record.input_tokens = event["usage"]["prompt_tokens"]
        record.output_tokens = event["usage"]["completion_tokens"]
    ended = False
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        record.e2el = now
        ended = ended or choice.get("finish_reason") is not None
        # A role, or an empty text, is sent before there is a token.
        if choice.get("text") or any(
            delta.get(k) for k in ("content", "reasoning_content", "reasoning", "tool_calls")
        ):
            record.arrivals.append(now)
    return ended


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _message(body: Mapping[str, Any]) -> str:
    error = body["error"]
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return str(error)


def _refusal(status: int, body: bytes) -> str:
    try:
        text = _message(json.loads(body))
    except (ValueError, LookupError, TypeError):
        text = body[:200].decode(errors="replace").strip()
    return f"HTTP {status}: {text}".rstrip(": ")
