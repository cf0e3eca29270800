"""A recorded step is the step: the same bits, whatever came before; and what cannot be recorded
runs as it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.engine.kv_cache import KVCache, cache_specs
from moebius.engine.runner import Runner
from moebius.models.weights import load_decoder
from moebius.ops.cpu import CpuOps, Recording
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from ops.levels import bits
from oracle import FAMILY, save_tiny

MAX_TOKENS, BLOCK_SIZE, BLOCKS = 24, 4, 40
CPU = torch.device("cpu")


def runner(directory: Path, ops: CpuOps, dtype: torch.dtype) -> Runner:
    decoder = load_decoder(directory, dtype, ops=ops)
    sizes = {"num_blocks": BLOCKS, "block_size": BLOCK_SIZE, "device": CPU}
    specs = cache_specs(decoder.config, dtype)
    return Runner(decoder, KVCache(specs, ops, **sizes), CPU, MAX_TOKENS)


def random_step(rng: random.Random, computed: list[int]) -> StepInputs:
    """New tokens of some of the sequences, none of all of them now and then; sequence s has blocks
    10 s to 10 s + 9."""
    some = [s for s in range(len(computed)) if rng.random() < 0.7]
    counts = [rng.randint(1, MAX_TOKENS // 4) for _ in some]
    starts = [computed[s] for s in some]
    for s, count in zip(some, counts, strict=True):
        computed[s] += count
    ids = [[rng.randrange(64) for _ in range(count)] for count in counts]
    blocks = [list(range(10 * s, 10 * s + -(-computed[s] // BLOCK_SIZE))) for s in some]
    return StepInputs.build(ids, starts, blocks, BLOCK_SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", sorted(FAMILY))
def test_recorded_steps_keep_every_bit(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, model_type)
    recorded, plain = (runner(tmp_path, CpuOps(1), dtype) for _ in range(2))
    assert recorded._forward != recorded._compute, "this architecture calls torch in between"
    plain._forward, plain._logits = ReferenceOps().capture(
        plain._compute, plain._compute_logits, STEP, MAX_TOKENS
    )
    rng, computed = random.Random(model_type), [0, 0, 0, 0]
    for _ in range(6):
        step = random_step(rng, computed)
        hidden, exact = recorded.execute(step), plain.execute(step)
        assert torch.equal(bits(hidden), bits(exact))
        rows = rng.sample(range(len(exact)), rng.randint(0, len(exact)))
        assert torch.equal(recorded.logits(hidden, rows), plain.logits(exact, rows))


def test_a_step_beyond_what_was_recorded_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    one = runner(tmp_path, CpuOps(1), torch.bfloat16)
    long = StepInputs.build([list(range(MAX_TOKENS + 1))], [0], [list(range(7))], BLOCK_SIZE)
    with pytest.raises(ValueError, match="25 rows where 24"):
        one.execute(long)


TABLE = torch.randn(8, 4)
STEP = StepInputs.build([[3]], [0], [[0]], BLOCK_SIZE)
THREE = StepInputs.build([[5, 1], [7]], [0, 0], [[0], [1]], BLOCK_SIZE)


def capture(ops: CpuOps, compute: Callable[[StepInputs], Tensor]) -> Callable[[StepInputs], Tensor]:
    return ops.capture(compute, lambda hidden, rows: ops.embed(rows, hidden), STEP, 8)[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 2,
        lambda x: x.mul_(2),
        lambda x: torch.cat((x, x), dim=1),
        lambda x: torch.split(x + 1, 2, dim=1)[0],
        lambda x: x.__setitem__(0, 1.0) or x,
        lambda x: x.__iadd__(1.0),
        lambda x: torch.nn.functional.relu(x),
    ],
)
@torch.inference_mode()
def test_what_torch_computes_is_not_recorded(change: Callable[[Tensor], Tensor]) -> None:
    ops = CpuOps(1)

    def compute(inputs: StepInputs) -> Tensor:
        return change(ops.embed(inputs.input_ids, TABLE))

    assert capture(ops, compute) is compute


@torch.inference_mode()
def test_views_are_recorded() -> None:
    ops = CpuOps(1)

    def compute(inputs: StepInputs) -> Tensor:
        return ops.embed(inputs.input_ids, TABLE).view(-1, 2, 2).flatten(1)

    captured = capture(ops, compute)
    assert captured is not compute
    assert torch.equal(captured(THREE), TABLE[[5, 1, 7]])


def test_a_recording_reuses_memory() -> None:
    """As many tensors as live at once, however many layers there are."""
    ops, gain = CpuOps(1), torch.ones(4)

    def deep(layers: int) -> Recording:
        def compute(ids: Tensor) -> Tensor:
            x = ops.embed(ids, TABLE)
            for _ in range(layers):
                x = ops.rms_norm(x, gain, 1e-6)
            return x

        recording = Recording(1, 8)
        with torch.inference_mode():
            assert ops._note(recording, compute)
        return recording

    assert sum(map(len, deep(3)._free.values())) == sum(map(len, deep(30)._free.values())) == 1
