"""A plan for a card that is not here: what it says is worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moebius import machine
from moebius.cli.commands import app
from moebius.engine.config import EngineConfig
from moebius.engine.host_experts import most_on_device
from moebius.engine.load import prepare
from moebius.engine.plan_words import bytes_of, human_bytes
from moebius.engine.prepared import Prepared
from moebius.engine.target import DEVICE_CONTEXT, Target
from moebius.errors import ConfigError, MemoryPlanError
from moebius.models.description import describe
from moebius.models.layout import sources
from tiny import write_model

KIB = 2**10
MIB = 2**20
GIB = 2**30
PUBLISHED = Path(__file__).parents[1] / "models" / "published"
# Of two layers of 16 experts of three matrices of 512 x 512 float32.
EXPERT = 3 * 512 * 512 * 4
SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 MiB, of which 96 are experts."""
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, hidden_size=512, moe_intermediate_size=512, num_experts=16)
    return directory


def for_card(directory: Path, memory: int, *, host: int = 64 * GIB, **options: Any) -> Prepared:
    config = EngineConfig(device="cuda", **options)
    return prepare(directory, config, target=Target(memory + DEVICE_CONTEXT, host))


def test_a_tiny_model_worked_by_hand(tiny: Path) -> None:
    whole = for_card(tiny, GIB, **SMALL).plan
    assert (whole.device, whole.available) == ("cuda", GIB)
    assert whole.host is None
    assert whole.weights.mapped == 0 and whole.weights.routed == 32 * EXPERT
    rest = whole.weights.total - 32 * EXPERT
    # Four sequences of 128 tokens, two layers of keys and values of two heads of 8 numbers.
    assert whole.kv_cache == 4 * 128 * 2 * 2 * 2 * 8 * 4

    plan = for_card(tiny, GIB, experts=5, **SMALL).plan
    assert plan.weights.total == rest + 2 * 5 * EXPERT
    assert plan.host is not None
    assert plan.host.weights.mapped == plan.host.weights.total == 2 * 11 * EXPERT
    # 16 tokens, each with 2 choices: 16 + 32 rows of 512 float32 cross, and 80 numbers of 8 bytes;
    # a choice is computed in 512 inner values, its answer, and that once more.
    assert plan.host.rows == (48 * 512 * 4 + 80 * 8) + 32 * 3 * 512 * 4
    assert plan.host.total == plan.host.weights.total + plan.host.rows
    assert (plan.host.available, plan.host.available_of) == (64 * GIB, "a host's 64.0 GiB")


def test_graphs_of_steps_in_pieces(tiny: Path) -> None:
    """By hand. Of up to four sequences: of 4, 2, 1 and no more sizes than one beside, with all
    experts on the card; in five pieces, of 4, 1 and one beside. 64 rows of logits: eight."""
    whole = for_card(tiny, GIB, **SMALL).plan
    apart = for_card(tiny, GIB, experts="cpu", **SMALL).plan
    few = 128 * KIB
    pieces = 3 * (8 * MIB + 4 * few)
    # A row, answers of two choices there and back, and twice as many ids.
    crossing = 4 * (5 * 512 * 4 + 8 * 8)
    assert whole.graphs - apart.graphs == 4 * 8 * MIB - pieces - crossing
    assert whole.workspace > whole.graphs > 4 * 8 * MIB + 8 * few


def test_a_card_that_is_too_small_is_told_what_would_fit(tiny: Path) -> None:
    bare = for_card(tiny, GIB, experts="cpu", **SMALL).plan
    rest = human_bytes(bare.weights.total)
    with pytest.raises(MemoryPlanError) as caught:
        for_card(tiny, 90 * MIB, **SMALL)
    said = str(caught.value)
    assert "97.1 MiB copied" in said and "more than the 90.0 MiB available" in said
    assert "left of a device's 602.0 MiB, less 512.0 MiB for its driver" in said
    assert f"--experts cpu ({rest} of weights are left here)" in said
    assert "\n" not in said
    assert for_card(tiny, 90 * MIB, experts="cpu", **SMALL).plan.kv_cache == bare.kv_cache
    with pytest.raises(MemoryPlanError, match=r"lower --max-model-len or free .* --experts cpu"):
        for_card(tiny, whole_of(tiny) + 4 * KIB, **SMALL)


def whole_of(directory: Path) -> int:
    """Weights and workspace with all experts on the device."""
    plan = for_card(directory, GIB, **SMALL).plan
    return plan.weights.total + plan.workspace


