"""The engine end to end on a tiny model, against transformers and against itself alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    NumericalError,
)
from moebius.ops import select_ops
from moebius.ops.cache_spec import key_value_spec
from moebius.request.constraint import Constraint
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.hashes import BlockHasher
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request, RequestStatus
from schedule.books import check_books


def engine(directory: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "kv_cache_memory_bytes": 2**20,
        "max_model_len": 512,
        "max_num_seqs": 32,
    }
    return load_engine(
        directory, EngineConfig(**{**defaults, **options}), eos_ids=frozenset({0, 2})
    )


def cache_bytes(tokens: int, block_size: int) -> int:
    """What so many of tiny_model's tokens take in the cache, in float32, with the operations that
    serve here."""
    ops = select_ops("cpu", torch.float32)
    return (
        tokens
        // block_size
        * 2
        * ops.cache_bytes_per_block(key_value_spec(2, 8, torch.float32), block_size)
    )


def ask(
    one: Engine,
    id: str,
    prompt: list[int],
    *,
    deadline: float | None = None,
    constraint: Constraint | None = None,
    **params: Any,
) -> EngineRequest:
    """What a front asks of this engine: greedy, 8 tokens, where nothing else is wanted."""
    defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    info = one.info
    return EngineRequest.create(
        id,
        prompt,
        SamplingParams(**{**defaults, **params}),
        info.limits,
        arrival=one.clock(),
        eos_ids=info.eos_ids,
        deadline=deadline,
        constraint=constraint,
    )


def make(
    one: Engine, id: str, prompt: list[int], *, deadline: float | None = None, **params: Any
) -> Request:
    return Request(ask(one, id, prompt, deadline=deadline, **params))


def run(one: Engine, requests: list[Request], limit: int = 5000) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {request.id: [] for request in requests}
    for request in requests:
        one.add(request)
    while one.has_work:
        limit -= 1
        assert limit > 0, "the engine makes no progress"
        for step in one.step():
            outputs[step.request_id].append(step)
        check_books(one.scheduler)
    assert one.scheduler.drained
    for steps in outputs.values():
        assert [s.finish_reason is not None for s in steps] == [False] * (len(steps) - 1) + [True]
    return outputs


def tokens(steps: list[StepOutput]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_64_mixed_requests_equal_transformers_and_themselves_alone(
    tiny_model: Path, reference: Any
) -> None:
    one = engine(tiny_model, max_num_batched_tokens=48, block_size=5)
    many = prompts(64)
    together = run(one, [make(one, str(i), p) for i, p in enumerate(many)])
    assert one.scheduler.pool.num_used == 0
    for i, prompt in enumerate(many):
        fresh = engine(tiny_model) if i < 4 else None
        if fresh:
            assert tokens(run(fresh, [make(fresh, "alone", prompt)])["alone"]) == tokens(
                together[str(i)]
            )
        if i < 12:
            assert tokens(together[str(i)]) == greedy(reference, prompt, 8)
        assert together[str(i)][-1].finish_reason is FinishReason.LENGTH


def test_preempted_requests_get_the_tokens_they_get_alone(tiny_model: Path) -> None:
    roomy = engine(tiny_model)
    many = prompts(8, seed=1, low=30, high=40)
    expected = run(roomy, [make(roomy, str(i), p, max_tokens=40) for i, p in enumerate(many)])
    tight = engine(
        tiny_model, kv_cache_memory_bytes=cache_bytes(160, 4), block_size=4, max_model_len=100
    )
    got = run(tight, [make(tight, str(i), p, max_tokens=40) for i, p in enumerate(many)])
    assert tight.stats().preemptions > 0
    assert {id: tokens(s) for id, s in got.items()} == {id: tokens(s) for id, s in expected.items()}


def test_a_common_prefix_is_computed_once(tiny_model: Path) -> None:
    one = engine(
        tiny_model, max_model_len=1200, kv_cache_memory_bytes=2**23, max_num_batched_tokens=256
    )
    prefix = prompts(1, seed=3, low=1024, high=1025)[0]
    many = [[*prefix, *own] for own in prompts(32, seed=4, low=8, high=9)]
    outputs = run(one, [make(one, str(i), p) for i, p in enumerate(many)])
    cached = sorted(steps[-1].num_cached_tokens for steps in outputs.values())
    assert cached == [0] + [1024] * 31
    stats = one.stats()
    assert stats.prefix_hits == 31 * 1024
    assert (stats.prompt_tokens, stats.prompt_tokens_cached) == (32 * 1032, 31 * 1024)
    assert stats.generation_tokens == 32 * 8
    again = run(one, [make(one, "warm", many[5])])["warm"]
    assert tokens(again) == tokens(outputs["5"]) and again[-1].num_cached_tokens == 1024


def test_prompt_logprobs_equal_transformers_in_chunks_and_after_preemption(
    tiny_model: Path, reference: Any
) -> None:
    prompt = prompts(1, seed=5, low=150, high=151)[0]
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].double(), -1)
    for options in ({"max_num_batched_tokens": 512}, {"max_num_batched_tokens": 37}):
        one = engine(tiny_model, **options)
        requests = [
            make(one, "score", prompt, max_tokens=0, prompt_logprobs=2),
            make(one, "twice", prompt, max_tokens=0, prompt_logprobs=0),
        ]
        for steps in run(one, requests).values():
            scored = [s for step in steps for s in step.prompt_logprobs]
            assert [s.token_id for s in scored] == prompt[1:]
            want = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
            assert [s.logprob for s in scored] == pytest.approx(want, abs=1e-4)
            assert tokens(steps) == [] and steps[-1].finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_are_sent_once_despite_preemption(tiny_model: Path) -> None:
    one = engine(
        tiny_model,
        kv_cache_memory_bytes=cache_bytes(100, 4),
        block_size=4,
        max_model_len=100,
        max_num_batched_tokens=33,
    )
    many = prompts(3, seed=9, low=40, high=41)
    outputs = run(
        one, [make(one, str(i), p, max_tokens=50, prompt_logprobs=0) for i, p in enumerate(many)]
    )
    assert one.stats().preemptions > 0
    for i, prompt in enumerate(many):
        assert [s.token_id for step in outputs[str(i)] for s in step.prompt_logprobs] == prompt[1:]


def test_end_stop_and_minimum(tiny_model: Path) -> None:
    one = engine(tiny_model)
    prompt = prompts(1, seed=7, low=20, high=21)[0]
    free = tokens(run(one, [make(one, "free", prompt, max_tokens=12)])["free"])
    stop = free[5]
    first = free.index(stop)
    steps = run(one, [make(one, "stop", prompt, max_tokens=12, stop_token_ids=(stop,))])["stop"]
    assert tokens(steps) == free[: first + 1] and steps[-1].finish_reason is FinishReason.STOP
    late = run(
        one, [make(one, "late", prompt, max_tokens=12, stop_token_ids=(stop,), min_tokens=10)]
    )["late"]
    assert len(tokens(late)) >= 10 and stop not in tokens(late)[:10]


def test_aborts_deadlines_and_refusals(tiny_model: Path) -> None:
    one = engine(tiny_model)
    one.add(make(one, "gone", [1, 2, 3], max_tokens=100))
    one.step()
    ended = one.abort("gone")
    assert (
        ended is not None
        and ended.finish_reason is FinishReason.ABORT
        and one.abort("gone") is None
    )
    late = run(one, [make(one, "late", [1, 2], deadline=one.clock() - 1)])["late"]
    assert late[-1].finish_reason is FinishReason.DEADLINE and isinstance(
        late[-1].error, DeadlineError
    )
    with pytest.raises(
        ContextLengthError, match=r"519 tokens \(511 in the prompt, 8 in the completion\)"
    ):
        make(one, "long", [1] * 511)
    assert one.scheduler.drained


def test_bad_logits_end_one_request_and_leave_the_others(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(tiny_model)
    many = prompts(4, seed=8, low=20, high=21)
    expected = run(one, [make(one, str(i), p) for i, p in enumerate(many)])
    other = engine(tiny_model)
    honest = other.runner.logits
    calls = 0

    def poisoned(rows: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = honest(rows).clone()
        if calls == 3:
            logits[1] = math.nan
        return logits

    monkeypatch.setattr(other.runner, "logits", poisoned)
    got = run(other, [make(other, str(i), p) for i, p in enumerate(many)])
    assert isinstance(got["1"][-1].error, NumericalError)
    assert all(tokens(got[i]) == tokens(expected[i]) for i in ("0", "2", "3"))
    assert run(other, [make(other, "again", many[1])])["again"][-1].num_cached_tokens == 0


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(tiny_model)
    honest = one.runner.execute

    def broken(inputs: Any) -> torch.Tensor:
        raise RuntimeError("out of luck")

    one.add(make(one, "first", [1, 2, 3]))
    monkeypatch.setattr(one.runner, "execute", broken)
    failed = one.step()
    assert [type(s.error) for s in failed] == [EngineError] and "out of luck" not in str(
        failed[0].error
    )
    monkeypatch.setattr(one.runner, "execute", honest)
    assert one.scheduler.drained
    assert len(tokens(run(one, [make(one, "second", [1, 2, 3])])["second"])) == 8


def test_too_little_memory_in_a_step_is_that_steps_failure(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device has it again when the step's tensors are gone: the engine goes on."""
    one = engine(tiny_model)
    honest = one.runner.execute

    def full(inputs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    one.add(make(one, "first", [1, 2, 3]))
    monkeypatch.setattr(one.runner, "execute", full)
    assert [type(output.error) for output in one.step()] == [EngineError]
    monkeypatch.setattr(one.runner, "execute", honest)
    assert len(tokens(run(one, [make(one, "second", [1, 2, 3])])["second"])) == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=["torch", "device-side assert", "triton"],
)
@pytest.mark.parametrize("where", ["execute", "logits", "argmax", "ranks"])
def test_a_device_that_is_lost_is_no_requests_failure(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    """Wherever it is told, drawing tokens and scoring prompts among it: nothing else would work
    afterwards, so that the engine has to end."""
    one = engine(tiny_model)

    def broken(*args: Any) -> Any:
        raise error

    one.add(make(one, "first", [1, 2, 3], prompt_logprobs=1))
    in_ops = where in ("argmax", "ranks")
    monkeypatch.setattr(one.runner.ops if in_ops else one.runner, where, broken)
    with pytest.raises(type(error)):
        one.step()


@pytest.mark.parametrize("isa", ["", "portable", "reference"])
def test_bfloat16_runs_and_the_fingerprint_names_the_kernels(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    one = engine(tiny_model, dtype="bfloat16")
    assert len(tokens(run(one, [make(one, "a", [5, 6, 7])])["a"])) == 8
    ops = select_ops("cpu", torch.bfloat16)
    assert (ops.name == "reference") == (isa == "reference")
    assert one.info.fingerprint.endswith(
        f"_{ops.name}_bfloat16" if isa != "reference" else "_reference_bfloat16-approx"
    )


def test_float_activations_are_chosen_and_named_by_the_fingerprint(tiny_model: Path) -> None:
    """Answers in blocks of weights differ between the two, and so do what prefixes are kept by."""
    names = [
        engine(tiny_model, activations=activations).info.fingerprint
        for activations in ("int8", "float")
    ]
    ops = select_ops("cpu", torch.float32)
    assert names[1] == names[0].replace(f"_{ops.name}_", f"_{ops.name}-float_") != names[0]
    with pytest.raises(ConfigError, match="activations"):
        EngineConfig(activations="bfloat16")  # type: ignore[arg-type]


@pytest.mark.case("B3")
def test_only_the_operator_allows_priorities(tiny_model: Path) -> None:
    assert not engine(tiny_model).info.limits.priorities
    assert engine(tiny_model, scheduling_policy="priority").info.limits.priorities


class Ticks:
    """A clock that goes on by a second each time it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.case("C21")
def test_outputs_say_when_a_request_was_first_scheduled_and_how_often_it_was_preempted(
    tiny_model: Path,
) -> None:
    tight = engine(
        tiny_model, kv_cache_memory_bytes=cache_bytes(160, 4), block_size=4, max_model_len=100
    )
    tight.clock = Ticks()
    many = prompts(8, seed=1, low=30, high=40)
    got = run(tight, [make(tight, str(i), p, max_tokens=40) for i, p in enumerate(many)])
    lasts = [steps[-1] for steps in got.values()]
    assert sum(last.num_preemptions for last in lasts) == tight.stats().preemptions > 0
    for steps in got.values():
        assert len({output.scheduled for output in steps}) == 1, (
            "a preemption has moved the first time"
        )
        ats = [output.at for output in steps]
        assert steps[0].scheduled is not None and steps[0].scheduled < ats[0]
        assert ats == sorted(set(ats))
    assert len({last.scheduled for last in lasts}) > 1, "all fitted at once: nobody waited"


def test_who_waits_is_known_before_a_step_is_computed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what the engine says of places alone: preempted requests wait again."""
    tight = engine(
        tiny_model, kv_cache_memory_bytes=cache_bytes(160, 4), block_size=4, max_model_len=100
    )
    heard: set[str] = set()
    told: list[set[str]] = []
    true: list[set[str]] = []

    def move(outputs: list[StepOutput]) -> None:
        for output in outputs:
            (heard.add if output.waits else heard.discard)(output.request_id)

    def execute(inputs: Any) -> Any:
        told.append(set(heard))
        unfinished = tight.scheduler.requests.values()
        true.append({each.id for each in unfinished if each.status is not RequestStatus.RUNNING})
        return honest(inputs)

    tight.on_moved = move
    honest = tight.runner.execute
    monkeypatch.setattr(tight.runner, "execute", execute)
    many = prompts(8, seed=1, low=30, high=40)
    requests = [make(tight, str(i), p, max_tokens=40) for i, p in enumerate(many)]
    heard.update(request.id for request in requests)
    run(tight, requests)
    assert tight.stats().preemptions > 0
    assert told == true and len(set(map(frozenset, true))) > 4


@pytest.mark.case("C21")
def test_requests_that_end_early_say_when_they_were_scheduled_too(tiny_model: Path) -> None:
    one = engine(tiny_model, max_num_seqs=1, max_num_batched_tokens=4)
    one.clock = Ticks()
    late = make(one, "late", [5] * 40, deadline=8.0)
    one.add(late)
    one.add(make(one, "waits", [5] * 40))
    ended = []
    while not ended:
        ended = [output for output in one.step() if output.finish_reason is not None]
    assert (
        ended[0].finish_reason is FinishReason.DEADLINE
        and ended[0].scheduled == late.scheduled is not None
    )
    aborted = one.abort("waits")
    assert aborted is not None and aborted.scheduled is not None and aborted.at > aborted.scheduled
    one.add(make(one, "never", [5]))
    never = one.abort("never")
    assert never is not None and never.scheduled is None and not len(one._outputs)


@pytest.mark.case("C21")
def test_steps_are_counted_by_their_tokens(tiny_model: Path) -> None:
    one = engine(tiny_model, max_num_batched_tokens=48)
    run(
        one, [make(one, "a", [5] * 50, max_tokens=4)]
    )  # 48 and 2 tokens of the prompt, then one a step
    stats = one.stats()
    assert stats.step_tokens == (3, 1, 0, 0, 1, *[0] * 9) and stats.step_tokens_sum == 48 + 2 + 3


def test_a_prompt_is_counted_once_whatever_its_output_begins_with(tiny_model: Path) -> None:
    """With tokens that another engine has drawn the first token here is not the output's first."""
    one = engine(tiny_model)
    whole = run(one, [make(one, "whole", [5] * 40, max_tokens=6)])["whole"]
    drawn = tokens(whole)
    assert one.stats().prompt_tokens == 40
    info = one.info
    rest = Request(replace(ask(one, "rest", [5] * 40, max_tokens=6), output_ids=tuple(drawn[:3])))
    assert tokens(run(one, [rest])["rest"]) == drawn[3:]
    assert one.stats().prompt_tokens == 80
    nothing = run(one, [make(one, "nothing", [5] * 40, max_tokens=0)])["nothing"]
    assert tokens(nothing) == [] and one.stats().prompt_tokens == 120
    assert one.stats().prompt_tokens_cached == 2 * (39 // info.block_size) * info.block_size


def test_what_an_earlier_engine_has_told_is_not_told_again(tiny_model: Path) -> None:
    """Its tokens are no part of the prompt, though they are found in the cache like one; and it has
    scored the prompt before it drew any."""
    one = engine(tiny_model, block_size=16)
    drawn = tokens(run(one, [make(one, "whole", [5] * 40, max_tokens=20)])["whole"])
    asked = ask(one, "rest", [5] * 40, max_tokens=20)
    rest = run(one, [Request(replace(asked, output_ids=tuple(drawn[:19])))])["rest"]
    assert tokens(rest) == drawn[19:]
    assert rest[-1].num_cached_tokens == 40, "48 positions were found"
    assert one.stats().prompt_tokens_cached == 40
    scored = ask(one, "scored", [5] * 40, max_tokens=20, prompt_logprobs=0)
    replayed = run(one, [Request(replace(scored, output_ids=tuple(drawn[:3])))])["scored"]
    assert tokens(replayed) == drawn[3:] and not any(step.prompt_logprobs for step in replayed)


def test_a_prompt_hashed_by_the_front_meets_the_cache_of_one_hashed_here(tiny_model: Path) -> None:
    key = bytes(range(32))
    one = load_engine(
        tiny_model, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=512), prefix_key=key
    )
    hasher = one.info.hasher(key)
    assert hasher is not None
    run(one, [make(one, "here", [5] * 40)])
    asked = ask(one, "front", [5] * 40)
    given = replace(asked, prompt_hashes=hasher.of_prompt(asked.prompt_ids, asked.salt))
    assert run(one, [Request(given)])["front"][-1].num_cached_tokens == 32
    foreign = BlockHasher(bytes(32), one.info.fingerprint.encode(), 16)
    other = replace(asked, id="other", prompt_hashes=foreign.of_prompt(range(40), b""))
    assert run(one, [Request(other)])["other"][-1].num_cached_tokens == 32


def test_an_engine_without_a_prefix_cache_asks_for_no_hashes(tiny_model: Path) -> None:
    assert engine(tiny_model).info.hasher(bytes(32)) is not None
    assert engine(tiny_model, enable_prefix_caching=False).info.hasher(bytes(32)) is None
