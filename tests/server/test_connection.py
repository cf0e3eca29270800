"""HTTP/1.1 and 1.0 on a socket: framing, keep-alive, what clients may offer or get wrong."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from moebius.server import connection as connection_module
from moebius.server import run as run_module
from moebius.server.capacity import Capacity
from moebius.server.connection import Connection, tracked
from moebius.server.limits import HTTP_LIMITS
from server.serving import MODEL, engine, events, exchange, listening, until, wait_until

STREAM: dict[str, Any] = {
    "prompt": "x",
    "stream": True,
    "max_tokens": 5,
    "seed": 1,
    "ignore_eos": True,
}
LIVE = "/health/live"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(engine()) as (port, _):
        yield port


def request(
    path: str, body: Any = None, *, version: str = "1.1", method: str = "POST", **headers: str
) -> bytes:
    """A request as bytes; one without a body where there is none."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: test"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"] if data else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


CHUNKED = request("/tokenize", Content_Type="application/json", Transfer_Encoding="chunked")
CHUNKED += b'f\r\n{"prompt": "x"}\r\n0\r\n\r\n'


def parted(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and all that follows of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = (line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in fields}, body


def text_of(body: bytes) -> str:
    """What a stream of completions says."""
    *chunks, last = events(body)
    assert last == "[DONE]"
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


class Talk:
    """One connection, on which several requests are made."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def ask(self, data: bytes, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        """Send, and read one answer that says how long it is."""
        self.sock.sendall(data)
        return self.read(body=body)

    def read(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        lines = []
        while (line := self.file.readline()) not in (b"\r\n", b""):
            lines.append(line)
        status, headers, _ = parted(b"".join(lines).removesuffix(b"\r\n") + b"\r\n\r\n")
        return (
            status,
            headers,
            self.file.read(int(headers.get("content-length", 0))) if body else b"",
        )

    def closed(self) -> bool:
        return self.file.read(1) == b""


# HTTP/1.0


@pytest.mark.case("C9")
@pytest.mark.parametrize("connection", [{}, {"Connection": "keep-alive"}])
def test_a_stream_over_http_1_0_has_no_chunk_sizes_and_ends_with_the_connection(
    port: int, connection: dict[str, str]
) -> None:
    with httpx.Client() as client:
        expected = text_of(
            client.post(f"http://127.0.0.1:{port}/v1/completions", json=STREAM).content
        )
    answer = exchange(port, request("/v1/completions", STREAM, version="1.0", **connection))
    status, headers, body = parted(answer)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert "transfer-encoding" not in headers and headers["connection"] == "close"
    assert text_of(body) == expected != ""


@pytest.mark.case("C9")
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_the_same_stream_over_both_versions(port: int) -> None:
    said = [
        subprocess.run(
            [
                "curl",
                "-sN",
                version,
                f"http://127.0.0.1:{port}/v1/completions",
                "--json",
                json.dumps(STREAM),
            ],
            capture_output=True,
            check=True,
        ).stdout
        for version in ("--http1.0", "--http1.1")
    ]
    assert text_of(said[0]) == text_of(said[1]) != ""


@pytest.mark.case("C9")
def test_http_1_0_with_keep_alive_is_answered_and_closed(port: int) -> None:
    """As ab -k asks: the answer says that it will not be, and how long it is."""
    with Talk(port) as talk:
        status, headers, body = talk.ask(
            request(LIVE, method="GET", version="1.0", Connection="Keep-Alive")
        )
        assert (status, headers["connection"], body) == (
            200,
            "close",
            b'{"status":"live"}',
        ) and talk.closed()


def test_a_chunked_body_of_an_http_1_0_client_ends_its_connection(port: int) -> None:
    data = (
        b"POST /tokenize HTTP/1.0\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
    )
    data += b'Transfer-Encoding: chunked\r\n\r\nf\r\n{"prompt": "x"}\r\n0\r\n\r\n'
    status, headers, _ = parted(exchange(port, data))
    assert (status, headers["connection"]) == (200, "close")


# HTTP/1.1


def test_head_has_a_length_and_no_body(port: int) -> None:
    with Talk(port) as talk:
        status, headers, _ = talk.ask(request(LIVE, method="HEAD"), body=False)
        assert status == 200 and int(headers["content-length"]) > 0
        assert talk.ask(request(LIVE, method="GET"))[2] == b'{"status":"live"}'


def test_options_says_which_methods_there_are(port: int) -> None:
    with Talk(port) as talk:
        status, headers, _ = talk.ask(request("/v1/completions", method="OPTIONS"))
        assert (status, headers["allow"]) == (204, "HEAD, OPTIONS, POST")
        status, headers, _ = talk.ask(request("/v1/models", method="OPTIONS"))
        assert (status, headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        assert talk.ask(request("*", method="OPTIONS"))[0] == 404


@pytest.mark.parametrize(
    "target", ["http://other.example:80/health/live?x=1", "http://h/health/live"]
)
def test_a_target_may_be_a_whole_url(port: int, target: str) -> None:
    status, _, body = parted(exchange(port, request(target, method="GET", Connection="close")))
    assert (status, body) == (200, b'{"status":"live"}')


def test_a_body_is_asked_for_only_where_it_is_wanted(port: int) -> None:
    body = {"prompt": "x"}
    whole = request("/tokenize", body, Expect="100-continue")
    head, _, data = whole.partition(b"\r\n\r\n")
    with Talk(port) as talk:
        talk.sock.sendall(head + b"\r\n\r\n")
        assert (
            talk.file.readline() == b"HTTP/1.1 100 Continue\r\n" and talk.file.readline() == b"\r\n"
        )
        assert talk.ask(data)[0] == 200
        refused = head.replace(b"application/json", b"text/plain")
        status, headers, _ = talk.ask(refused + b"\r\n\r\n")
        assert (status, headers["connection"]) == (415, "close") and talk.closed()


@pytest.mark.parametrize(
    "offer",
    [
        {
            "Connection": "Upgrade, HTTP2-Settings",
            "Upgrade": "h2c",
            "HTTP2-Settings": "AAMAAABkAAQAAP__",
        },
        {"Connection": "Upgrade", "Upgrade": "websocket"},
        {"Upgrade": "h2c"},
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_an_offer_of_another_protocol_is_declined_and_the_body_read(
    port: int, offer: dict[str, str], together: bool
) -> None:
    """Java's HttpClient offers h2c with every request; its body counts all the same."""
    whole = request("/tokenize", {"prompt": "hello"}, **offer)
    with Talk(port) as talk:
        if not together:
            head, _, data = whole.partition(b"\r\n\r\n")
            talk.sock.sendall(head + b"\r\n\r\n")
            time.sleep(0.05)
            whole = data
        status, _, body = talk.ask(whole)
        assert status == 200 and json.loads(body)["count"] > 0
        assert talk.ask(request(LIVE, method="GET", **offer))[0] == 200
        assert talk.ask(request(LIVE, method="GET"))[0] == 200


def test_connect_is_refused(port: int) -> None:
    status, _, body = parted(exchange(port, b"CONNECT other:443 HTTP/1.1\r\n\r\n\x16\x03"))
    assert status == 400 and json.loads(body)["error"]["code"] == "bad_request"


def test_a_request_may_come_byte_by_byte(port: int) -> None:
    data = request(
        "/tokenize", method="POST", Content_Type="application/json", Transfer_Encoding="chunked"
    )
    data += b'2;x=y\r\n{"\r\nd\r\nprompt": "x"}\r\n0\r\nTrailer: z\r\n\r\n'
    with Talk(port) as talk:
        talk.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for i in range(len(data)):
                talk.sock.sendall(data[i : i + 1])
            status, _, body = talk.read()
            assert status == 200 and json.loads(body)["count"] == 1


def test_what_comes_behind_a_stream_waits_for_its_end() -> None:
    """Requests that are pipelined, and bytes that are none: nothing gets into the middle of a
    stream."""
    fake = engine(step_seconds=0.005)
    with listening(fake) as (port, door):
        stream = request("/v1/completions", {**STREAM, "max_tokens": 20})
        with Talk(port) as talk:
            talk.sock.sendall(stream)
            wait_until(lambda: fake.steps >= 2)
            talk.sock.sendall(request(LIVE, method="GET") * 700 + b"what?\r\n\r\n")
            head, _, rest = talk.file.read().partition(b"0\r\n\r\nHTTP/1.1")
        assert head.startswith(b"HTTP/1.1 200") and b"[DONE]" in head and b"400" not in head
        assert rest.startswith(b" 400 ") and rest.endswith(b'"code":"bad_request"}}')
        wait_until(lambda: door.in_flight == 0)


def test_a_client_that_pipelines_and_leaves_is_noticed() -> None:
    fake = engine(step_seconds=0.02)
    with listening(fake) as (port, door):
        sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        sock.sendall(
            request("/v1/completions", {**STREAM, "max_tokens": 400})
            + request(LIVE, method="GET") * 2
        )
        wait_until(lambda: fake.steps >= 2)
        sock.close()
        wait_until(lambda: door.in_flight == 0 and fake.idle)
        assert max(fake.drawn.values()) < 100


def test_a_body_that_goes_wrong_under_way_is_a_bad_request(port: int) -> None:
    head = request("/tokenize", Content_Type="application/json", Transfer_Encoding="chunked")
    with Talk(port) as talk:
        talk.sock.sendall(head + b'2\r\n{"\r\n')
        time.sleep(0.05)
        status, headers, _ = talk.ask(b"zz\r\n")
        assert (status, headers["connection"]) == (400, "close") and talk.closed()


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: "
        b"chunked\r\n\r\n2;",
        b"POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: "
        b"chunked\r\n\r\n0\r\nX: ",
    ],
    ids=["empty lines", "a header", "a chunk's extension", "a trailer"],
)
def test_nothing_comes_without_end(port: int, start: bytes) -> None:
    endless = b"\r\n" if not start else b"x"
    with Talk(port) as talk:
        status, headers, _ = talk.ask(
            start + endless * (4 * HTTP_LIMITS.header_bytes if b"\r\n\r\n" not in start else 2**20)
        )
        assert (status, headers["connection"]) == (431, "close")


