"""Which tokens a reply's content is made of, beside a count of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.front.assemble import Delta, SequenceAssembler
from moebius.front.origins import Origins, Place
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.text import EncodedPrompt, Expected, Tokenizer
from moebius.text.replies import Content, Event, Reasoning
from text.harmony import harmony_tokenizer
from text.replies import TOOLS, family

SETTINGS = settings(derandomize=True, deadline=None, max_examples=200, database=None)
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>"
SEED = "<seed:think> </seed:think> <function= <parameter= <seed:tool_call>"

Parts = Sequence[tuple[str, bool]]
"""A reply as its parts, and whether each is content."""


def marked(reply: str) -> list[tuple[str, bool]]:
    """Parts of a reply in which what is content is between ⟦ and ⟧."""
    parts = []
    for piece in reply.split("⟦"):
        content, bracket, other = piece.rpartition("⟧")
        parts += [(content, bool(bracket)), (other, False)]
    return [part for part in parts if part[0]]


# By the name of a tokenizer: its own, and the name of its format of calls.
KINDS: dict[str, tuple[Tokenizer, str]] = {
    "tokens": (family(MARKERS), "hermes"),
    "special": (family(MARKERS, special=True), "hermes"),
    # Tokens that are the end of a marker and the beginning of a text, and the other way round.
    "spelled": (family(("k>Hi", "e.<", "l>\nB", "</seed:think>So"), SEED), "seed-xml"),
    "bare": (family((), "tools parameters ipython"), "llama3"),
    "harmony": (harmony_tokenizer(), "harmony"),
}
REPLIES = [
    ("tokens", "⟦Grüße 🦉 aus <b> Köln⟧"),
    ("tokens", f"<think>\nHm 🦉.\n</think>\n\n⟦Grüße <t 🦉\n⟧{CALL}\n⟦日本, and\n⟧{CALL}\n"),
    ("special", f"<think>\nHm 🦉.\n</think>\n\n⟦Grüße <t 🦉\n⟧{CALL}\n⟦日本⟧<|im_start|>⟦ x⟧"),
    ("tokens", "⟦ No <tool_call>\nno call 🦉</tool_call> here⟧"),
    ("tokens", '⟦<tool_call>{"name": "now", "arguments": [🦉]}⟧'),
    ("tokens", "⟦a</think>\nb 🦉⟧<think>x 🦉</think>\n⟦c 🦉⟧"),
    ("tokens", "<think>All of it is thought 🦉"),
    ("tokens", "⟦\n \n⟧"),
    ("spelled", f"<seed:think>Hm.</seed:think>⟦Hi there.⟧{XML}\n⟦But 🦉 <seed⟧"),
    ("spelled", f"<seed:think>Hm.</seed:think>⟦Here.<seed:x> <⟧{XML}\n⟦But⟧"),
    ("bare", '⟦{"name": "Rome", "people": 2800000} 🦉⟧'),
    ("bare", '{"name": "now", "parameters": {}}'),
    (
        "harmony",
        "<|channel|>analysis<|message|>Grüße? 🦉<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>⟦Well 🦉, ⟧<|end|><|start|>assistant<|channel|>final<|message|>⟦Grüße 😀!⟧",
    ),
]


def assembler(kind: str, **params: object) -> SequenceAssembler:
    tokenizer, calls = KINDS[kind]
    given = SamplingParams(logprobs=0, **params)  # type: ignore[arg-type]
    replies = tokenizer.replies.with_tools(calls)
    prompt = EncodedPrompt([])
    if kind == "harmony":
        prompt = tokenizer.chat_prompt([{"role": "user", "content": "hello"}])
    parser = replies.parser(prompt, Expected(tools=TOOLS), "r")
    return SequenceAssembler(tokenizer, given, reply=parser)


def pushed(found: SequenceAssembler, ids: Sequence[int], step: int) -> list[Delta]:
    """The deltas of a reply that comes so many tokens at a time, and is cut by its length."""
    numbers = count()
    deltas = []
    for at in range(0, len(ids), step):
        some = tuple(ids[at : at + step])
        logprobs = tuple(TokenLogprob(token, -float(next(numbers)), 1) for token in some)
        last = FinishReason.LENGTH if at + step >= len(ids) else None
        deltas.append(found.push(StepOutput("r", some, logprobs, finish_reason=last)))
        if found.finished:
            break
    return deltas


def owners(tokenizer: Tokenizer, ids: Sequence[int], parts: Parts) -> list[int]:
    """The token that each byte of the content is of."""
    of_all = [i for i, token in enumerate(ids) for _ in tokenizer.token_bytes(token)]
    found: list[int] = []
    at = 0
    for text, is_content in parts:
        end = at + len(text.encode())
        found += of_all[at:end] if is_content else []
        at = end
    assert at == len(of_all), "the reply is tokenised as it is written"
    return found


def check(events: Sequence[Event], content: str, owner: Sequence[int]) -> None:
    """Each piece of content names the tokens of its bytes, but for those that were named before."""
    at = 0
    named: list[int] = []
    said = ""
    for event in events:
        if isinstance(event, Content):
            said += event.text
            end = at + len(event.text.encode())
            own = dict.fromkeys(owner[at:end])
            assert list(event.tokens) == [token for token in own if token not in named]
            named += event.tokens
            at = end
    assert said == content and named == list(dict.fromkeys(owner))


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
@pytest.mark.parametrize(("kind", "reply"), REPLIES)
def test_content_names_its_tokens(kind: str, reply: str, step: int) -> None:
    tokenizer, _ = KINDS[kind]
    parts = marked(reply)
    ids = tokenizer.encode("".join(text for text, _ in parts), False)
    found = assembler(kind)
    deltas = pushed(found, ids, step)
    content = "".join(text for text, is_content in parts if is_content)
    owner = owners(tokenizer, ids, parts)
    check([event for delta in deltas for event in delta.events], content, owner)
    check(found.released.events, content, owner)
    assert [entry.token_id for entry in found.output_logprobs] == ids == found.output_ids


def test_the_cases_have_tokens_across_a_borders_sides() -> None:
    """Else the oracle above would be no harder than a list of parts' tokens."""
    kind, reply = REPLIES[8]
    pieces = [
        KINDS[kind][0].token_text(i)
        for i in KINDS[kind][0].encode(reply.translate({0x27E6: "", 0x27E7: ""}), False)
    ]
    assert {"k>Hi", "e.<", "l>\nB"} <= set(pieces)


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_character_that_is_cut_off(step: int) -> None:
    """Of its tokens those are named that were drawn."""
    tokenizer, _ = KINDS["tokens"]
    ids = tokenizer.encode("so 🦉", False)
    of_character = [i for i, token in enumerate(ids) if max(tokenizer.token_bytes(token)) >= 0x80]
    assert len(of_character) >= 3
    left = ids[: of_character[-1]]
    deltas = pushed(assembler("tokens"), left, step)
    events = [event for delta in deltas for event in delta.events]
    content = "".join(event.text for event in events if isinstance(event, Content))
    named = [token for event in events if isinstance(event, Content) for token in event.tokens]
    assert (content, named) == ("so �", list(range(len(left))))


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_character_that_was_begun_and_left(step: int) -> None:
    """It is one of the thought; the token behind it, which ends that, is the only one of the
    text."""
    tokenizer, _ = KINDS["spelled"]
    of_byte = {tokenizer.token_bytes(token): token for token in range(256 + 10)}
    ids = [*tokenizer.encode("<seed:think>Hm ", False), of_byte[b"\xe2"]]
    ids += tokenizer.encode("</seed:think>So", False)
    events = [e for delta in pushed(assembler("spelled"), ids, step) for e in delta.events]
    assert events[-1] == Content("So", (len(ids) - 1,))
    assert "".join(event.text for event in events[:-1] if isinstance(event, Reasoning)) == "Hm �"


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_stop_string_is_no_content(step: int) -> None:
    tokenizer, _ = KINDS["tokens"]
    text = "Grüße aus Köln"
    ids = tokenizer.encode(text, False)
    found = assembler("tokens", stop=("aus K",))
    deltas = pushed(found, ids, step)
    owner = owners(tokenizer, ids, [("Grüße ", True), ("aus Köln", False)])
    check([event for delta in deltas for event in delta.events], "Grüße ", owner)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_text_that_is_no_reply(step: int) -> None:
    """Where special tokens are wanted all is content, markers too; the tokens of its end are."""
    tokenizer, _ = KINDS["special"]
    text = "<think>Grüße 🦉</think>\n\nx"
    ids = tokenizer.encode(text, False)
    found = SequenceAssembler(tokenizer, SamplingParams(logprobs=0, skip_special_tokens=False))
    deltas = pushed(found, ids, step)
    owner = owners(tokenizer, ids, [(text, True)])
    check([event for delta in deltas for event in delta.events], text, owner)


