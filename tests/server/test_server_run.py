"""Binding, signals and the end of the process."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from forked import PARENT
from moebius.errors import ConfigError
from moebius.server.listen import reserve
from server.serving import http_request, wait_until

SERVER = """
import sys, warnings
warnings.simplefilter("error")
sys.path[:0] = sys.argv.pop(1).split(":")
from server.serving import engine, settings, tokenizer
from moebius.server.app import create_app
from moebius.server.listen import reserve
from moebius.server.run import run_server
from moebius.text import GenerationDefaults

fake = engine(step_seconds=float(sys.argv[1]))
with reserve("127.0.0.1", 0) as sockets:
    app = create_app(fake, tokenizer(), GenerationDefaults(), settings(drain_timeout=float(sys.argv[2])))
    run_server(app, sockets, on_start=lambda: print(sockets[0].getsockname()[1], flush=True))
assert fake.closed
print("ended", flush=True)
"""


@contextmanager
def process(
    step_seconds: float, drain_timeout: float = 30
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", "-c", SERVER, f"{root / 'src'}:{root / 'tests'}"]
    command += [str(step_seconds), str(drain_timeout)]
    child = PARENT.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert get(port, "/health/live") == 200  # at once: the port is told only when it is open
        yield child, port
    finally:
        child.kill()
        child.communicate()


def get(port: int, path: str) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}").status_code
    except httpx.HTTPError:
        return 0


def streaming(port: int, max_tokens: int) -> socket.socket:
    """A stream that has begun."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    body = {"prompt": "x", "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
    sock.sendall(http_request("/v1/completions", body))
    assert b"200 OK" in sock.recv(100)
    return sock


def rest(sock: socket.socket) -> bytes:
    with sock:
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_with_the_port_open_and_ends_with_0(number: int) -> None:
    with process(step_seconds=0.02) as (child, port):
        sock = streaming(port, max_tokens=40)
        child.send_signal(number)
        wait_until(lambda: get(port, "/health/ready") == 503)
        live = httpx.get(f"http://127.0.0.1:{port}/health/live")
        assert live.status_code == 200 and live.headers["connection"] == "close"
        refused = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert b"data: [DONE]" in rest(sock)
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out, err) == (0, "ended\n", "")


def test_a_hangup_has_the_keys_read_again_and_ends_nothing() -> None:
    with process(step_seconds=0.02) as (child, port):
        with streaming(port, max_tokens=20) as sock:
            child.send_signal(signal.SIGHUP)
            received = b""
            while b"data: [DONE]" not in received:
                received += sock.recv(65536)
        assert get(port, "/health/ready") == 200
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out, err) == (0, "ended\n", "")


def drained_under_load(seed: int) -> None:
    """SIGTERM at a random time, with streams and short requests under way: what began ends whole,
    what comes later is refused, and the exit code is 0."""
    rng = random.Random(seed)
    with process(step_seconds=0.005) as (child, port):
        streams = [streaming(port, max_tokens=rng.randint(5, 120)) for _ in range(8)]
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGTERM)
        for sock in streams:
            assert rest(sock).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), seed
        assert get(port, "/health/live") in (0, 200)
        out, err = child.communicate(timeout=30)
        assert (child.returncode, out, err) == (0, "ended\n", ""), seed


@pytest.mark.parametrize("seed", range(2))
def test_what_is_in_flight_ends_whole(seed: int) -> None:
    drained_under_load(seed)


@pytest.mark.signals
@pytest.mark.timeout(3600)
def test_what_is_in_flight_ends_whole_a_hundred_times() -> None:
    for seed in range(100):
        drained_under_load(seed)


def test_what_outlasts_the_drain_time_is_told_so() -> None:
    with process(step_seconds=0.02, drain_timeout=0.3) as (child, port):
        sock = streaming(port, max_tokens=400)
        child.send_signal(signal.SIGTERM)
        received = rest(sock)
        assert b'"code":"draining"' in received and b"[DONE]" not in received
        child.communicate(timeout=20)
        assert child.returncode == 0


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_connections_that_never_asked_anything_are_hung_up_on() -> None:
    """Browsers open some ahead of need."""
    with process(step_seconds=0.02) as (child, port), connected(port) as silent:
        with connected(port) as begun:
            begun.sendall(b"GET /health/live HT")
            assert get(port, "/health/live") == 200  # the loop has seen the others by now
            started = time.monotonic()
            child.send_signal(signal.SIGTERM)
            assert rest(begun) == rest(silent) == b""
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out, err) == (0, "ended\n", "")
        assert time.monotonic() - started < 4, "of the five that answers under way may take"


