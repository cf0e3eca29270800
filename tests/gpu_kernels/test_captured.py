"""Decoding steps as graphs: the same bits as without, and nothing in them that the host reads."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import random_schedules
from covering import chosen, rest
from gpu_kernels.conftest import DEVICE
from gpu_kernels.standing_in import HostRead, StandIn, no_host_reads
from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.engine.workspace import StepRows
from moebius.models.store.load import load_decoder
from moebius.ops.capability import Operation
from moebius.ops.steps import StateInputs, StepInputs
from moebius.ops.triton.captured import CapturedOps, captured_rows
from moebius.ops.triton.checked import CheckedOps
from moebius.request.params import SamplingParams
from oracle import FAMILY, save_tiny
from random_schedules import Schedule, Wish, answers

pytestmark = [
    pytest.mark.usefixtures("sums_in_order"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in plays the card"),
]
CPU = torch.device("cpu")
FLOAT32 = torch.float32
# Families of which all operations have kernels of ours.
OURS = ("qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "gemma4_text")
# With gates of heads, a decay for each channel, and a scan.
SOME = ("afmoe", "kimi_linear", "nemotron_h")


def runner_of(directory: Path, ops: CheckedOps, rows: StepRows, **beside: Any) -> Runner:
    """beside: ranks or a host that have experts."""
    decoder = load_decoder(directory, FLOAT32, ops=ops, **beside)
    specs = decoder.config.caches(FLOAT32)
    states = 5 if any(spec.state for spec in specs) else 0
    cache = KVCache(specs, ops, num_blocks=60, block_size=4, device=CPU, num_states=states)
    return Runner(decoder, cache, CPU, rows)


def steps_of(runner: Runner) -> list[StepInputs]:
    """A prompt of each of three sequences, then decodes of three, one and two of them."""
    rng = random.Random(0)
    groups = len(runner.cache.layout.windows)
    computed = [0, 0, 0]
    found = []
    for some, count in (((0, 1, 2), 3), ((0, 1, 2), 1), ((1,), 1), ((2, 0), 1), ((0, 1, 2), 1)):
        tables = [
            [[s * 3 + 12 * group + i for i in range(3)] for s in some] for group in range(groups)
        ]
        states = None
        if runner.cache.num_states:
            states = StateInputs(
                [1 + s for s in some], [1 + s for s in some if not computed[s]], (), ()
            )
        found.append(
            StepInputs.build(
                [[rng.randrange(60) for _ in range(count)] for _ in some],
                [computed[s] for s in some],
                tables[0] if tables else None,
                4,
                others=tables[1:],
                states=states,
            )
        )
        for s in some:
            computed[s] += count
    return found


# States beside experts, and layers with windows: what is left of them is in the rest.
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
    ("gemma4_text", {"enable_moe_block": False}),
]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*SMALL, *(rest(name, {}) for name in OURS)],
    ids=[*(f"{name}-small" for name, _ in SMALL), *OURS],
)
def test_a_captured_step_is_the_step(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """To the bit, with rows beyond those that there are, which are counted nowhere."""
    save_tiny(tmp_path, model_type, **changes)
    card = StandIn()
    captured = runner_of(tmp_path, CapturedOps(card), StepRows(16, 4, sequences=4, context=12))
    plain = runner_of(tmp_path, CheckedOps(), StepRows(16, 4))
    for step, same in zip(steps_of(captured), steps_of(plain), strict=True):
        before = card.replays
        found = captured.execute(step).clone()
        assert torch.equal(found, plain.execute(same))
        decodes = len(step.seq_lens_host) == len(step.input_ids_host)
        assert card.replays == before + decodes
        last = range(len(found) - 1, len(found))
        assert torch.equal(captured.logits(last), plain.logits(last))
    assert _pairs(captured) == _pairs(plain)


def _pairs(runner: Runner) -> list[tuple[int, ...]]:
    """How many choices each layer's experts got."""
    return [tuple(load.pairs) for load in runner.expert_counts.read().layers]


@pytest.mark.parametrize("model_type", chosen(sorted(FAMILY), lambda name: name in SOME))
def test_a_step_of_every_family_can_be_captured(model_type: str, tmp_path: Path) -> None:
    """Nothing in it is read on the host, or brought from there, in plain PyTorch's part either."""
    save_tiny(tmp_path, model_type)
    rows = StepRows(4, 1, sequences=1, context=12)
    programs = runner_of(tmp_path, CapturedOps(StandIn()), rows).programs
    assert programs.step.trace.recorded, programs.step.trace.reason
    assert programs.head.trace.recorded, programs.head.trace.reason


