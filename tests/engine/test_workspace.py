"""What a step takes is planned by what allocates it, and what is promised of it by what it calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import moebius
from covering import rest
from engine.test_one_answer import KINDS
from moebius.engine.config import EngineConfig
from moebius.engine.expert_share import ExpertShare
from moebius.engine.load import load_engine, prepare, step_rows
from moebius.engine.workspace import StepRows, Workspace, plan_workspace
from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.moe.config import FeedForwardConfig
from moebius.moe.placement import Placement
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig
from moebius.ops import Feature, Operation, select_ops
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.cpu.program import RecordedProgram
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.parallel.exchange import ExchangeSpec
from ops.formats.blocks import random_matrix
from oracle import FAMILY, save_tiny
from random_schedules import WINDOWED
from rank_threads import group, together
from tiny import write_tokenizer

BUNDLED = Path(moebius.__file__).parent / "bundled"
SMALL = EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=32, max_num_seqs=3)


NAMES = [*sorted(FAMILY), "bundled", *sorted(WINDOWED)]
EVERY_RUN = KINDS | {"bundled", "lfm2_moe", "kimi_linear", "bailing_hybrid", "gemma4"}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        (name, tokens) if name in EVERY_RUN and i % 2 == j else rest(name, tokens)
        for i, name in enumerate(NAMES)
        for j, tokens in enumerate((64, 512))
    ],
)
def test_the_plan_is_what_is_allocated(tmp_path: Path, name: str, tokens: int) -> None:
    directory = BUNDLED if name == "bundled" else tmp_path
    if name != "bundled":
        model_type, changes = WINDOWED.get(name, (name, {}))
        save_tiny(tmp_path, model_type, **changes)
        write_tokenizer(tmp_path)
    config = replace(SMALL, max_num_batched_tokens=tokens)
    prepared = prepare(directory, config)
    runner = load_engine(directory, config, prepared=prepared).runner
    planned = prepared.workspace
    programs = (runner.programs.step, runner.programs.head)
    assert planned.reason == ""
    for program, trace in zip(programs, (planned.step, planned.head), strict=True):
        assert isinstance(program, RecordedProgram)
        assert program.trace == trace
        assert program.memory.nbytes == trace.nbytes > 0
    assert prepared.plan.workspace >= planned.nbytes
    assert runner.cache.nbytes == prepared.plan.kv_cache > 0
    assert len(runner.cache.layout.windows) == len(prepared.plan.groups.blocks)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "dots1"])
def test_a_ranks_plan_is_what_it_allocates(tmp_path: Path, model_type: str) -> None:
    """Three ranks' engines, which warm up together: bytes of weights and of each one's programs."""
    save_tiny(tmp_path, model_type)
    write_tokenizer(tmp_path)
    whole = prepare(tmp_path, SMALL)
    each = [prepare(tmp_path, SMALL, ExpertShare(rank, 3)) for rank in range(3)]
    config = whole.checkpoint.config
    (top_k,) = {part.router.top_k for part in config.feed_forward if part.router is not None}
    tokens = SMALL.max_num_batched_tokens
    spec = ExchangeSpec(3, tokens, config.hidden_size, top_k, whole.dtype, 4, config.vocab_size)
    exchanges = group(spec)
    for prepared, exchange in zip(each, exchanges, strict=True):
        assert prepared.decoder.ranks is not None
        prepared.decoder.ranks.join(exchange)
    engines = together(exchanges, lambda rank: load_engine(tmp_path, SMALL, prepared=each[rank]))
    for engine, prepared in zip(engines, each, strict=True):
        programs = engine.runner.programs
        planned = prepared.workspace.programs
        for program, trace in zip(
            (programs.step, programs.head, programs.shared_head), planned, strict=True
        ):
            assert isinstance(program, RecordedProgram)
            assert program.trace == trace
            assert program.memory.nbytes == trace.nbytes
        assert prepared.plan.workspace >= sum(trace.nbytes for trace in planned)
        # Rows of three ranks come, and their choices' outputs go.
        received = 3 * tokens * (top_k + 1) * config.hidden_size * prepared.dtype.itemsize
        assert prepared.workspace.step.nbytes > received
        held = sum(x.nbytes for x in engine.runner.model.parameters())
        assert held == prepared.plan.weights.mapped + prepared.plan.weights.copied
    experts = [source for source in whole.checkpoint.sources if source.expert is not None]
    rest = len(whole.checkpoint.sources) - len(experts)
    assert sum(len(prepared.weights) for prepared in each) == len(experts) + 3 * rest
    assert all(prepared.plan.weights.mapped < whole.plan.weights.mapped for prepared in each)
    (row,) = [row for row in each[1].rows() if row[0] == "rank"]
    assert row[1:] == ("1 of 3", row[2]) and row[2].startswith("2 of ")


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ConfigError, match="this llama model has no experts"):
        prepare(tmp_path, SMALL, ExpertShare(0, 2))
    save_tiny(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match="6 ranks cannot share the 5 experts of a layer"):
        prepare(tmp_path, SMALL, ExpertShare(0, 6))
    with pytest.raises(ConfigError, match="rank 2 is none of the 2"):
        prepare(tmp_path, SMALL, ExpertShare(2, 2))
    placement = Placement.linear({0: 5, 1: 5}, 3)
    with pytest.raises(ConfigError, match="placed on 3 ranks, but there are 2"):
        prepare(tmp_path, SMALL, ExpertShare(0, 2, placement))


def test_ranks_want_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes no two ranks on one."""
    save_tiny(tmp_path, "mixtral")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="a GPU of its own, and this host has 1; use --ranks 1"):
        prepare(tmp_path, replace(SMALL, ranks=2), ExpertShare(0, 2))


