"""LLM against transformers, and what its callers rely on: order, n, seeds, stops, log-probabilities, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import LLM, SamplingParams
from moebius.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), kv_cache_memory_bytes=2**21, max_model_len=512, max_num_seqs=8)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


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
    assert [o.outputs for o in llm.generate([ids, "def f("], [params, params])] == [alone.outputs] * 2
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
    assert not llm.engine.has_work


def test_chat_renders_the_template(llm: LLM, reference: Any) -> None:
    _, tokenizer = reference
    messages = [{"role": "user", "content": "hello"}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=4))[0]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(output.prompt_token_ids) == expected
    assert len(llm.chat([messages, messages], SamplingParams(max_tokens=2))) == 2
    params = SamplingParams(temperature=0, max_tokens=4)
    assert "".join(llm.stream_chat(messages, params)) == output.outputs[0].text


def test_an_abandoned_stream_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream((f"p{i}", SamplingParams(max_tokens=30, ignore_eos=True)) for i in range(20))
    next(stream)
    stream.close()
    assert llm.engine.scheduler.drained
    chat = llm.stream_chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=50, ignore_eos=True))
    next(chat)
    chat.close()
    assert llm.engine.scheduler.drained


def test_bad_input_is_refused_before_anything_runs(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["a", ""], SamplingParams())
    with pytest.raises(RequestError, match="token id 320 is not an integer from 0 to 319"):
        llm.generate([[320]], SamplingParams())
    with pytest.raises(RequestError, match="context length is 512"):
        llm.generate([[1] * 600], SamplingParams())
    assert llm.engine.scheduler.drained
    with pytest.raises(TypeError, match="no option max_num_seq;"):
        LLM("bundled", max_num_seq=1)
    with pytest.raises(ConfigError):
        LLM(str(tmp_path / "missing"))