def test_nobody_counts_where_no_logprobs_are_asked_for() -> None:
    tokenizer, _ = KINDS["tokens"]
    for reply in (None, tokenizer.replies.parser(EncodedPrompt([]), Expected(), "r")):
        found = SequenceAssembler(tokenizer, SamplingParams(), reply=reply)
        for delta in pushed(found, tokenizer.encode("Hi 🦉", False), 2):
            assert all(event == Content(event.text) for event in delta.events)


@given(st.data())
@SETTINGS
def test_it_makes_no_difference_how_a_reply_is_cut(data: st.DataObject) -> None:
    """Of any tokens, broken characters and stray markers among them."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    tokenizer, _ = KINDS[kind]
    token = st.integers(0, tokenizer.vocab_size - 1)
    control = st.sampled_from(sorted(assembler(kind)._feed.symbols) or [0])
    ids = data.draw(st.lists(st.one_of(token, control), min_size=1, max_size=30))
    found = []
    for step in (1, data.draw(st.integers(2, 6)), len(ids)):
        events = [e for delta in pushed(assembler(kind), ids, step) for e in delta.events]
        pieces = [event for event in events if isinstance(event, Content)]
        named = [token for piece in pieces for token in piece.tokens]
        assert named == sorted(set(named)), "each once, in order"
        found.append(("".join(piece.text for piece in pieces), named))
    assert found[0] == found[1] == found[2]


def test_origins_by_hand() -> None:
    """Five characters are read as `ab<symbol>cd`: token 3 is empty, 4 and 5 share c."""
    places = [Place(0, 0, 1), Place(1, 1, 2), Place(2, 2, 9, "!"), Place(3, 9, 9)]
    places += [Place(4, 9, 10), Place(5, 9, None)]
    origins = Origins()
    for place in places:
        origins.expect(place)
    origins.reads(2)
    assert origins.of(1, 2) == (1,), "a is not asked for"
    origins.reads_symbol(places[2], 2)
    origins.reads(10, -6)
    assert origins.of(2, 4) == (2, 4, 5)
    places[5].end = 11
    origins.reads(11, -6)
    assert origins.of(4, 5) == (), "its token was told with c"
