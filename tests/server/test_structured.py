"""Structured output through a real server: the official client's ways, every field that says it, and
what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from moebius.errors import OverloadError, RequestError
from moebius.request.structured import StructuredOutput
from moebius.server import compiling
from moebius.server.compiling import GrammarDesk
from moebius.text.grammar import CheckedGrammar
from serving import serving
from tiny import write_model

MODEL = "tiny"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a fruit"}]}


class Colour(StrEnum):
    red = "red"
    green = "dark green"


class Part(BaseModel):
    colour: Colour
    grams: int | None


class Fruit(BaseModel):
    ripe: bool
    colour: Colour
    part: Part
    parts: list[Part]
    nickname: Colour | None


class Tree(BaseModel):
    leaf: bool
    left: Tree | None


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    with serving(directory, MODEL) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("kind", [Fruit, Tree])
def test_the_official_client_parses_what_it_asked_for(
    client: openai.OpenAI, kind: type[BaseModel]
) -> None:
    """Nested models, enumerations, lists, what may be null, and a model that holds itself."""
    parsed = 0
    for seed in range(6):
        try:
            answer = client.chat.completions.parse(
                **ASK, response_format=kind, seed=seed, max_tokens=400
            )
        except openai.LengthFinishReasonError:
            continue
        assert isinstance(answer.choices[0].message.parsed, kind)
        assert answer.choices[0].finish_reason == "stop"
        parsed += 1
    assert parsed


def test_a_truncated_answer_is_told_by_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ASK, response_format=Fruit, max_tokens=3)


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}
    whole = client.chat.completions.create(**ASK, response_format=wanted, seed=5, max_tokens=300)
    stream = client.chat.completions.create(
        **ASK, response_format=wanted, seed=5, max_tokens=300, stream=True
    )
    pieces = [chunk.choices[0] for chunk in stream]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason


OBJECT = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
}
GOOD: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": OBJECT}}}, OBJECT),
    ({"response_format": {"type": "json_schema", "schema": OBJECT}}, OBJECT),
    ({"response_format": {"type": "json_object", "schema": OBJECT}}, OBJECT),
    ({"response_format": {"type": "text"}, "structured_outputs": {"json": OBJECT}}, OBJECT),
    ({"structured_outputs": {"json": json.dumps(OBJECT), "disable_any_whitespace": True}}, OBJECT),
    ({"guided_json": OBJECT, "guided_decoding_backend": "outlines"}, OBJECT),
    ({"json_schema": OBJECT}, OBJECT),
    ({"structured_outputs": {"regex": "[ab]{2}"}}, ("aa", "ab", "ba", "bb")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
    ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, ("x", "y")),
    ({"guided_regex": "[ab]{2}"}, ("aa", "ab", "ba", "bb")),
    ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
    ({"guided_grammar": 'root ::= "x" | "y"'}, ("x", "y")),
    ({"grammar": 'root ::= "x" | "y"'}, ("x", "y")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), GOOD, ids=lambda each: str(each)[:50])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_every_field_that_says_what_the_text_is_to_be(
    address: str, path: str, fields: dict[str, Any], expected: Any
) -> None:
    ask = ASK if path.startswith("chat") else {"model": MODEL, "prompt": "a fruit"}
    for seed in range(2):
        body = {**ask, **fields, "seed": seed, "max_tokens": 60}
        answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        text = choice["message"]["content"] if path.startswith("chat") else choice["text"]
        assert choice["finish_reason"] == "stop"
        if isinstance(expected, dict):
            jsonschema.validate(json.loads(text), expected)
        else:
            assert text in expected


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "structural_tag"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format.json_schema.name", "name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}, "strict": True}}}, "response_format.json_schema.schema", 'Unimplemented keys: ["not"]'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}, "response_format.json_schema.schema", "object"),
    ({"response_format": {"type": "json_object", "shcema": {}}}, "response_format.shcema", "no such field"),
    ({"structured_outputs": {}}, "structured_outputs", "is empty"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json and regex"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "true"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "structural_tag"),
    ({"structural_tag": "{}"}, "structural_tag", "not supported"),
    ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs", "look-around"),
    ({"guided_regex": "a", "grammar": 'start: "a"'}, "grammar", "guided_regex and grammar"),
    ({"grammar": 'start: "a"', "json_schema": {}}, "json_schema", "grammar and json_schema"),
    ({"guided_choice": []}, "guided_choice", "empty"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_json"),
    ({"json_schema": {"$ref": "https://example.org/a"}}, "json_schema", "example.org"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "1000000"),
    ({"bad_words": [""]}, "bad_words", "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "says"), BAD, ids=lambda each: str(each)[:40])
def test_what_cannot_be_held_to_is_refused(
    address: str, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json={**ASK, **fields}, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param and says in error["message"] and "\n" not in error["message"]


def test_a_lenient_schema_is_held_to_as_far_as_it_goes(address: str) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {**ASK, "response_format": wanted, "max_tokens": 30}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    found = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert set(found) <= {1, 2} and len(found) <= 2


def test_allowed_ids_and_bad_words_reach_the_engine(address: str) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 12, "return_token_ids": True, "seed": 1}
    url = f"{address}/v1/completions"
    choice = httpx.post(url, json={**body, "allowed_token_ids": [70, 71]}).json()["choices"][0]
    assert set(choice["token_ids"]) <= {70, 71}
    free = httpx.post(url, json=body).json()["choices"][0]["text"]
    word = next(each for each in free if each.isalpha() and each.isascii())
    held = httpx.post(url, json={**body, "bad_words": [word]}).json()["choices"][0]["text"]
    assert held != free


def test_grammars_are_checked_beside_the_event_loop_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def slow(wanted: StructuredOutput) -> CheckedGrammar:
        assert go_on.wait(60)
        return CheckedGrammar("{}")

    monkeypatch.setattr(compiling, "checked_grammar", slow)
    monkeypatch.setattr(compiling, "_MOST_WAITING", 2)

    async def check() -> None:
        desk = GrammarDesk()
        first = asyncio.create_task(desk.checked(StructuredOutput(regex="a", param="x"), 0.05))
        second = asyncio.create_task(desk.checked(StructuredOutput(regex="b")))
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="2 grammars"):
            await desk.checked(StructuredOutput(regex="c"))
        with pytest.raises(RequestError, match=r"x takes over 0\.05 s") as raised:
            await first
        assert raised.value.param == "x" and not second.done()
        go_on.set()
        assert await second == CheckedGrammar("{}")
        await asyncio.sleep(0.1)
        assert await desk.checked(StructuredOutput(regex="c")) == CheckedGrammar("{}")
        desk.close()

    asyncio.run(check())
