"""Fields about a completion's prompt and about what its text shows, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import AddedToken

from moebius.text import Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, engine, listening, run, tokenizer
from text.tiny_tokenizers import byte_level

FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, openai.OpenAI]]:
    fake = engine("one two three")
    with (
        listening(fake) as (port, _),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        yield fake, client


def test_a_suffix_is_filled_in_and_the_familys_tokens_end_it() -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in FIM])
    coder = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    prefix, gap, middle = (coder.token_id(t) for t in FIM)
    said = coder.encode("x + 1", False)

    def script(request: Any) -> list[int]:
        ids = [*said, prefix, *said]
        ends = [i for i, t in enumerate(ids) if t in request.stop_ids]
        return ids[: ends[0] + 1] if ends else ids

    async def check(server: Server) -> None:
        fields = {"prompt": "def f(x):\n    return ", "suffix": "\n\nf(2)", "max_tokens": 40}
        choice = (await server.complete(**fields))["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("x + 1", "stop")
        (request,) = server.engine.requests
        before = coder.encode(fields["prompt"], False)
        behind = coder.encode(fields["suffix"], False)
        assert list(request.prompt_ids) == [prefix, *before, gap, *behind, middle]
        assert request.stop_ids >= {prefix, gap, middle}
        chunks = await server.stream(COMPLETIONS, **fields)
        assert "".join(c["choices"][0]["text"] for c in chunks) == "x + 1"
        choice = (await server.complete(**fields, ignore_eos=True))["choices"][0]
        assert choice["text"] == "x + 1x + 1"
        plain = await server.complete(prompt="a", suffix="")
        assert plain["usage"]["prompt_tokens"] == len(coder.encode("a"))
        for extra, param in (
            ({"prompt": [20, 21]}, "suffix"),
            ({"echo": True}, "echo"),
            ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
            ({"prompt": "x" * 4000}, "prompt"),
        ):
            response = await server.post(COMPLETIONS, {**fields, **extra})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param

    run(check, FakeEngine(script, vocab_size=coder.vocab_size), tokenizer=coder)


def test_a_model_without_such_tokens_says_which(
    live: tuple[FakeEngine, openai.OpenAI],
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"has no <\|fim_prefix\|>") as bad:
        live[1].completions.create(model=MODEL, prompt="a", suffix="b")
    assert bad.value.param == "suffix"


@pytest.mark.parametrize("chat", [False, True])
def test_the_stop_string_may_be_wanted(live: tuple[FakeEngine, openai.OpenAI], chat: bool) -> None:
    _, client = live

    def ask(stream: bool, **extra: Any) -> tuple[str, Any]:
        fields: dict[str, Any] = {"model": MODEL, "stop": ["e tw"], "stream": stream}
        if chat:
            asked: Any = [{"role": "user", "content": "x"}]
            found = client.chat.completions.create(messages=asked, **fields, extra_body=extra)
        else:
            found = client.completions.create(prompt="x", **fields, extra_body=extra)
        if stream:
            choices = [chunk.choices[0] for chunk in found]
            said = [c.delta.content if chat else c.text for c in choices]
            return "".join(text or "" for text in said), choices[-1].stop_reason
        choice = found.choices[0]
        return (choice.message.content if chat else choice.text), choice.stop_reason

    for stream in (False, True):
        assert ask(stream) == ("on", "e tw")
        assert ask(stream, include_stop_str_in_output=True) == ("one tw", "e tw")


def test_so_may_the_text_of_a_stop_token() -> None:
    ids = tokenizer().encode("hello world", False)
    cut = ids[:2]

    async def check(server: Server) -> None:
        fields = {"stop_token_ids": [cut[-1]], "logprobs": 0}
        choice = (await server.complete(**fields))["choices"][0]
        assert choice["text"] == tokenizer().decode(cut[:-1])
        choice = (await server.complete(**fields, include_stop_str_in_output=True))["choices"][0]
        assert choice["text"] == tokenizer().decode(cut)
        assert choice["stop_reason"] == cut[-1]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]

    fake = FakeEngine(constant(cut), vocab_size=tokenizer().vocab_size)
    fake.eos_ids = frozenset(cut[-1:])
    run(check, fake)


def test_a_prompt_is_cut_at_the_side_that_is_asked_for(
    live: tuple[FakeEngine, openai.OpenAI],
) -> None:
    fake, client = live
    text = "hello world " * 300
    ids = tokenizer().encode(text)
    assert len(ids) > 512

    def sent(prompt: Any, **extra: Any) -> list[int]:
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, extra_body=extra)
        return list(fake.requests[-1].prompt_ids)

    for prompt in (text, ids):
        assert sent(prompt, truncate_prompt_tokens=10) == ids[-10:]
        assert sent(prompt, truncate_prompt_tokens=10, truncation_side="right") == ids[:10]
        assert sent(prompt, truncate_prompt_tokens=-1) == ids[-508:]
    assert sent("hello", truncate_prompt_tokens=100) == tokenizer().encode("hello")
    for wrong in (0, -2, 513, 1.5):
        with pytest.raises(openai.BadRequestError) as bad:
            sent("a", truncate_prompt_tokens=wrong)
        assert bad.value.param == "truncate_prompt_tokens"
    with pytest.raises(openai.BadRequestError, match="that many are not cut"):
        sent(text * 50, truncate_prompt_tokens=10)
    asked: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="a chat that is cut"):
        client.chat.completions.create(
            model=MODEL, messages=asked, extra_body={"truncate_prompt_tokens": 5}
        )


def test_what_begins_every_text_stays_when_it_is_cut() -> None:
    llama = tokenizer("llama")

    async def check(server: Server) -> None:
        fields = {"prompt": "hello world hello world", "truncate_prompt_tokens": 3}
        body = await server.complete(
            **fields, echo=True, logprobs=0, max_tokens=0, return_token_ids=True
        )
        choice = body["choices"][0]
        ids = llama.encode(fields["prompt"])
        assert choice["prompt_token_ids"] == [llama.bos_id, *ids[-2:]]
        assert choice["text"] == llama.decode([llama.bos_id, *ids[-2:]])
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["text_offset"]) == 3
        plain = await server.complete(
            **fields | {"truncate_prompt_tokens": None},
            add_special_tokens=False,
            echo=True,
            logprobs=0,
            max_tokens=0,
        )
        shown = plain["choices"][0]["logprobs"]
        assert len(shown["tokens"]) == len(shown["text_offset"]) == len(ids) - 1

    run(check, FakeEngine(constant([5]), vocab_size=llama.vocab_size), tokenizer=llama)


def test_tokens_may_be_named_by_their_ids(live: tuple[FakeEngine, openai.OpenAI]) -> None:
    _, client = live
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = client.completions.create(
        model=MODEL, prompt="x", logprobs=2, extra_body=extra
    ).choices[0]
    names = [f"token_id:{token}" for token in choice.token_ids]
    assert choice.logprobs.tokens == names
    assert list(choice.logprobs.top_logprobs[0]) == ["token_id:100", "token_id:101", names[0]]
    asked: Any = [{"role": "user", "content": "x"}]
    reply = client.chat.completions.create(
        model=MODEL, messages=asked, logprobs=True, top_logprobs=1, extra_body=extra
    ).choices[0]
    assert [entry.token for entry in reply.logprobs.content] == names
    assert reply.logprobs.content[0].top_logprobs[0].token == "token_id:100"
    assert reply.logprobs.content[0].bytes == list(tokenizer().token_bytes(choice.token_ids[0]))
