"""What is wrong with a body, in the words of its client's fields: no name of a type of ours."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.errors import RequestError
from moebius.server.messages_bodies import read_messages
from moebius.server.ollama_bodies import OllamaChat
from moebius.server.protocol import parse
from moebius.server.responses_bodies import read_responses

USER = {"role": "user", "content": "x"}
READERS = {
    "responses": lambda fields: read_responses({"input": "x", **fields}),
    "messages": lambda fields: read_messages({"messages": [USER], "max_tokens": 1, **fields}),
    "ollama": lambda fields: parse(OllamaChat, {"messages": [USER], **fields}),
}


@pytest.mark.parametrize(
    ("api", "fields", "says"),
    [
        ("responses", {"input": 3}, "input: Input should be a valid string or a valid list"),
        ("responses", {"tool_choice": 3}, "tool_choice: Input should be a valid string or an object"),
        ("responses", {"stream_options": 3}, "stream_options: Input should be an object"),
        ("messages", {"system": 3}, "system: Input should be a valid string or a valid list"),
        ("messages", {"system": [3]}, "system[0]: Input should be an object"),
        ("messages", {"stop_sequences": ["a", 3]}, "stop_sequences[1]: Input should be a valid string"),
        ("ollama", {"think": 3}, "think: Input should be a valid boolean or a valid string"),
        ("ollama", {"options": {"stop": 3}}, "options.stop: Input should be a valid list or a valid string"),
        ("ollama", {"options": {"stop": [3]}}, "options.stop[0]: Input should be a valid string"),
        ("ollama", {"options": {"mirostat": 1}}, "options.mirostat: there is no such field"),
    ],
)  # fmt: skip
def test_a_field_of_several_types_is_named_as_it_was_sent(
    api: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        READERS[api](fields)
    assert str(caught.value) == says
    assert caught.value.param == says.split(":")[0]


def test_a_clients_own_key_is_no_type() -> None:
    """Named as its field is, whatever it is called."""
    with pytest.raises(RequestError) as caught:
        parse(OllamaChat, {"messages": [USER], "options": {"str": 1}})
    assert caught.value.param == "options.str"
