"""From a checkpoint to streamed tokens: the real server and engine on a tiny model, through the
official client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from serving import serving
from tiny import write_model


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    with serving(tiny_model, "tiny", max_num_batched_tokens=512) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_streaming_with_everything_at_once(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": "def f(",
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
        "logprobs": 2,
    }
    fields["stop"] = ["zzz", "\n"]
    texts, ends, tokens, usage = ["", "", ""], [None] * 3, 0, None
    for chunk in client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert ends[choice.index] is None
            ends[choice.index] = choice.finish_reason  # type: ignore[call-overload]
            tokens += len(choice.logprobs.tokens or []) if choice.logprobs else 0
    whole = client.completions.create(**fields)
    assert [c.text for c in sorted(whole.choices, key=lambda c: c.index)] == texts
    assert len(set(texts)) == 3 and set(ends) <= {"stop", "length"}
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert whole.system_fingerprint is not None and not whole.system_fingerprint.endswith("-approx")


def test_a_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "naïve 😀"}],
        "seed": 3,
    }
    fields |= {"max_completion_tokens": 20, "logprobs": True, "top_logprobs": 2, "n": 2}
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    whole = client.chat.completions.create(**fields)
    assert [c.message.content for c in sorted(whole.choices, key=lambda c: c.index)] == streamed
    content = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and all(len(entry.top_logprobs) == 2 for entry in content)


def test_a_scored_prompt_has_transformers_numbers(client: openai.OpenAI, reference: Any) -> None:
    """As lm-eval's local-completions asks: token ids in, echo, logprobs, no new token."""
    prompts = [[5, 6, 7, 8, 9, 200], list(range(20, 90))]
    answer = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    for prompt, choice in zip(prompts, sorted(answer.choices, key=lambda c: c.index), strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].double(), -1)
        scores = choice.logprobs
        assert (
            scores is not None
            and scores.token_logprobs is not None
            and scores.top_logprobs is not None
        )
        assert scores.token_logprobs[0] is None
        want = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
        assert scores.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
        best = [max(top.values()) for top in scores.top_logprobs[1:]]
        assert best == pytest.approx(expected.max(-1).values[:-1].tolist(), abs=1e-4)


def test_a_float16_checkpoint_answers_as_its_weights_do_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, dtype=torch.float16, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [[5, 6, 7, 8], list(range(20, 90))]
    with (
        serving(tmp_path, "half", max_model_len=256) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.completions.create(
            model="half",
            prompt=prompts,
            max_tokens=10,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    for prompt, choice in zip(prompts, sorted(answer.choices, key=lambda c: c.index), strict=True):
        ids: list[int] = choice.token_ids  # type: ignore[attr-defined]
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        scores = torch.log_softmax(logits.double(), -1)
        assert scores.argmax(-1).tolist() == ids and len(ids) == 10
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(scores.amax(-1).tolist(), abs=1e-4)


def test_64_concurrent_requests_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 120, (64,), generator=generator).tolist()
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]

    def ask(i: int) -> tuple[str, int]:
        fields: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompts[i],
            "max_tokens": 1 + i % 30,
            "temperature": 0,
        }
        answer = client.completions.create(
            **fields, extra_body={"ignore_eos": True, "cache_salt": f"{i}"}
        )
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.completion_tokens

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert [tokens for _, tokens in together] == [1 + i % 30 for i in range(64)]
    assert [ask(i) for i in range(0, 64, 4)] == together[::4]


def test_a_common_prefix_sent_together_is_computed_once(client: openai.OpenAI, url: str) -> None:
    prefix = [3 + i * 7 % 300 for i in range(1024)]
    hits = metric(url, "vllm:prefix_cache_hits_total")

    def ask(i: int) -> int:
        answer = client.completions.create(
            model="tiny", prompt=[*prefix, 5 + i, 6, 7, 8], max_tokens=4
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    with ThreadPoolExecutor(32) as pool:
        cached = sorted(pool.map(ask, range(32)))
    assert cached == [0] + [1024] * 31
    assert metric(url, "vllm:prefix_cache_hits_total") - hits == 31 * 1024


def test_a_client_that_goes_away_frees_its_place(client: openai.OpenAI, url: str) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1500, "stream": True}
    stream = client.completions.create(**fields, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    while metric(url, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert metric(url, "vllm:num_requests_running") == 0
    assert metric(url, "vllm:kv_cache_usage_perc") == 0


def test_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as out:
        client.completions.create(model="tiny", prompt="x", top_p=2)
    assert out.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as token:
        client.completions.create(model="tiny", prompt=[320])
    assert "319" in token.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    assert client.models.retrieve("tiny").id == "tiny"
