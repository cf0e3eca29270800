"""Hosts that are to serve one thing are asked whether they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from moebius.cluster.alike import check_alike, check_engines_alike, common_isa
from moebius.engine.client import EngineInfo
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.request.params import ServingLimits

FRONT = HostHello(
    release="1.0",
    node=0,
    nodes=3,
    name="anna",
    address="10.0.0.1",
    directory="/models/a",
    weights="0123",
    config=EngineConfig(ranks=4),
    isas=("portable", "avx2", "avx512"),
    vocabulary="abcd",
)
OTHER = structs.replace(FRONT, node=1, name="bert", address="10.0.0.2", directory="/data/a")


def test_hosts_may_differ_in_what_is_their_own() -> None:
    own = EngineConfig(ranks=4, threads=3, trace="t", kv_cache_memory_bytes=2**20)
    check_alike(FRONT, OTHER)
    check_alike(FRONT, structs.replace(OTHER, config=own, isas=("portable",)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"release": "1.1"}, ["bert", "1.1", "anna", "1.0"]),
        ({"nodes": 2}, ["bert", "--nnodes 2", "anna", "3"]),
        ({"node": 0}, ["bert", "--node-rank 0", "1 to 2"]),
        ({"node": 3}, ["bert", "--node-rank 3", "1 to 2"]),
        ({"weights": "0124"}, ["node 1 (bert)", "/data/a", "0124", "/models/a", "0123"]),
        (
            {"vocabulary": "abce", "tokenizer": "/data/t"},
            ["node 1 (bert)", "/data/t", "abce", "/models/a", "abcd", "--tokenizer"],
        ),
        ({"config": EngineConfig(ranks=2)}, ["node 1 (bert)", "--ranks 2", "4"]),
        (
            {"config": EngineConfig(ranks=4, max_num_batched_tokens=64)},
            ["node 1 (bert)", "--max-num-batched-tokens 64"],
        ),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        check_alike(FRONT, structs.replace(OTHER, **changes))
    assert all(word in str(found.value) for word in words), found.value


def test_the_highest_instruction_set_of_all_is_taken() -> None:
    def of(*isas: str) -> HostHello:
        return structs.replace(OTHER, isas=isas)

    assert common_isa([FRONT, OTHER], exact=True) == "avx512"
    assert common_isa([FRONT, of("portable", "avx2")], exact=False) == "avx2"
    assert common_isa([of("portable"), FRONT], exact=False) == "portable"
    with pytest.raises(ConfigError, match=r"--isa is exact.*anna\) avx512, node 1 \(bert\) avx2"):
        common_isa([FRONT, of("portable", "avx2")], exact=True)
    with pytest.raises(ConfigError, match="no kernels in common"):
        common_isa([FRONT, of("neon")], exact=False)
    with pytest.raises(ConfigError, match=r"kernels, which .* of node 1 \(bert\) lacks"):
        common_isa([FRONT, of("reference")], exact=False)


def test_ranks_that_were_loaded_are_compared() -> None:
    limits = ServingLimits(vocab_size=100, max_model_len=200)
    info = EngineInfo(limits, frozenset(), block_size=16, num_blocks=50, fingerprint="fp_a_avx2")
    check_engines_alike(info, replace(info, num_blocks=60), "rank 3")
    with pytest.raises(ConfigError, match="rank 3 on node 1 computes fp_a_avx512, and others"):
        other = replace(info, fingerprint="fp_a_avx512")
        check_engines_alike(info, other, "rank 3 on node 1")
    with pytest.raises(ConfigError, match=r"rank 3 has room for 100 .* others for 200"):
        smaller = replace(info, limits=replace(limits, max_model_len=100))
        check_engines_alike(info, smaller, "rank 3")
