"""LLM against transformers, and what its callers rely on: order, n, seeds, stops,
log-probabilities, errors."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from covering import rest
from engine.wire_client import WireClient
from moebius import LLM, SamplingParams, machine
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.inline import InlineClient
from moebius.engine.interrupts import Uninterrupted
from moebius.errors import ConfigError, EngineError, OverloadError, RequestError
from moebius.models.hub import find_model
from moebius.ops.threads import TorchThreads


def over_frames(engine: Engine) -> WireClient:
    return WireClient(InlineClient(engine), engine.scheduler.pool.hasher)


def on_a_thread(engine: Engine) -> InProcessClient:
    return InProcessClient(engine, step_deadline=60.0)


@pytest.fixture(scope="module", params=[InlineClient, over_frames], ids=lambda one: one.__name__)
def llm(request: pytest.FixtureRequest, tiny_model: Path) -> LLM:
    """One whose engine computes on this thread, and one all of whose records cross as frames."""
    return reaching(request.param, tiny_model)


def reaching(connect: Callable[[Engine], Any], tiny_model: Path) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebius.llm.InlineClient", connect)
        return LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512, max_num_seqs=8)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(
        tiny_model
    )


def test_greedy_text_equals_transformers(llm: LLM, reference: Any) -> None:
    model, tokenizer = reference
    texts = ["def fibonacci(n):", "naïve café", "x"]
    outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert output.prompt == text and list(output.prompt_token_ids) == ids
        for token in output.outputs[0].token_ids:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_text_and_token_prompts_one_or_many(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    ids = llm.tokenizer.encode("def f(")
    alone = llm.generate("def f(", params)[0]
    assert [o.outputs for o in llm.generate([ids, "def f("], [params, params])] == [
        alone.outputs
    ] * 2
    assert llm.generate(ids, params)[0].outputs == alone.outputs
    assert llm.generate([], params) == []


def test_seeds_repeat_and_choices_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=12, temperature=1.0, ignore_eos=True)
    first, second = llm.generate(["a", "a"], params)
    assert first.outputs == second.outputs
    assert len({choice.token_ids for choice in first.outputs}) == 4
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    other = llm.generate("a", params.with_(seed=12))[0]
    assert other.outputs[0].token_ids != first.outputs[0].token_ids
    free = SamplingParams(max_tokens=12, ignore_eos=True)
    assert len({llm.generate("a", free)[0].outputs[0].token_ids for _ in range(3)}) == 3
    assert first.completion_tokens == 48 and first.prompt_tokens == 1


def test_more_prompts_than_seats_come_in_order(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    many = [f"x{i}" for i in range(70)]
    outputs = llm.generate(many, params)
    assert [o.prompt for o in outputs] == many
    assert outputs[33].outputs == llm.generate(many[33], params)[0].outputs


def test_a_stop_string_cuts_text_tokens_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
    free = llm.generate("def", params)[0].outputs[0]
    middle = free.text[4:6]
    cut = llm.generate("def", params.with_(stop=(middle,)))[0].outputs[0]
    assert cut.text == free.text[: free.text.index(middle)]
    assert cut.finish_reason == "stop" and cut.stop_reason == middle
    assert cut.logprobs is not None and len(cut.logprobs) == len(cut.token_ids) < 20
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert not llm.client._engine.has_work


def test_chat_renders_the_template(llm: LLM, reference: Any) -> None:
    _, tokenizer = reference
    messages = [{"role": "user", "content": "hello"}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=4))[0]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert list(output.prompt_token_ids) == expected
    assert len(llm.chat([messages, messages], SamplingParams(max_tokens=2))) == 2
    params = SamplingParams(temperature=0, max_tokens=4)
    assert "".join(llm.stream_chat(messages, params)) == output.outputs[0].text


def test_chat_goes_on_with_the_last_message(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    question = {"role": "user", "content": "hello"}
    begun = llm.chat([question])[0].prompt_token_ids
    messages = [question, {"role": "assistant", "content": "def f"}]
    output = llm.chat(messages, params, continue_final_message=True)[0]
    assert output.prompt_token_ids == (*begun, *llm.tokenizer.encode("def f", False))
    same = llm.generate([list(output.prompt_token_ids)], params)[0]
    assert same.outputs[0].text == output.outputs[0].text
    with pytest.raises(RequestError, match="cannot both be true"):
        llm.chat(messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="reasoning is between tokens") as raised:
        llm.chat([question], thinking_token_budget=3)
    assert raised.value.param == "thinking_token_budget"


@pytest.mark.parametrize("connect", [over_frames, on_a_thread])
def test_an_engine_that_is_reached_otherwise_gives_the_same_answers(
    tiny_model: Path, connect: Callable[[Engine], Any]
) -> None:
    wishes = [
        SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=1
        ),
        SamplingParams(n=3, seed=5, max_tokens=9, top_p=0.9, presence_penalty=0.5, logprobs=0),
        SamplingParams(seed=6, max_tokens=30, logit_bias={7: 5.0}, stop=("e",), min_tokens=2),
    ]
    texts = ["def fibonacci(n):", "naïve café", "x" * 40] * 4
    messages = [{"role": "user", "content": "hello"}]
    found = []
    for way in (InlineClient, connect):
        with reaching(way, tiny_model) as one:
            answers = one.generate(texts, wishes * 4)
            chats = one.chat([messages] * 3, wishes)
            pieces = "".join(one.stream_chat(messages, wishes[2]))
            streamed = sorted(
                one.stream(zip(texts, wishes * 4, strict=True)), key=lambda o: int(o.request_id)
            )
            # Who found how much in the cache depends on how the steps fell, not on what was asked.
            found.append(
                [
                    (o.prompt_token_ids, o.prompt_logprobs, o.outputs)
                    for o in (*answers, *chats, *streamed)
                ]
                + [pieces]
            )
            assert one.client.stats().generation_tokens > 0
    assert found[0] == found[1]


def test_frames_are_what_the_llm_over_frames_speaks(tiny_model: Path) -> None:
    with reaching(over_frames, tiny_model) as one:
        one.generate(["a", "b"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert isinstance(one.client, WireClient) and one.client.frames == 2 + 3


@pytest.mark.parametrize("connect", [InlineClient, on_a_thread])
def test_a_queue_that_is_full_is_waited_for(
    tiny_model: Path, connect: Callable[[Engine], Any]
) -> None:
    """Refusals come as outputs; the LLM asks again when something has ended."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    texts = [f"x{i}" for i in range(20)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebius.llm.InlineClient", connect)
        small = LLM(
            str(tiny_model),
            kv_cache_memory_bytes=2**21,
            max_model_len=512,
            max_num_seqs=4,
            max_queue_requests=2,
        )
    with small:
        other = small.stream([("other", params.with_(max_tokens=40))])
        outputs = small.generate(texts, params)
        assert [output.prompt for output in outputs] == texts
        assert len(next(other).outputs[0].token_ids) == 40


