"""The memory plan's arithmetic, worked by hand, and what the engine really reserves."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from engine.test_engine import cache_bytes, make, run
from moebius import machine
from moebius.engine import load
from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.dtypes import choose_dtype
from moebius.engine.load import load_engine, prepare
from moebius.engine.memory import MemoryPlan, plan_memory
from moebius.engine.plan_words import human_bytes
from moebius.engine.step_memory import StepMemory, exchange_bytes, sampling_bytes, workspace_bytes
from moebius.engine.weight_bytes import WeightBytes
from moebius.errors import ConfigError, MemoryPlanError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig
from moebius.ops.config import RouterConfig
from tiny import write_model

MODEL = ModelConfig(
    model_type="llama",
    hidden_size=64,
    vocab_size=1000,
    context=1024,
    layers=(LayerSpec(GQA(4, 2, 16, rope=RopeConfig()), FeedForwardConfig(128)),) * 2,
)
GIB = 2**30
# 2 layers x (key and value) x 2 heads x 16 x 2 bytes
PER_TOKEN = 256
CACHE = CacheSizes((None,), 16 * PER_TOKEN)


def plan(available: int = GIB, copied: int = 0, **options: Any) -> MemoryPlan:
    return plan_memory(
        MODEL,
        EngineConfig(**options),
        WeightBytes(1000, copied, 500),
        dtype="bfloat16",
        device="cpu",
        cache=CACHE,
        available=available,
    )


def test_the_default_cache_is_what_the_sequences_can_use() -> None:
    made = plan(max_num_seqs=10)
    assert made.kv_tokens == 10 * 1024 and made.kv_cache == 10 * 1024 * PER_TOKEN
    assert made.sequences(1024) == 10 and made.sequences(1) == 640 and made.sequences(17) == 320


def test_the_default_cache_is_at_most_half_of_what_is_left() -> None:
    copied = 100 * 2**20
    made = plan(available=150 * 2**20, copied=copied, max_num_seqs=1024)
    left = 150 * 2**20 - copied - made.weights.mapped - made.workspace
    assert left // 2 - 16 * PER_TOKEN < made.kv_cache <= left // 2
    assert copied + made.weights.mapped + made.kv_cache + made.workspace <= 150 * 2**20


def test_a_given_cache_is_taken_in_whole_blocks() -> None:
    made = plan(kv_cache_memory_bytes=16 * PER_TOKEN * 70 + 5)
    assert made.num_blocks == 70 and made.kv_cache == 16 * PER_TOKEN * 70


def test_the_default_context_is_lowered_to_what_fits_and_a_given_one_refused() -> None:
    size = 16 * PER_TOKEN * 10
    made = plan(kv_cache_memory_bytes=size)
    assert (made.max_model_len, made.lowered_from) == (160, 1024)
    with pytest.raises(
        MemoryPlanError,
        match=f"one sequence of 1,024 tokens needs 256.0 KiB .* to {1024 * PER_TOKEN}",
    ):
        plan(kv_cache_memory_bytes=size, max_model_len=1024)
    with pytest.raises(MemoryPlanError, match="one sequence"):
        plan(kv_cache_memory_bytes=1)


@pytest.mark.case("B4")
def test_sampling_is_a_part_of_the_workspace() -> None:
    """64 rows of logits, 4 bytes each; 8 rows of 64 bytes an id, and 64 bytes for 65,536 ids or the
    vocabulary."""
    sizes = {vocab: workspace_bytes(replace(MODEL, vocab_size=vocab), EngineConfig(max_num_seqs=64), 2)
             for vocab in (1000, 2000, 100_000, 101_000)}  # fmt: skip
    assert sampling_bytes(1000, 1024) == 64 * 65_536 + 8 * 64 * 1000
    assert sizes[2000] - sizes[1000] == 1000 * (64 * 4 + 8 * 64)
    assert sizes[101_000] - sizes[100_000] == 1000 * (64 * 4 + 8 * 64 + 64)


def test_a_model_without_feed_forward_parts_has_a_workspace_too() -> None:
    """Of its four rows of 64 and of attention's in float32, and of its logits twice."""
    bare = replace(MODEL, layers=(replace(MODEL.layers[0], feed_forward=None),))
    sizes = [
        workspace_bytes(bare, EngineConfig(max_num_seqs=64, max_num_batched_tokens=n), 2)
        for n in (64, 164)
    ]
    attends = 2 * (64 + 32 + 32 + 64)
    assert sizes[1] - sizes[0] == 100 * 4 * (4 * 64 + attends)


