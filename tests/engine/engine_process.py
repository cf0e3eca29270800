"""An engine in a process of its own, for tests: `python engine_process.py DIRECTORY FD KEY`.

Frames come and go over the socket FD, each behind its length in four bytes; when the other end
closes it the process ends.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from pathlib import Path

from moebius.engine import wire
from moebius.engine.config import EngineConfig
from moebius.engine.faults import failed
from moebius.engine.in_process import InProcessClient
from moebius.engine.load import load_engine
from moebius.errors import MoebiusError

_LENGTH = struct.Struct("<I")


class Frames:
    """Whole frames over a stream; sending is safe from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, frame: bytes) -> None:
        with self._lock:
            self._sock.sendall(_LENGTH.pack(len(frame)) + frame)

    def receive(self) -> bytes | None:
        """The next frame; None where the other end has closed."""
        head = self._read(_LENGTH.size)
        return None if head is None else self._read(*_LENGTH.unpack(head))

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            if not part:
                return None
            data += part
        return data


def main(directory: str, fd: str, key: str) -> None:
    frames = Frames(socket.socket(fileno=int(fd)))
    try:
        config = EngineConfig(
            kv_cache_memory_bytes=2**20, max_model_len=512, max_num_seqs=4, max_queue_requests=8
        )
        engine = load_engine(Path(directory), config, prefix_key=bytes.fromhex(key))
    except MoebiusError as error:
        frames.send(wire.encode(wire.Failed(error)))
        return
    client = InProcessClient(engine, step_deadline=60.0)
    hasher = client.info.hasher(bytes.fromhex(key))
    client.start(lambda outputs: frames.send(wire.encode(wire.Outputs(outputs))))
    frames.send(wire.encode(wire.Loaded(client.info)))
    while (frame := frames.receive()) is not None:
        message = wire.decode_to_engine(frame)
        if isinstance(message, wire.Abort):
            client.abort(message.request_id)
            continue
        try:
            client.submit(wire.received(message.request, client.info.limits, hasher))
        except MoebiusError as error:
            frames.send(wire.encode(wire.Outputs([failed(message.request.id, error)])))
    client.close(5)


if __name__ == "__main__":
    main(*sys.argv[1:])
