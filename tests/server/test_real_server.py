"""A real server on a socket: the official client, clients that leave, lag or talk nonsense."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moebius.server import connection as connection_module
from server.fake_engine import FakeEngine
from server.serving import MODEL, engine, exchange, http_request, listening, tokenizer, wait_until

KEY = "a-key"


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, int]]:
    fake = engine(step_seconds=0.001)
    with listening(fake, api_keys=(KEY,)) as (port, _):
        yield fake, port


@pytest.fixture
def client(live: tuple[FakeEngine, int]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{live[1]}/v1", api_key=KEY, max_retries=0, timeout=20
    ) as client:
        yield client


MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


def test_openai_chat_stream_with_n_stop_logprobs_seed_and_usage(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "n": 3,
        "seed": 11,
        "max_tokens": 25,
    }
    fields |= {"logprobs": True, "top_logprobs": 2, "stop": ["zzzz"]}
    whole = client.chat.completions.create(**fields)
    texts, ends, entries = ["", "", ""], [[], [], []], [[], [], []]
    usage = None
    for chunk in client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        assert chunk.system_fingerprint == whole.system_fingerprint == "fp_fake"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices] and len(set(texts)) == 3
    assert ends == [["length"]] * 3
    assert entries == [choice.logprobs.content for choice in whole.choices]
    assert usage == whole.usage and usage.completion_tokens == 75
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert client.chat.completions.create(**fields).choices == whole.choices


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, seed=1, logprobs=1, echo=True
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in whole.choices] == ["a", "a", "b", "b"]
    texts = [""] * 4
    for chunk in client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, seed=1, echo=True, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_errors(client: openai.OpenAI, live: tuple[FakeEngine, int]) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_openai_sees_an_error_inside_a_stream(
    client: openai.OpenAI, live: tuple[FakeEngine, int]
) -> None:
    from moebius.errors import EngineError

    live[0].fault = lambda request, step: EngineError("x") if step == 5 else None
    try:
        with pytest.raises(openai.APIError, match="error id"):
            list(client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=20))
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=MODEL, prompt="x", max_tokens=20)
    finally:
        live[0].fault = lambda request, step: None


def ask(
    fake: FakeEngine, port: int, body: dict[str, Any], room: int | None = None
) -> tuple[socket.socket, str]:
    """Send a request, and wait until the engine has it: its socket and its id.

    room   bytes that the kernel may hold for the client; None: as many as it likes
    """
    before = len(fake.requests)
    sock = socket.socket()
    if room is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    sock.sendall(http_request("/v1/completions", body, Authorization=f"Bearer {KEY}"))
    wait_until(lambda: len(fake.requests) > before)
    return sock, fake.requests[-1].id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("farewell", ["close", "shutdown", "reset"])
def test_a_client_that_goes_away_costs_at_most_a_few_steps(
    stream: bool, n: int, farewell: str
) -> None:
    fake = engine(step_seconds=0.05)
    with listening(fake, api_keys=(KEY,)) as (port, door):
        sock, id = ask(
            fake,
            port,
            {"prompt": "x", "stream": stream, "max_tokens": 400, "ignore_eos": True, "n": n},
        )
        wait_until(lambda: fake.drawn.get(id, 0) >= 2)
        if farewell == "shutdown":
            sock.shutdown(socket.SHUT_WR)
        elif farewell == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if farewell != "shutdown":
            sock.close()
        drawn = fake.drawn[id]
        wait_until(lambda: fake.idle)
        assert fake.drawn[id] <= drawn + 3
        assert len(set(fake.aborted)) == n
        wait_until(lambda: door.in_flight == 0)
        sock.close()


def test_a_client_that_leaves_before_the_first_token(live: tuple[FakeEngine, int]) -> None:
    fake, port = live
    fake.gate.clear()
    try:
        for stream in (False, True):
            sock, id = ask(fake, port, {"prompt": "x", "stream": stream})
            sock.close()
            wait_until(lambda id=id: id in fake.aborted)
    finally:
        fake.gate.set()
    wait_until(lambda: fake.idle)


def test_a_reader_that_lags_is_cut_off_and_its_neighbour_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "moebius.server.access")
    fake = engine(max_model_len=1_000_000, step_tokens=64, step_seconds=0.002)
    with listening(fake, api_keys=(KEY,), stream_buffer_bytes=64 * 1024) as (port, door):
        body = {
            "prompt": "x",
            "stream": True,
            "max_tokens": 500_000,
            "ignore_eos": True,
            "logprobs": 20,
        }
        slow, slow_id = ask(fake, port, body)
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0
        ) as client:
            chunks = list(
                client.completions.create(model=MODEL, prompt="y", max_tokens=5000, stream=True)
            )
            assert chunks[-1].choices[0].finish_reason == "length"
        wait_until(lambda: slow_id in fake.aborted and fake.idle, 20)
        assert fake.drawn[slow_id] < 500_000
        wait_until(lambda: door.in_flight == 0)
        with slow, pytest.raises(ConnectionResetError):
            while part := slow.recv(2**20):
                assert b"[DONE]" not in part
    assert f"call={slow_id.rsplit('-', 1)[0]} end=cut_off" in caplog.text


def test_a_client_that_takes_nothing_at_all_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing more is being drawn for it."""
    monkeypatch.setattr(connection_module, "_STALL_SECONDS", 0.2)
    fake = engine(max_model_len=1_000_000, step_tokens=1000)
    with listening(fake, api_keys=(KEY,)) as (port, door):
        body = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "logprobs": 20}
        sock, _ = ask(fake, port, body, room=4096)
        wait_until(lambda: door.in_flight == 0, 20)
        time.sleep(0.5)
        with sock, pytest.raises(ConnectionResetError):
            while sock.recv(2**20):
                pass