def test_who_is_refused_while_sending_still_reads_why(port: int) -> None:
    """Closing at once would reset the connection, under a client that is still busy sending."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: "
        b"50000000\r\n\r\n"
    )
    with Talk(port) as talk:
        talk.sock.sendall(head)
        for _ in range(16):
            talk.sock.sendall(b" " * 2**18)
            time.sleep(0.002)
        status, headers, body = talk.read()
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["error"]["code"] == "request_too_large" and talk.closed()


class Stuck(asyncio.Transport):
    """A transport whose peer takes nothing: what is closed stays open until it is aborted."""

    aborted = False
    closing = False
    written = b""

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


def stuck(capacity: Capacity, app: Any, data: bytes) -> tuple[Connection, Stuck]:
    """A connection that has received bytes, and its transport."""
    config = uvicorn.Config(
        tracked(app), http="httptools", ws="none", lifespan="off", log_config=None
    )
    config.load()
    shared = uvicorn.Server(config).server_state

    def framing(*, h11: bool, state: dict[str, Any]) -> asyncio.Protocol:
        make: Any = config.http_protocol_class
        protocol: asyncio.Protocol = make(config=config, server_state=shared, app_state=state)
        return protocol

    connection, transport = Connection(framing, capacity, {}), Stuck()
    connection.connection_made(transport)
    connection.data_received(data)
    return connection, transport


async def one_byte(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def test_an_answer_that_nobody_takes_is_given_up_after_its_connection_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it is too small to hold the server's writing up."""
    monkeypatch.setattr(connection_module, "_STALL_SECONDS", 0.1)

    async def check() -> None:
        capacity = Capacity(8, 75)
        connection, transport = stuck(
            capacity, one_byte, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
        )
        await until(lambda: transport.closing)
        assert not transport.aborted and len(capacity) == 1
        await until(lambda: transport.aborted)
        connection.connection_lost(None)
        assert len(capacity) == 0

    asyncio.run(check())


