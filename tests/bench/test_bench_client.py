"""The load generator against a scripted server: times, every kind of failure, concurrency, what it
sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bench.fake_openai import DONE, END, FakeOpenAI, answer, chat, event, running, text, usage
from moebius.bench.client import Target, introduce, read_stream, run_load, warm_up
from moebius.bench.metrics import Record
from moebius.bench.workload import Sample
from moebius.errors import ConfigError

SAMPLE = Sample("hello", 1, 4)


def load(
    fake: FakeOpenAI, count: int = 1, due: Sequence[float] = (), **options: Any
) -> tuple[list[Record], float]:
    target = options.pop("target", {})
    with running(fake) as url:
        where = Target(
            **{"base_url": url, "endpoint": "/v1/completions", "model": "fake", **target}
        )
        return asyncio.run(run_load(where, [SAMPLE] * count, list(due) or [0.0] * count, **options))


def one(*steps: tuple[float, bytes], **options: Any) -> Record:
    return load(FakeOpenAI(lambda number, body: list(steps)), **options)[0][0]


def fed(parts: Sequence[tuple[float, bytes]]) -> Record:
    record = Record(0.0, 1)
    read_stream(record, parts)
    return record


def test_times_are_those_of_the_script() -> None:
    records, seconds = load(FakeOpenAI(lambda number, body: answer(0.15, (0.05, 0.1))))
    (record,) = records
    assert record.error == "" and (record.input_tokens, record.output_tokens) == (7, 3)
    assert len(record.itl) == 2 and record.itl[0] >= 0.045 and record.itl[1] >= 0.095
    # However late the machine is: each part is part of the whole.
    assert 0.149 <= record.ttft <= record.e2el - sum(record.itl) + 0.001
    assert 0.299 <= record.e2el <= seconds


def test_what_counts_as_a_token() -> None:
    """Roles, empty texts, comments and usage are no tokens; the end is the last chunk of the
    answer."""
    parts = [
        (0.1, chat(role="assistant", content="")),
        (0.2, b": keep-alive\n\n"),
        (0.3, chat("a")),
        (0.5, chat(reasoning_content="b")),
        (0.9, END),
        (1.5, usage(5, 4) + DONE),
    ]
    record = fed(parts)
    assert record.arrivals == [0.3, 0.5] and record.e2el == 0.9
    assert (record.input_tokens, record.output_tokens, record.error) == (5, 4, "")
    assert record.tpot == pytest.approx(0.6 / 3)
    assert fed(parts[:-1]).output_tokens == 2, "without usage every arrival counts as one"
    assert fed([(0.4, END)]).ttft == 0.4, "an answer that shows no text"


def test_reads_may_end_anywhere() -> None:
    stream = b"".join(data for _, data in answer(0, (0, 0)))
    whole, bytewise = (
        fed([(0.1, stream)]),
        fed([(0.1, stream[i : i + 1]) for i in range(len(stream))]),
    )
    assert whole == bytewise and whole.output_tokens == 3
    assert fed([(0.1, stream.replace(b"\n", b"\r\n"))]) == whole


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([(0.0, text("a"))], "the stream ended before the answer did"),
        ([], "the stream ended before the answer did"),
        (
            [(0.0, text("a")), (0.0, event({"error": {"message": "it broke"}})), (0.0, DONE)],
            "in the stream: it broke",
        ),
        (
            [(0.0, text("a")), (0.0, event("{nonsense")), (0.0, DONE)],
            "the stream holds what is no chunk of an answer",
        ),
        (
            [(0.0, text("a")), (0.0, event("[1]")), (0.0, DONE)],
            "the stream holds what is no chunk of an answer",
        ),
        ([(0.0, b"Content-Length"), (9.0, b"")], "ReadTimeout"),
    ],
)
def test_broken_answers_keep_their_reason(steps: list[tuple[float, bytes]], reason: str) -> None:
    record = one(*steps, target={"timeout": 0.5})
    assert record.error.startswith(reason)


def test_refusals_and_lost_connections_are_counted_beside_successes() -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        kinds = (
            answer(0, (0,)),
            (503, b'{"error": {"message": "the queue is full"}}'),
            (500, b"Oops"),
            (502, b""),
        )
        return kinds[number % 4]

    records, _ = load(FakeOpenAI(script), 8)
    assert sorted(record.error for record in records) == sorted(
        2 * ["", "HTTP 503: the queue is full", "HTTP 500: Oops", "HTTP 502"]
    )
    gone = Target("http://127.0.0.1:9", "/v1/completions", "fake")
    records, _ = asyncio.run(run_load(gone, [SAMPLE] * 3, [0.0] * 3))
    assert all(record.error.startswith("ConnectError") for record in records) and len(records) == 3


def test_concurrency_is_bounded_and_waiting_is_not_timed() -> None:
    fake = FakeOpenAI(lambda number, body: answer(0.1, ()))
    done: list[Record] = []
    records, seconds = load(fake, 6, max_concurrency=2, on_done=done.append)
    assert fake.most_at_once == 2 and seconds >= 0.3
    # Two at a time: no more than twice the time that there was, as if none had waited.
    assert len(done) == 6 and sum(record.ttft for record in records) <= 2 * seconds
    assert max(record.start for record in records) >= 0.2


def test_requests_go_out_when_they_are_due() -> None:
    fake = FakeOpenAI(lambda number, body: answer(0, ()))
    due = (0.9, 0.0, 0.45)
    records, _ = load(fake, 3, due=due)
    for record, wanted in zip(records, due, strict=True):
        assert wanted <= record.start < wanted + 0.45


def test_what_is_sent() -> None:
    fake = FakeOpenAI(lambda number, body: answer(0, ()))
    load(fake, target={"api_key": "k", "body": {"temperature": 0.0, "ignore_eos": True}})
    load(fake, target={"endpoint": "/v1/chat/completions"})
    completion, conversation = fake.bodies
    common = {
        "model": "fake",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert completion == {"prompt": "hello", "temperature": 0.0, "ignore_eos": True, **common}
    assert conversation == {"messages": [{"role": "user", "content": "hello"}], **common}
    assert fake.keys == ["bearer k", None]


def met(fake: FakeOpenAI, model: str = "", warmups: int = 1) -> Target:
    with running(fake) as url:
        target = introduce(Target(f"{url}/v1/", "/v1/completions", model, timeout=5))
        asyncio.run(warm_up(target, [SAMPLE] * warmups))
        return target


def test_the_model_is_asked_for() -> None:
    fake = FakeOpenAI(lambda number, body: answer(0, ()))
    assert met(fake).model == "fake" and fake.bodies[0]["model"] == "fake"
    fake.models = None
    assert met(fake, "mine").model == "mine"
    with pytest.raises(ConfigError, match="does not list its models; name one with --model"):
        met(fake)


def test_a_server_that_will_not_do_is_one_line() -> None:
    fake = FakeOpenAI(lambda number, body: (404, b'{"error": {"message": "no such model"}}'))
    with pytest.raises(
        ConfigError,
        match="first request failed: HTTP 404: no such model; the server lists fake, other",
    ):
        met(fake, "mine")
    start = time.monotonic()
    for url in ("http://127.0.0.1:9", "http://no.such.host.invalid"):
        with pytest.raises(ConfigError, match=f"no server answers at {url}"):
            introduce(Target(url, "/v1/completions"))
    assert time.monotonic() - start < 10
    with pytest.raises(ConfigError, match="must begin with http"):
        Target("localhost:8000", "/v1/completions")
    with pytest.raises(ConfigError, match="use /v1/completions or /v1/chat/completions"):
        Target("http://localhost:8000", "/v1/embeddings")


def test_a_key_that_is_wanted() -> None:
    class Locked(FakeOpenAI):
        def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
            super()._send(writer, 401, body)

    with pytest.raises(ConfigError, match="wants a key: give --api-key, or set OPENAI_API_KEY"):
        met(Locked(lambda number, body: []))
