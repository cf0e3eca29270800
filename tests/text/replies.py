"""What the tests of reply formats share: a tokenizer with a family's control tokens, and a reply
that is read in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from moebius.text import ChatTemplate, EncodedPrompt, Expected, ReplyFormat, Tokenizer
from moebius.text.replies import Event, Said, fold
from text.tiny_tokenizers import byte_level

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS: Mapping[str, Mapping[str, Any]] = {
    "get_weather": WEATHER,
    "now": {"type": "object", "properties": {}},
}


def family(
    tokens: Sequence[str] = (),
    says: str = "",
    *,
    special: bool = False,
    template: str = CHATML,
) -> Tokenizer:
    """A tokenizer whose added tokens are these, with a chat template that holds `says`."""
    backend = byte_level()
    # Whether text or a token: the tests' trained vocabulary has one of the two as a token.
    added = [AddedToken(token, normalized=False, special=special) for token in tokens]
    (backend.add_special_tokens if special else backend.add_tokens)(added)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    source = f"{{# {says} #}}{template}"
    return Tokenizer(backend, names, templates={"default": ChatTemplate(source)})


def events(
    tokenizer: Tokenizer,
    reply: str,
    ends: Sequence[int] | None = None,
    *,
    tools: Mapping[str, Mapping[str, Any]] | None = TOOLS,
    prompt: EncodedPrompt | None = None,
    cut: bool = False,
    spelled: bool = False,
    replies: ReplyFormat | None = None,
) -> list[Event]:
    """The events of a reply whose text comes in pieces that end here; one piece for None.

    spelled: its markers are no tokens, though the vocabulary has such.
    """
    given = EncodedPrompt([]) if prompt is None else prompt
    parser = (replies or tokenizer.replies).parser(given, Expected(tools=tools), "r")
    text = reply
    for token_id, symbol in parser.symbols.items():
        text = text if spelled else text.replace(tokenizer.spelling(token_id) or "", symbol)
    found: list[Event] = []
    at = 0
    for end in (len(text),) if ends is None else (*ends, len(text)):
        found += parser.push(text[at:end])
        at = max(at, end)
    return found + parser.finish(cut=cut)


def said(tokenizer: Tokenizer, reply: str, **options: Any) -> Said:
    """What a reply comes to, which is the same however it is cut: once, in every place, or into
    single characters and control tokens."""
    whole = fold(events(tokenizer, reply, **options))
    assert fold(events(tokenizer, reply, range(len(reply)), **options)) == whole
    for at in range(len(reply)):
        assert fold(events(tokenizer, reply, [at], **options)) == whole, reply[:at]
    return whole


def calls(found: Said) -> list[tuple[str, str]]:
    """Names and arguments."""
    return [(call.name, call.arguments) for call in found.calls]
