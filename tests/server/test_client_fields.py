"""What real clients send beside the prompt: what asks for nothing is taken, and what is taken has
its effect."""

from __future__ import annotations

import inspect
import json
import logging
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import Completions as ChatResource
from openai.resources.completions import Completions as CompletionResource

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.text import ChatTemplate, Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, engine, listening, run, tokenizer
from server.test_bad_requests import CHAT, COMPLETIONS, GOOD, check_error
from text.tiny_tokenizers import byte_level

MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}

# A value for each field of the client's create(): what agents and frameworks send by default, or
# that asks for nothing.
SHARED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"20": 1},
    "max_tokens": 3,
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 1,
    "stop": ["zz"],
    "stream": False,
    "stream_options": None,
    "temperature": 0.5,
    "top_p": 0.9,
    "user": "u",
}
CHAT_FIELDS: dict[str, Any] = SHARED | {
    "audio": None,
    "function_call": "none",
    "functions": [{"name": "f", "parameters": {}}],
    "logprobs": True,
    "max_completion_tokens": 3,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "service_tier": "fast",
    "store": False,
    "tool_choice": "none",
    "tools": [TOOL],
    "top_logprobs": 1,
    "verbosity": "low",
    "web_search_options": None,
}
COMPLETION_FIELDS: dict[str, Any] = SHARED | {
    "best_of": 1,
    "echo": True,
    "logprobs": 1,
    "suffix": "",
}
TRANSPORT = {
    "self",
    "model",
    "messages",
    "prompt",
    "extra_headers",
    "extra_query",
    "extra_body",
    "timeout",
}


@pytest.mark.case("C6")
def test_every_field_that_the_official_client_can_send() -> None:
    with (
        listening(engine()) as (port, _),
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=20
        ) as client,
    ):
        for resource, fields, prompt in (
            (ChatResource, CHAT_FIELDS, {"messages": MESSAGES}),
            (CompletionResource, COMPLETION_FIELDS, {"prompt": "hello"}),
        ):
            assert inspect.signature(resource.create).parameters.keys() - TRANSPORT <= fields.keys()
            create = (
                client.chat.completions.create
                if resource is ChatResource
                else client.completions.create
            )
            answer = create(model=MODEL, **prompt, **fields)
            assert len(answer.choices) == 2 and answer.usage.completion_tokens == 6
            for name, value in fields.items():
                alone = {name: value} | ({"logprobs": True} if name == "top_logprobs" else {})
                if name in ("tools", "functions"):
                    alone |= {"tool_choice": "none", "function_call": "none"}
                assert create(model=MODEL, **prompt, **alone).choices, name


