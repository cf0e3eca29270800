"""A recorded step is the step: the same bits, whatever came before; and what cannot be recorded
runs as it is, and says why."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covering import rest
from engine.test_one_answer import KINDS
from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.engine.workspace import StepRows
from moebius.models.store.load import load_decoder
from moebius.ops.capability import Operation, Use
from moebius.ops.cpu import CpuOps, RecordedProgram
from moebius.ops.program import Program
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.program import Unrecorded
from moebius.ops.sources import RowSource, StepSource
from moebius.ops.steps import StateInputs, Step, StepInputs
from ops.levels import bits
from oracle import FAMILY, save_tiny

MAX_TOKENS, BLOCK_SIZE, BLOCKS = 24, 4, 160
CPU = torch.device("cpu")


class Plain(CpuOps):
    """The kernels, without recording."""

    def record(self, compute: Any, source: Any, device: Any, planned: Any = None) -> Program[Any]:
        return Unrecorded(compute, source, device, ReferenceOps().trace(compute, source))


def runner(directory: Path, ops: CpuOps, dtype: torch.dtype) -> Runner:
    decoder = load_decoder(directory, dtype, ops=ops)
    sizes = {"num_blocks": BLOCKS, "block_size": BLOCK_SIZE, "device": CPU, "num_states": 4}
    cache = KVCache(decoder.config.caches(dtype), ops, **sizes)
    return Runner(decoder, cache, CPU, StepRows(MAX_TOKENS, MAX_TOKENS))


def random_step(rng: random.Random, computed: list[int], groups: int = 1) -> StepInputs:
    """New tokens of some of the sequences, none of all of them now and then; sequence s has blocks
    10 s to 10 s + 9, and as many 40 further on for another group of layers; and slot s."""
    some = [s for s in range(len(computed)) if rng.random() < 0.7]
    counts = [rng.randint(1, MAX_TOKENS // 4) for _ in some]
    starts = [computed[s] for s in some]
    for s, count in zip(some, counts, strict=True):
        computed[s] += count
    ids = [[rng.randrange(64) for _ in range(count)] for count in counts]
    blocks = [list(range(10 * s, 10 * s + -(-computed[s] // BLOCK_SIZE))) for s in some]
    others = [[[40 * group + b for b in table] for table in blocks] for group in range(1, groups)]
    begun = [s for s, start in zip(some, starts, strict=True) if not start]
    states = StateInputs(some, begun, (), ())
    return StepInputs.build(ids, starts, blocks, BLOCK_SIZE, others=others, states=states)


DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        (name, dtype) if name in KINDS and DTYPES[i % 2] == dtype else rest(name, dtype)
        for i, name in enumerate(sorted(FAMILY))
        for dtype in DTYPES
    ],
    ids=str,
)
def test_recorded_steps_keep_every_bit(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, model_type)
    recorded, plain = runner(tmp_path, CpuOps(1), dtype), runner(tmp_path, Plain(1), dtype)
    for program in (recorded.programs.step, recorded.programs.head):
        assert program.trace.reason == "" and program.trace.segments == 1
    assert not plain.programs.step.trace.recorded and not plain.programs.head.trace.recorded
    rng, computed = random.Random(model_type), [0, 0, 0, 0]
    groups = len(plain.cache.layout.windows)
    for _ in range(6):
        step = random_step(rng, computed, groups)
        exact = plain.execute(step)
        assert torch.equal(bits(recorded.execute(step)), bits(exact))
        rows = rng.sample(range(len(exact)), rng.randint(0, len(exact)))
        assert torch.equal(recorded.logits(rows), plain.logits(rows))


def test_rows_beyond_what_was_recorded_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    one = runner(tmp_path, CpuOps(1), torch.bfloat16)
    long = StepInputs.build([list(range(MAX_TOKENS + 1))], [0], [list(range(7))], BLOCK_SIZE)
    with pytest.raises(ValueError, match="25 tokens where 24"):
        one.execute(long)


@pytest.mark.parametrize("ops", [CpuOps(1), Plain(1), ReferenceOps()], ids=["recorded", "", "ref"])
def test_logits_are_of_rows_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ops: CpuOps
) -> None:
    """Memory of earlier, longer steps is behind them, and is nobody's; a failed one has none."""
    save_tiny(tmp_path, "mixtral")
    one = runner(tmp_path, ops, torch.float32)
    with pytest.raises(IndexError):
        one.logits([0])
    one.execute(StepInputs.build([[1, 2, 3]], [0], [[0]], BLOCK_SIZE))
    assert len(one.logits([2, 0])) == 2
    one.execute(StepInputs.build([[4]], [3], [[0]], BLOCK_SIZE))
    for row in (1, 2, -1):
        with pytest.raises(IndexError):
            one.logits([0, row])
    monkeypatch.setattr(one.programs, "step", None)
    with pytest.raises(AttributeError):
        one.execute(StepInputs.build([[4]], [4], [[0, 1]], BLOCK_SIZE))
    with pytest.raises(IndexError, match="the last step had 0 rows"):
        one.logits([0])