def one_at_a_time(directory: Path) -> LLM:
    """One request runs, and one may wait."""
    return LLM(
        str(directory),
        kv_cache_memory_bytes=2**21,
        max_model_len=512,
        max_num_seqs=1,
        max_queue_requests=1,
    )


def test_a_queue_that_empties_in_one_step_takes_what_it_has_refused(tiny_model: Path) -> None:
    """The last of the others starts and ends in one step: none is left whose end is to come."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with one_at_a_time(tiny_model) as small:
        others = small.stream([("a", params), ("b", params.with_(max_tokens=1))])
        next(others)
        assert small.client.stats().waiting == 1, "the queue is full"
        (output,) = small.generate("c", params)
        assert len(output.outputs[0].token_ids) == 2
        assert next(others).prompt == "b"


def test_a_conversation_waits_for_a_queue_that_is_full_too(tiny_model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with one_at_a_time(tiny_model) as small:
        expected = small.chat(HELLO, params)[0].outputs[0].text
        others = small.stream([("a", params.with_(max_tokens=2)), ("b", params)])
        next(others)
        assert small.client.stats().waiting == 1, "the queue is full"
        assert "".join(small.stream_chat(HELLO, params)) == expected
        assert next(others).prompt == "b"


def test_an_engine_that_seems_idle_is_asked_for_a_while(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one elsewhere says of itself is of some tenths of a second ago."""
    one = LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512)
    scheduler = one.client._engine.scheduler
    honest = scheduler.add
    full_until = time.monotonic() + 0.3

    def add(request: Any) -> None:
        if time.monotonic() < full_until:
            raise OverloadError("the queue is full")
        honest(request)

    monkeypatch.setattr(scheduler, "add", add)
    assert len(one.generate("a", GREEDY)[0].outputs[0].token_ids) == 12


