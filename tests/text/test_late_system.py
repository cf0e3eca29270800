"""System messages in the middle of a chat, as agents send them: shown in their place whatever the
template would do with them."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.text import ChatTemplate
from moebius.text.chat import normalise_messages

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}"
    + TURNS
)
LEAVES_OUT = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}] {{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
MOVES = (
    "{% for m in messages if m.role == 'system' %}[system] {{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
IN_PARTS = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('no') }}{% endif %}[{{ m.role }}] {% for part in m.content %}"
    "{{ part.text }}|{% endfor %}{{ '\n' }}{% endfor %}"
)
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "B."},
    {"role": "system", "content": "9 tokens left"},
    {"role": "user", "content": "C?"},
    {"role": "assistant", "content": "D."},
    {"role": "user", "content": "E?"},
    {"role": "system", "content": "5 tokens left"},
]


def rendered(source: str, messages: list[dict[str, Any]]) -> str:
    template = ChatTemplate(source)
    return template.render({"messages": normalise_messages(messages, template.probe({}))})


@pytest.mark.parametrize("source", [REFUSES, LEAVES_OUT, MOVES])
def test_what_would_not_be_shown_in_its_place_is_said_by_the_user(source: str) -> None:
    assert rendered(source, CHAT) == (
        "[system] Be kind.\n\nBe brief.\n[user] A?\n[assistant] B.\n"
        "[user] 9 tokens left\n\nC?\n[assistant] D.\n[user] E?\n\n5 tokens left\n"
    )


def test_parts_stay_parts() -> None:
    assert rendered(IN_PARTS, CHAT) == (
        "[system] Be kind.|Be brief.|\n[user] A?|\n[assistant] B.|\n"
        "[user] 9 tokens left|C?|\n[assistant] D.|\n[user] E?|5 tokens left|\n"
    )


def test_a_template_that_shows_them_gets_them() -> None:
    assert rendered(TURNS, CHAT) == "".join(
        f"[{message['role'].replace('developer', 'system')}] {message['content']}\n"
        for message in CHAT
    )


@pytest.mark.parametrize("source", [TURNS, REFUSES, LEAVES_OUT, MOVES, IN_PARTS])
def test_a_longer_chat_begins_as_the_shorter_one(source: str) -> None:
    """As it must for the prefix cache, up to the turn that a system message is added to."""
    for length in (4, 7):
        assert rendered(source, CHAT).startswith(rendered(source, CHAT[:length]))


@pytest.mark.parametrize("source", [REFUSES, LEAVES_OUT, MOVES])
def test_users_that_nothing_is_moved_to_stay_apart(source: str) -> None:
    chat = [{"role": "user", "content": "A?"}, {"role": "user", "content": "B?"}]
    assert rendered(source, chat) == "[user] A?\n[user] B?\n"
