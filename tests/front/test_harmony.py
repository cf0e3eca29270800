"""Replies in gpt-oss' format: their text is their content, their tokens are all that were drawn."""

from __future__ import annotations

import random
from itertools import count

import pytest

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.front.assemble import Delta, SequenceAssembler
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.text import Tokenizer
from text.harmony import harmony_tokenizer

REPLY = (
    "<|channel|>analysis<|message|>Grüße? 🙂<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>Well, <|end|><|start|>assistant<|channel|>final<|message|>Grüße 😀!<|return|>"
)
CONTENT = "Well, Grüße 😀!"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return harmony_tokenizer()


def assembled(
    tokenizer: Tokenizer,
    reply: str,
    rng: random.Random,
    finish: FinishReason = FinishReason.STOP,
    **params: object,
) -> tuple[SequenceAssembler, list[Delta]]:
    """The reply in steps of one token or several."""
    assert tokenizer.harmony is not None
    prompt = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    given = SamplingParams(logprobs=0, **params)  # type: ignore[arg-type]
    found = SequenceAssembler(tokenizer, given, reply=tokenizer.harmony.reader(prompt))
    left = tokenizer.encode(reply, False)
    numbers = count()
    deltas = []
    while left and not found.finished:
        some = left[: rng.choice((1, 1, 2, 5))]
        left = left[len(some) :]
        logprobs = tuple(TokenLogprob(token, -float(next(numbers)), 1) for token in some)
        last = None if left else finish
        deltas.append(found.push(StepOutput("r", tuple(some), logprobs, finish_reason=last)))
    return found, deltas


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_is_the_content(tokenizer: Tokenizer, seed: int) -> None:
    found, deltas = assembled(tokenizer, REPLY, random.Random(seed))
    assert "".join(delta.text for delta in deltas) == CONTENT == found.completion().text
    ids = tokenizer.encode(REPLY, False)
    assert [token for delta in deltas for token in delta.token_ids] == ids
    logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs]
    assert logprobs == [-float(i) for i in range(len(ids))]
    assert found.num_tokens == len(ids) and deltas[-1].finish_reason == "stop"
    offsets = [offset for delta in deltas for offset in delta.text_offsets]
    assert offsets == sorted(offsets) and offsets[-1] == len(CONTENT)


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_are_looked_for_in_the_content_alone(tokenizer: Tokenizer, seed: int) -> None:
    """Both the reasoning and the content say it."""
    found, deltas = assembled(tokenizer, REPLY, random.Random(seed), stop=("Grüße",))
    assert "".join(delta.text for delta in deltas) == "Well, "
    assert (found.finish_reason, found.stop_reason) == ("stop", "Grüße")


def test_a_stop_string_may_name_what_ends_a_message(tokenizer: Tokenizer) -> None:
    found, _ = assembled(tokenizer, REPLY, random.Random(0), stop=("<|end|>",))
    assert (found.completion().text, found.stop_reason) == ("", "<|end|>")


def test_a_reply_that_is_cut_off(tokenizer: Tokenizer) -> None:
    """In its reasoning there is no content; a character that is cut off in it is U+FFFD."""
    length = FinishReason.LENGTH
    cut = REPLY[: REPLY.index("🙂")]
    found, _ = assembled(tokenizer, cut, random.Random(0), length)
    assert (found.completion().text, found.finish_reason) == ("", "length")
    assert tokenizer.harmony is not None
    whole = tokenizer.encode("<|channel|>final<|message|>a😀", False)
    reader = tokenizer.harmony.reader(tokenizer.encode("<|start|>assistant", False))
    broken = SequenceAssembler(tokenizer, SamplingParams(), reply=reader)
    end = tokenizer.encode("<|end|>", False)
    broken.push(StepOutput("r", (*whole[:-1], *end), finish_reason=length))
    assert broken.completion().text == "a�"