def test_what_operations_keep_is_planned_beside_an_estimate() -> None:
    def workspace(step: StepMemory) -> int:
        weights = WeightBytes(1000, 0, 500)
        where = {"dtype": "bfloat16", "device": "cuda", "cache": CACHE, "available": GIB}
        return plan_memory(MODEL, EngineConfig(), weights, step=step, **where).workspace  # type: ignore[arg-type]

    for recorded in (None, 2**20):
        without = workspace(StepMemory(recorded))
        assert workspace(StepMemory(recorded, 2**27)) - without == 2**27


def test_too_little_memory_and_too_long_a_context() -> None:
    with pytest.raises(MemoryPlanError, match=r"need more than the 1\.0 MiB available"):
        plan(available=2**20)
    with pytest.raises(
        MemoryPlanError, match=r"--kv-cache-memory-bytes 2147483648 \(2\.0 GiB\) is more than"
    ):
        plan(kv_cache_memory_bytes=2 * GIB)
    with pytest.raises(
        ConfigError, match="max_model_len = 2000 is beyond the model's 1024 positions"
    ):
        plan(max_model_len=2000)


def test_the_engine_reserves_what_the_plan_says(tiny_model: Path) -> None:
    engine = load_engine(
        tiny_model, EngineConfig(kv_cache_memory_bytes=100_000, max_model_len=64, block_size=8)
    )
    per_token = cache_bytes(8, 8) // 8
    assert engine.info.num_blocks == 100_000 // (8 * per_token) == engine.scheduler.pool.num_blocks
    assert engine.runner.cache.nbytes == engine.info.num_blocks * 8 * per_token
    assert engine.info.limits.max_model_len == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of auto, bfloat16, float32"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"block_size": 2048}, "at most 1024"),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            "each running sequence needs at least one token",
        ),
        ({"step_deadline": float("nan")}, "step_deadline"),
        ({"max_queue_tokens": -1}, "max_queue_tokens is -1"),
        ({"max_num_seqs": 2.5}, "max_num_seqs is 2.5; it must be an integer"),
        ({"max_num_seqs": None}, "max_num_seqs is None; it must be an integer"),
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'; it must be an integer"),
        ({"threads": True}, "threads is True; it must be an integer"),
        ({"step_deadline": "5"}, "step_deadline is '5'; it must be a number"),
        ({"step_deadline": True}, "step_deadline is True; it must be a number"),
        ({"enable_prefix_caching": "no"}, "prefix_caching is 'no'; it must be True or False"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_rows_name_every_part() -> None:
    text = str(replace(plan(), lowered_from=4096).rows())
    assert "lowered from 4,096" in text and "1000 B mapped, 0 B copied" in text
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 TiB",
    ]


def test_a_large_vocabulary_is_counted_for_the_grammars() -> None:
    large = replace(MODEL, vocab_size=50_000)

    def made(model: ModelConfig, device: str = "cpu", **options: Any) -> MemoryPlan:
        weights = WeightBytes(1000, 0, 500)
        config = EngineConfig(**options)
        return plan_memory(
            model, config, weights, dtype="bfloat16", device=device, cache=CACHE, available=GIB
        )

    assert made(MODEL).grammars == made(large, "cuda").grammars == 0
    found = made(large)
    assert found.grammars == 100_000_000
    assert ("grammars", "95.4 MiB") in [row[:2] for row in found.rows()]
    left = GIB - found.weights.total - found.workspace - 100_000_000
    assert found.left == left
    assert made(large, kv_cache_memory_bytes=left).kv_cache > left - 16 * PER_TOKEN
    with pytest.raises(MemoryPlanError, match="more than the"):
        made(large, kv_cache_memory_bytes=left + 1)


