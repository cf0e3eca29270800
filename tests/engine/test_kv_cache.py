"""How layers share blocks, what leaves the cache as bytes and comes back, and the copies of
states."""

from __future__ import annotations

import json
import random
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.windows import assert_windows_are_given_back
from moebius.engine.config import EngineConfig
from moebius.engine.kv_cache import KVCache, block_bytes, lay_out, state_bytes
from moebius.engine.load import load_engine, prepare
from moebius.errors import CacheDataError
from moebius.ops import Ops
from moebius.ops.cache_spec import CacheSpec, Plane, key_value_spec
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StateInputs, StepInputs
from moebius.request.engine_request import EngineRequest
from moebius.schedule.request import Request, SamplingParams
from ops.levels import LEVELS, level
from ops.paged import as_is
from tiny import write_model

CPU = torch.device("cpu")


def layer(window: int | None = None, dtype: torch.dtype = torch.bfloat16, heads: int = 2) -> Any:
    return key_value_spec(heads, 8, dtype, window=window)


STATE = CacheSpec(
    state=(Plane("recurrent", (2, 3), torch.float32), Plane("conv", (4,), torch.bfloat16))
)


@pytest.fixture(params=[*LEVELS, "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else level(request.param, 1)


@pytest.mark.parametrize(
    ("counts", "rows", "tables", "unused"),
    [
        ({None: 28}, 28, 1, 0),
        ({4096: 32}, 32, 1, 0),
        ({None: 12, 128: 12}, 12, 2, 0),
        ({None: 21, 64: 7}, 7, 4, 0),
        ({None: 5, 64: 25}, 5, 6, 0),
        ({None: 1, 64: 23}, 4, 7, 4),  # one layer a block would need 24 tables
        ({None: 2, 16: 2, 32: 2}, 2, 3, 0),
    ],
)
def test_a_block_has_room_for_as_many_layers_as_leave_least_unused(
    counts: dict[int | None, int], rows: int, tables: int, unused: int
) -> None:
    specs = [layer(window) for window, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(specs)
    layout = lay_out(specs)
    assert (layout.rows, len(layout.windows)) == (rows, tables)
    assert rows * tables - len(specs) == unused
    assert len(set(layout.places)) == len(specs), "no two layers lie in one place"
    for spec, place in zip(specs, layout.places, strict=True):
        assert place is not None and layout.windows[place[0]] == spec.window
        assert place[1] < rows


def test_layers_without_keys_and_values_have_no_place() -> None:
    layout = lay_out([STATE, layer(), STATE])
    assert layout.places == (None, (0, 0), None) and layout.windows == (None,)
    assert lay_out([STATE]).rows == 0


@pytest.mark.parametrize(
    ("counts", "rows", "tables"),
    [
        # Gemma 4's: windows keep twice as much. Five layers that see all fill a block.
        ({(None, 1): 5, (9, 2): 25}, {None: 5, 9: 2}, 1 + 13),
        ({(None, 1): 10, (9, 4): 50}, {None: 10, 9: 4}, 1 + 13),
        ({(None, 2): 1, (9, 3): 1}, {None: 1, 9: 1}, 2),
        ({(None, 1): 3, (None, 2): 3}, {None: 2}, 2 + 3),
        ({(None, 7): 1, (9, 1): 40}, {None: 1, 9: 7}, 1 + 6),
    ],
)
def test_a_block_has_room_for_more_layers_of_those_that_keep_less(
    counts: dict[tuple[int | None, int], int], rows: dict[int | None, int], tables: int
) -> None:
    """What all of a long sequence would leave unused counts for more than what a window would."""
    specs = [
        layer(*kind[:1], heads=kind[1]) for kind, count in counts.items() for _ in range(count)
    ]
    random.Random(0).shuffle(specs)
    layout = lay_out(specs)
    assert len(layout.windows) == tables and layout.unequal
    assert len(set(layout.places)) == len(specs), "no two layers lie in one place"
    found: dict[int | None, int] = {}
    for spec, place in zip(specs, layout.places, strict=True):
        assert place is not None and layout.windows[place[0]] == spec.window
        found[spec.window] = max(found.get(spec.window, 0), place[1] + 1)
    assert found.items() >= rows.items()


@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_no_byte_is_of_two_blocks_where_layers_keep_more_or_less(
    ops: Ops, dtype: torch.dtype, block_size: int
) -> None:
    kinds = [(None, 2), (5, 4), (5, 4), (None, 2), (5, 4), (7, 1)]
    specs: list[Any] = [layer(window, dtype, heads) for window, heads in kinds]
    cache, other = (
        KVCache(specs, ops, num_blocks=5, block_size=block_size, device=CPU) for _ in range(2)
    )
    blocks: dict[int, int] = {}
    layers: dict[tuple[int, int], int] = {}
    for number, each in enumerate(cache.layers):
        for block in range(5):
            for part in ops.block_memory(each, block):
                start = part.data_ptr()
                for byte in range(start, start + part.numel() * part.element_size()):
                    assert blocks.setdefault(byte, block) == block
                    key = (byte, cache.groups[number])
                    assert layers.setdefault(key, number) == number, "a layer's of its group"
    assert max(blocks) - min(blocks) < cache.nbytes
    torch.manual_seed(0)
    tokens = 5 * block_size
    for group in range(len(cache.layout.windows)):
        step = StepInputs.build([[0] * tokens], [0], [list(range(5))], block_size)
        for each, spec, its in zip(cache.layers, specs, cache.groups, strict=True):
            if its == group:
                shape = tokens, *spec.token[0].shape
                as_is(
                    ops,
                    each,
                    torch.randn(shape).bfloat16(),
                    torch.randn(shape).bfloat16(),
                    step.slot_mapping,
                )
        data = cache.read_block(group, 1)
        other.write_block(group, 4, data)
        assert other.read_block(group, 4) == data


def filled(
    ops: Ops, specs: list[CacheSpec], block_size: int, seed: int, offset: float | None = None
) -> KVCache:
    """A cache of 6 blocks and 3 slots, in which everything was written; its layers' keys are held
    less `offset`."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_blocks": 6, "block_size": block_size, "num_states": 3}
    if offset is not None:
        sizes["key_offsets"] = [torch.full((2, 8), offset) for _ in specs]
    cache = KVCache(specs, ops, device=CPU, **sizes)
    tokens = 6 * block_size
    step = StepInputs.build([[0] * tokens], [0], [list(range(6))], block_size)
    keeping = [one for one, spec in zip(cache.layers, specs, strict=True) if spec.token]
    for one in {id(one): one for one in keeping}.values():
        keys, values = (torch.randn(tokens, 2, 8).to(torch.bfloat16) for _ in range(2))
        as_is(ops, one, keys, values, step.slot_mapping)
    for planes in cache.states:
        for plane in planes.values():
            plane.copy_(torch.randn(plane.shape))
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block_size", [3, 16])
def test_blocks_and_states_come_back_as_they_left(
    ops: Ops, block_size: int, dtype: torch.dtype
) -> None:
    specs = [layer(None, dtype), layer(5, dtype), STATE, layer(5, dtype), layer(None, dtype)]
    ours, theirs = (filled(ops, specs, block_size, seed) for seed in (0, 1))
    for group in range(2):  # no block belongs to two groups
        data = ours.read_block(group, 1)
        target = 4 + group
        assert theirs.read_block(group, target) != data
        theirs.write_block(group, target, data)
        assert theirs.read_block(group, target) == data
        fresh = filled(ops, specs, block_size, 1)
        untouched = [theirs.read_block(group, b) == fresh.read_block(group, b) for b in range(4)]
        assert all(untouched)
    data = ours.read_state(2)
    theirs.write_state(0, data)
    assert theirs.read_state(0) == data
    for planes, before in zip(theirs.states, ours.states, strict=True):
        for name, plane in planes.items():
            assert torch.equal(plane[0], before[name][2])
    assert len(ours.read_block(0, 0)) >= block_bytes(specs, ops, block_size)


def test_bytes_of_another_cache_or_damaged_ones_are_refused_and_change_nothing(ops: Ops) -> None:
    specs = [layer(), layer(5), STATE]
    cache = filled(ops, specs, 4, 0)
    data, before = cache.read_block(0, 1), cache.read_block(0, 2)
    half = len(data) // 2
    for wrong, message in (
        (b"", "no block or state"),
        (b"x" * 200, "no block or state"),
        (data[:-1], "checksum"),
        (data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :], "checksum"),
        (cache.read_block(1, 1), r"layers \[1\] instead of \[0\], window 5 instead of None"),
        (cache.read_state(0), "kind 'state' instead of 'block'"),
        (filled(ops, specs, 8, 0).read_block(0, 1), "block_size 8 instead of 4"),
        (filled(ops, [layer(), layer()], 4, 0).read_block(0, 1), r"layers \[0, 1\] instead"),
    ):
        with pytest.raises(CacheDataError, match=message):
            cache.write_block(0, 2, wrong)
    assert cache.read_block(0, 2) == before
    with pytest.raises(CacheDataError, match="kind 'block'"):
        cache.write_state(0, data)


def test_codes_are_another_caches_than_numbers_and_those_less_something_else(ops: Ops) -> None:
    coded = [layer(None, torch.int8)]
    cache = filled(ops, coded, 4, 0, 0.5)
    before = cache.read_block(0, 2)
    for wrong, message in (
        (filled(ops, [layer()], 4, 0).read_block(0, 1), r"planes .*bfloat16.* instead of .*int8"),
        (filled(ops, coded, 4, 0).read_block(0, 1), r"key_offsets \[None\] instead of \['"),
        (filled(ops, coded, 4, 0, 0.25).read_block(0, 1), r"key_offsets \['.*'\] instead"),
    ):
        with pytest.raises(CacheDataError, match=message):
            cache.write_block(0, 2, wrong)
    assert cache.read_block(0, 2) == before
    cache.write_block(0, 2, filled(ops, coded, 4, 1, 0.5).read_block(0, 3))
    assert cache.read_block(0, 2) != before


def resealed(header: bytes, memory: bytes) -> bytes:
    """What another program could have written, with a checksum that is right."""
    data = b"".join((b"moebius cache\n", len(header).to_bytes(4, "little"), header, memory))
    return data + blake2b(data, digest_size=16).digest()


def test_bytes_with_a_right_checksum_are_not_believed_either() -> None:
    cache = filled(ReferenceOps(), [layer(), STATE], 4, 0)
    data = cache.read_block(0, 1)
    start = len(b"moebius cache\n") + 4
    end = start + int.from_bytes(data[start - 4 : start], "little")
    header, memory = data[start:end], data[end:-16]
    assert resealed(header, memory) == data
    for wrong, message in (
        (resealed(header, memory[:-1]), "255 of memory instead of 256"),
        (resealed(header, memory + b"x"), "257 of memory instead of 256"),
        (resealed(header[:-1], memory), "header cannot be read"),
        (resealed(b"[]", memory), "header cannot be read"),
        (resealed(b"\xff", memory), "header cannot be read"),
        (resealed(b"[" * 10**5, memory), "header cannot be read"),
        (resealed(header + b" ", memory), "header cannot be read"),
        (resealed(header, memory)[: start - 4] + b"\xff" * 4 + data[start:], "checksum"),
    ):
        before = cache.read_block(0, 2)
        with pytest.raises(CacheDataError, match=message):
            cache.write_block(0, 2, wrong)
        assert cache.read_block(0, 2) == before


@pytest.mark.parametrize("index", [-1, 6])
def test_what_is_no_block_or_slot_is_not_read(ops: Ops, index: int) -> None:
    """-1 is a table's entry for a block that was given back, not the last block."""
    cache = filled(ops, [layer(), STATE], 4, 0)
    for call in (cache.read_block, lambda group, block: cache.write_block(group, block, b"")):
        with pytest.raises(IndexError, match=f"block {index} is none of 6"):
            call(0, index)
    for call in (cache.read_state, lambda slot: cache.write_state(slot, b"")):
        with pytest.raises(IndexError, match=f"slot {index} is none of 3"):
            call(index)


def test_layouts_of_backends_are_kept_apart() -> None:
    specs = [layer()]
    data = filled(ReferenceOps(), specs, 4, 0).read_block(0, 0)
    with pytest.raises(CacheDataError, match=r"layout .* instead of"):
        filled(level(LEVELS[0], 1), specs, 4, 0).write_block(0, 0, data)


def test_states_are_cleared_and_copied_in_all_layers() -> None:
    cache = filled(ReferenceOps(), [STATE, layer(), STATE], 4, 0)
    assert state_bytes(cache.specs) == 2 * (6 * 4 + 4 * 2)
    before = [{name: plane.clone() for name, plane in planes.items()} for planes in cache.states]
    cache.copy_states([(0, 1), (2, 0)])
    for planes, old in zip(cache.states, before, strict=True):
        for name, plane in planes.items():
            assert torch.equal(plane, old[name][[2, 0, 2]])
    cache.clear_states([1])
    assert all(not plane[1].any() for planes in cache.states for plane in planes.values())
    assert all(plane[0].any() for planes in cache.states for plane in planes.values())


def test_states_lie_behind_the_blocks_in_one_mapping() -> None:
    """Each plane on a cache line of its own, though blocks and planes end anywhere."""
    odd = CacheSpec(state=(Plane("a", (3,), torch.float32), Plane("b", (5,), torch.bfloat16)))
    cache = filled(ReferenceOps(), [layer(), odd, layer(), odd], 3, 0)
    blocks = [cache.read_block(0, block) for block in range(6)]
    planes = [plane for each in cache.states for plane in each.values()]
    assert len({plane.untyped_storage().data_ptr() for plane in planes}) == 1
    assert all(plane.data_ptr() % 64 == 0 and plane.is_contiguous() for plane in planes)
    assert planes[0].storage_offset() * 4 == -(-cache.nbytes // 64) * 64
    for number, plane in enumerate(planes):
        plane.fill_(number)
    assert all(bool((plane == number).all()) for number, plane in enumerate(planes))
    assert [cache.read_block(0, block) for block in range(6)] == blocks


def write_qwen2(directory: Path, **changes: object) -> None:
    """The tiny model's directory with the sizes of a Qwen2 whose upper layers have a window."""
    from oracle import save_tiny

    write_model(directory)  # its tokenizer
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    sizes = {"vocab_size": 320, "num_hidden_layers": 3, "max_position_embeddings": 2048}
    save_tiny(directory, "qwen2", **{**sizes, **window, **changes})


def test_an_engine_gives_back_what_its_window_has_passed(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    assert_windows_are_given_back(tmp_path, full=2, windowed=1)


def test_a_sequence_longer_than_the_cache_runs_in_its_window(tmp_path: Path) -> None:
    write_qwen2(tmp_path, max_window_layers=0)
    per_block = prepare(tmp_path, EngineConfig(block_size=8)).plan.cache.block
    config = EngineConfig(
        block_size=8,
        max_num_batched_tokens=32,
        max_num_seqs=2,
        kv_cache_memory_bytes=10 * per_block,
    )
    prepared = prepare(tmp_path, config)
    assert prepared.plan.max_model_len == 2048 and prepared.plan.kv_tokens == 80
    engine = load_engine(tmp_path, config, prepared=prepared)
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    prompt = [i % 300 for i in range(700)]
    engine.add(
        Request(EngineRequest.create("a", prompt, params, engine.info.limits, arrival=0.0, seed=0))
    )
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
    from oracle import load_theirs

    whole = load_theirs(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    assert tokens == whole[0, 700:].tolist()


def test_a_step_copies_states_before_and_after(tmp_path: Path) -> None:
    """The runner clears and restores before the model runs, and saves after it."""
    write_model(tmp_path)
    engine = load_engine(tmp_path, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=128))
    runner = engine.runner
    runner.cache.states = filled(ReferenceOps(), [STATE, layer()], 4, 0).states
    runner.cache.num_states = 3
    plane = runner.cache.states[0]["recurrent"]
    one = plane[1].clone()
    seen: list[torch.Tensor] = []
    hidden = runner.programs.hidden
    runner.programs.hidden = lambda step: seen.append(plane.clone()) or hidden(step)
    states = StateInputs(slots=[0], cleared=[0], restores=[(1, 2)], saves=[(2, 0)])
    runner.execute(StepInputs.build([[5]], [0], [[0]], 16, states=states))
    assert not seen[0][0].any() and torch.equal(seen[0][2], one)
    assert torch.equal(plane[0], one)


def test_headers_are_plain_json() -> None:
    data = filled(ReferenceOps(), [layer(7)], 4, 0).read_block(0, 0)
    start = len(b"moebius cache\n") + 4
    header = json.loads(data[start : start + int.from_bytes(data[start - 4 : start], "little")])
    assert header["window"] == 7 and header["planes"][0] == ["k", [2, 8], "torch.bfloat16"]