@pytest.mark.case("C6")
def test_fields_of_other_servers_that_ask_for_nothing() -> None:
    fields: dict[str, Any] = {
        "include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True, "client_metadata": {"a": "b"},
        "reasoning_format": "auto", "context_management": [{}], "spaces_between_special_tokens": False, "add_special_tokens": False,
        "guided_json": None, "kv_transfer_params": None, "truncate_prompt_tokens": None, "vllm_xargs": {},
    }  # fmt: skip

    async def check(server: Server) -> None:
        for path in (COMPLETIONS, CHAT):
            response = await server.post(path, {**GOOD[path], **fields})
            assert response.status_code == 200, response.text

    run(check)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"separate_reasoning": False}, "separate_reasoning"),
        ({"stream_reasoning": False}, "stream_reasoning"),
        ({"reasoning_format": "none"}, "reasoning_format"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 3}, "thinking_token_budget": 7},
            "thinking_token_budget",
        ),
    ],
)
def test_what_would_change_an_answer_is_not_passed_over(fields: dict[str, Any], param: str) -> None:
    async def check(server: Server) -> None:
        response = await server.post(CHAT, {**GOOD[CHAT], **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)

    run(check)


@pytest.mark.parametrize("path", list(GOOD))
def test_unknown_fields_are_ignored_with_a_line_where_the_operator_says_so(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the value that nobody may log"
    unknown = {
        "zzz": secret,
        "a b\n=": secret,
        "n" * 5000: secret,
        "m" * 5000: 1,
        "l" * 5000: 1,
        "nothing": None,
    } | {f"x{i}": 1 for i in range(50)}

    async def warned(server: Server) -> None:
        plain = (await server.post(path, GOOD[path])).json()
        caplog.clear()
        response = await server.post(path, {**unknown, **GOOD[path]})
        assert response.status_code == 200, response.text
        assert (response.json().keys(), response.json().get("usage")) == (
            plain.keys(),
            plain.get("usage"),
        )
        (record,) = [record for record in caplog.records if record.name == "moebius.server.access"]
        line = record.getMessage()
        assert record.levelno == logging.WARNING
        assert (
            "ignored_fields=" in line
            and "zzz" in line
            and "and 50 more" in line
            and response.headers["x-request-id"] in line
        )
        assert (
            secret not in line and "nothing" not in line and line.isprintable() and len(line) < 700
        )
        caplog.clear()
        assert (await server.post(path, {**GOOD[path], "zzz": None})).status_code == 200
        assert "ignored_fields" not in caplog.text
        bad = {**GOOD[path], "zzz": 1, "model": 5}
        check_error(await server.post(path, bad), status=400, param="model")
        if path in (COMPLETIONS, CHAT):
            for known in ({"best_of": 2}, {"guided_json": 3}, {"timeout": 0}):
                response = await server.post(path, {**GOOD[path], "zzz": 1, **known})
                check_error(response, status=400, param=next(iter(known)))

    async def refused(server: Server) -> None:
        check_error(await server.post(path, {**GOOD[path], "zzz": 1}), status=400, param="zzz")

    with caplog.at_level(logging.INFO, "moebius"):
        run(warned, unknown_fields="warn")
    run(refused)


@pytest.mark.case("C6")
def test_unknown_keys_inside_messages_are_dropped() -> None:
    template = "{% for m in messages %}{{ m.keys() | sort | join(',') }};{% endfor %}"
    shows = Tokenizer(byte_level(), templates={"default": ChatTemplate(template)})
    messages = [
        {
            "role": "user",
            "content": "x",
            "zzz": {"a": [1]},
            "provider_specific_fields": {},
            "id": "m1",
        },
        {
            "role": "assistant",
            "content": "y",
            "refusal": None,
            "reasoning_details": [{}],
            "phase": "final",
        },
        {
            "role": "user",
            "content": [{"type": "text", "text": "z", "prompt_cache_breakpoint": True}],
        },
    ]

    async def check(server: Server) -> None:
        await server.chat(messages=messages, max_tokens=1)
        (request,) = server.engine.requests
        assert shows.decode(request.prompt_ids) == "content,role;" * 3

    run(check, tokenizer=shows)


@pytest.mark.case("C6")
def test_tools_that_must_not_be_called_are_not_shown() -> None:
    template = "{% if tools %}TOOLS{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    shows = Tokenizer(byte_level(), templates={"default": ChatTemplate(template)})

    async def check(server: Server) -> None:
        await server.chat(tools=[TOOL], tool_choice="none", max_tokens=1)
        assert shows.decode(server.engine.requests[0].prompt_ids) == "hello"
        for choice in ({}, {"tool_choice": "auto"}):
            response = await server.post(CHAT, {**GOOD[CHAT], "tools": [TOOL], **choice})
            check_error(response, status=400, param="tools")

    run(check, tokenizer=shows)


@pytest.mark.case("C6")
@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({}, "--"),
        ({"reasoning_effort": "none"}, "none-False-False"),
        ({"reasoning_effort": "high"}, "high-True-True"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"thinking": True}},
            "none-False-True",
        ),
    ],
)
def test_a_reasoning_effort_reaches_the_template(fields: dict[str, Any], rendered: str) -> None:
    template = "{{ reasoning_effort }}-{{ enable_thinking }}-{{ thinking }}"
    shows = Tokenizer(byte_level(), templates={"default": ChatTemplate(template)})

    async def check(server: Server) -> None:
        await server.chat(**fields, max_tokens=1)
        assert shows.decode(server.engine.requests[0].prompt_ids) == rendered

    run(check, tokenizer=shows)


