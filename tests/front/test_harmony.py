"""Replies in gpt-oss' format: what they are made of, and all tokens that were drawn."""

from __future__ import annotations

import random
from itertools import count

import pytest

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.front.assemble import Delta, SequenceAssembler
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.text import EncodedPrompt, Expected, Tokenizer
from moebius.text.replies import Said, fold
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
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "hello"}])
    given = SamplingParams(logprobs=0, **params)  # type: ignore[arg-type]
    parser = tokenizer.replies.parser(prompt, Expected(), "r")
    found = SequenceAssembler(tokenizer, given, reply=parser)
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


def fold_all(deltas: list[Delta]) -> Said:
    return fold(event for delta in deltas for event in delta.events)


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_is_what_the_reply_is_made_of(tokenizer: Tokenizer, seed: int) -> None:
    found, deltas = assembled(tokenizer, REPLY, random.Random(seed))
    assert fold_all(deltas) == Said("Grüße? 🙂", CONTENT)
    completion = found.completion()
    assert (completion.reasoning, completion.text) == ("Grüße? 🙂", CONTENT)
    ids = tokenizer.encode(REPLY, False)
    assert [token for delta in deltas for token in delta.token_ids] == ids
    logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs]
    assert logprobs == [-float(i) for i in range(len(ids))]
    assert found.num_tokens == len(ids) and deltas[-1].finish_reason == "stop"
    offsets = [offset for delta in deltas for offset in delta.text_offsets]
    written = tokenizer.decode(ids)
    assert "".join(delta.text for delta in deltas) == written
    assert offsets == sorted(offsets) and offsets[-1] == len(written)
    assert found.num_reasoning_tokens == len(tokenizer.encode("Grüße? 🙂", False))


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_are_looked_for_in_all_that_the_model_writes(
    tokenizer: Tokenizer, seed: int
) -> None:
    found, deltas = assembled(tokenizer, REPLY, random.Random(seed), stop=("🙂",))
    assert fold_all(deltas) == Said("Grüße? ")
    found, deltas = assembled(tokenizer, REPLY, random.Random(seed), stop=("😀",))
    assert fold_all(deltas) == Said("Grüße? 🙂", "Well, Grüße ")
    assert (found.finish_reason, found.stop_reason) == ("stop", "😀")


def test_a_stop_string_may_name_what_ends_a_message(tokenizer: Tokenizer) -> None:
    found, _ = assembled(tokenizer, REPLY, random.Random(0), stop=("<|end|>",))
    assert (found.completion().text, found.stop_reason) == ("", "<|end|>")


def test_a_reply_that_is_cut_off(tokenizer: Tokenizer) -> None:
    """In its reasoning there is no content; a character that is cut off in it is U+FFFD."""
    length = FinishReason.LENGTH
    cut = REPLY[: REPLY.index("🙂")]
    found, _ = assembled(tokenizer, cut, random.Random(0), length)
    assert (found.completion().text, found.finish_reason) == ("", "length")
    whole = tokenizer.encode("<|channel|>final<|message|>a😀", False)
    prompt = EncodedPrompt(tokenizer.encode("<|start|>assistant", False))
    parser = tokenizer.replies.parser(prompt, Expected(), "r")
    broken = SequenceAssembler(tokenizer, SamplingParams(), reply=parser)
    end = tokenizer.encode("<|end|>", False)
    broken.push(StepOutput("r", (*whole[:-1], *end), finish_reason=length))
    assert broken.completion().text == "a�"