def test_clients_that_take_nothing_are_hung_up_on_at_the_end() -> None:
    with process(step_seconds=0.0, drain_timeout=0.3) as (child, port), socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.settimeout(20)
        lazy.connect(("127.0.0.1", port))
        body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "logprobs": 20, "n": 16}
        lazy.sendall(http_request("/v1/completions", body))
        assert b" 200 OK" in lazy.recv(100), (
            "some megabytes begin, of which the kernel holds a part"
        )
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out) == (0, "ended\n")
        assert "unclosed" not in err


def test_the_second_signal_ends_at_once() -> None:
    with process(step_seconds=0.02) as (child, port):
        sock = streaming(port, max_tokens=500)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: get(port, "/health/ready") == 503)
        started = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
        assert time.monotonic() - started < 5, "of the ten that the answer takes"
        assert child.returncode == 128 + signal.SIGTERM
        sock.close()


def refused(host: str, port: int, **options: Any) -> str:
    """Why an address is not to be had."""
    with pytest.raises(ConfigError) as error, reserve(host, port, **options):
        pass
    return str(error.value)


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused("127.0.0.1", port)
        assert (
            message
            == f"cannot bind 127.0.0.1:{port}: Address already in use; choose another --port or "
            "--host"
        )


def test_a_reserved_port_does_not_answer_yet() -> None:
    with reserve("localhost", 0) as sockets, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sockets[0].getsockname()[:2], timeout=5).close()


def test_a_port_taken_while_the_model_loaded() -> None:
    """Two servers may reserve one port, but only one can listen on it."""
    from moebius.server.app import create_app
    from moebius.server.run import run_server
    from moebius.text import GenerationDefaults
    from server.serving import engine, settings, tokenizer

    with (
        reserve("127.0.0.1", 0) as (first,),
        reserve("127.0.0.1", first.getsockname()[1]) as second,
    ):
        first.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"):
            run_server(create_app(engine(), tokenizer(), GenerationDefaults(), settings()), second)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.1", "example.com"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    assert "api-key" in refused(host, 0)


def test_with_a_key_any_address_of_this_machine_will_do() -> None:
    with reserve("0.0.0.0", 0, open_to_all=False):
        pass
    assert "cannot bind 192.0.2.1:0" in refused("192.0.2.1", 0, open_to_all=False)
    assert "cannot be resolved" in refused("no-such-host.invalid", 0, open_to_all=False)


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """What the name service says, whichever name is asked."""
    real = socket.getaddrinfo

    def answer(host: str, *more: Any, **options: Any) -> Any:
        return [row for address in addresses for row in real(address, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            return False
        return True


@pytest.mark.case("C18")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_host_of_two_addresses_is_served_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """localhost is ::1 to some clients and 127.0.0.1 to others."""
    resolves_to(monkeypatch, "::1", "127.0.0.1")
    with reserve("localhost", 0) as sockets:
        port = sockets[0].getsockname()[1]
        for sock in sockets:
            sock.listen()
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, port), timeout=5).close()
        assert refused("localhost", port) == (
            f"cannot bind localhost:{port}: Address already in use; choose another --port or --host"
        )


@pytest.mark.case("C18")
def test_an_address_that_the_machine_lacks_is_left_out_where_another_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ::1 of localhost, on a machine without IPv6."""
    resolves_to(monkeypatch, "127.0.0.1", "192.0.2.1")
    with reserve("some-name", 0, open_to_all=False) as sockets:
        assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1"]


@pytest.mark.case("C18")
def test_a_localhost_that_is_elsewhere_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch, "192.0.2.1")
    assert "192.0.2.1" in refused("localhost", 0) and "api-key" in refused("localhost", 0)


@pytest.mark.case("C18")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_addresses_of_ipv6_stand_in_brackets() -> None:
    with reserve("::1", 0) as (first,):
        first.listen()
        port = first.getsockname()[1]
        assert f"cannot bind [::1]:{port}: " in refused("::1", port)
    with reserve("::", 0, open_to_all=False) as (both,):
        both.listen()
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, both.getsockname()[1]), timeout=5).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_out_of_range(port: int) -> None:
    assert "between 0 and 65535" in refused("127.0.0.1", port)
