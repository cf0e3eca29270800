"""Frames between a front and its hosts: what goes in comes out, and nothing else does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from moebius.engine import cluster, wire
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, WireError

HELLO = cluster.HostHello(
    release="1.0",
    node=1,
    nodes=2,
    name="bert",
    address="10.0.0.2",
    directory="/models/a",
    weights="0123",
    config=EngineConfig(ranks=2, threads=3, max_num_seqs=5),
    isas=("portable", "avx2"),
)


def test_frames_come_back_as_what_they_were() -> None:
    for hello in (HELLO, cluster.RankHello("ticket")):
        assert cluster.decode_hello(cluster.encode_hello(hello)) == hello
    for told in (cluster.Beat(), cluster.Ended("ticket", "it ended")):
        assert cluster.decode_from_host(cluster.encode(told)) == told
    for told in (cluster.Beat(), cluster.Start("t"), cluster.End("t"), cluster.Dismissed()):
        assert cluster.decode_to_host(cluster.encode(told)) == told
    last = cluster.decode_to_host(cluster.encode(cluster.Dismissed(ConfigError("why"))))
    assert isinstance(last, cluster.Dismissed)
    assert isinstance(last.error, ConfigError) and str(last.error) == "why"


@pytest.mark.parametrize(
    "value",
    [
        ["rank"],
        ["rank", 5],
        ["rank", "ticket", "more"],
        ["beat"],
        [],
        {"ticket": "x"},
        ["host", "1.0", "one", 2, "bert", "a", "d", "w", {}, []],
        ["host", "1.0", 1, 2, "bert", "a", "d", "w", {"ranks": 0}, []],
    ],
)
def test_what_is_no_hello_is_refused(value: Any) -> None:
    with pytest.raises(WireError):
        cluster.decode_hello(bytes([wire.VERSION]) + msgspec.msgpack.encode(value))


def test_another_release_is_named() -> None:
    frame = cluster.encode_hello(HELLO)
    with pytest.raises(WireError, match="a frame of version 77; this process speaks"):
        cluster.decode_hello(bytes([77]) + frame[1:])
