"""Every field at extreme values, every body that is no request: a 4xx in the error's shape."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covering import chosen
from moebius.server.fields import HARMLESS, UNSUPPORTED
from moebius.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest
from moebius.text import Tokenizer
from server.serving import MODEL, Server, engine, run, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def function(**fields: Any) -> dict[str, Any]:
    """A tool with these fields, right or wrong."""
    return {"type": "function", "function": {"name": "f", **fields}}


NOW = function(name="now")
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "hello", "max_tokens": 2},
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2]},
}
EXTREMES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, "", "1", "x" * 5000,
    "\u0000", "😀", [], [[]], [None], [1], [-1], [2**40], ["a"], [["a"]], [1, "a"], [[1], "a"], [True], [[1.5]],
    {}, {"a": 1}, {"1": 1}, {"-1": 1}, {"1": "x"}, {"٣": 1}, {"9" * 40: 1}, {"type": "text"}, {"type": "json_object"},
    [{}], [{"role": "user"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": ["user"], "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": "x", "zzz": 1}], [{"role": "user", "content": "x", "name": 5}],
    [{"role": "assistant", "tool_calls": [5]}], [{"role": "assistant", "tool_calls": {"a": 1}}],
    [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], [0] * 2000, ["a"] * 65, ["a"] * 17,
    {str(i): 1 for i in range(1025)},
]  # fmt: skip


# Of every field's extremes that are tried at a time.
PARTS = 4


def check_error(
    response: httpx.Response, *, status: int | None = None, param: str | None = None
) -> dict[str, Any]:
    """A 4xx of OpenAI's shape; returns the error."""
    assert 400 <= response.status_code < 500, response.text
    assert status is None or response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str) and 0 < len(error["message"]) <= 500
    assert isinstance(error["type"], str)
    assert param is None or error["param"] == param, error
    return error


def fields_of(path: str) -> list[str]:
    models = {COMPLETIONS: CompletionRequest, CHAT: ChatRequest, "/detokenize": DetokenizeRequest}
    own = (
        sorted(models[path].model_fields)
        if path in models
        else ["prompt", "messages", "return_token_strs"]
    )
    return own + (sorted(HARMLESS | UNSUPPORTED.keys()) if path in (COMPLETIONS, CHAT) else [])


@pytest.mark.parametrize("path", list(GOOD))
@pytest.mark.parametrize("part", chosen(range(PARTS), lambda part: part == 0))
def test_every_field_at_every_extreme_is_served_or_refused_by_name(path: str, part: int) -> None:
    """Every run has some extremes of each field, and each extreme in some fields."""

    async def check(server: Server) -> None:
        refused = served = 0
        for field_number, field in enumerate(fields_of(path)):
            for value in EXTREMES[(field_number + part) % PARTS :: PARTS]:
                body = json.dumps({**GOOD[path], field: value}).encode()
                response = await server.http.post(
                    path, content=body, headers={"Content-Type": "application/json"}
                )
                if response.status_code == 200:
                    served += 1
                    assert field != "model" or value is None
                    continue
                refused += 1
                error = check_error(response)
                if value != 10**400:
                    known = (field, "max_tokens", "min_tokens", "messages", "prompt")
                    assert error["param"].split("[")[0].split(".")[0] in known, (
                        field,
                        value,
                        error,
                    )
        assert refused > 2 * served or path == "/tokenize"

    run(check)


