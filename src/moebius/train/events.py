"""TensorBoard's file of scalars: records of TFRecord framing around Event messages, both written by hand.

A record is its length (8 bytes), a masked CRC-32C of that, the message, and a masked CRC-32C of the message.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class EventFile:
    """Appends scalars to a new file in `folder`. Raises OSError when the disk is full."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Whatever older files hold of `first_step` and later is void: TensorBoard drops it."""
        now = time.time()
        self._path = folder / f"events.out.tfevents.{time.time_ns():020d}.moebius"
        self._append(now, 0, _field(3, b"brain.Event:2"))
        self._append(now, first_step, _field(7, b"\x08\x01"))  # SessionLog with status START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        value = (_field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", x)) for tag, x in values.items())
        self._append(time.time(), step, _field(5, b"".join(value)))

    def _append(self, wall_time: float, step: int, content: bytes) -> None:
        event = b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + content
        length = struct.pack("<Q", len(event))
        with self._path.open("ab") as file:
            file.write(length + _masked_crc(length) + event + _masked_crc(event))
