"""Who meets whom: a private socket, or a proof of the key before anything is read; strangers hold
nobody up."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import ChannelError, ConfigError, DeadlineError
from moebius.parallel import meet
from moebius.parallel.channel import Channel
from moebius.parallel.handshake import ANSWER_BYTES, HELLO_BYTES, MAGIC, Introduction
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener, connect

KEY = ClusterKey(bytes(range(32)))
OTHER_KEY = ClusterKey(bytes(32))


@pytest.fixture
def listener() -> Iterator[Listener]:
    one = Listener.tcp("127.0.0.1", 0, KEY)
    yield one
    one.close()


def port(listener: Listener) -> int:
    assert isinstance(listener.address, tuple)
    return listener.address[1]


@contextmanager
def accepting(listener: Listener, timeout: float = 10) -> Iterator[list[Channel]]:
    """The channel that the listener accepts within the block, once that is over."""
    found: list[Channel] = []

    def accept() -> None:
        with suppress(DeadlineError):
            found.append(listener.accept(timeout))

    thread = threading.Thread(target=accept)
    thread.start()
    yield found
    thread.join(20)
    assert not thread.is_alive()


def stranger(listener: Listener) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port(listener)), timeout=10)


def meets(listener: Listener) -> None:
    """Somebody with the key gets through, and frames cross."""
    with accepting(listener) as accepted:
        ours = connect(listener.address, 10, KEY)
    (theirs,) = accepted
    ours.send(b"to the listener", 1)
    theirs.send(b"from it", 1)
    assert (theirs.receive(5), ours.receive(5)) == (b"to the listener", b"from it")
    ours.close()
    theirs.close()


def test_a_unix_socket_lies_where_nobody_else_may_go() -> None:
    listener = Listener.unix()
    path = listener.address
    assert isinstance(path, Path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with accepting(listener) as accepted:
        ours = connect(path, 5)
    ours.send(b"hello", 1)
    assert accepted[0].receive(5) == b"hello"
    listener.close()
    assert not path.parent.exists()
    listener.close()  # again: nothing happens
    with pytest.raises(ChannelError, match=r"cannot connect to the socket .*No such file"):
        connect(path, 5)
    ours.close()
    accepted[0].close()


def test_a_long_temporary_directory_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    listener = Listener.unix()
    assert isinstance(listener.address, Path) and len(str(listener.address)) < 108
    listener.close()
    assert not listener.address.parent.exists()


def test_over_tcp_both_prove_that_they_hold_the_key(listener: Listener) -> None:
    meets(listener)
    meets(listener)


def test_another_key_is_refused_on_both_sides(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    with accepting(listener, 0.5) as accepted:
        name = f"127.0.0.1:{port(listener)}"
        with pytest.raises(ChannelError, match=f"{name} refused .* another cluster key"):
            connect(listener.address, 10, OTHER_KEY)
    assert accepted == []
    assert "holds another cluster key, or none" in caplog.text
    assert KEY.text not in caplog.text and OTHER_KEY.text not in caplog.text
    with pytest.raises(ConfigError, match="wants the cluster's key"):
        connect(listener.address, 10)
    meets(listener)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3 * ANSWER_BYTES), st.booleans(), st.booleans())
def test_no_bytes_without_the_key_get_through(sent: bytes, magic: bool, hangs_up: bool) -> None:
    """Whatever a stranger sends, it hears a hello and no more, and the next one is served."""
    listener = Listener.tcp("127.0.0.1", 0, KEY)
    with stranger(listener) as sock:
        sock.sendall(MAGIC + sent if magic else sent)
        if hangs_up:
            sock.close()
        with pytest.raises(DeadlineError):
            listener.accept(0.02)
        if not hangs_up:
            sock.setblocking(False)
            heard = everything(sock)
            assert heard[: len(MAGIC)] == MAGIC and len(heard) == HELLO_BYTES
    meets(listener)
    listener.close()


def everything(sock: socket.socket) -> bytes:
    """What has come so far."""
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except (BlockingIOError, ConnectionResetError):
        pass
    return data


def test_what_follows_a_failed_proof_is_not_even_read(listener: Listener) -> None:
    with accepting(listener, 0.3) as accepted, stranger(listener) as sock:
        good = Introduction(KEY, "x", sock.recv(HELLO_BYTES)).answer
        sock.sendall(good[:-1] + bytes([good[-1] ^ 1]) + b"\0\0\0\x04evil")
        assert hung_up(sock, 10)
    assert accepted == []


@pytest.mark.parametrize("of", ["itself", "another connection"])
def test_proofs_are_not_to_be_had_by_listening(listener: Listener, of: str) -> None:
    """Neither by sending back what the listener says, nor what another has once said to it."""
    with accepting(listener, 0.3) as accepted, stranger(listener) as sock:
        hello = sock.recv(HELLO_BYTES)
        answer = hello + hello[-32:]
        if of == "another connection":
            with stranger(listener) as other:
                answer = Introduction(KEY, "x", other.recv(HELLO_BYTES)).answer
        sock.sendall(answer)
        assert hung_up(sock, 10)
    assert accepted == []


def test_the_silent_hold_nobody_up(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meet, "MOST_UNPROVEN", 4)
    silent = [stranger(listener) for _ in range(10)]
    with pytest.raises(DeadlineError):
        listener.accept(0.2)
    ended = [sock for sock in silent if hung_up(sock)]
    assert ended == silent[:6], "the oldest give way"
    meets(listener)
    assert len([sock for sock in silent if hung_up(sock)]) == 7
    assert caplog.text.count("a connection was refused") == 1, "strangers do not fill the log"
    for sock in silent:
        sock.close()


def hung_up(sock: socket.socket, timeout: float = 0.0) -> bool:
    """Whether the listener has closed this connection, behind its hello or less."""
    sock.settimeout(timeout)
    heard = b""
    try:
        while part := sock.recv(4096):
            heard += part
            assert len(heard) <= HELLO_BYTES
    except (BlockingIOError, TimeoutError):
        return False
    except ConnectionResetError:
        pass
    return True


def test_a_proof_has_a_deadline(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "PROOF_SECONDS", 0.05)
    with stranger(listener) as sock, accepting(listener, 0.5) as accepted:
        sock.sendall(MAGIC)
        sock.settimeout(10)
        assert len(sock.recv(100)) == HELLO_BYTES
        assert sock.recv(100) == b"", "long before the 10 seconds of this end"
    assert accepted == []


@contextmanager
def impostor(behave: Callable[[socket.socket], object]) -> Iterator[tuple[str, int]]:
    """An address where somebody listens that is no listener of ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                behave(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()
        thread.join(10)
        assert not thread.is_alive()


def pretend(sock: socket.socket) -> None:
    sock.sendall(MAGIC + os.urandom(32))
    answer = sock.recv(ANSWER_BYTES)
    sock.sendall(answer[-32:])


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (pretend, "does not hold this cluster's key"),
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 3), "no Moebius process"),
        (lambda sock: sock.sendall(MAGIC[:-1] + b"\x09" + bytes(32)), "of another release"),
        (lambda sock: None, "hung up before it had proven itself"),
        (lambda sock: time.sleep(0.5), "it does not answer"),
    ],
    ids=["pretends", "http", "version", "hangs up", "silent"],
)
def test_who_connects_wants_a_proof_too(
    behave: Callable[[socket.socket], object], why: str
) -> None:
    with impostor(behave) as address:
        with pytest.raises(ChannelError, match=why) as error:
            connect(address, 0.2, KEY)
        assert f"127.0.0.1:{address[1]}" in str(error.value)


def test_where_nobody_is_the_address_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()
        with pytest.raises(ChannelError, match=f"127.0.0.1:{address[1]}: .*refused"):
            connect(address, 1, KEY)
        with pytest.raises(ChannelError, match=r"no-such-host\.invalid:5"):
            connect(("no-such-host.invalid", 5), 1, KEY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, port = taken.getsockname()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            Listener.tcp("127.0.0.1", port, KEY)


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    try:
        listener = Listener.tcp("::1", 0, KEY)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with accepting(listener) as accepted:
        channel = connect(listener.address, 5, KEY)
    assert channel.peer.startswith("[::1]:")
    channel.close()
    accepted[0].close()
    listener.close()
