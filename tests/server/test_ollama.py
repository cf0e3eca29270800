"""Ollama's API through its official client, and as raw lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from moebius.errors import EngineError
from server.fake_engine import FakeEngine
from server.serving import MODEL, engine, listening, tokenizer
from server.test_tools_api import REPLY, THOUGHT, TOKENIZER, TOOLS, saying

SAID = "one two 😀"
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, str]]:
    fake = engine(SAID)
    with listening(fake) as (port, _):
        yield fake, f"http://127.0.0.1:{port}"


@pytest.fixture
def client(live: tuple[FakeEngine, str]) -> Iterator[ollama.Client]:
    client = ollama.Client(host=live[1])
    yield client
    client._client.close()


def test_clients_find_the_models(client: ollama.Client, live: tuple[FakeEngine, str]) -> None:
    models = client.list().models
    assert [model.model for model in models] == [MODEL, "alias"]
    assert len(models[0].digest) == 64 and models[0].modified_at.year >= 2026
    shown = client.show(f"{MODEL}:latest")
    assert "completion" in shown.capabilities
    assert shown.modelinfo["moebius.context_length"] == 512
    assert "<|im_start|>" in shown.template
    version = httpx.get(f"{live[1]}/api/version").json()["version"]
    assert all(part.isdigit() for part in version.split("."))
    with pytest.raises(ollama.ResponseError, match="is not served here"):
        client.show("other")


def test_a_chat_streams_and_does_not(client: ollama.Client) -> None:
    whole = client.chat(MODEL, ASKED)
    assert whole.message.content == SAID and whole.message.role == "assistant"
    assert (whole.done, whole.done_reason) == (True, "stop")
    *parts, last = client.chat(MODEL, ASKED, stream=True)
    assert "".join(part.message.content for part in parts) == SAID
    assert not any(part.done for part in parts)
    assert (last.done, last.message.content) == (True, "")
    for answer in (whole, last):
        assert answer.eval_count == len(tokenizer().encode(SAID, False)) + 1
        assert answer.prompt_eval_count == len(tokenizer().encode_chat(ASKED))
        assert answer.total_duration >= answer.eval_duration >= 0


def test_a_prompt_is_a_chat_of_one_turn_unless_it_is_raw(
    client: ollama.Client, live: tuple[FakeEngine, str]
) -> None:
    fake = live[0]
    assert client.generate(MODEL, "hello", system="Be kind.").response == SAID
    system = {"role": "system", "content": "Be kind."}
    assert list(fake.requests[-1].prompt_ids) == tokenizer().encode_chat([system, *ASKED])
    parts = list(client.generate(MODEL, "hello", raw=True, stream=True))
    assert "".join(part.response for part in parts) == SAID
    assert list(fake.requests[-1].prompt_ids) == tokenizer().encode("hello")


def test_options_go_by_their_own_names(client: ollama.Client, live: tuple[FakeEngine, str]) -> None:
    options = {
        "num_predict": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "seed": 5,
        "stop": ["zz"], "repeat_penalty": 1.2, "num_ctx": 4096, "num_gpu": 1,
    }  # fmt: skip
    answer = client.chat(MODEL, ASKED, options=options, keep_alive="5m")
    assert (answer.done_reason, answer.eval_count) == ("length", 3)
    params = live[0].requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_k) == (3, 0.5, 7)
    assert (params.top_p, params.min_p, params.seed, params.stop) == (0.9, 0.1, 5, ("zz",))
    assert params.repetition_penalty == 1.2
    client.chat(MODEL, ASKED, options={"num_predict": -1})
    assert live[0].requests[-1].params.max_tokens is None


def test_nothing_asked_is_a_model_loaded(client: ollama.Client) -> None:
    assert client.generate(MODEL).done_reason == "load"
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert client.chat(MODEL, []).done_reason == "load"


@pytest.mark.parametrize(
    "body, says",
    [
        ({"messages": ASKED, "options": {"temperature": -1}}, "temperature"),
        ({"messages": [{"role": "elf", "content": "x"}]}, "role"),
        ({"messages": [{**ASKED[0], "images": ["aGk="]}]}, "only text"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "maximum context length"),
    ],
)
def test_an_error_is_a_text(
    client: ollama.Client, live: tuple[FakeEngine, str], body: dict[str, Any], says: str
) -> None:
    response = httpx.post(f"{live[1]}/api/chat", json=body)
    assert response.status_code == 400 and list(response.json()) == ["error"]
    assert says in response.json()["error"]
    with pytest.raises(ollama.ResponseError, match=says) as caught:
        client.chat(MODEL, body["messages"], options=body.get("options"))
    assert caught.value.status_code == 400


@pytest.mark.parametrize(
    "path, sent, status, says",
    [
        ("chat", {"json": {"model": "other", "messages": ASKED}}, 404, "'other' is not served"),
        ("show", {"json": {"model": "other"}}, 404, "'other' is not served"),
        ("generate", {"json": {"prompt": 5}}, 400, "prompt"),
        ("chat", {"json": {"messages": 5}}, 400, "messages"),
        ("chat", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "JSON"),
        ("chat", {"content": b"{}"}, 415, "Content-Type"),
        ("nowhere", {"json": {}}, 404, "there is no route /api/nowhere"),
    ],
)
def test_what_is_refused_before_it_is_asked_is_a_text_too(
    live: tuple[FakeEngine, str], path: str, sent: dict[str, Any], status: int, says: str
) -> None:
    response = httpx.post(f"{live[1]}/api/{path}", **sent)
    assert response.status_code == status and list(response.json()) == ["error"]
    assert says in response.json()["error"]


def test_the_client_shows_the_words_of_a_refusal(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("other", ASKED)
    assert str(caught.value).startswith("the model 'other' is not served here")
    assert caught.value.status_code == 404


def test_lines_are_objects_whatever_happens(live: tuple[FakeEngine, str]) -> None:
    fake, url = live
    fake.fault = lambda request, step: EngineError("x") if step == 3 else None
    fake.step_seconds = 0.05  # or it may have failed before anything was sent
    try:
        response = httpx.post(f"{url}/api/chat", json={"messages": ASKED})
        assert response.headers["content-type"] == "application/x-ndjson"
        *lines, last = map(json.loads, response.text.splitlines())
        assert lines and "error id" in last["error"]
        whole = httpx.post(f"{url}/api/chat", json={"messages": ASKED, "stream": False})
        assert whole.status_code == 500 and "error id" in whole.json()["error"]
    finally:
        fake.fault = lambda request, step: None
        fake.step_seconds = 0.0


def test_thought_and_calls_are_told_apart() -> None:
    with listening(saying(f"{REPLY}\nDone"), tokenizer=TOKENIZER) as (port, _):
        client = ollama.Client(host=f"http://127.0.0.1:{port}")
        assert {"tools", "thinking"} <= set(client.show(MODEL).capabilities)
        whole = client.chat(MODEL, ASKED, tools=TOOLS)
        parts = list(client.chat(MODEL, ASKED, tools=TOOLS, stream=True))
        answer = client.generate(MODEL, "hello", think=True)
        client._client.close()
    called = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert called == [("get_weather", {"city": "Köln"}), ("now", {})]
    assert whole.message.thinking == answer.thinking == THOUGHT
    assert whole.message.content.strip() == "Done"
    messages = [part.message for part in parts]
    assert "".join(message.thinking or "" for message in messages) == THOUGHT
    assert "".join(message.content for message in messages) == whole.message.content
    streamed = [call for message in messages for call in message.tool_calls or ()]
    assert streamed == whole.message.tool_calls