def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("secret")

    async def check() -> None:
        _, transport = stuck(Capacity(8, 75), app, b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: transport.closing)
        assert (
            transport.written.endswith(b"\r\n\r\n1\r\nx\r\n") and b"secret" not in transport.written
        )

    asyncio.run(check())


def test_how_many_take_their_time_to_leave_is_bounded() -> None:
    async def check() -> None:
        capacity = Capacity(3, 75)
        found = [stuck(capacity, one_byte, b"no HTTP\r\n\r\n")[1] for _ in range(5)]
        assert [transport.aborted for transport in found] == [False] * 3 + [True] * 2
        assert len(capacity) == 3

    asyncio.run(check())


# Keep-alive


@pytest.mark.case("C8")
def test_connections_may_rest_and_clients_are_told_how_long(port: int) -> None:
    with Talk(port) as talk:
        _, headers, _ = talk.ask(request(LIVE, method="GET"))
        assert headers["keep-alive"] == "timeout=75" and "connection" not in headers
        _, headers, _ = talk.ask(request(LIVE, method="GET", Connection="close"))
        assert headers["connection"] == "close" and "keep-alive" not in headers


@pytest.mark.case("C8")
def test_a_connection_rests_longer_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_REST_MARGIN", 1)
    with listening(engine(), keep_alive_timeout=1) as (port, _), Talk(port) as talk:
        assert talk.ask(request(LIVE, method="GET"))[1]["keep-alive"] == "timeout=1"
        started = time.monotonic()
        assert talk.closed()
        assert 1.5 < time.monotonic() - started < 6