RAW: list[tuple[bytes, int]] = [
    (b"\r\n\r\n\x00\x01", 400),
    (b"GET\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET /v1/models HTTP/1.1\r\nno colon\r\n\r\n", 400),
    (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
        b"99999999999999999999999\r\n\r\n",
        400,
    ),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000, 431),
    (b"GET /" + b"x" * 40_000, 431),
    (b"GET / HTTP/1.1\r\nConnection: close\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431),
    (b"GET /nowhere HTTP/1.0\r\n\r\n", 401),
    (b"GET /health%2flive HTTP/1.0\r\n\r\n", 401),
    (b"GET http://x/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"GET /health/live HTTP/1.0\r\n\r\n", 200),
]


@pytest.mark.parametrize("data, status", RAW, ids=lambda value: repr(value)[:40])
def test_bytes_that_are_no_request(live: tuple[FakeEngine, int], data: bytes, status: int) -> None:
    answer = exchange(live[1], data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    if status != 200:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_two_content_lengths_and_smuggling_are_refused(live: tuple[FakeEngine, int]) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        b"a-key\r\nConnection: close\r\n"
    )
    for extra in (
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    ):
        assert b" 400 " in exchange(live[1], head + extra).split(b"\r\n")[0]


def test_headers_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_HEADER_SECONDS", 0.2)
    with listening(engine()) as (port, _):
        started = time.monotonic()
        for data in (b"", b"GET / HTTP/1.1\r\nX: "):
            assert exchange(port, data) == b""
        assert time.monotonic() - started < 3


def test_a_body_larger_than_the_limit_is_not_read(live: tuple[FakeEngine, int]) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        b"a-key\r\nContent-Length: 900000000\r\n"
    )
    answer = exchange(live[1], head + b"Content-Type: application/json\r\n\r\n{")
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_pipelined_requests_are_answered_in_order(live: tuple[FakeEngine, int]) -> None:
    one = http_request(
        "/v1/completions",
        {"prompt": "x", "max_tokens": 3, "seed": 1},
        Authorization=f"Bearer {KEY}",
    )
    last = b"GET /version HTTP/1.1\r\nAuthorization: Bearer a-key\r\nConnection: close\r\n\r\n"
    answer = exchange(live[1], one + one + last)
    assert answer.count(b"HTTP/1.1 200") == 3 and answer.rstrip().endswith(b"}")
    assert answer.index(b"text_completion") < answer.index(b'"version"')


def test_special_text_survives_the_socket(
    client: openai.OpenAI, live: tuple[FakeEngine, int]
) -> None:
    text = "😀 Grüße 日本語 \u2028\r\n\x00 end"
    ids = tokenizer().encode(text, False)
    fake, script = live[0], live[0].script
    fake.script = lambda request: ids
    try:
        chunks = client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
    finally:
        fake.script = script