def test_a_runner_follows_weights_that_are_moved(tmp_path: Path) -> None:
    """What was recorded of the old ones is not run again."""
    save_tiny(tmp_path, "mixtral")
    one = runner(tmp_path, CpuOps(1), torch.float32)
    step = StepInputs.build([[1, 2, 3]], [0], [[0]], BLOCK_SIZE)
    before = one.execute(step).clone()
    one.model._apply(lambda x: x * 1.25)
    after = one.execute(step).clone()
    fresh = runner(tmp_path, CpuOps(1), torch.float32)
    fresh.model._apply(lambda x: x * 1.25)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh.execute(step))


TABLE = torch.randn(8, 4)
GAIN = torch.ones(4)
IDS = [5, 1, 7]


def record(ops: CpuOps, compute: Callable[[Tensor], Tensor], most: int = 8) -> Any:
    return ops.record(compute, RowSource("rows", most), CPU)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x * 2, "mul"),
        (lambda x: x.mul_(2), "mul_"),
        (lambda x: torch.add(x, 1, out=x), "add"),
        (lambda x: torch.cat((x, x), dim=1), "cat"),
        (lambda x: torch.split(x + 1, 2, dim=1)[0], "add"),
        (lambda x: x.__setitem__(0, 1.0) or x, "__setitem__"),
        (lambda x: x.data.add_(1) is None or x, "add_"),
        (lambda x: x.detach().add_(1) is None or x, "add_"),
        (lambda x: x.__iadd__(1.0), ""),
        (lambda x: torch.nn.functional.relu(x, inplace=True), "relu"),
        (lambda x: x.view(-1, 2, 2)[:, 0].zero_() is None or x, "zero_"),
        (lambda x: TABLE[x[:, 0].long()], "long"),
        (lambda x: torch.ones(len(x), 4) @ x.t() @ x, "matmul"),
        (lambda x: torch.zeros_like(x), "zeros_like"),
        (lambda x: torch.zeros(x.shape, device=x.device), "zeros"),
        (lambda x: x if x.sum() > 0 else -x, "sum"),
    ],
)
@torch.inference_mode()
def test_what_torch_computes_is_not_recorded(change: Callable[[Tensor], Tensor], name: str) -> None:
    ops = CpuOps(1)
    program = record(ops, lambda ids: change(ops.embed(ids, TABLE)))
    assert "torch's" in program.trace.reason and name in program.trace.reason
    assert isinstance(program, Unrecorded)


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "__bool__": lambda x: bool(x[0]),
    "__int__": lambda x: int(x[0]),
    "__float__": lambda x: float(x[0]),
    "__index__": lambda x: [0] * 9 if range(9)[x[0]] else [],
    "__array__": lambda x: np.asarray(x),
    "__contains__": lambda x: 3 in x,
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "__getitem__": lambda x: TABLE[x],
    "data_ptr": lambda x: x.data_ptr(),
}


@pytest.mark.parametrize("name", sorted(READS))
@torch.inference_mode()
def test_a_value_that_is_read_is_not_frozen(name: str) -> None:
    """It would be the example's for ever. The computation runs as it is, and says which function
    read."""
    ops = CpuOps(1)
    seen = []

    def compute(ids: Tensor) -> Tensor:
        seen.append(READS[name](ids))
        return ops.embed(ids, TABLE)

    program = record(ops, compute)
    assert name in program.trace.reason
    seen.clear()
    for ids in ([3], [6, 2]):
        assert torch.equal(program.run(array("q", ids)), TABLE[ids])
    assert len(seen) == 2


@torch.inference_mode()
def test_reading_in_vain_is_noticed_too() -> None:
    ops = CpuOps(1)

    def compute(ids: Tensor) -> Tensor:
        try:
            first = int(ids[0])
        except Exception:
            first = 0
        return ops.embed(ids, TABLE, 2.0 if first == 5 else 1.0)

    program = record(ops, compute)
    assert not program.trace.recorded
    assert torch.equal(program.run(array("q", IDS)), 2 * TABLE[IDS])


@torch.inference_mode()
def test_what_has_no_values_may_be_asked() -> None:
    ops = CpuOps(1)

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        assert x.dim() == 2 and x.dtype == TABLE.dtype and x.shape[1] == x.stride(0) == 4
        assert len(x) == len(ids) and x.is_contiguous() and not x.requires_grad
        return x.view(-1, 2, 2).flatten(1)

    program = record(ops, compute)
    assert program.trace.recorded
    assert torch.equal(program.run(array("q", IDS)), TABLE[IDS])


@torch.inference_mode()
def test_some_of_a_steps_rows_are_not_recorded_as_all() -> None:
    ops = CpuOps(1)
    for cut in (lambda x: x[1:], lambda x: x[:-1], lambda x: x[:, :2].contiguous()):
        program = record(ops, lambda ids, cut=cut: ops.clip(cut(ops.embed(ids, TABLE)), 1.0))
        assert program.trace.reason
        assert torch.equal(program.run(array("q", IDS)), cut(TABLE[IDS]).clamp(-1, 1))


