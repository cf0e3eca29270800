"""/v1/completions without a socket: what goes to the engine, and what comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moebius.front.choices import choice_seed
from moebius.text import GenerationDefaults, Tokenizer
from server.fake_engine import MINUS_INFINITY_TOKEN, FakeEngine, constant, logprob
from server.serving import MODEL, Server, engine, run, tokenizer
from text.tiny_tokenizers import FAMILIES, UNFAITHFUL

COMPLETIONS = "/v1/completions"
SPOKEN = " world, hello 😀 Grüße"


def joined(chunks: list[dict[str, Any]], index: int) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_a_completion_says_what_the_engine_said() -> None:
    async def check(server: Server) -> None:
        body = await server.complete(max_tokens=100)
        choice = body["choices"][0]
        assert choice["text"] == SPOKEN
        assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
        assert (body["object"], body["model"], body["system_fingerprint"]) == (
            "text_completion",
            MODEL,
            "fp_fake",
        )
        drawn = len(tokenizer().encode(SPOKEN, False)) + 1
        prompt = len(tokenizer().encode("hello"))
        assert body["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": 3},
        }

    run(check, engine(SPOKEN, cached_tokens=3))


def test_max_tokens_defaults_to_16_and_ends_with_length() -> None:
    async def check(server: Server) -> None:
        for fields in ({}, {"max_tokens": None}):
            body = await server.complete(**fields)
            assert body["usage"]["completion_tokens"] == 16
            assert body["choices"][0]["finish_reason"] == "length"

    run(check)


@pytest.mark.parametrize("step_tokens", [1, 3])
def test_a_stream_equals_the_answer_that_is_not_streamed(step_tokens: int) -> None:
    """Hashed tokens are full of broken UTF-8, so that this is the hard case."""

    async def check(server: Server) -> None:
        for prompt in ("a", "b", "c", "d", "e", "f"):
            fields = {
                "prompt": prompt,
                "n": 3,
                "seed": 5,
                "max_tokens": 40,
                "logprobs": 2,
                "return_token_ids": True,
            }
            whole = (await server.complete(**fields))["choices"]
            chunks = await server.stream(COMPLETIONS, **fields)
            parts = [c for chunk in chunks for c in chunk["choices"]]
            for choice in whole:
                own = [part for part in parts if part["index"] == choice["index"]]
                assert "".join(part["text"] for part in own) == choice["text"]
                assert [i for part in own for i in part["token_ids"]] == choice["token_ids"]
                for field, values in choice["logprobs"].items():
                    assert [v for part in own for v in part["logprobs"][field]] == values
                assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [
                    choice["finish_reason"]
                ]

    run(check, engine(step_tokens=step_tokens))


def test_chunks_share_id_and_created_and_usage_comes_only_when_asked_for() -> None:
    async def check(server: Server) -> None:
        plain = await server.stream(COMPLETIONS, max_tokens=5)
        assert all("usage" not in chunk for chunk in plain)
        chunks = await server.stream(
            COMPLETIONS, n=2, max_tokens=5, stream_options={"include_usage": True}
        )
        assert (
            len(
                {
                    (c["id"], c["created"], c["object"], c["model"], c["system_fingerprint"])
                    for c in chunks
                }
            )
            == 1
        )
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 10
        assert chunks[-1]["usage"]["prompt_tokens"] == len(tokenizer().encode("hello"))
        assert "prompt_tokens_details" in chunks[-1]["usage"]

    run(check)


@pytest.mark.parametrize(
    "prompt",
    ["hello", ["hello", "world"], [5, 6, 7], [[5, 6], [7]]],
)
def test_every_form_of_prompt(prompt: Any) -> None:
    items = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    expected = [
        tuple(tokenizer().encode(item) if isinstance(item, str) else item) for item in items
    ]

    async def check(server: Server) -> None:
        body = await server.complete(prompt=prompt, n=2, max_tokens=3, return_token_ids=True)
        assert [request.prompt_ids for request in server.engine.requests] == [
            ids for ids in expected for _ in "12"
        ]
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(items)))
        assert [tuple(c["prompt_token_ids"]) for c in body["choices"]] == [
            ids for ids in expected for _ in "12"
        ]
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert body["usage"]["completion_tokens"] == 6 * len(items)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == len(items)

    run(check, engine(cached_tokens=1))


def test_all_prompts_and_choices_are_submitted_together() -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        server.engine.step_seconds = 0.05
        task = asyncio.create_task(server.complete(prompt=["a", "b", "c"], n=4, max_tokens=2))
        while len(server.engine.requests) < 12:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        server.engine.gate.set()
        await task
        assert server.engine.steps == 2
        ids = [request.id for request in server.engine.requests]
        assert ids == sorted(ids)

    run(check)


def test_seeds_repeat_and_choices_differ() -> None:
    async def check(server: Server) -> None:
        first, again = [await server.complete(n=4, seed=7, max_tokens=20) for _ in "12"]
        texts = [choice["text"] for choice in first["choices"]]
        assert texts == [choice["text"] for choice in again["choices"]]
        assert len(set(texts)) == 4
        assert [r.seed for r in server.engine.requests[:4]] == [choice_seed(7, i) for i in range(4)]
        one = await server.complete(seed=7, max_tokens=20)
        assert one["choices"][0]["text"] == texts[0]
        negative = await server.complete(prompt=["x", "x"], seed=-3)
        assert negative["choices"][0]["text"] == negative["choices"][1]["text"]

    run(check)


def test_without_a_seed_every_prompt_and_call_draws_its_own() -> None:
    async def check(server: Server) -> None:
        for _ in range(2):
            await server.complete(prompt=["same", "same"], n=2)
        assert len({request.seed for request in server.engine.requests}) == 8

    run(check)


def test_sampling_fields_reach_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [33, 44],
        "stop": ["xyz", ""],
        "logit_bias": {"5": 3, "6": -100.0},
    }

    async def check(server: Server) -> None:
        await server.complete(**fields, priority=-3)
        request = server.engine.requests[0]
        for name, value in fields.items():
            if name not in ("stop", "logit_bias", "stop_token_ids"):
                assert getattr(request.params, name) == value, name
        assert request.params.stop == ("xyz",)
        assert dict(request.params.logit_bias) == {5: 3.0, 6: -100.0}
        assert request.stop_ids == {33, 44}
        assert request.priority == -3
        assert request.deadline is not None and request.deadline > request.arrival

    run(check, engine(priorities=True))


def test_the_models_defaults_yield_to_the_clients_values() -> None:
    defaults = GenerationDefaults(frozenset(), {"temperature": 0.3, "top_k": 20})

    async def check(server: Server) -> None:
        await server.complete()
        await server.complete(temperature=None, top_k=None)
        await server.complete(temperature=0, top_k=5)
        found = [
            (r.params.temperature, r.params.top_k, r.params.top_p) for r in server.engine.requests
        ]
        assert found == [(0.3, 20, 1.0), (0.3, 20, 1.0), (0.0, 5, 1.0)]

    run(check, defaults=defaults)


def test_a_stop_string_that_spans_tokens_is_never_sent_and_ends_the_request() -> None:
    said = "one two three four five six seven eight"
    stops = ["ee fo", "zzz"]

    async def check(server: Server) -> None:
        body = await server.complete(max_tokens=200, stop=stops)
        choice = body["choices"][0]
        assert choice["text"] == "one two thr"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "ee fo")
        ids = tokenizer().encode(said, False)
        needed = next(i for i in range(1, 200) if "ee fo" in tokenizer().decode(ids[:i]))
        assert body["usage"]["completion_tokens"] == needed
        assert server.engine.requests[0].id in server.engine.aborted
        chunks = await server.stream(COMPLETIONS, max_tokens=200, stop=stops)
        assert joined(chunks, 0) == "one two thr"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        # A beginning of a stop string that comes to nothing is sent after all.
        body = await server.complete(max_tokens=200, stop="seven nine")
        assert body["choices"][0]["text"] == said

    run(check, engine(said))


@pytest.mark.parametrize("stop", [None, "", [], [""]])
def test_no_stop(stop: Any) -> None:
    async def check(server: Server) -> None:
        assert (await server.complete(max_tokens=100, stop=stop))["choices"][0]["text"] == SPOKEN

    run(check, engine(SPOKEN))


@pytest.mark.case("A4")
def test_a_special_token_that_is_no_end_token_may_be_a_stop_string() -> None:
    async def check(server: Server) -> None:
        for stop, tokens in (("<|im_end|>", 3), ("<|im_end|>\n", 4)):
            body = await server.complete(
                max_tokens=100, stop=stop, logprobs=0, return_token_ids=True
            )
            choice = body["choices"][0]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
                "ab",
                "stop",
                stop,
            )
            assert body["usage"]["completion_tokens"] == tokens == len(choice["token_ids"])
            assert len(choice["logprobs"]["tokens"]) == tokens
            assert joined(await server.stream(COMPLETIONS, max_tokens=100, stop=stop), 0) == "ab"
            answer = (await server.chat(max_tokens=100, stop=stop))["choices"][0]
            assert (answer["message"]["content"], answer["stop_reason"]) == ("ab", stop)
            chunks = await server.stream("/v1/chat/completions", max_tokens=100, stop=stop)
            assert (
                "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab"
            )
            assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"

    run(check, engine("ab<|im_end|>\nand on and on"))


def test_scoring_a_prompt_as_lm_eval_does() -> None:
    """Token ids, echo, logprobs: one entry a prompt token, the first null, in the prompt's own
    order."""
    ids = [10, 11, 12, MINUS_INFINITY_TOKEN, 14, 15, 16, 17, 18, 19]

    async def check(server: Server) -> None:
        for max_tokens in (0, 1):
            body = await server.complete(
                prompt=[ids, ids[:3]], echo=True, logprobs=1, max_tokens=max_tokens
            )
            for choice, own in zip(body["choices"], (ids, ids[:3]), strict=True):
                found = choice["logprobs"]
                expected = [max(logprob(t, 1).logprob, -9999.0) for t in own[1:]]
                assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
                assert found["token_logprobs"][1 : len(own)] == expected
                assert all(len(values) == len(own) + max_tokens for values in found.values())
                assert all(
                    -0.5 in top.values() and len(top) == 2 for top in found["top_logprobs"][1:]
                )
                assert found["text_offset"] == sorted(found["text_offset"])
                assert choice["finish_reason"] == "length"
            assert body["usage"]["completion_tokens"] == 2 * max_tokens
        fields = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1}
        chunks = await server.stream(COMPLETIONS, **fields)
        whole = (await server.complete(**fields))["choices"][0]
        for name, values in whole["logprobs"].items():
            assert [v for c in chunks for v in c["choices"][0]["logprobs"][name]] == values

    run(check)


def test_echo_and_offsets_point_into_the_text() -> None:
    prompt = "hello world, the dog"

    async def check(server: Server) -> None:
        body = await server.complete(prompt=prompt, echo=True, max_tokens=100, logprobs=0)
        choice = body["choices"][0]
        assert choice["text"] == prompt + SPOKEN
        found = choice["logprobs"]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            if not token.startswith("bytes:") and token != "</s>":
                assert choice["text"][offset:].startswith(token)
        assert all(len(top) == 1 for top in found["top_logprobs"][1:])
        assert (await server.complete(prompt=prompt, echo=True, max_tokens=0))["choices"][0][
            "text"
        ] == prompt
        assert (
            joined(await server.stream(COMPLETIONS, prompt=prompt, echo=True, max_tokens=100), 0)
            == prompt + SPOKEN
        )

    run(check, engine(SPOKEN))


@pytest.mark.case("A3")
@pytest.mark.parametrize("make", [*FAMILIES.values(), *UNFAITHFUL.values()])
@pytest.mark.parametrize(
    "prompt", ["hello world", "  hello <s> world", "caf\u0065\u0301 \ufb01 <|im_end|>"]
)
def test_echoed_offsets_point_into_the_text_that_is_sent(make: Any, prompt: str) -> None:
    ours = Tokenizer(make(), {"bos_token": "<s>", "eos_token": "</s>"})
    fields = {"echo": True, "logprobs": 0, "max_tokens": 2, "seed": 1}

    async def check(server: Server) -> None:
        for asked in (prompt, ours.encode(prompt)):
            choice = (await server.complete(prompt=asked, **fields))["choices"][0]
            sent = prompt if asked is prompt else ours.decode(asked)
            assert choice["text"].startswith(sent)
            offsets = choice["logprobs"]["text_offset"]
            assert len(offsets) == len(choice["logprobs"]["tokens"]) == len(ours.encode(prompt)) + 2
            assert offsets[-2] == len(sent)  # where the prompt ends, the answer begins
            chunks = await server.stream(COMPLETIONS, prompt=asked, **fields)
            assert [
                o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]
            ] == offsets
            if asked is prompt:
                assert offsets[:-2] == ours.offsets(prompt)

    fake = FakeEngine(constant([ours.encode("hello", False)[0]] * 2), vocab_size=ours.vocab_size)
    run(check, fake, tokenizer=ours)


def test_prompt_logprobs_by_token_id() -> None:
    ids = [30, 31, 102]

    async def check(server: Server) -> None:
        body = await server.complete(prompt=ids, prompt_logprobs=3, max_tokens=1)
        first, second, third = body["choices"][0]["prompt_logprobs"]
        assert first is None
        assert list(second) == ["31", "100", "101", "102"]
        assert second["31"] == {
            "logprob": -1 - 31 / 8,
            "rank": 32,
            "decoded_token": tokenizer().token_text(31),
        }
        assert list(third) == ["100", "101", "102"] and third["102"]["rank"] == 3

    run(check)


def test_completions_continue_the_prompt_and_add_bos_as_the_tokenizer_does() -> None:
    llama = tokenizer("llama")
    ids = llama.encode("the dog", False)

    async def check(server: Server) -> None:
        body = await server.complete(prompt="hello", max_tokens=50)
        assert server.engine.requests[0].prompt_ids == tuple(llama.encode("hello"))
        assert server.engine.requests[0].prompt_ids[0] == llama.bos_id
        assert body["choices"][0]["text"] == " the dog"

    fake = engine(SPOKEN)
    fake.script, fake.vocab_size = constant(ids), llama.vocab_size
    run(check, fake, tokenizer=llama)


def test_any_served_name_may_be_used_or_none() -> None:
    async def check(server: Server) -> None:
        assert (await server.complete(model="alias"))["model"] == "alias"
        assert (await server.complete(model=None))["model"] == MODEL

    run(check)
