"""The scalars as TensorBoard's own reader finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius.train.events import EventFile, _masked_crc


def test_crc_of_the_standards_example() -> None:
    """CRC-32C of "123456789" is E3069283 (RFC 3720 gives the polynomial), masked as TFRecord does."""
    expected = (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert int.from_bytes(_masked_crc(b"123456789"), "little") == expected


def test_tensorboard_reads_it_and_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFile(tmp_path, 1)
    for step in (100, 200, 300):
        first.scalars(step, {"loss": step / 8, "max_violation/layer_0": 0.5})
    EventFile(tmp_path, 201).scalars(300, {"loss": -1.0})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(100, 12.5), (200, 25.0), (300, -1.0)]
    assert [e.value for e in events.Scalars("max_violation/layer_0")] == [0.5, 0.5]