def test_what_no_empty_queue_would_take_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512)

    def full(request: Any) -> None:
        raise OverloadError("the queue is full")

    monkeypatch.setattr("moebius.llm._IDLE_SECONDS", 0.05)
    monkeypatch.setattr(one.client._engine.scheduler, "add", full)
    with pytest.raises(OverloadError, match="the queue is full"):
        one.generate("a", SamplingParams(max_tokens=2))


def test_a_closed_llm_says_so(tiny_model: Path) -> None:
    one = LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    stream = one.stream([("a", params.with_(max_tokens=1)), ("b", params)])
    next(stream)
    one.close()
    with pytest.raises(EngineError, match="the engine has stopped"):
        next(stream)
    with pytest.raises(EngineError, match="the engine has stopped"):
        one.generate("a", params)
    one.close()
    assert one.client._engine.scheduler.drained


def test_a_step_that_breaks_the_engine_ends_all_that_is_open(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its books may be half written: nobody's answer goes on from there, and nobody waits."""
    one = LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512)
    other = one.stream([("a", GREEDY.with_(max_tokens=1)), ("b", GREEDY)])
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(one.client._engine.scheduler, "update", lambda plan, tokens: 1 / 0)
        with pytest.raises(EngineError, match="error id"):
            one.generate("c", GREEDY)
    with pytest.raises(EngineError, match="error id"):
        next(other)
    with pytest.raises(EngineError, match="has stopped"):
        one.generate("d", GREEDY)
    assert not one.client.stats().ready and one.client._engine.scheduler.drained
    one.close()


def test_an_abandoned_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(
        (f"p{i}", SamplingParams(max_tokens=30, ignore_eos=True)) for i in range(20)
    )
    next(stream)
    stream.close()
    assert llm.client._engine.scheduler.drained
    chat = llm.stream_chat(
        [{"role": "user", "content": "hello"}], SamplingParams(max_tokens=50, ignore_eos=True)
    )
    next(chat)
    chat.close()
    assert llm.client._engine.scheduler.drained


def test_bad_input_is_refused_before_anything_runs(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["a", ""], SamplingParams())
    with pytest.raises(RequestError, match="token id 320 is not an integer from 0 to 319"):
        llm.generate([[320]], SamplingParams())
    with pytest.raises(RequestError, match="context length is 512"):
        llm.generate([[1] * 600], SamplingParams())
    assert llm.client._engine.scheduler.drained
    with pytest.raises(TypeError, match="no option max_num_seq;"):
        LLM("bundled", max_num_seq=1)
    with pytest.raises(TypeError, match="names its file and tokenizer itself"):
        LLM(find_model("bundled"), file="model.gguf")
    with pytest.raises(ConfigError, match=r"there is no directory .*/missing"):
        LLM(tmp_path / "missing")


def expected_logprobs(reference: Any, ids: list[int]) -> list[float]:
    with torch.no_grad():
        scores = torch.log_softmax(reference[0](torch.tensor([ids])).logits[0].double(), -1)
    return [float(scores[i, token]) for i, token in enumerate(ids[1:])]


@pytest.mark.case("A2")
@pytest.mark.parametrize("top", [0, 2])
def test_prompt_logprobs_have_an_entry_for_each_token_the_first_none(
    llm: LLM, reference: Any, top: int
) -> None:
    ids = [7, 30, 100, 31, 9, 200]
    for n in (1, 3):
        output = llm.generate(ids, SamplingParams(n=n, max_tokens=2, prompt_logprobs=top, seed=1))[
            0
        ]
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 6
        first, *others = output.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in others if entry] == ids[1:]
        assert [entry.logprob for entry in others if entry] == pytest.approx(
            expected_logprobs(reference, ids), abs=1e-4
        )
        assert all(entry and len(entry.top) == top for entry in others)