PLAIN = GQA(4, 2, 16, rope=RopeConfig())


def model(*layers: FeedForwardConfig, attention: GQA = PLAIN) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        vocab_size=100,
        context=64,
        layers=tuple(LayerSpec(attention, layer) for layer in layers),
    )


def planned(config: ModelConfig, rows: StepRows = StepRows(8, 8)) -> Workspace:  # noqa: B008
    decoder = Decoder(config, CpuOps(1), torch.bfloat16, device="meta")
    return plan_workspace(decoder, 16, rows, 64)


def test_the_logits_memory_is_of_the_rows_that_may_be_asked_for() -> None:
    """Not of as many as a step may have: rows of 100 float32 logits, beside rows of 64 values and
    their numbers."""
    config = model(FeedForwardConfig(16))
    few, more = planned(config, StepRows(512, 64)), planned(config, StepRows(512, 128))
    assert more.head.nbytes - few.head.nbytes == 64 * (100 * 4 + 64 * 2 + 8)
    assert more.step == few.step


def test_a_promise_follows_from_the_operations_that_a_model_uses() -> None:
    router = RouterConfig(4, 2)
    for gated in (True, False):
        found = planned(model(FeedForwardConfig(16), FeedForwardConfig(16, router, gated=gated)))
        assert found.batch_invariant(CpuOps(1)) and not found.batch_invariant(ReferenceOps())
        two = {use for use in found.uses if Feature.TWO_MATRICES in use.features}
        assert {use.operation for use in two} == (set() if gated else {Operation.EXPERTS})
    windowed = planned(model(FeedForwardConfig(16), attention=replace(PLAIN, window=8)))
    features = [use.features for use in windowed.uses if use.operation == "paged_attention"]
    assert features == [frozenset({Feature.WINDOW})]
    plain = planned(model(FeedForwardConfig(16)))
    routed = planned(model(FeedForwardConfig(16, router)))
    assert {use.operation for use in routed.uses - plain.uses} == {Operation.ROUTE}