def test_auto_takes_as_many_as_there_is_room_for(tiny: Path) -> None:
    bare = for_card(tiny, GIB, experts="cpu", **SMALL).plan
    fixed = bare.weights.total + bare.workspace
    cache = bare.kv_cache  # of four sequences of 128
    more_graphs = for_card(tiny, GIB, **SMALL).plan.graphs - bare.graphs
    for count in (0, 1, 7, 15, 16):
        needed = fixed + cache + 2 * count * EXPERT
        if count == 16:  # with all of them there, steps are whole graphs, and of more sizes
            needed += more_graphs
        # A 32nd of the memory is left alone.
        memory = needed * 32 // 31 + 64
        plan = for_card(tiny, memory, experts="auto", **SMALL).plan
        assert plan.weights.routed == 2 * count * EXPERT
        assert plan.kv_cache == cache
        on_host = 0 if plan.host is None else plan.host.weights.total
        assert on_host == 2 * (16 - count) * EXPERT
    fewer = for_card(tiny, needed * 32 // 31 - MIB, experts="auto", **SMALL).plan
    assert fewer.weights.routed == 2 * 15 * EXPERT


def test_auto_leaves_a_cache_that_is_asked_for(tiny: Path) -> None:
    options = {**SMALL, "max_num_seqs": 16}
    one = for_card(tiny, 100 * MIB, experts="auto", **options).plan
    two = for_card(tiny, 100 * MIB, experts="auto", kv_cache_memory_bytes=20 * MIB, **options).plan
    assert two.kv_cache == 20 * MIB
    assert one.weights.routed - two.weights.routed == 2 * 3 * EXPERT  # 18 MiB, less 512 KiB


def test_sizes_are_counted_to_the_last_byte() -> None:
    class Plan:
        left = 1000
        available = 3200

    sizes = [0, 100, 200, 300]
    for cache, count in ((600, 3), (601, 2), (700, 2), (701, 1), (900, 0), (5000, 0)):
        assert most_on_device(Plan(), sizes, cache) == count  # type: ignore[arg-type]


def test_the_hosts_memory_counts_too(tiny: Path) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        for_card(tiny, GIB, host=96 * MIB, experts="cpu", **SMALL)
    said = str(caught.value)
    assert "experts in the host's memory (96.0 MiB mapped, 0 B copied)" in said
    assert "more than the 96.0 MiB available there (left of a host's 96.0 MiB)" in said
    assert "--experts-on-gpu" in said and "--mmap-cold" in said
    for_card(tiny, GIB, host=96 * MIB, experts=1, **SMALL)
    cold = for_card(tiny, GIB, host=60 * MIB, experts="cpu", mmap_cold=True, **SMALL).plan
    assert cold.host is not None and cold.host.weights.total == 16 * EXPERT
    # What `auto` leaves to the host is what counts.
    card = 90 * MIB
    left = for_card(tiny, card, experts="auto", **SMALL).plan.host
    assert left is not None and 0 < left.total < 32 * EXPERT
    for_card(tiny, card, host=left.total, experts="auto", **SMALL)
    with pytest.raises(MemoryPlanError, match="experts in the host's memory"):
        for_card(tiny, card, host=left.total - 1, experts="auto", **SMALL)


def test_this_host_is_asked_where_none_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = machine.Memory(50 * MIB, 700 * MIB, "cgroup")
    monkeypatch.setattr(machine, "memory", lambda: memory)
    config = EngineConfig(device="cuda", experts="cpu", **SMALL)
    with pytest.raises(
        MemoryPlanError, match=r"50\.0 MiB available there .left of the cgroup's 700"
    ):
        prepare(tiny, config, target=Target(GIB))
    # A host's own size is said for plans on a CPU, too.
    plan = prepare(tiny, EngineConfig(device="cpu", **SMALL), target=Target(None, GIB)).plan
    assert (plan.available, plan.available_of) == (GIB, "a host's 1.0 GiB")


def write_headers(directory: Path, name: str) -> Path:
    """A published model without its weights: files with heads, and holes."""
    shutil.copy(PUBLISHED / f"{name}.json", directory / "config.json")
    described = describe(directory)
    shapes = {s.name: s.stored_shape for s in sources(described.config, described.layouts[0])}
    head: dict[str, Any] = {}
    at = 0
    for tensor, shape in shapes.items():
        size = 2 * math.prod(shape)
        head[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + at)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("large"), "Qwen3-30B-A3B")