@pytest.mark.case("A2")
def test_prompt_logprobs_of_one_token_of_a_chat_and_of_none_asked_for(llm: LLM) -> None:
    scored = SamplingParams(max_tokens=2, prompt_logprobs=0)
    assert llm.generate([[5]], scored)[0].prompt_logprobs == (None,)
    assert llm.generate([[5]], scored.with_(max_tokens=0))[0].prompt_logprobs == (None,)
    chat = llm.chat([{"role": "user", "content": "hello"}], scored)[0]
    assert chat.prompt_logprobs is not None and len(chat.prompt_logprobs) == len(
        chat.prompt_token_ids
    )
    assert chat.prompt_logprobs[0] is None and None not in chat.prompt_logprobs[1:]
    assert llm.generate([[5, 6]], SamplingParams(max_tokens=1))[0].prompt_logprobs is None


@pytest.mark.case("A2")
def test_prompt_logprobs_in_chunks_after_preemptions_and_beside_a_warm_cache(
    tiny_model: Path, reference: Any
) -> None:
    many = [[(i * 7 + j * 3) % 300 + 5 for j in range(40)] for i in range(4)]
    tight = LLM(
        str(tiny_model),
        kv_cache_memory_bytes=2**16,
        block_size=4,
        max_model_len=100,
        max_num_batched_tokens=33,
        max_num_seqs=8,
    )
    params = SamplingParams(max_tokens=50, prompt_logprobs=0, temperature=0, ignore_eos=True)
    for prompts in (many, many):  # the second time all their blocks were seen before
        for ids, output in zip(prompts, tight.generate(prompts, params), strict=True):
            assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
            got = [entry.logprob for entry in output.prompt_logprobs[1:] if entry]
            assert got == pytest.approx(expected_logprobs(reference, ids), abs=1e-4)
    assert tight.client._engine.stats().preemptions > 0


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.case("C22")
def test_open_iterators_interleave_and_each_gets_its_own(llm: LLM) -> None:
    names = [f"p{i}" for i in range(12)]
    expected = {output.prompt: output.outputs for output in llm.generate(names, GREEDY)}
    answer = "".join(llm.stream_chat(HELLO, GREEDY))
    first = llm.stream((name, GREEDY) for name in names[:6])
    second = llm.stream((name, GREEDY) for name in names[6:])
    chat = llm.stream_chat(HELLO, GREEDY)
    got = [next(first), next(second)]
    said = next(chat)
    assert llm.generate("p3", GREEDY)[0].outputs == expected["p3"], (
        "generate() while streams are open"
    )
    said += next(chat)
    assert "".join(llm.stream_chat(HELLO, GREEDY)) == answer, (
        "a second conversation beside the first"
    )
    open_ones: list[Iterator[Any]] = [first, second]
    while open_ones:
        for stream in list(open_ones):
            output = next(stream, None)
            if output is None:
                open_ones.remove(stream)
            else:
                got.append(output)
    assert said + "".join(chat) == answer
    assert sorted(output.prompt for output in got) == sorted(names)
    assert {output.prompt: output.outputs for output in got} == expected
    assert llm.client._engine.scheduler.drained


@pytest.mark.case("C22")
def test_closing_an_iterator_aborts_its_own_requests_only(llm: LLM) -> None:
    long = GREEDY.with_(max_tokens=60)
    expected = {output.prompt: output.outputs for output in llm.generate(["a", "b"], long)}
    kept = llm.stream([("short", GREEDY.with_(max_tokens=1)), ("a", long), ("b", long)])
    dropped = llm.stream([("short", GREEDY.with_(max_tokens=1)), ("x", long), ("y", long)])
    chat = llm.stream_chat(HELLO, long)
    next(kept), next(dropped), next(chat)
    assert len(llm.client._engine.scheduler.requests) == 5
    dropped.close()
    assert len(llm.client._engine.scheduler.requests) == 3
    chat.close()
    assert {output.prompt: output.outputs for output in kept} == expected
    assert llm.client._engine.scheduler.drained


