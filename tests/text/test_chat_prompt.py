"""Where a chat's generation prompt begins, against transformers with and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from moebius.text import ChatTemplate, Tokenizer
from text.tiny_tokenizers import FAMILIES, byte_level, save

CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was ist ein Café? 🙂"},
    {"role": "assistant", "content": "hello <tool_call> world\n"},
    {"role": "user", "content": "    x"},
]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_generation_prompt_begins_where_a_chat_without_one_ends(
    family: str, tmp_path: Path
) -> None:
    directory = save(FAMILIES[family](), tmp_path)
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    for messages in (CHAT, CHAT[1:2], [{"role": "user", "content": "<|im_end|>"}]):
        prompt = ours.chat_prompt(messages)
        assert prompt.ids == ours.encode_chat(messages)
        if any("<|im_end|>" in message["content"] for message in messages):
            without = ours.encode_chat(messages, add_generation_prompt=False)
        else:
            without = theirs.apply_chat_template(messages, return_dict=False)
        assert prompt.generation_start == len(without) < len(prompt.ids)
        assert list(prompt.ids[: len(without)]) == without


def loaded(template: str, tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(save(byte_level(), tmp_path, chat_template=template))


@pytest.mark.parametrize(
    "template",
    [
        # The end of the history changes too, or all of it.
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% else %}?{% endif %}",
        "{% if add_generation_prompt %}answer: {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
        # Nobody but the answered chat is rendered.
        "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_where_it_changes_more_than_the_end_nothing_is_said(template: str, tmp_path: Path) -> None:
    assert loaded(template, tmp_path).chat_prompt(CHAT[:1]).generation_start is None


def test_where_a_token_spans_the_seam_nothing_is_said(tmp_path: Path) -> None:
    """`hel` and `lo` apart are other tokens than `hello`: no cache could end between them."""
    seam = "{{ messages[0].content }}{% if add_generation_prompt %}lo{% endif %}"
    ours = loaded(seam, tmp_path)
    ids = ours.encode_chat([{"role": "user", "content": "hel"}])
    apart = [*ours.encode("hel", False), *ours.encode("lo", False)]
    prompt = ours.chat_prompt([{"role": "user", "content": "hel"}])
    assert ids != apart and prompt.generation_start is None


def test_a_template_that_adds_nothing_ends_with_the_history(tmp_path: Path) -> None:
    prompt = loaded("{{ messages[0].content }}", tmp_path).chat_prompt(CHAT[:1])
    assert prompt.generation_start == len(prompt.ids)


def test_a_template_that_adds_by_the_last_role_is_followed(tmp_path: Path) -> None:
    """What was learnt of one chat must not be taken for another's."""
    ours = loaded(
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_end|>' if messages[-1].role == 'user' else '<|im_end|><|im_start|>' }}{% endif %}",
        tmp_path,
    )
    for _ in range(2):
        for role, added in (("user", 1), ("system", 2), ("user", 1)):
            prompt = ours.chat_prompt([{"role": role, "content": "x"}])
            assert len(prompt.ids) - (prompt.generation_start or 0) == added


def test_a_chat_is_rendered_twice_only_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Tokenizer.load(save(byte_level(), tmp_path))
    made: list[object] = []
    honest = ChatTemplate.render

    def render(self: ChatTemplate, variables: object, **rest: object) -> str:
        made.append(variables)
        return honest(self, variables, **rest)

    monkeypatch.setattr(ChatTemplate, "render", render)
    starts = []
    for i in range(3):
        messages = [{"role": "user", "content": "x" * i}]
        starts.append(ours.chat_prompt(messages).generation_start)
    assert len(made) == 3 + 1
    expected = [
        len(ours.encode_chat([{"role": "user", "content": "x" * i}], add_generation_prompt=False))
        for i in range(3)
    ]
    assert starts == expected