def test_memory_is_used_again_and_never_while_it_is_needed() -> None:
    """As much as lives at once, however many layers there are."""
    ops = CpuOps(1)

    def deep(layers: int) -> Callable[[Tensor], Tensor]:
        def compute(ids: Tensor) -> Tensor:
            x = first = ops.embed(ids, TABLE)
            for _ in range(layers):
                x, _ = ops.add_rms_norm(x, x, 0.5, GAIN, 1e-6)
            return ops.add_gated(first, x)

        return compute

    with torch.inference_mode():
        programs = {layers: record(ops, deep(layers)) for layers in (3, 30)}
        assert programs[3].trace.nbytes == programs[30].trace.nbytes
        for layers, program in programs.items():
            assert isinstance(program, RecordedProgram)
            for ids in (IDS, [2] * 8, [], [0, 3]):
                exact = deep(layers)(torch.tensor(ids, dtype=torch.int64))
                assert torch.equal(bits(program.run(array("q", ids))), bits(exact))


def test_a_program_holds_what_it_points_to() -> None:
    """Weights and tables whose owner let them go."""
    ops = CpuOps(1)

    def made() -> Program[Any]:
        weight, gain = torch.randn(6, 4), torch.rand(6)
        table = torch.randn(8, 4)
        with torch.inference_mode():
            layer = ops.prepare_linear((weight, None))
            return record(
                ops, lambda ids: ops.rms_norm(ops.linear(ops.embed(ids, table), layer), gain, 1e-6)
            )

    program = made()
    first = program.run(array("q", IDS)).clone()
    for _ in range(50):  # takes over memory that is free
        torch.full((8, 4), torch.nan), torch.full((6, 4), torch.nan), torch.full((6,), torch.nan)
    assert torch.equal(program.run(array("q", IDS)), first)


@torch.inference_mode()
def test_random_numbers_are_not_frozen() -> None:
    ops = CpuOps(1)
    program = record(ops, lambda ids: ops.rms_norm(ops.embed(ids, TABLE), torch.rand(4), 1e-6))
    assert program.trace.reason.startswith("it draws random numbers")
    first, second = (program.run(array("q", IDS)).clone() for _ in range(2))
    assert not torch.equal(first, second)


@torch.inference_mode()
def test_the_result_has_the_shape_that_was_returned() -> None:
    ops = CpuOps(1)
    for row in ((4,), (2, 2), (2,), (1, 4)):
        program = record(ops, lambda ids, row=row: ops.embed(ids, TABLE).view(-1, *row))
        assert program.trace.recorded
        for ids in (IDS, [], [3]):
            assert torch.equal(program.run(array("q", ids)), TABLE[ids].view(-1, *row))


@torch.inference_mode()
def test_a_plan_of_other_lifetimes_is_not_used() -> None:
    """Though its buffers have the same sizes in the same order."""
    ops = CpuOps(1)

    def short(ids: Tensor) -> Tensor:
        x = ops.clip(ops.clip(ops.embed(ids, TABLE), 3.0), 2.0)
        return ops.add_gated(x, x)

    def long(ids: Tensor) -> Tensor:
        first = ops.embed(ids, TABLE)
        return ops.add_gated(first, ops.clip(ops.clip(first, 3.0), 2.0))

    source = RowSource("rows", 8)
    program = ops.record(long, source, CPU, ops.trace(short, source))
    assert torch.equal(program.run(array("q", IDS)), long(torch.tensor(IDS)))
    assert program.trace.reason == "it called other operations than were planned"


@torch.inference_mode()
def test_a_trace_says_in_what_each_operation_computes() -> None:
    ops = CpuOps(1)
    half = TABLE.bfloat16()
    trace = ops.trace(lambda ids: ops.embed(ids, half), RowSource("rows", 8))
    assert trace.uses == {Use(Operation.EMBED, torch.bfloat16)}


def test_columns_of_unequal_lengths_are_refused() -> None:
    """What lies behind the shorter one would be read."""
    ops = CpuOps(1)
    with torch.inference_mode():
        program = ops.record(
            lambda step: ops.embed(step.input_ids, TABLE), StepSource(8, groups=1), CPU
        )
    step = StepInputs.build([[1, 2, 3]], [0], [[0]], BLOCK_SIZE)
    step.slot_mapping_host.pop()
    with pytest.raises(ValueError, match="a column of 2 beside one of 3 tokens"):
        program.run(step)


def test_a_step_of_several_groups_brings_slots_for_each() -> None:
    seen: list[Step] = []
    source = StepSource(4, groups=2)
    columns = [torch.empty(4, dtype=torch.int64, device="meta") for _ in range(source.width)]
    step = source.symbolic(columns)
    seen += [step.of(0), step.of(1)]
    assert source.width == 4
    assert seen[0].slot_mapping is columns[2] and seen[1].slot_mapping is columns[3]