@pytest.mark.case("C22")
def test_prompts_that_ask_the_model_themselves(llm: LLM) -> None:
    """The iterator of prompts uses the LLM between two steps of the stream that reads it."""
    expected = [llm.generate(f"p{i}", GREEDY)[0].outputs for i in range(20)]

    def asking() -> Iterator[tuple[str, SamplingParams]]:
        for i in range(20):
            assert llm.generate("other", GREEDY)[0].finished
            yield f"p{i}", GREEDY

    outputs = {int(output.request_id): output.outputs for output in llm.stream(asking())}
    assert [outputs[i] for i in range(20)] == expected


@pytest.mark.case("C22")
def test_an_iterator_that_the_collector_closes_in_the_middle_of_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forgotten iterator in a cycle is closed whenever Python collects garbage: here while a step
    is computed."""
    expected = llm.generate("kept", GREEDY)[0].outputs
    forgotten: list[Any] = [
        llm.stream([("a", GREEDY.with_(max_tokens=1)), ("b", GREEDY.with_(max_tokens=300))])
    ]
    forgotten.append(forgotten)
    next(forgotten[0])
    assert llm.client._engine.has_work
    honest = llm.client._engine.runner.execute

    collected: list[int] = []

    def collecting(inputs: Any) -> Any:
        if not collected:
            collected.append(gc.collect())
        return honest(inputs)

    monkeypatch.setattr(llm.client._engine.runner, "execute", collecting)
    del forgotten
    assert llm.generate("kept", GREEDY)[0].outputs == expected
    assert collected and llm.client._engine.scheduler.drained


@pytest.mark.case("C22")
def test_threads_of_one_program_share_an_llm(llm: LLM) -> None:
    names = [f"p{i}" for i in range(9)]
    expected = [output.outputs for output in llm.generate(names, GREEDY)]
    found: dict[int, Any] = {}

    def ask(part: int) -> None:
        found[part] = [
            output.outputs for output in llm.generate(names[part * 3 : part * 3 + 3], GREEDY)
        ]

    threads = [threading.Thread(target=ask, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [*found[0], *found[1], *found[2]] == expected


@pytest.mark.case("C22")
def test_an_error_reaches_the_reader_whose_request_it_is(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("good", GREEDY)[0].outputs
    bad = llm.stream_chat(HELLO, GREEDY)
    next(bad)
    with monkeypatch.context() as patch:
        patch.setattr(llm.client._engine.runner, "execute", lambda inputs: 1 / 0)
        with pytest.raises(EngineError, match="error id"):
            next(llm.stream([("ugly", GREEDY)]))
    assert llm.generate("good", GREEDY)[0].outputs == expected
    with pytest.raises(EngineError, match="error id"):
        list(bad)
    assert llm.client._engine.scheduler.drained


class InterruptsAt:
    """Traces engine, scheduler and front, and sends a signal to this process at their n-th line."""

    def __init__(self, n: int, number: signal.Signals) -> None:
        self.n, self.number, self.lines = n, number, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_filename
        packages = ("moebius/schedule/", "moebius/engine/", "moebius/front/")
        return self.line if any(package in name for package in packages) else None

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.lines += event == "line"
        if self.lines == self.n:
            self.lines += 1
            signal.raise_signal(self.number)
        return self.line


def traced(trace: InterruptsAt, call: Callable[[], object]) -> int:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return trace.lines


@pytest.mark.case("C22")
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), rest(signal.SIGALRM, TimeoutError)],
    ids=["Ctrl-C", "alarm"],
)
def test_an_interrupt_at_any_line_leaves_an_llm_that_goes_on(
    tiny_model: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    """And the other reader's stream with it; a step that is under way is finished first."""
    llm = LLM(str(tiny_model), kv_cache_memory_bytes=2**20, max_model_len=256, max_num_seqs=3)
    wishes = [
        GREEDY.with_(n=2),
        SamplingParams(max_tokens=9, seed=1, logprobs=1, prompt_logprobs=0),
    ]

    def ask() -> list[Any]:
        return [output.outputs for output in llm.generate(["one", "two"], wishes)]

    def late(*_: object) -> None:
        raise error

    expected, lines = ask(), traced(InterruptsAt(0, number), ask)
    other = llm.stream([("other", GREEDY.with_(max_tokens=200, ignore_eos=True))])
    before = signal.signal(number, late)
    try:
        for n in random.Random(0).sample(range(1, lines), 40):
            with pytest.raises(error):
                traced(InterruptsAt(n, number), ask)
            assert signal.getsignal(number) is late
            assert ask() == expected
    finally:
        signal.signal(number, before)
    assert len(next(other).outputs[0].token_ids) == 200
    assert llm.client._engine.scheduler.drained


