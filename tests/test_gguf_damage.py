"""Damaged GGUF files are refused in a line, quickly and in little memory."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
import pytest

import damaged_gguf
from models.gguf_writing import Converter
from moebius.errors import MoebiusError, UsageError, WeightsError
from moebius.gguf import open_gguf
from moebius.models.store import open_checkpoint
from oracle import save_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with lists of every kind."""
    directory = tmp_path_factory.mktemp("whole")
    save_tiny(directory, "mixtral", num_hidden_layers=1)

    def lists(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list([f"token {i}" for i in range(67)])
        writer.add_token_scores([float(i) for i in range(67)])
        writer.add_array("mixed.flags", [True, False])

    Converter(directory).save(directory / "tiny.gguf", lists)
    return directory / "tiny.gguf"


def test_a_thousand_are_refused_within_a_second_and_200_megabytes_each(whole: Path) -> None:
    """In one process that may take no more, and has no torch."""
    program = Path(damaged_gguf.__file__)
    done = subprocess.run(
        [sys.executable, program, whole, "1000", "200"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"1000 read, the slowest in ([\d.]+) s\n", done.stdout)
    assert found is not None and float(found[1]) < 1


def test_what_opens_them_says_one_line(whole: Path, tmp_path: Path) -> None:
    """All of the way to a checkpoint, where any byte of the head may be another: it is refused, or
    another file, but nothing else."""
    content = whole.read_bytes()
    end = open_gguf(whole).files[0].data_start
    drawn = np.random.default_rng(1)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _, changed in islice(damaged_gguf.damaged(content, 2), 50):
        path.write_bytes(changed)
        with pytest.raises(UsageError) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)
    for _ in range(80):
        flipped = bytearray(content)
        for at in drawn.integers(0, end, size=drawn.integers(1, 4)):
            flipped[at] ^= 1 << int(drawn.integers(8))
        path.write_bytes(flipped)
        try:
            open_checkpoint(path)
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40


def head(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


STRINGS = 2**60
HOSTILE = {
    "nothing": (b"", "0 bytes are no GGUF file"),
    "another format": (b"PK\3\4" + bytes(60), "it begins with"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1; versions 2 and 3"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "tensors": (head(2**60, 0), "1152921504606846976 tensors in a file of 24 bytes"),
    "keys": (head(0, 2**60), "1152921504606846976 keys in a file of 24 bytes"),
    "strings": (
        head(0, 1) + string(b"words") + struct.pack("<IIQ", 9, 8, STRINGS),
        "words has 1152921504606846976 values, in a file of 53 bytes; it is truncated",
    ),
    "a long string": (
        head(0, 1) + string(b"word") + struct.pack("<IQ", 8, STRINGS),
        "word ends at byte 1152921504606847024, the file at 48",
    ),
    "no UTF-8": (head(0, 1) + string(b"\xff\xfe") + struct.pack("<IB", 0, 0), "is no UTF-8"),
    "a list of lists": (
        head(0, 1) + string(b"lists") + struct.pack("<IIQ", 9, 9, 1),
        "lists has a value of type 9",
    ),
    "half a truth": (
        head(0, 1) + string(b"true") + struct.pack("<IB", 7, 2),
        "true holds a truth value that is neither 0 nor 1",
    ),
    "a key twice": (
        head(0, 2) + 2 * (string(b"one") + struct.pack("<IB", 0, 1)),
        "the key 'one' is there twice",
    ),
    "an odd alignment": (
        head(0, 1) + string(b"general.alignment") + struct.pack("<II", 4, 12),
        "general.alignment is 12; it must be a power of two",
    ),
    "sizes that overflow": (
        head(1, 0) + string(b"big") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0),
        "tensor 'big' of 4294967296 x 4294967296 F32 does not fit",
    ),
    "five dimensions": (
        head(1, 0) + string(b"deep") + struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0),
        "tensor 'deep' has 5 dimensions",
    ),
    "half a block": (
        head(1, 0) + string(b"part") + struct.pack("<IQIQ", 1, 48, 8, 0) + bytes(100),
        "tensor 'part' has rows of 48; Q8_0 has blocks of 32 numbers",
    ),
    "a type that is gone": (
        head(1, 0) + string(b"old") + struct.pack("<IQIQ", 1, 32, 4, 0) + bytes(100),
        "tensor 'old' has type 4, which is unknown",
    ),
    "a tensor twice": (
        head(2, 0) + 2 * (string(b"one") + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(100),
        "tensor 'one' is there twice",
    ),
    "a gap": (
        head(1, 0) + string(b"far") + struct.pack("<IQIQ", 1, 1, 0, 32) + bytes(100),
        "a gap between the table and tensor 'far', which begins at 32",
    ),
    "no data": (
        head(1, 0) + string(b"cut") + struct.pack("<IQIQ", 1, 8, 0, 0),
        "tensor 'cut' ends at byte",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_lie_is_named(name: str, tmp_path: Path) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(MoebiusError) as caught:
        dict(open_gguf(path).metadata)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path.name}/bad.gguf: ") and words in said, said


def test_a_huge_file_of_nothing_is_no_long_work(tmp_path: Path) -> None:
    """A terabyte of zeros, which takes no disk: lengths that would fit it are too many."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(head(0, 1) + string(b"words") + struct.pack("<IIQ", 9, 8, 2**36))
        file.truncate(2**40)
    with pytest.raises(WeightsError, match="words has 68719476736 values"):
        open_gguf(path)