@pytest.mark.case("C6")
def test_special_tokens_stay_in_the_text_where_they_are_not_to_be_skipped() -> None:
    said = "hello<|im_start|>world"
    ids = tokenizer().encode(said, False)

    async def check(server: Server) -> None:
        for skips, text in ((True, "helloworld"), (False, said)):
            fields = {"skip_special_tokens": skips, "max_tokens": len(ids), "ignore_eos": True}
            assert (await server.complete(**fields))["choices"][0]["text"] == text
            assert (await server.chat(**fields))["choices"][0]["message"]["content"] == text
            chunks = await server.stream(COMPLETIONS, **fields)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text

    run(check, FakeEngine(constant(ids), vocab_size=tokenizer().vocab_size))


@pytest.mark.case("C6")
def test_the_answers_id_ends_in_the_clients_request_id() -> None:
    async def check(server: Server) -> None:
        for _ in range(2):  # ours tell the two apart
            assert (await server.complete(request_id="job-7"))["id"] == "cmpl-job-7"
        chunks = await server.stream(CHAT, request_id="job-7", max_tokens=2)
        assert {chunk["id"] for chunk in chunks} == {"chatcmpl-job-7"}
        assert len({request.id for request in server.engine.requests}) == 3

    run(check)


@pytest.mark.case("C4")
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("last", [True, False])
def test_usage_in_every_chunk(path: str, last: bool) -> None:
    options = {"include_usage": last, "continuous_usage_stats": True}

    async def check(server: Server) -> None:
        chunks = await server.stream(
            path, stream_options=options, max_tokens=9, n=2, return_token_ids=True
        )
        prompt = len(server.engine.requests[0].prompt_ids)
        sent = {0: 0, 1: 0}
        for chunk in chunks[:-1] if last else chunks:
            (choice,) = chunk["choices"]
            sent[choice["index"]] += len(choice.get("token_ids", ()))
            completion = sent[choice["index"]]
            total = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
            details = {"prompt_tokens_details": {"cached_tokens": 5}}
            if path == CHAT:
                details |= {"completion_tokens_details": {"reasoning_tokens": 0}}
            assert chunk["usage"] == total | details
        assert sent == {0: 9, 1: 9}
        if last:
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 18

    run(check, engine(cached_tokens=5))


@pytest.mark.case("C5")
def test_what_is_too_long_is_told_in_openais_sentence() -> None:
    long = "hello " * 600

    async def check(server: Server) -> None:
        for path, change, words in (
            (
                CHAT,
                {"messages": [{"role": "user", "content": long}]},
                "However, your messages resulted in ",
            ),
            (
                CHAT,
                {"messages": [{"role": "user", "content": long}], "max_tokens": None},
                "However, your messages resu",
            ),
            (
                CHAT,
                {"messages": [{"role": "user", "content": long * 99}]},
                "your messages resulted in at least ",
            ),
            (
                CHAT,
                {"max_tokens": 512},
                " in the messages, 512 in the completion). Please reduce the length of the mess",
            ),
            (COMPLETIONS, {"prompt": long}, "However, your prompt resulted in "),
            (COMPLETIONS, {"prompt": long * 99}, "your prompt resulted in at least "),
            (COMPLETIONS, {"prompt": [5] * 600}, "your prompt resulted in 600 tokens"),
            (
                COMPLETIONS,
                {"max_tokens": 512},
                "you requested 513 tokens (1 in the prompt, 512 in the completion)",
            ),
            ("/tokenize", {"prompt": long * 99}, "prompt has over 2048: no more are counted"),
        ):
            response = await server.post(path, {**GOOD[path], **change})
            error = check_error(
                response, status=400, param="messages" if path == CHAT else "prompt"
            )
            assert error["code"] == "context_length_exceeded"
            assert error["message"].startswith(
                "This model's maximum context length is 512 tokens. However, "
            )
            assert words in error["message"], error
            # openai-python shows nothing but the message, and LangChain looks there for the code.
            assert error["message"].endswith(" (context_length_exceeded)"), error

    run(check)