ALONE = """
import gc, logging, os, signal, threading, warnings
import torch
torch.set_num_threads(3)
def state():
    subnormal = float(torch.tensor([1e-39]) * torch.tensor([1.0]))  # 0 where they are flushed
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start(); thread.join()
    return (
        torch.get_num_threads(), seen, torch.get_num_interop_threads(), subnormal, torch.is_grad_enabled(),
        torch.get_default_dtype(), torch.initial_seed(), torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(), gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(),
        [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], logging.getLogger().handlers,
        logging.getLogger().level, list(warnings.filters), dict(os.environ), os.sched_getaffinity(0),
    )
import moebius.llm  # what imports register is not asked about
from moebius import LLM, SamplingParams, machine
for isa in ("", "reference"):
    os.environ["MOEBIUS_CPU_ISA"] = isa
    before = state()
    with LLM(DIRECTORY, kv_cache_memory_bytes=2**20, max_model_len=256) as llm:
        assert state() == before, "after LLM()"
        params = SamplingParams(max_tokens=8, ignore_eos=True, top_p=0.9, presence_penalty=0.5, logprobs=2, seed=1)
        llm.generate(["a", "b"], params)
        assert state() == before, "after generate()"
        stream = llm.stream([("a", params), ("b", params.with_(max_tokens=100))])
        next(stream)
        assert state() == before, "while a stream is open"
        stream.close()
        try:
            LLM(DIRECTORY, max_model_len=10**9)
        except ValueError:
            assert state() == before, "after a refused LLM()"
    assert state() == before, "after close()"
"""


@pytest.mark.case("C24")
def test_an_llm_leaves_the_program_as_it_is(tiny_model: Path) -> None:
    """With compiled kernels, which have threads of their own, and without."""
    code = ALONE.replace("DIRECTORY", repr(str(tiny_model)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.case("C24")
@pytest.mark.parametrize(
    ("isa", "asked", "expected"), [("reference", 2, 2), ("reference", None, 1), ("", 2, 1)]
)
def test_a_step_has_torch_threads_of_its_own(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, isa: str, asked: int | None, expected: int
) -> None:
    """As many as asked for where torch computes, within a CPU quota; one beside kernels, which have
    their own."""
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    monkeypatch.setattr(machine, "processors", lambda *_: 0.5)
    with TorchThreads(3):
        one = LLM(str(tiny_model), kv_cache_memory_bytes=2**20, max_model_len=256, threads=asked)
        seen: set[int] = set()
        honest = one.client._engine.runner.execute

        def counted(inputs: Any) -> Any:
            seen.add(torch.get_num_threads())
            return honest(inputs)

        monkeypatch.setattr(one.client._engine.runner, "execute", counted)
        one.generate("a", GREEDY)
        assert seen == {expected} and torch.get_num_threads() == 3
    assert torch.get_num_threads() == 1  # as the tests are set to


@pytest.mark.case("C24")
@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()], ids=repr)
def test_an_llm_that_cannot_be_loaded_leaves_no_file_open(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("moebius.engine.load.Loader.fill", fails)
    trace = tmp_path / "trace.jsonl"
    with pytest.raises(type(error)):
        LLM(str(tiny_model), kv_cache_memory_bytes=2**20, max_model_len=256, trace=str(trace))
    assert trace.resolve() not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]