NAMED_CASES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"n": 17}, "n"),
    (COMPLETIONS, {"n": "1"}, "n"),
    (COMPLETIONS, {"n": True}, "n"),
    (COMPLETIONS, {"n": 1.0}, "n"),
    (COMPLETIONS, {"temperature": "1"}, "temperature"),
    (COMPLETIONS, {"temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"top_p": -0.1}, "top_p"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, "prompt"),
    (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt"),
    (COMPLETIONS, {"stop": ["a"] * 17}, "stop"),
    (COMPLETIONS, {"stop": "a" * 257}, "stop"),
    (COMPLETIONS, {"stop": [1]}, "stop[0]"),
    (COMPLETIONS, {"logit_bias": {"400000": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (COMPLETIONS, {"cache_salt": "ü" * 129}, "cache_salt"),
    (COMPLETIONS, {"priority": 2**31}, "priority"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"best_of": True}, "best_of"),
    (COMPLETIONS, {"echo": 1}, "echo"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"min_tokens": 3}, "min_tokens"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream": True, "stream_options": {"zzz": 1}}, "stream_options.zzz"),
    (COMPLETIONS, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETIONS, {"temprature": 1}, "temprature"),
    (COMPLETIONS, {"messages": []}, "messages"),
    (COMPLETIONS, {"priority": -1}, "priority"),
    (COMPLETIONS, {"request_id": "a b"}, "request_id"),
    (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort"),
    (COMPLETIONS, {"skip_special_tokens": 0}, "skip_special_tokens"),
    (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort"),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools[0]"),
    (CHAT, {"tools": [{}] * 257, "tool_choice": "none"}, "tools"),
    (CHAT, {"tools": [5], "tool_choice": "none"}, "tools[0]"),
    (CHAT, {"tools": "now"}, "tools"),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    (CHAT, {"tools": [NOW, {**NOW, "type": "web_search"}]}, "tools[1].type"),
    (CHAT, {"tools": [NOW, NOW]}, "tools[1].function.name"),
    (CHAT, {"tools": [function(name="a b")]}, "tools[0].function.name"),
    (CHAT, {"tools": [function(name="x" * 129)]}, "tools[0].function.name"),
    (CHAT, {"tools": [function(description=1)]}, "tools[0].function.description"),
    (CHAT, {"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
    (CHAT, {"tools": [function(strict="yes")]}, "tools[0].function.strict"),
    (CHAT, {"tools": [NOW]}, "tools"),
    (CHAT, {"tools": [NOW], "tool_choice": "never"}, "tool_choice"),
    (CHAT, {"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice"),
    (CHAT, {"tools": [NOW], "tool_choice": function()}, "tool_choice"),
    (CHAT, {"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    (CHAT, {"tools": [NOW], "tool_choice": "required"}, "tools"),
    (CHAT, {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"bos_token": ""}}, "chat_template_kwargs"),
    (CHAT, {"thinking": {"type": "maybe"}}, "thinking.type"),
    (CHAT, {"thinking_token_budget": 5}, "thinking_token_budget"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 511}, "messages"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
    (CHAT, {"messages": [{"role": "elf", "content": "x"}]}, "messages[0].role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]},
        "messages[0].audio",
    ),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"guided_json": {"not": {}}}, "guided_json"),
    (CHAT, {"echo": True}, "echo"),
    ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
]


def test_the_error_names_the_field() -> None:
    async def check(server: Server) -> None:
        for path, change, param in NAMED_CASES:
            response = await server.post(path, {**GOOD[path], **change})
            error = check_error(response, status=400, param=param)
            too_long = error["code"] == "context_length_exceeded"
            assert too_long or "prompt" in change or param.split("[")[0] in error["message"], error
        assert server.engine.requests == []

    run(check)


def test_neutral_and_harmless_fields_are_served() -> None:
    neutral = {name: values[0] for name, values in UNSUPPORTED.items() if values}
    null = dict.fromkeys(UNSUPPORTED)
    harmless = dict.fromkeys(HARMLESS, "x") | {
        "include_reasoning": True,
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
        "store": True,
        "logit_bias": {},
        "stop": [],
    }

    async def check(server: Server) -> None:
        for fields in (neutral, null, harmless):
            for path in (COMPLETIONS, CHAT):
                response = await server.post(path, {**GOOD[path], **fields})
                assert response.status_code == 200, response.text

    run(check)


BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"1", b"{}x", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"prompt": NaN}', b"[" * 100_000,
    b"\xef\xbb\xbf\xef\xbb\xbf{}",
    b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": '
b'"\\ud800"}', b"{'prompt': 'x'}", b'{"prompt": "x",}',
    b'{"prompt": "x", '
b'"metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}", b'{"n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "n": '
b'1e0}', b"\x00" * 100, b'{"prompt": "a\nb"}', b'{"' + b"k" * 50_000 + b'": 1}',
]  # fmt: skip


def test_bodies_that_are_no_request() -> None:
    async def check(server: Server) -> None:
        for path in GOOD:
            for body in BODIES:
                response = await server.http.post(
                    path, content=body, headers={"Content-Type": "application/json"}
                )
                check_error(response, status=400)
        assert server.engine.requests == []

    run(check)


def test_duplicate_keys_take_the_last_value() -> None:
    async def check(server: Server) -> None:
        content = b'{"prompt": "x", "max_tokens": "bad", "max_tokens": 3}'
        response = await server.http.post(
            COMPLETIONS, content=content, headers={"Content-Type": "application/json"}
        )
        assert response.json()["usage"]["completion_tokens"] == 3

    run(check)


def test_a_prompt_beyond_the_context() -> None:
    async def check(server: Server) -> None:
        for path, change in (
            (COMPLETIONS, {"prompt": [5] * 512, "max_tokens": 1}),
            (COMPLETIONS, {"prompt": [5], "max_tokens": 512}),
            (CHAT, {"messages": [{"role": "user", "content": "hello " * 600}], "max_tokens": None}),
            (COMPLETIONS, {"prompt": "x" * 100_000}),
        ):
            response = await server.post(path, {**GOOD[path], **change})
            error = check_error(response, status=400)
            assert error["code"] == "context_length_exceeded" and "512" in error["message"]
        assert (await server.complete(prompt=[5] * 511, max_tokens=1))["usage"][
            "total_tokens"
        ] == 512

    run(check)


def test_an_unknown_model() -> None:
    async def check(server: Server) -> None:
        for path, body in GOOD.items():
            error = check_error(
                await server.post(path, {**body, "model": "gpt"}), status=404, param="model"
            )
            assert error["code"] == "model_not_found"
        check_error(await server.http.get("/v1/models/gpt"), status=404)

    run(check)


def test_routes_and_methods() -> None:
    async def check(server: Server) -> None:
        for path in (
            "/index.html",
            "/v1",
            "/docs/",
            "/openapi",
            "/v1/completions/",
            "//v1/models",
            "/%00",
        ):
            check_error(await server.http.get(path), status=404)
        for method in ("GET", "POST"):
            error = check_error(
                await server.http.request(method, "/v1/embeddings", json={"input": "x"}), status=404
            )
            assert "generates" in error["message"] and error["code"] == "not_found"
        for method, path in (
            ("GET", COMPLETIONS),
            ("DELETE", "/v1/models"),
            ("PUT", CHAT),
            ("POST", "/metrics"),
        ):
            response = await server.http.request(method, path)
            check_error(response, status=405)
            assert response.headers["allow"]

    run(check)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


def test_random_bodies_never_fail_the_server() -> None:
    """Random values for random fields: 200 or a 4xx. The engine stays well, a neighbour's answer
    unchanged."""
    import asyncio

    loop = asyncio.new_event_loop()
    context = serving(engine())
    server = loop.run_until_complete(context.__aenter__())
    before = loop.run_until_complete(server.complete(seed=1))["choices"]

    @settings(
        max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from([COMPLETIONS, CHAT]), st.data())
    def check(path: str, data: st.DataObject) -> None:
        names = data.draw(
            st.lists(st.sampled_from(fields_of(path)) | st.text(max_size=8), min_size=1, max_size=3)
        )
        body = {**GOOD[path], **{name: data.draw(json_values) for name in names}}
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": "application/json"}
        response = loop.run_until_complete(server.http.post(path, content=content, headers=headers))
        if response.status_code != 200:
            check_error(response)

    try:
        check()
        assert loop.run_until_complete(server.complete(seed=1))["choices"] == before
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def test_mutated_bodies_never_fail_the_server() -> None:
    """Good bodies with bytes changed, cut and doubled."""
    rng = random.Random(3)

    async def check(server: Server) -> None:
        statuses = []
        for _ in range(600):
            path = rng.choice([COMPLETIONS, CHAT])
            body = bytearray(
                json.dumps({**GOOD[path], "stop": ["a"], "logit_bias": {"5": 1.5}}).encode()
            )
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(body))
                match rng.randrange(3):
                    case 0:
                        body[at] = rng.randrange(256)
                    case 1:
                        del body[at : at + rng.randrange(5)]
                    case _:
                        body[at:at] = body[at : at + rng.randrange(9)]
            headers = {"Content-Type": "application/json"}
            response = await server.http.post(path, content=bytes(body), headers=headers)
            statuses.append(response.status_code)
            if response.status_code != 200:
                check_error(response)
        assert statuses.count(400) > 300

    run(check)


def test_logprobs_are_finite_json() -> None:
    async def check(server: Server) -> None:
        body = await server.complete(prompt=[20, 13, 21], echo=True, logprobs=0, max_tokens=0)
        assert body["choices"][0]["logprobs"]["token_logprobs"][1] == -9999.0
        assert all(math.isfinite(v) for v in body["choices"][0]["logprobs"]["token_logprobs"][1:])

    run(check)


def test_limits_are_checked_before_anything_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt costs is paid for no request that another field, or too many of something,
    refuses anyway."""
    about_the_prompt = ("prompt", "messages", "tokens", "messages[0].role")

    async def check(server: Server) -> None:
        for name in ("encode", "encode_chat"):
            monkeypatch.setattr(Tokenizer, name, lambda *_, **__: pytest.fail("tokenised"))
        for path, change, param in NAMED_CASES:
            too_many = (
                isinstance(change.get("messages", change.get("prompt")), list) and "[" not in param
            )
            if param not in about_the_prompt or too_many:
                check_error(
                    await server.post(path, {**GOOD[path], **change}), status=400, param=param
                )

    run(check)