@pytest.mark.exhaustive  # in pieces, and begun ahead, in every run
def test_mixed_batches_have_the_bits_that_they_have_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole engines: up to eight sequences that come and end at different steps, with a cache that
    is too small for all. Of one layer: the interpreter takes minutes for more."""
    save_tiny(tmp_path, "llama", num_hidden_layers=1, max_position_embeddings=256)
    rng = random.Random(0)
    asked = [
        Wish(
            str(i),
            tuple(rng.randrange(60) for _ in range(rng.choice((2, 3)))),
            SamplingParams(temperature=1.0, logprobs=2, ignore_eos=True, max_tokens=7),
            i,
        )
        for i in range(8)
    ]
    schedule = Schedule(4, 11, 8, 24, True, (0, 0, 0, 0, 0, 0, 1, 2), 1)
    rows = StepRows(24, 8, sequences=8, context=256)
    monkeypatch.setattr(random_schedules, "Runner", partial(Runner, rows=rows))
    card = StandIn()
    seen = [
        answers(load_decoder(tmp_path, FLOAT32, ops=ops), asked, schedule)
        for ops in (CapturedOps(card), CheckedOps())
    ]
    assert seen[0].rounds == seen[1].rounds
    assert seen[0].preemptions == seen[1].preemptions > 0
    assert card.replays > 5, "steps and logits"


def test_graphs_that_go_on_with_tokens_the_host_has_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole engines again, each step begun ahead: captured ones find their tokens on the card."""
    save_tiny(tmp_path, "llama", num_hidden_layers=1, max_position_embeddings=256)
    asked = [
        Wish(
            str(i),
            (i, 7),
            SamplingParams(temperature=float(i % 2), ignore_eos=True, max_tokens=4 + i % 3),
            i,
        )
        for i in range(5)
    ]
    schedule = Schedule(4, 11, 8, 24, True, (0, 0, 0, 0, 2), 1)
    rows = StepRows(24, 8, sequences=8, context=256)
    monkeypatch.setattr(random_schedules, "Runner", partial(Runner, rows=rows))
    card = StandIn()
    ahead = answers(
        load_decoder(tmp_path, FLOAT32, ops=CapturedOps(card)), asked, replace(schedule, ahead=True)
    )
    plain = answers(load_decoder(tmp_path, FLOAT32, ops=CheckedOps()), asked, schedule)
    assert ahead.rounds == plain.rounds
    assert card.replays > 5


def test_what_would_write_for_rows_that_are_not_there_is_not_captured(tmp_path: Path) -> None:
    """As where the kernel that leaves them out fell back to plain PyTorch."""
    save_tiny(tmp_path, "llama")
    ops = CapturedOps(StandIn())
    ops.fall_back(Operation.ROTATE_AND_STORE, "for this test")
    runner = runner_of(tmp_path, ops, StepRows(16, 4, sequences=4, context=12))
    trace = runner.programs.step.trace
    assert "what writes to the cache is plain PyTorch's" in trace.reason
    assert runner.execute(steps_of(runner)[0]).isfinite().all()


def test_what_reads_a_value_is_not_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is computed as it is, with the reason for the log."""
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr(
        CapturedOps, "clip", lambda self, x, limit: x.clamp(-limit, float(x.abs().max()))
    )
    clip = CapturedOps.add_rms_norm

    def reading(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.clip(x, 1e9)
        return clip(self, x, *args, **kwargs)

    monkeypatch.setattr(CapturedOps, "add_rms_norm", reading)
    runner = runner_of(tmp_path, CapturedOps(StandIn()), StepRows(8, 8, sequences=2, context=12))
    trace = runner.programs.step.trace
    assert not trace.recorded
    assert trace.reason == "they are not captured: HostRead: torch's __float__"
    assert runner.programs.head.trace == trace
    assert runner.execute(steps_of(runner)[0]).isfinite().all()


def test_an_error_of_a_capture_ends_the_capture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In CUDA's own words (cudaErrorStreamCaptureUnsupported): what reads a value there raises it.
    After any other error of a device nothing is captured, and nothing computed."""
    save_tiny(tmp_path, "llama", num_hidden_layers=1)
    rows = StepRows(8, 8, sequences=2, context=12)
    said = "operation not permitted when stream is capturing"

    def end(self: StandIn) -> Any:
        raise torch.AcceleratorError(f"CUDA error: {said}\nSearch for it")

    monkeypatch.setattr(StandIn, "end", end)
    runner = runner_of(tmp_path, CapturedOps(StandIn()), rows)
    assert said in runner.programs.step.trace.reason
    assert runner.execute(steps_of(runner)[0]).isfinite().all()
    said = "an illegal memory access was encountered"
    with pytest.raises(torch.AcceleratorError, match=said):
        runner_of(tmp_path, CapturedOps(StandIn()), rows)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.bincount(x),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1, 2, 3]),
        lambda x: torch.equal(x, x),
    ],
    ids=["tolist", "item", "bool", "int", "mask", "nonzero", "bincount", "cpu", "tensor", "equal"],
)
def test_reads_are_found(read: Any) -> None:
    x = torch.tensor([1, 2, 3])
    with no_host_reads():
        assert (x * 2 + 1).shape == (3,)
        with pytest.raises(HostRead):
            read(x)


def test_few_numbers_of_rows_are_captured() -> None:
    assert captured_rows(1) == [1]
    assert captured_rows(8) == [8, 4, 2, 1]
    assert captured_rows(12) == [12, 8, 4, 2, 1]
    assert captured_rows(0) == []
