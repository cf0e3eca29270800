"""Frames arrive whole and in order, or an error says why; no peer can make a call wait or grow for
ever."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import (
    ChannelClosedError,
    ChannelError,
    DeadlineError,
    OverloadError,
    WireError,
)
from moebius.parallel import channel as module
from moebius.parallel.channel import MOST_FRAME, Channel, Seal


def framed(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    channel = Channel(ours, "the peer")
    with theirs:
        yield channel, theirs
    channel.close()


@pytest.fixture
def pair(ends: tuple[Channel, socket.socket]) -> Iterator[tuple[Channel, Channel]]:
    other = Channel(ends[1].dup(), "the other peer")
    yield ends[0], other
    other.close()


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data


def test_a_frame_is_its_length_and_its_bytes(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    channel.send(b"abc", 1)
    channel.send(b"", 1)
    assert read(peer, 11) == b"\0\0\0\x03abc\0\0\0\0"
    peer.sendall(b"\0\0\0\x02de")
    assert channel.receive(1) == b"de"


def test_frames_of_many_senders_arrive_whole_and_each_senders_in_order(
    pair: tuple[Channel, Channel],
) -> None:
    channel, other = pair
    sizes = [0, 1, 5, 300, 70_000, 900_000]

    def send(number: int) -> None:
        draw = random.Random(number)
        for i in range(20):
            filling = bytes([number]) * draw.choice(sizes)
            channel.send(struct.pack(">BB", number, i) + filling, 20)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    heard: dict[int, list[int]] = {number: [] for number in range(4)}
    for _ in range(80):
        frame = other.receive(20)
        number, i = frame[:2]
        assert frame[2:] == bytes([number]) * (len(frame) - 2)
        heard[number].append(i)
    for thread in threads:
        thread.join()
    assert all(order == list(range(20)) for order in heard.values())


def test_what_came_before_a_deadline_is_kept(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    data = framed(b"slowly")
    for byte in data[:-1]:
        peer.sendall(bytes([byte]))
        with pytest.raises(DeadlineError, match="the peer within 0 s"):
            channel.receive(0)
    peer.sendall(data[-1:] + framed(b"next"))
    assert channel.receive(5) == b"slowly" and channel.receive(0) == b"next"


def test_posting_never_waits_and_the_rest_is_flushed(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    frames = [bytes([i]) * 400_000 for i in range(20)]
    assert not all([channel.post(frame) for frame in frames]), "a socket does not hold as much"
    reader = threading.Thread(target=channel.flush, args=(20,))
    reader.start()
    assert read(peer, 20 * 400_004) == b"".join(map(framed, frames))
    reader.join(20)
    assert channel.post(b"")


def test_what_waits_for_a_peer_is_bounded(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UNSENT", 3_000_000)
    channel, peer = ends
    posted = 0
    with pytest.raises(OverloadError, match=r"the peer takes nothing; 2\d+ bytes wait"):
        while True:
            channel.post(bytes(400_000))
            posted += 1
    flushing = threading.Thread(target=channel.flush, args=(20,))
    flushing.start()
    read(peer, posted * 400_004)
    flushing.join(20)
    assert channel.post(b"and on"), "the refused frame left nothing behind"
    assert read(peer, 10)[4:] == b"and on"


def test_a_peer_that_takes_nothing_ends_the_connection(
    ends: tuple[Channel, socket.socket],
) -> None:
    channel, _ = ends
    with pytest.raises(ChannelError, match=r"the peer took nothing for 0\.05 s"):
        while True:
            channel.send(bytes(1_000_000), 0.05)
    for use in (lambda: channel.send(b"", 1), lambda: channel.flush(1)):
        with pytest.raises(ChannelError, match="took nothing"):
            use()
    with pytest.raises(ChannelClosedError):
        channel.receive(1)


def test_frames_without_bounds_are_refused_on_both_sides(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, peer = ends
    peer.sendall(struct.pack(">I", MOST_FRAME + 1))
    with pytest.raises(ChannelError, match="announced a frame of 67108865 bytes"):
        channel.receive(1)
    assert peer.recv(1) == b"", "there is nothing more to say"
    monkeypatch.setattr(module, "MOST_FRAME", 10)
    ours, theirs = socket.socketpair()
    with theirs:
        small = Channel(ours, "the peer")
        with pytest.raises(WireError, match="a frame of 11 bytes"):
            small.send(bytes(11), 1)
        small.send(bytes(10), 1)
        small.close()


def test_an_end_between_frames_and_one_within(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    peer.sendall(framed(b"last"))
    peer.shutdown(socket.SHUT_WR)
    assert channel.receive(1) == b"last"
    for _ in range(2):
        with pytest.raises(ChannelClosedError, match="the peer has closed the connection"):
            channel.receive(1)
    ours, theirs = socket.socketpair()
    theirs.sendall(framed(b"half")[:-1])
    theirs.close()
    broken = Channel(ours, "another")
    for _ in range(2):
        with pytest.raises(ChannelError, match="another hung up in the middle of a frame") as error:
            broken.receive(1)
        assert not isinstance(error.value, ChannelClosedError)
    broken.close()


def test_what_a_peer_said_before_it_went_is_heard(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    peer.sendall(framed(b"why"))
    peer.close()
    with pytest.raises(ChannelError, match="cannot be written to"):
        while True:
            channel.post(b"are you there?")
    assert channel.receive(1) == b"why"


def test_closing_wakes_up_who_waits(pair: tuple[Channel, Channel]) -> None:
    channel, _ = pair
    caught: list[BaseException] = []

    def wait(call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except ChannelError as error:
            caught.append(error)

    while channel.post(bytes(1_000_000)):
        pass
    waiting = [
        threading.Thread(target=wait, args=(call,))
        for call in (lambda: channel.receive(60), lambda: channel.flush(60))
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)  # so that they wait, in most runs
    channel.close()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
    assert len(caught) == 2
    with pytest.raises(ChannelClosedError, match="closed here"):
        channel.send(b"", 1)


def test_closing_in_the_middle_of_a_frame_is_nobody_elses_doing(
    ends: tuple[Channel, socket.socket],
) -> None:
    channel, peer = ends
    peer.sendall(framed(b"half")[:-1])
    with pytest.raises(DeadlineError):
        channel.receive(0)
    caught: list[ChannelError] = []

    def wait() -> None:
        try:
            channel.receive(60)
        except ChannelError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not channel._receiving.locked():
        time.sleep(0.001)
    channel.close()
    waiting.join(10)
    assert [str(error) for error in caught] == ["the connection to the peer was closed here"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.booleans(), st.data())
def test_whatever_bytes_come_a_channel_reads_frames_or_says_why(
    frames: list[bytes], hostile: bool, data: st.DataObject
) -> None:
    """Against cutting the same bytes by hand; they come in pieces of any size."""
    stream = bytearray().join(map(framed, frames))
    if hostile and stream:
        for _ in range(data.draw(st.integers(1, 4))):
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "the peer")
    got: list[bytes] = []
    with theirs, closing(channel):
        position = 0
        try:
            while position < len(stream):
                size = data.draw(st.integers(1, 50))
                theirs.sendall(stream[position : position + size])
                position += size
                with_all(channel, got)
            theirs.close()
            with_all(channel, got)
        except ChannelError as error:
            outcome: type[ChannelError] = type(error)
    expected, rest = cut(bytes(stream[:position]))
    assert got == expected
    assert outcome is (ChannelClosedError if rest == b"" else ChannelError)


def with_all(channel: Channel, got: list[bytes]) -> None:
    """Receive all that is there."""
    while True:
        try:
            got.append(channel.receive(0))
        except DeadlineError:
            return


def cut(stream: bytes) -> tuple[list[bytes], bytes]:
    """The frames at the beginning of a stream, and what does not make one."""
    frames = []
    while len(stream) >= 4:
        length = int.from_bytes(stream[:4], "big")
        if length > MOST_FRAME or len(stream) < 4 + length:
            break
        frames.append(stream[4 : 4 + length])
        stream = stream[4 + length :]
    return frames, stream


TAGGED = 4 + 3 + 16


def sealed_pair() -> tuple[Channel, socket.socket, Channel, socket.socket]:
    """Two channels with the same keys, and between them somebody who has both sockets."""
    first, first_far = socket.socketpair()
    second, second_far = socket.socketpair()
    keys = (bytes(32), bytes(range(32)))
    sender = Channel(first, "b", (Seal(keys[0]), Seal(keys[1])))
    receiver = Channel(second, "a", (Seal(keys[1]), Seal(keys[0])))
    return sender, first_far, receiver, second_far


@pytest.mark.parametrize(
    "attack", ["none", "change", "repeat", "leave out", "swap", "length", "own"]
)
def test_frames_that_another_has_touched_are_refused(attack: str) -> None:
    sender, far, receiver, near = sealed_pair()
    for frame in (b"one", b"two", b"six"):
        sender.send(frame, 1)
    one, two, six = (bytearray(read(far, TAGGED)) for _ in range(3))
    two_changed = two.copy()
    two_changed[5] ^= 1
    short = two.copy()
    short[3] -= 1
    passed = {
        "none": [one, two, six],
        "change": [one, two_changed, six],
        "repeat": [one, one, two],
        "leave out": [one, six],
        "swap": [one, six, two],
        "length": [one, short, six],
        "own": [one, framed(b"two" + bytes(16)), six],
    }[attack]
    near.sendall(b"".join(passed))
    assert receiver.receive(1) == b"one"
    if attack == "none":
        assert [receiver.receive(1), receiver.receive(1)] == [b"two", b"six"]
        near.sendall(framed(b""))
        with pytest.raises(ChannelError, match="a frame of 0 bytes"):  # and without a tag
            receiver.receive(1)
    else:
        with pytest.raises(ChannelError, match="wrong tag"):
            receiver.receive(1)
        with pytest.raises(ChannelError, match="wrong tag"):  # though the next one has a right one
            receiver.receive(1)
        with pytest.raises(ChannelError):
            receiver.send(b"after", 1)
    for one_end in (sender, receiver, far, near):
        one_end.close()
