"""What a server takes on at most: connections, and bytes of bodies in memory."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moebius.server import capacity as capacity_module
from moebius.server import run as run_module
from moebius.server.limits import HTTP_LIMITS
from server.serving import engine, exchange, http_request, listening, wait_until

LIVE = b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n"
FIELDS = b'{"prompt": "hello", "max_tokens": 1, "user": "'
COMPLETIONS = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def clients(port: int, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            )
            found[-1].sendall(data)
        yield found


def read_end(sock: socket.socket) -> bytes:
    """All until the server hangs up."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def hung_up(socks: list[socket.socket]) -> list[int]:
    """Which of them the server has closed, without a word."""
    readable, _, _ = select.select(socks, [], [], 0)
    return [
        i
        for i, sock in enumerate(socks)
        if sock in readable and sock.recv(1, socket.MSG_PEEK) == b""
    ]


@pytest.mark.case("B7")
@pytest.mark.parametrize(
    "start", [b"", b"GET /health/live HTTP/1.1\r\nX: "], ids=["silent", "within headers"]
)
def test_idle_connections_give_way_the_oldest_first(start: bytes) -> None:
    with listening(engine(), max_connections=40) as (port, _), clients(port, 70, start) as idle:
        for _ in range(3):
            assert b" 200 " in exchange(port, LIVE)
        # 70 came, and then three more of which each was gone before the next.
        wait_until(lambda: hung_up(idle) == list(range(31)))


@pytest.mark.case("B7")
def test_a_connection_that_was_used_rests_from_then_on() -> None:
    answered = b"GET /health/live HTTP/1.1\r\n\r\n"
    with listening(engine(), max_connections=3) as (port, _), clients(port, 3) as idle:
        idle[0].sendall(answered)
        assert b" 200 " in idle[0].recv(1000)
        assert b" 200 " in exchange(port, LIVE)
        assert idle[1].recv(1) == b""
        idle[0].sendall(answered)
        assert b" 200 " in idle[0].recv(1000)


@pytest.mark.case("B7")
def test_where_all_connections_are_busy_a_new_one_is_told_so_at_once() -> None:
    fake = engine()
    fake.gate.clear()
    asked = http_request(
        "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 2}, Connection="close"
    )
    with listening(fake, max_connections=4) as (port, door), clients(port, 4, asked) as busy:
        wait_until(lambda: door.in_flight == 4)
        head, _, body = exchange(port, LIVE).partition(b"\r\n\r\n")
        assert (
            head.startswith(b"HTTP/1.1 503 ")
            and b"retry-after: 1" in head
            and b"connection: close" in head
        )
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert b'reason="overload"} 1.0' in door.metrics.exposition()
        fake.gate.set()
        assert all(b"[DONE]" in read_end(sock) for sock in busy)
        assert b" 200 " in exchange(port, LIVE)


@pytest.mark.case("B7")
def test_as_many_files_are_asked_for_as_connections_need(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1_000_000))
    assert run_module._openable(2048) == 2048
    assert asked == [(2 * 2048 + 256, 1_000_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1256))
    assert run_module._openable(2048) == 500
    assert asked[1:] == [(1256, 1256)] and "at most 500 connections, not 2048" in caplog.text
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    assert run_module._openable(2048) == 2048 and len(asked) == 2


# Bodies


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for four bodies of 256 KiB."""
    monkeypatch.setattr(capacity_module, "HTTP_LIMITS", replace(HTTP_LIMITS, bodies_bytes=2**20))


def body_of(size: int) -> bytes:
    return FIELDS + b"x" * (size - len(FIELDS) - 2) + b'"}'


@pytest.mark.case("B7")
@pytest.mark.usefixtures("tight")
def test_bodies_that_find_no_room_are_refused_before_they_are_read() -> None:
    body = body_of(2**18)
    head = COMPLETIONS + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with listening(engine()) as (port, door), clients(port, 7, head + body[:1000]) as socks:
        wait_until(lambda: len(select.select(socks, [], [], 0)[0]) == 3)
        refused = select.select(socks, [], [], 0)[0]
        for sock in refused:
            answer = read_end(sock)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
        small = {"prompt": "hello", "max_tokens": 1, "user": "x" * 50_000}
        assert b" 200 " in exchange(
            port, http_request("/v1/completions", small, Connection="close")
        )
        waiting = [sock for sock in socks if sock not in refused]
        waiting.pop().close()
        wait_until(lambda: exchange(port, head + body).startswith(b"HTTP/1.1 200 "))
        for sock in waiting:
            sock.sendall(body[1000:])
            assert read_end(sock).startswith(b"HTTP/1.1 200 ")
        assert b'reason="overload"' in door.metrics.exposition()


@pytest.mark.case("B7")
@pytest.mark.usefixtures("tight")
def test_a_body_without_a_length_takes_room_as_it_grows() -> None:
    head = COMPLETIONS + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
    with listening(engine()) as (port, _), clients(port, 2, head) as (first, second):
        for _ in range(12):
            first.sendall(chunk)
        first.settimeout(0.3)
        with pytest.raises(TimeoutError):
            first.recv(1)
        for _ in range(12):
            second.sendall(chunk)
        assert read_end(second).startswith(b"HTTP/1.1 503 ")
        first.close()
        with clients(port, 1, head) as (third,):
            for _ in range(15):
                third.sendall(chunk)
            third.sendall(b"%x\r\n" % len(FIELDS) + FIELDS + b'\r\n2\r\n"}\r\n0\r\n\r\n')
            assert third.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.case("B7")
@pytest.mark.usefixtures("tight")
def test_only_who_has_a_key_takes_room() -> None:
    head = COMPLETIONS + b"Content-Length: %d\r\n" % 2**18
    with (
        listening(engine(), api_keys=("k",)) as (port, _),
        clients(port, 8, head + b"\r\n") as socks,
    ):
        assert all(sock.recv(1000).startswith(b"HTTP/1.1 401 ") for sock in socks)
        answer = exchange(
            port, head + b"Authorization: Bearer k\r\nConnection: close\r\n\r\n" + body_of(2**18)
        )
        assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.case("B7")
@pytest.mark.usefixtures("tight")
def test_a_slow_body_gives_its_room_back() -> None:
    head = COMPLETIONS + b"Content-Length: %d\r\n\r\n" % 2**20
    with listening(engine(), body_timeout=0.2) as (port, _):
        for _ in range(3):
            with clients(port, 1, head + b"{") as (sock,):
                assert read_end(sock).startswith(b"HTTP/1.1 408 ")


@pytest.mark.case("B7")
def test_the_room_is_that_of_eight_full_bodies() -> None:
    assert HTTP_LIMITS.bodies_bytes == 8 * HTTP_LIMITS.body_bytes