@pytest.mark.parametrize("isa", ["", "reference"])
def test_what_start_says_and_what_the_fingerprint_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    save_tiny(tmp_path, "mixtral")
    write_tokenizer(tmp_path)
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    prepared = prepare(tmp_path, SMALL)
    fingerprint = load_engine(tmp_path, SMALL, prepared=prepared).info.fingerprint
    assert prepared.batch_invariant == (isa == "")
    assert fingerprint.endswith("-approx") == (isa == "reference")
    assert prepared.ops.name == select_ops("cpu", torch.float32).name


def test_a_dtype_without_kernels_is_refused_before_anything_is_allocated() -> None:
    decoder = Decoder(model(FeedForwardConfig(16)), CpuOps(1), torch.float16, device="meta")
    with pytest.raises(ConfigError, match="kernels do not compute in float16; use another --dtype"):
        plan_workspace(decoder, 16, StepRows(8, 8), 64)


def test_a_plan_that_does_not_fit_the_model_is_not_recorded(tmp_path: Path) -> None:
    """Steps then run as they are: nothing is written where another plan had room."""
    save_tiny(tmp_path, "mixtral")
    write_tokenizer(tmp_path)
    prepared = prepare(tmp_path, SMALL)
    for layers in (1, 3):
        wrong = replace(model(*[FeedForwardConfig(16)] * layers), vocab_size=64)
        decoder = Decoder(wrong, prepared.ops, prepared.dtype, device="meta")
        other = plan_workspace(decoder, 16, step_rows(SMALL), 32)
        runner = load_engine(tmp_path, SMALL, prepared=replace(prepared, workspace=other)).runner
        assert runner.programs.step.trace.reason == "it called other operations than were planned"


def test_the_kernels_keep_no_more_while_a_context_grows() -> None:
    """By one split of its keys more: no vector grows to twice what it was."""
    most, block_size = 5 * 1024, 16
    ops = CpuOps(1)
    spec = key_value_spec(1, 64, torch.bfloat16)
    blocks = most // block_size
    buffer = torch.zeros(ops.cache_bytes_per_block(spec, block_size) * blocks, dtype=torch.uint8)
    cache = ops.make_cache(buffer, spec, block_size)
    for context in range(1024, most + 1, 1024):
        step = StepInputs.build([[0]], [context - 1], [list(range(blocks))], block_size)
        q = torch.randn(1, 4, 64).bfloat16()
        ops.paged_attention(q, cache, ops.plan_attention(step, block_size), 1.0)
    assert ops._native.scratch_bytes <= ops.scratch_bytes(64, spec, block_size, most)


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernels_keep_no_more_than_they_said(
    threads: int, activations: Literal["int8", "float"]
) -> None:
    """One long sequence, whose keys are split as often as can be; then long rows of products, with
    plain numbers and with blocks of both sizes."""
    context, size, block_size = 5000, 256, 16
    ops = CpuOps(threads, activations=activations)
    spec = key_value_spec(1, 64, torch.bfloat16)
    blocks = -(-context // block_size)
    buffer = torch.zeros(ops.cache_bytes_per_block(spec, block_size) * blocks, dtype=torch.uint8)
    cache = ops.make_cache(buffer, spec, block_size)
    said = ops.scratch_bytes(size, spec, block_size, context)
    for new in range(1, 65 * threads, 31):
        tables = [list(range(blocks))]
        step = StepInputs.build([[0] * new], [context - new], tables, block_size)
        q = torch.randn(new, 4, 64).bfloat16()
        ops.paged_attention(q, cache, ops.plan_attention(step, block_size), 1.0)
    plain = torch.randn(300, size).bfloat16()
    blocks_of = [random_matrix(name, 300, size) for name in ("q5_1", "q8_0", "q4_k", "q6_k")]
    for rows in (1, 5, 800):
        x = torch.randn(rows, size).bfloat16()
        for weight in (plain, *blocks_of):
            ops.linear(x, ops.prepare_linear((weight, None), dtype=torch.bfloat16))
    assert said / 3 < ops._native.scratch_bytes <= said