MEASURED = """
import gc, json, sys
from tokenizers import Tokenizer as Backend
import llguidance, llguidance.numpy
from moebius.engine.step_memory import grammar_bytes
from moebius.text.masks import Vocabulary
from moebius.text.tokenizer import Tokenizer

def resident():
    with open("/proc/self/statm") as file:
        return 4096 * int(file.read().split()[1])

before = resident()
tokenizer = Tokenizer(Backend.from_file(sys.argv[1]))
vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [0])
vocabulary.matcher('start: "a"').compute_bitmask()
gc.collect()
print(resident() - before, grammar_bytes(tokenizer.vocab_size, "cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what this process has of Linux")
def test_what_grammars_take_is_no_more_than_is_counted(tmp_path: Path) -> None:
    """Of 60,000 ids: pairs, threes and more of letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    rng = random.Random(0)
    known = list(vocab)
    while len(vocab) < 60_000:
        pair = (rng.choice(known), rng.choice(known[97:123]))
        if len(pair[0]) < 12 and vocab.setdefault("".join(pair), len(vocab)) == len(known):
            known.append("".join(pair))
            merges.append(pair)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, counted = map(int, done.stdout.split())
    assert counted / 3 < taken <= counted == 120_000_000


def test_more_threads_than_cores_are_a_warning(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cores = len(os.sched_getaffinity(0))
    prepare(tiny_model, EngineConfig(threads=cores))
    assert not caplog.text
    prepare(tiny_model, EngineConfig(threads=cores + 1))
    assert f"--threads {cores + 1} is more than the {cores} cores" in caplog.text


@pytest.mark.case("B2")
def test_mapped_weights_must_stay_resident() -> None:
    """A cache that takes the room of weights would have them read from the disk again at each
    step."""
    mapped = 400 * 2**20
    made = plan_memory(
        MODEL,
        EngineConfig(max_num_seqs=2048, max_num_batched_tokens=2048),
        WeightBytes(mapped, 0, 1000),
        dtype="bfloat16",
        device="cpu",
        cache=CACHE,
        available=500 * 2**20,
    )
    assert made.kv_cache <= (500 * 2**20 - mapped - made.workspace) // 2
    with pytest.raises(
        MemoryPlanError,
        match=r"400\.0 MiB mapped, 0 B copied.*300\.0 MiB available \(left of the cgroup",
    ):
        plan_memory(
            MODEL,
            EngineConfig(),
            WeightBytes(mapped, 0, 1000),
            dtype="bfloat16",
            device="cpu",
            cache=CACHE,
            available=300 * 2**20,
            available_of="the cgroup's 700.0 MiB",
        )


@pytest.mark.case("B2")
def test_the_table_names_the_limit_that_bound(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        machine, "memory", lambda: machine.Memory(402 * 2**20, 700 * 2**20, "cgroup")
    )
    monkeypatch.setattr(machine, "processors", lambda *_: 0.5)
    prepared = prepare(tiny_model, EngineConfig())
    rows = {name: (amount, remark) for name, amount, remark in prepared.rows()}
    assert rows["available"] == ("402.0 MiB", "left of the cgroup's 700.0 MiB")
    assert rows["threads"] == ("1", "0.5 processors may be used")
    assert prepared.plan.available == 402 * 2**20 and prepared.plan.kv_cache < 201 * 2**20


@pytest.mark.case("C23")
@pytest.mark.parametrize(
    ("wish", "stored", "device", "expected"),
    [
        ("auto", "float16", "cpu", torch.float32),
        ("auto", "float16", "cuda", torch.float16),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("auto", "bfloat16", "cuda", torch.bfloat16),
        ("auto", "float32", "cuda", torch.float32),
        ("bfloat16", "float16", "cuda", torch.bfloat16),
        ("float32", "float16", "cuda", torch.float32),
        ("bfloat16", "float16", "cpu", torch.bfloat16),
    ],
)
def test_float16_stays_float16_where_the_device_has_it(
    wish: str, stored: str, device: str, expected: torch.dtype
) -> None:
    assert choose_dtype(wish, stored, device) == expected


@pytest.mark.case("C23")
def test_an_engine_of_float16_says_so_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would hold in float16, on plain PyTorch here; beside it, what a CPU makes of the
    same file."""
    write_model(tmp_path, dtype=torch.float16)
    on_cpu = prepare(tmp_path, EngineConfig())
    words = "on cpu; weights are float16 in the files, read in place"
    assert ("computed", "float32", words) in on_cpu.rows()
    full = load_engine(tmp_path, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=128))
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float16)
    half = load_engine(tmp_path, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=128))
    prepared = prepare(tmp_path, EngineConfig())
    assert ("computed", "float16", "on cpu") in prepared.rows()
    # Norms alone are copied, so that both hold half of what float32 would take.
    weights = on_cpu.plan.weights
    held = prepared.plan.weights.mapped + prepared.plan.weights.copied
    assert held <= weights.mapped + weights.copied <= 1.05 * held
    assert weights.copied < 0.05 * weights.mapped
    assert weights.parameters == prepared.plan.weights.parameters == held // 2
    assert half.runner.model.embed_tokens.weight.dtype == torch.float16
    prompt = list(range(3, 60))
    scores = []
    for one in (full, half):
        steps = run(one, [make(one, "a", prompt, max_tokens=0, prompt_logprobs=0)])["a"]
        scores.append([scored.logprob for step in steps for scored in step.prompt_logprobs])
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


# What a Mistral of 32 layers with 8 heads of 128 keeps of a token in bfloat16, by blocks of 16.
MISTRAL_BLOCK = 16 * 32 * 2 * 8 * 128 * 2


def windowed_plan(cache: CacheSizes, **options: Any) -> MemoryPlan:
    model = replace(MODEL, context=32_768)
    return plan_memory(
        model,
        EngineConfig(**options),
        WeightBytes(1000, 0, 500),
        dtype="bfloat16",
        device="cpu",
        cache=cache,
        available=2**40,
    )


def test_a_window_of_4096_at_a_context_of_32768_is_planned_as_4096_tokens_a_sequence() -> None:
    """In a step of 2,048 tokens a sequence holds its window and the step's: 4,095 + 2,048
    neighbours, which touch at most 385 blocks; not the 2,048 blocks of its whole length."""
    options = {"kv_cache_memory_bytes": 3850 * MISTRAL_BLOCK}
    made = windowed_plan(CacheSizes((4096,), MISTRAL_BLOCK), **options)
    assert made.num_blocks == 3850 and made.most_blocks(32_768) == 385
    assert made.sequences(32_768) == 10 and made.sequences(1024) == 60
    full = windowed_plan(CacheSizes((None,), MISTRAL_BLOCK), **options)
    assert full.most_blocks(32_768) == 2048 and full.sequences(32_768) == 1
    rows = {name: (amount, remark) for name, amount, remark in made.rows()}
    assert rows["sequences of 32,768"] == ("10", "at once in the cache, 385 blocks each")
    assert rows["KV cache"][1].endswith("B a token; freed behind windows of 4,096")
    # By default it reserves what all sequences can use, and no more.
    default = windowed_plan(CacheSizes((4096,), MISTRAL_BLOCK), max_num_seqs=10)
    assert default.num_blocks == 3850


def test_a_context_beyond_the_cache_stays_where_its_window_fits() -> None:
    made = windowed_plan(
        CacheSizes((4096,), MISTRAL_BLOCK), kv_cache_memory_bytes=385 * MISTRAL_BLOCK
    )
    assert made.max_model_len == 32_768 and made.lowered_from is None
    made = windowed_plan(
        CacheSizes((4096,), MISTRAL_BLOCK), kv_cache_memory_bytes=384 * MISTRAL_BLOCK
    )
    assert (made.max_model_len, made.lowered_from) == (384 * 16, 32_768)


def test_groups_of_layers_share_the_blocks() -> None:
    """Two tables: one keeps everything, one the last 128 tokens and a step's 64."""
    block = 1000
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    cache = CacheSizes((None, 128), block)
    made = windowed_plan(cache, kv_cache_memory_bytes=700 * block, **options)
    # 127 + 64 neighbours touch at most 13 blocks of 16.
    assert made.most_blocks(1024) == 64 + 13 and made.sequences(1024) == 700 // 77
    assert made.most_blocks(100) == 7 + 7
    assert made.max_model_len == (700 - 13) * 16 and made.lowered_from == 32_768
    assert made.bytes_per_token == 2 * block // 16 and made.kv_tokens == 350 * 16


def test_states_are_planned_for_all_that_may_run() -> None:
    cache = CacheSizes((None,), 1000, state=5000, scratch=1)
    made = windowed_plan(cache, max_num_seqs=4, kv_cache_memory_bytes=10**6)
    slots = 4 * (1 + 1 + 2)  # its own, one more, and two snapshots
    assert made.groups.states is not None and made.groups.states.num_slots == slots
    assert made.states == slots * 5000
    assert made.num_blocks == (10**6 - made.states) // 1000
    rows = {name: (amount, remark) for name, amount, remark in made.rows()}
    # 14,720 tokens, of which a prompt's fill 4 of the 8 slots for snapshots: in chunks of 2,048.
    assert made.max_model_len == 920 * 16
    words = "16 slots of 4.9 KiB: 4 sequences, 2 snapshots each, and one every 4,096 tokens"
    assert rows["states"] == ("78.1 KiB", words)
    alone = windowed_plan(CacheSizes((), 0, state=5000), max_num_seqs=4)
    assert alone.num_blocks == 0 and alone.sequences(30_000) == 4
    assert alone.max_model_len == 32_768


# Qwen3.5-35B-A3B: 10 of 40 layers attend, 2 heads of 256 in bfloat16; the others keep 32 states of
# 128 x 128 in float32, and three inputs of 8,192 columns in bfloat16.
QWEN_BLOCK = 16 * 10 * 2 * 2 * 256 * 2
QWEN_STATE = 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
QWEN = CacheSizes((None,), QWEN_BLOCK, state=QWEN_STATE)


def test_states_get_half_of_a_small_cache_and_blocks_the_rest() -> None:
    """Of 3 GiB: 25 slots and 4,917 blocks. Three slots serve a sequence and its two snapshots."""
    made = windowed_plan(QWEN, kv_cache_memory_bytes=3 * GIB)
    assert made.num_slots == 3 * GIB // 2 // QWEN_STATE == 25
    assert made.num_blocks == (3 * GIB - 25 * QWEN_STATE) // QWEN_BLOCK == 4917
    assert made.sequences(16) == 25, "with fewer snapshots"
    states = made.groups.states
    # A state is as large as 3,144 tokens' blocks; two chunks of 2,048 are the next multiple.
    assert states is not None and (states.interval, states.apart) == (4096 // 16, 16)
    rows = {name: remark for name, _, remark in made.rows()}
    assert rows["states"] == (
        "25 slots of 61.4 MiB: 8 sequences, 2 snapshots each, and one every 4,096 tokens"
    )


def test_one_sequence_as_long_as_was_asked_for_goes_before_snapshots() -> None:
    """Of 1 GiB, 32,768 tokens of blocks take 640 MiB, which leaves six slots instead of eight."""
    options = {"kv_cache_memory_bytes": GIB}
    assert windowed_plan(QWEN, **options).num_slots == 8
    made = windowed_plan(QWEN, max_model_len=32_768, **options)
    assert made.num_slots == 6 and made.max_model_len == 32_768
    assert (
        windowed_plan(QWEN, max_model_len=32_768, kv_cache_memory_bytes=705 * 2**20).num_slots == 1
    )
    with pytest.raises(MemoryPlanError, match=r"one sequence of 32,768 tokens needs 640\.0 MiB"):
        windowed_plan(QWEN, max_model_len=32_768, kv_cache_memory_bytes=700 * 2**20)


def test_a_state_that_does_not_fit_is_named() -> None:
    named = r"one sequence's recurrent states \(61.4 MiB a slot\) need 61.4 MiB, but the cache has"
    with pytest.raises(MemoryPlanError, match=rf"{named} 60.0 MiB; raise --kv-cache-memory-bytes"):
        windowed_plan(QWEN, kv_cache_memory_bytes=60 * 2**20)
    enough = QWEN_STATE + QWEN_BLOCK
    made = windowed_plan(QWEN, kv_cache_memory_bytes=enough)
    assert (made.num_slots, made.num_blocks, made.max_model_len) == (1, 1, 16)
    with pytest.raises(MemoryPlanError, match="one sequence of 32,768 tokens needs"):
        windowed_plan(QWEN, kv_cache_memory_bytes=enough - 1)
    two = CacheSizes((None,), 1000, state=5000, scratch=1)
    with pytest.raises(MemoryPlanError, match=r"\(4.9 KiB a slot\) need 9.8 KiB"):
        windowed_plan(two, max_num_seqs=4, kv_cache_memory_bytes=9_999)


def test_without_prefix_caching_no_slot_is_kept_for_snapshots() -> None:
    made = windowed_plan(QWEN, max_num_seqs=4, enable_prefix_caching=False)
    assert made.num_slots == 4
    rows = {name: remark for name, _, remark in made.rows()}
    assert rows["states"] == "4 slots of 61.4 MiB"


def test_states_alone_are_apart_by_their_number() -> None:
    """A recurrent model has no blocks to weigh a state against: half of its spare slots hold a
    prompt's snapshots."""
    made = windowed_plan(CacheSizes((), 0, state=5000), max_num_seqs=4, max_num_batched_tokens=64)
    states = made.groups.states
    assert states is not None and states.num_slots == 12
    assert states.interval * 16 == 32_768 // 4


def test_what_ranks_exchange_worked_by_hand() -> None:
    """Of 3 choices, rows of 64 bfloat16: on 2 ranks a row and its 3 ids go to the other; on 8 to 3
    others. 3 rows come back. Dense layers exchange nothing."""
    routed = FeedForwardConfig(32, RouterConfig(8, 3))
    layers = (LayerSpec(None, routed), LayerSpec(None, FeedForwardConfig(128)))
    config = replace(MODEL, layers=layers * 2)
    assert exchange_bytes(config, 5, 1, 2) == 0
    assert exchange_bytes(config, 5, 2, 2) == 5 * 2 * ((128 + 24) + 3 * 128)
    assert exchange_bytes(config, 5, 8, 2) == 5 * 2 * (3 * (128 + 24) + 3 * 128)


def test_a_rank_needs_room_for_all_ranks_rows() -> None:
    """Where steps are not recorded: (row, choice) pairs of 3 * 32 + 2 * 64 numbers of 4 bytes."""
    config = replace(MODEL, layers=(LayerSpec(None, FeedForwardConfig(32, RouterConfig(8, 3))),))
    engine = EngineConfig(max_num_batched_tokens=100)
    more = workspace_bytes(config, engine, 2, ranks=3) - workspace_bytes(config, engine, 2)
    assert more == 2 * 100 * 3 * (3 * 32 + 2 * 64) * 4