@pytest.mark.case("C8")
def test_no_post_is_lost_as_a_pooled_connection_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that keep a connection for as long as the server says use it up to the last moment."""
    monkeypatch.setattr(run_module, "_REST_MARGIN", 1)
    with listening(engine(), keep_alive_timeout=1) as (port, _):
        url = f"http://127.0.0.1:{port}/v1"

        def twice(rest: float) -> int:
            pool = httpx.Client(limits=httpx.Limits(keepalive_expiry=1.0))
            with openai.OpenAI(
                base_url=url, api_key="k", max_retries=0, http_client=pool
            ) as client:
                for _ in range(2):
                    done = client.completions.create(model=MODEL, prompt="x", max_tokens=2).usage
                    time.sleep(rest)
                assert done is not None
                return done.completion_tokens

        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(twice, [0.88 + i / 100 for i in range(12)])) == [2] * 12


def test_a_reader_of_the_standard_library(port: int) -> None:
    """http.client frames by what the head says, and complains where it is not so."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    for version in (11, 10):
        connection._http_vsn, connection._http_vsn_str = (
            version,
            f"HTTP/{version // 10}.{version % 10}",
        )  # type: ignore[attr-defined]
        connection.request(
            "POST", "/v1/completions", json.dumps(STREAM), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert text_of(answer.read())
        assert answer.will_close == (version == 10)
        connection.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("/tokenize", {}, Transfer_Encoding="chunked"), 400),
        (request("/tokenize", {}, Transfer_Encoding="chunked", Upgrade="h2c"), 400),
        (CHUNKED.replace(b"chunked", b"gzip, chunked"), 501),
        (request(LIVE, method="GET", version="2.0"), 505),
        (b"GET /health/live\r\n\r\n", 505),
    ],
)
def test_framing_that_can_be_read_in_two_ways_is_refused(
    port: int, data: bytes, status: int
) -> None:
    found, headers, body = parted(exchange(port, data))
    assert (found, headers["connection"]) == (status, "close")
    assert json.loads(body)["error"]["code"] == "bad_request"


@pytest.mark.case("B1")
def test_many_small_chunks_keep_nobody_waiting() -> None:
    """h11 works through all that it is given before anyone else has a turn."""
    fed: list[int] = []
    connection: Connection

    class Counting(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            fed.append(len(data))
            connection.receive(whole=False)

    async def check() -> None:
        nonlocal connection
        connection = Connection(lambda **_: Counting(), Capacity(8, 75), {})
        connection.connection_made(Stuck())
        data = CHUNKED.replace(b"Host", b"Upgrade: h2c\r\nHost") + b"1\r\nx\r\n" * 20_000
        connection.data_received(data)
        assert sum(fed) < 5000
        await until(lambda: sum(fed) == len(data))
        assert max(fed) < 5000

    asyncio.run(check())


@pytest.mark.case("C9")
@pytest.mark.parametrize(
    "second",
    [
        request("/v1/completions", STREAM, version="1.0"),
        request("/tokenize", {"prompt": "hello"}, Connection="Upgrade", Upgrade="h2c"),
    ],
)
def test_what_needs_another_framing_is_refused_behind_other_requests(
    port: int, second: bytes
) -> None:
    """Or its answer would have chunk sizes in it, or its body be lost and read as the next
    request."""
    with Talk(port) as talk:
        assert talk.ask(request(LIVE, method="GET"))[0] == 200
        status, headers, _ = talk.ask(second)
        assert (status, headers["connection"]) == (400, "close") and talk.closed()