def test_a_text_beyond_the_context_is_counted() -> None:
    async def check(server: Server) -> None:
        chat = [{"role": "user", "content": "hello " * 600}]
        for fields in ({"prompt": "hello " * 600}, {"messages": chat}):
            response = await server.post("/tokenize", fields)
            assert response.status_code == 200 and response.json()["count"] > 512, response.text

    run(check)


@pytest.mark.case("B3")
def test_a_priority_is_the_operators_to_allow() -> None:
    async def refused(server: Server) -> None:
        for path in (COMPLETIONS, CHAT):
            for priority in (-1, 1):
                response = await server.post(path, {**GOOD[path], "priority": priority})
                error = check_error(response, status=400, param="priority")
                assert (
                    "it must be 0" in error["message"] and "--scheduling-policy" in error["message"]
                )
            assert (await server.post(path, {**GOOD[path], "priority": 0})).status_code == 200

    async def allowed(server: Server) -> None:
        await server.complete(priority=-1)
        assert server.engine.requests[0].priority == -1

    run(refused)
    run(allowed, engine(priorities=True))


@pytest.mark.case("B3")
def test_the_scheduling_policy_is_one_of_two() -> None:
    assert EngineConfig().scheduling_policy == "fcfs"
    with pytest.raises(ConfigError, match="one of fcfs, priority"):
        EngineConfig(scheduling_policy="lifo")  # type: ignore[arg-type]


@pytest.mark.case("C15")
def test_a_byte_order_mark_is_read_and_other_encodings_are_named() -> None:
    async def check(server: Server) -> None:
        text = json.dumps({**GOOD[COMPLETIONS], "prompt": "naïve"}, ensure_ascii=False)
        headers = {"Content-Type": "application/json"}
        for encoding in ("utf-8", "utf-8-sig"):
            response = await server.http.post(
                COMPLETIONS, content=text.encode(encoding), headers=headers
            )
            assert response.status_code == 200, response.text
        ids = [request.prompt_ids for request in server.engine.requests]
        assert ids[0] == ids[1] == tuple(tokenizer().encode("naïve"))
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
            response = await server.http.post(
                COMPLETIONS, content=text.encode(encoding), headers=headers
            )
            message = check_error(response, status=400)["message"]
            assert encoding[:6].upper() in message and "must be sent as UTF-8" in message

    run(check)


def test_a_refusal_says_what_would_be_right() -> None:
    async def check(server: Server) -> None:
        for change, param, words in (
            ({"model": "gpt-4"}, "model", f"'gpt-4' is not served here; use '{MODEL}' or 'alias'"),
            ({"tools": [TOOL]}, "tools", 'leave them out, send "tool_choice": "none" beside them'),
            (
                {"functions": [TOOL]},
                "functions",
                'leave it out, or send "function_call": "none" beside it',
            ),
        ):
            response = await server.post(CHAT, {**GOOD[CHAT], **change})
            error = check_error(response, status=404 if param == "model" else 400, param=param)
            assert words in error["message"], error

    run(check)


def test_the_list_of_models_may_end_in_a_slash() -> None:
    async def check(server: Server) -> None:
        response = await server.http.get("/v1/models/")
        assert (
            response.status_code == 200
            and response.json() == (await server.http.get("/v1/models")).json()
        )

    run(check)


@pytest.mark.case("C25")
def test_what_clients_of_vllm_read_is_there() -> None:
    async def check(server: Server) -> None:
        assert (await server.complete(n=2))["choices"][1]["prompt_logprobs"] is None
        assert (await server.chat())["prompt_logprobs"] is None
        cards = (await server.http.get("/v1/models")).json()["data"]
        for card in cards:
            assert (card["root"], card["parent"], card["max_model_len"]) == (MODEL, None, 512)
            (permission,) = card["permission"]
            assert (
                permission["object"] == "model_permission" and permission["allow_sampling"] is True
            )
        assert [card["id"] for card in cards] == [MODEL, "alias"]

    run(check)
