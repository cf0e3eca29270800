"""Damaged copies of a GGUF file: cut off, and with each of its lengths, counts, sizes and offsets
made another. Run as a program, it reads so many of them within limits of time and memory.

    python damaged_gguf.py FILE COUNT MEGABYTES
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
HOSTILE = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**62, 2**63, 2**64 - 1)


class Number(NamedTuple):
    """Where a number of the file's structure is, what it says, and how many bytes it has."""

    at: int
    what: str
    width: int


def numbers(content: bytes) -> list[Number]:
    """All that a reader has to believe, but for types that have others of the same size."""
    found = [Number(4, "version", 4), Number(8, "tensors", 8), Number(16, "keys", 8)]
    at = 24

    def read(what: str, width: int) -> int:
        nonlocal at
        found.append(Number(at, what, width))
        value = int.from_bytes(content[at : at + width], "little")
        at += width
        return value

    def string() -> None:
        nonlocal at
        length = read("length", 8)
        at += length

    for _ in range(int.from_bytes(content[16:24], "little")):
        string()
        kind, count = read("type", 4), 1
        if kind == 9:
            kind, count = read("type", 4), read("count", 8)
        for _ in range(count):
            if kind == 8:
                string()
            else:
                at += SIZES[kind]
    for _ in range(int.from_bytes(content[8:16], "little")):
        string()
        for _ in range(read("dimensions", 4)):
            read("size", 8)
        read("type", 4)
        read("offset", 8)
    return found


def damaged(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file; each is one that nobody can take for whole."""
    drawn = random.Random(seed)
    places = numbers(content)
    end = places[-1].at + 8
    while True:
        if drawn.random() < 0.2:
            # More often than not somewhere in the head; the data's last byte is the latest.
            stop = drawn.randrange(end if drawn.random() < 0.7 else len(content))
            yield f"cut at {stop}", content[:stop]
            continue
        at, what, width = drawn.choice(places)
        value = int.from_bytes(content[at : at + width], "little")
        others = {value ^ 1 << drawn.randrange(8 * width), value + 1, value - 1, *HOSTILE}
        if what == "type":
            others = {13, 99, 2**31, 2**32 - 1}
        if what == "version":
            others -= {2, 3}
        fitting = [each for each in sorted(others - {value}) if 0 <= each < 256**width]
        other = drawn.choice(fitting)
        changed = content[:at] + other.to_bytes(width, "little") + content[at + width :]
        yield f"{what} at {at}: {value} -> {other}", changed


def main() -> None:
    from moebius.errors import WeightsError
    from moebius.gguf import open_gguf

    path, count, megabytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    content = path.read_bytes()
    scratch = path.with_name("damaged.gguf")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    slowest = 0.0
    for number, (what, changed) in zip(range(count), damaged(content, 0), strict=False):
        scratch.write_bytes(changed)
        start = time.process_time()
        try:
            open_gguf(scratch)
        except WeightsError as error:
            assert "\n" not in str(error) and "damaged.gguf" in str(error), (number, what)
        else:
            # What stays within a tensor's padding is for its shape's reader to notice.
            assert what.startswith("size"), f"{number}: {what} was not noticed"
        slowest = max(slowest, time.process_time() - start)
    print(f"{count} read, the slowest in {slowest:.3f} s")


if __name__ == "__main__":
    main()