@pytest.mark.case("B3")
def test_an_empty_list_of_priorities_is_not_one_for_all(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 prompts but 0 priority"):
        llm.generate(["a", "b"], GREEDY, priority=[])


@pytest.mark.case("C22")
def test_what_an_iterator_cannot_take_is_named(llm: LLM) -> None:
    wrong: Any = {"max_tokens": 3}
    with pytest.raises(RequestError, match="params is dict; it must be SamplingParams"):
        llm.generate("a", wrong)
    with pytest.raises(RequestError, match="params is NoneType"):
        next(llm.stream([("a", None)]))  # type: ignore[list-item]
    with pytest.raises(RequestError, match="n is 3; a stream has one choice"):
        next(llm.stream_chat(HELLO, GREEDY.with_(n=3)))


@pytest.mark.case("B3")
def test_priorities_decide_who_is_served_first(tiny_model: Path) -> None:
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": 2**21,
        "max_model_len": 512,
        "max_num_seqs": 1,
    }
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    texts = [f"x{i}" for i in range(6)]
    with LLM(str(tiny_model), scheduling_policy="priority", **options) as one:
        served: list[str] = []
        start = one.client._engine.scheduler._start

        def noted(request: Any, *rest: Any) -> None:
            served.append(one.tokenizer.decode(list(request.prompt_ids)))
            start(request, *rest)

        one.client._engine.scheduler._start = noted  # type: ignore[method-assign]
        outputs = one.generate(texts, params, priority=[3, 1, 2, 0, 1, -5])
        assert served == ["x5", "x3", "x1", "x4", "x2", "x0"]
        assert [output.prompt for output in outputs] == texts
        served.clear()
        one.generate(texts[:2], params, priority=7)
        assert served == texts[:2]
        assert one.generate(texts, params) == outputs
        chats = [[{"role": "user", "content": text}] for text in texts[:2]]
        assert len(one.chat(chats, params, priority=[1, 0])) == 2
        for wrong in ([1], [1] * 7):
            with pytest.raises(RequestError, match="6 prompts but") as error:
                one.generate(texts, params, priority=wrong)
            assert error.value.param == "priority"
        with pytest.raises(RequestError, match="integer"):
            one.generate(texts, params, priority=[0.5] * 6)  # type: ignore[list-item]


def test_a_priority_needs_the_policy(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    with pytest.raises(RequestError, match=r"scheduling_policy"):
        llm.generate("x", params, priority=1)
    assert llm.generate("x", params, priority=0) == llm.generate("x", params, priority=None)


def test_a_signal_that_comes_while_another_is_handled_is_not_lost() -> None:
    """At every line of the code that holds signals back and hands them on."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGALRM)
    before = [
        signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers
    ]

    def hold() -> None:
        with Uninterrupted() as held:
            signal.raise_signal(signal.SIGTERM)
            held.run_noted()

    try:
        for n in range(1, traced(InterruptsAt(0, signal.SIGALRM), hold)):
            seen.clear()
            traced(InterruptsAt(n, signal.SIGALRM), hold)
            assert sorted(seen) == sorted(numbers), f"at line {n}"
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_handler_that_raises_while_others_are_held_or_given_back_leaves_all_in_place() -> None:
    """At every line: else Ctrl-C would be noted, and never heard of again."""

    def late(*_: object) -> None:
        raise TimeoutError

    def hold() -> None:
        with Uninterrupted():
            pass

    def quiet(*_: object) -> None:
        pass

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, quiet) for number in numbers]
    try:
        lines = traced(InterruptsAt(0, signal.SIGALRM), hold)
        for raising in numbers:
            for n in range(1, lines):
                for number in numbers:
                    signal.signal(number, late if number is raising else quiet)
                with pytest.raises(TimeoutError):
                    traced(InterruptsAt(n, raising), hold)
                held = [
                    each.name for each in numbers if signal.getsignal(each) not in (late, quiet)
                ]
                assert not held, f"{raising.name} at line {n}"
    finally:
        for pair in zip(numbers, before, strict=True):
            signal.signal(*pair)
