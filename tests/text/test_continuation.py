"""Chats whose last message stays open: what a prompt ends with, against transformers and by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moebius.errors import RequestError
from moebius.text import ChatTemplate, Tokenizer
from text import family_templates
from text.tiny_tokenizers import FAMILIES, byte_level

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
QUESTION = {"role": "user", "content": "hello"}


def of(template: str) -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(byte_level(), names, templates={"default": ChatTemplate(template)})


def opened(tokenizer: Tokenizer, content: Any) -> str:
    messages = [QUESTION, {"role": "assistant", "content": content}]
    prompt = tokenizer.chat_prompt(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert prompt.inside and prompt.generation_start is None
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ids == list(prompt.ids)
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("prefill", ["def f", "def f(x):\n    ", "x ", " \n x\t\n", "é😀", "", " "])
@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["trims", "wants parts"])
def test_the_prompt_ends_with_the_prefill_as_it_is_written(template: str, prefill: str) -> None:
    text = opened(of(template), prefill)
    begun = prefill.lstrip() if template is CHATML else prefill
    assert text.endswith("hello<|im_end|>\n<|im_start|>assistant\n" + begun)


def test_a_list_of_parts_goes_on_with_its_last_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    assert opened(of(PARTS), parts).endswith("assistant\nab ")
    assert opened(of(CHATML), parts).endswith("assistant\na\nb ")


@pytest.mark.parametrize("name", sorted(family_templates.FAMILIES))
def test_it_is_what_transformers_renders(name: str) -> None:
    """With text that no template trims, since transformers cuts at the trimmed text."""
    source = family_templates.FAMILIES[name].source
    messages = [QUESTION, {"role": "assistant", "content": "Once upon"}]
    known = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        (theirs,), _ = render_jinja_template(
            [messages], chat_template=source, continue_final_message=True, **known
        )
    except Exception as error:
        pytest.skip(f"transformers cannot: {error}")
    ours = of(source)
    ids = ours.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ids == ours.encode(theirs, False)


def test_special_text_in_a_prefill_stays_plain() -> None:
    tokenizer = of(CHATML)
    messages = [QUESTION, {"role": "assistant", "content": "a<|im_end|>"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    closing = tokenizer.encode("<|im_end|>", False)
    assert ids[-1:] != closing
    assert ids.count(closing[0]) == 1  # the question's own
    assert tokenizer.decode(ids, False).endswith("a<|im_end|>")


@pytest.mark.parametrize(
    "messages, says",
    [
        ([QUESTION], "must be the assistant's"),
        ([QUESTION, {"role": "assistant", "content": None}], "which has none"),
        ([QUESTION, {"role": "assistant", "content": []}], "which has none"),
        (
            [
                QUESTION,
                {
                    "role": "assistant",
                    "content": "I",
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
            ],
            "calls tools behind it",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        of(CHATML).chat_prompt(messages, add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_template_that_leaves_the_text_out_is_named() -> None:
    silent = of("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(RequestError, match="does not show the last message"):
        opened(silent, "a")


def test_a_new_message_and_the_last_one_are_two_things() -> None:
    with pytest.raises(RequestError, match="cannot both be true"):
        of(CHATML).chat_prompt([QUESTION], continue_final_message=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_special_tokens_are_added_once(family: str) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for begin in ("", "{{ bos_token }}"):
        template = ChatTemplate(begin + "{% for m in messages %}{{ m.content }}{% endfor %}")
        tokenizer = Tokenizer(
            FAMILIES[family](), names, add_bos=True, templates={"default": template}
        )
        without = tokenizer.chat_prompt([QUESTION])
        added = tokenizer.chat_prompt([QUESTION], add_special_tokens=True)
        assert list(added.ids).count(tokenizer.bos_id) == 1
        missing = 0 if begin else 1
        assert list(added.ids)[missing:] == list(without.ids)
        if without.generation_start is not None:
            assert added.generation_start == without.generation_start + missing


def test_documents_reach_a_template_that_takes_them_and_no_other() -> None:
    documents = [{"title": "T", "text": "some <|im_end|> text"}]
    takes = of("{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + CHATML)
    ids = takes.chat_prompt([QUESTION], {"documents": documents}).ids
    assert takes.decode(ids, False).startswith("[T: some <|im_end|> text]<|im_start|>user")
    assert list(ids).count(takes.encode("<|im_end|>", False)[0]) == 1
    with pytest.raises(RequestError, match="takes none") as caught:
        of(CHATML).chat_prompt([QUESTION], {"documents": documents})
    assert caught.value.param == "documents"
    assert of(CHATML).chat_prompt([QUESTION], {"documents": []}).ids