# Of Qwen3-30B-A3B: 48 layers of 128 experts of three matrices of 2,048 x 768 bfloat16; a token's
# keys and values are 4 heads of 128 numbers in each layer.
LARGE_EXPERT = 3 * 2048 * 768 * 2
LARGE_TOKEN = 48 * 2 * 4 * 128 * 2


def test_thirty_billion_parameters_on_a_card_of_24_gib(large: Path) -> None:
    card = bytes_of("24GiB") - DEVICE_CONTEXT
    with pytest.raises(MemoryPlanError, match=r"56\.\d GiB copied.*--experts cpu \(2\.9 GiB"):
        for_card(large, card)
    plan = for_card(large, card, experts="cpu", max_num_seqs=4, max_model_len=8192).plan
    # Attention: 32 query and 4 key and value heads of 128; norms; a router; both embeddings.
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048
    assert plan.weights.total == 2 * (48 * layer + 2048 + 2 * 151_936 * 2048)
    assert plan.host is not None
    assert plan.host.weights.mapped == 48 * 128 * LARGE_EXPERT
    assert plan.bytes_per_token == LARGE_TOKEN
    assert plan.kv_cache == 4 * 8192 * LARGE_TOKEN

    auto = for_card(large, card, experts="auto", max_num_seqs=4, max_model_len=8192).plan
    # Room for four sequences of 4,096 tokens, and for one of 8,192; a 32nd of the memory stays.
    cache = 4 * 4096 * LARGE_TOKEN
    room = card - plan.weights.total - plan.workspace - cache - card // 32
    count = room // (48 * LARGE_EXPERT)
    assert auto.weights.routed == count * 48 * LARGE_EXPERT and 30 < count < 60
    assert auto.kv_cache >= cache and auto.max_model_len == 8192
    assert auto.left >= auto.kv_cache
    long = for_card(large, card, experts="auto", max_num_seqs=1, max_model_len=32_768).plan
    assert long.sequences(32_768) == 1 and long.weights.routed > 20 * 48 * LARGE_EXPERT


def test_by_default_auto_gives_the_cache_no_more_than_half(large: Path) -> None:
    """64 sequences of 4,096 tokens would be 24 GiB."""
    card = bytes_of("24GiB") - DEVICE_CONTEXT
    bare = for_card(large, card, experts="cpu").plan
    plan = for_card(large, card, experts="auto").plan
    count = plan.weights.routed // (48 * LARGE_EXPERT)
    assert count == (bare.left - bare.left // 2 - card // 32) // (48 * LARGE_EXPERT)
    assert bare.left // 2 - 16 * LARGE_TOKEN < plan.kv_cache <= bare.left // 2


def moebius(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["plan", *words])
    return found.exit_code, found.output + str(found.exception or "")


def test_the_command_needs_no_card(tiny: Path) -> None:
    card = ["--device", "cuda", "--memory", "1.5GiB", "--host-memory", "4GiB"]
    sizes = ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "16"]
    code, text = moebius(str(tiny), *card, *sizes, "--experts-on-gpu", "5")
    assert code == 0, text
    assert "of 16 a layer on cuda, the first by number; 11 in the host's memory" in text
    assert "in the host's memory" in text and "left of a host's 4.0 GiB" in text
    code, text = moebius(str(tiny), *card, *sizes, "--experts", "cpu", "--json")
    record = json.loads(text)
    expected = for_card(tiny, GIB, host=4 * GIB, experts="cpu", **SMALL).plan
    assert record["host"]["weights"]["mapped"] == expected.host.weights.mapped
    assert record["weights"]["copied"] == expected.weights.copied
    assert record["available"] == GIB


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "24"], "--memory is how much a CUDA device has, but --device is auto"),
        (["--memory", "24GiB", "--device", "cpu"], "but --device is cpu"),
        (["--memory", "many", "--device", "cuda"], "--memory: 'many' is no size; write it as 24G"),
        (["--host-memory", "-1"], "--host-memory: '-1' is no size"),
    ],
)
def test_sizes_that_are_none(tiny: Path, words: list[str], said: str) -> None:
    code, text = moebius(str(tiny), *words)
    assert code and said in text


def test_without_a_size_a_card_has_to_be_here(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"finds no CUDA device.* where --memory says its size"):
        prepare(tiny, EngineConfig(device="cuda"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512M", 512 * 10**6),
        ("80Gi", 80 * 2**30),
        ("7B", 7),
        ("7", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "24gib", "1.GiB", "24 GiBB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write it as 24GiB"):
        bytes_of(text)
