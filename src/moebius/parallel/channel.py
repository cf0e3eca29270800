"""Whole frames over a connected stream socket: four bytes of length, big-endian, and the frame.

A channel over a Unix socket is guarded by the directory of its name. One over TCP begins with a
proof by both sides that they hold the cluster's key (parallel/handshake.py), and each of its frames
carries a tag of that connection's own: a frame that another has made, changed, or sent again is
refused. Frames are not encrypted.
"""

import hmac
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from hashlib import blake2b

from moebius.errors import (
    ChannelClosedError,
    ChannelError,
    DeadlineError,
    OverloadError,
    WireError,
)

MOST_FRAME = 64 * 2**20
"""Bytes of the largest frame that is taken."""
MOST_UNSENT = 2 * MOST_FRAME
"""Bytes that may wait for a peer that does not read."""
_LENGTH = struct.Struct(">I")
_COUNTER = struct.Struct(">Q")
_TAG_BYTES = 16
_READ_BYTES = 256 * 1024
_SOCKET_BUFFER = 1024 * 1024


class Seal:
    """Tags of the frames that go one way over one connection, by a key of that alone.

    Frames are counted, so that one that is left out, repeated or swapped has the wrong tag.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._frames = 0

    def tag(self, frame: bytes | memoryview) -> bytes:
        """The tag of the next frame."""
        digest = blake2b(key=self._key, digest_size=_TAG_BYTES)
        digest.update(_COUNTER.pack(self._frames))
        digest.update(frame)
        self._frames += 1
        return digest.digest()


class Channel:
    """Frames to and from one peer.

    One thread receives; any number send. Whatever breaks the connection is a ChannelError, at once
    and for every call from then on; an orderly end by the peer is a ChannelClosedError.

    peer    what the errors call the other end
    seals   for what is sent and for what is received, where the connection is no private one
    """

    def __init__(
        self, sock: socket.socket, peer: str, seals: tuple[Seal, Seal] | None = None
    ) -> None:
        self.peer = peer
        self._sock = sock
        sock.setblocking(False)
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._seal_out = None if seals is None else seals[0]
        self._seal_in = None if seals is None else seals[1]
        self._tag_bytes = 0 if seals is None else _TAG_BYTES
        self._received = bytearray()
        self._unsent = bytearray()
        self._unsendable: str | None = None
        self._closed = False
        # Held while the socket is used, so that `close` takes its number away from nobody.
        self._receiving = threading.Lock()
        self._flushing = threading.Lock()
        self._sending = threading.Lock()

    def send(self, frame: bytes, timeout: float) -> None:
        """Send a frame within `timeout` seconds. ChannelError where the peer does not take it: half
        a frame may have gone out, so that nothing can follow."""
        if not self.post(frame):
            self.flush(timeout)

    def post(self, frame: bytes) -> bool:
        """Send what the peer takes at once and keep the rest; True where nothing is left to flush.

        OverloadError, and nothing sent, where too much would wait; WireError where the frame is too
        large.
        """
        if len(frame) > MOST_FRAME:
            raise WireError(f"a frame of {len(frame)} bytes; {MOST_FRAME} are the most")
        with self._sending:
            self._check_sendable()
            if self._unsent and len(self._unsent) + len(frame) > MOST_UNSENT:
                raise OverloadError(f"{self.peer} takes nothing; {len(self._unsent)} bytes wait")
            self._unsent += _LENGTH.pack(len(frame) + self._tag_bytes)
            self._unsent += frame
            if self._seal_out is not None:
                self._unsent += self._seal_out.tag(frame)
            return self._write()

    def flush(self, timeout: float) -> None:
        """Send what `post` has kept. ChannelError where that takes longer than `timeout` s."""
        deadline = time.monotonic() + timeout
        with self._flushing:
            while True:
                with self._sending:
                    self._check_sendable()
                    if self._write():
                        return
                left = deadline - time.monotonic()
                if left <= 0 or not _wait(self._sock, left, writing=True):
                    raise self._broken(f"{self.peer} took nothing for {timeout:g} s")

    def receive(self, timeout: float) -> bytes:
        """The next frame. DeadlineError where it is not here within `timeout` seconds: what came of
        it is kept, and the channel is as good as before."""
        deadline = time.monotonic() + timeout
        with self._receiving:
            while (frame := self._next()) is None:
                if not self._fill(deadline):
                    raise DeadlineError(f"nothing came from {self.peer} within {timeout:g} s")
        return frame

    def close(self) -> None:
        """End the connection; calls that wait on other threads end with ChannelClosedError."""
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._receiving, self._flushing, self._sending:
            self._sock.close()

    def detach(self) -> socket.socket:
        """The socket, for something else than frames from here on, before any have come or gone."""
        with self._receiving, self._flushing, self._sending:
            assert not self._received and not self._unsent, "frames have come or wait to go"
            self._closed = True
            return self._sock

    def _check_sendable(self) -> None:
        if self._closed:
            raise ChannelClosedError(f"the connection to {self.peer} was closed here")
        if self._unsendable is not None:
            raise ChannelError(self._unsendable)

    def _write(self) -> bool:
        """Write what the socket takes; True where that was all."""
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                # What the peer said before it went can still be received.
                self._unsendable = f"{self.peer} cannot be written to: {error.strerror}"
                self._unsent.clear()
                raise ChannelError(self._unsendable) from error
            del self._unsent[:sent]
        return True

    def _fill(self, deadline: float) -> bool:
        """Read what there is, or wait for some; False where none came in time."""
        while True:
            if self._closed:
                raise ChannelClosedError(f"the connection to {self.peer} was closed here")
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not _wait(self._sock, left, writing=False):
                    return False
                continue
            except OSError as error:
                raise self._broken(
                    f"the connection to {self.peer} broke: {error.strerror}"
                ) from error
            if data:
                self._received += data
                return True
            if self._received:
                raise self._broken(f"{self.peer} hung up in the middle of a frame")
            raise ChannelClosedError(f"{self.peer} has closed the connection")

    def _next(self) -> bytes | None:
        """The first frame of what was received, once it is whole."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if not self._tag_bytes <= length <= MOST_FRAME + self._tag_bytes:
            raise self._broken(
                f"{self.peer} announced a frame of {length} bytes, and is no Moebius process or of "
                f"another release: {MOST_FRAME} are the most"
            )
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        with memoryview(self._received) as data:
            frame = bytes(data[_LENGTH.size : end - self._tag_bytes])
            tag = bytes(data[end - self._tag_bytes : end])
        del self._received[:end]
        if self._seal_in is not None and not hmac.compare_digest(self._seal_in.tag(frame), tag):
            raise self._broken(f"a frame from {self.peer} has a wrong tag: somebody else made it")
        return frame

    def _broken(self, why: str) -> ChannelError:
        """The error of a connection that nothing more can go over, which is shut down."""
        self._unsendable = why
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        return ChannelError(why)


def _wait(sock: socket.socket, seconds: float, *, writing: bool) -> bool:
    """Wait until a socket can be used, or has nothing more to wait for; False where it was not."""
    if hasattr(select, "poll"):  # which knows no largest descriptor
        poller = select.poll()
        poller.register(sock, select.POLLOUT if writing else select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    waits = [sock]
    if writing:
        return any(select.select([], waits, [], seconds))
    return any(select.select(waits, [], [], seconds))
