from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.errors import ConstraintError, DeadlineError, EngineError, RequestError
from moebius.front.assemble import Delta, SequenceAssembler
from moebius.front.results import CompletionOutput, RequestOutput
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.request.structured import StructuredOutput
from moebius.text import Tokenizer, text_offsets
from moebius.text.replies import Content
from text.tiny_tokenizers import FAMILIES, SPECIALS

SETTINGS = settings(derandomize=True, deadline=None, max_examples=200, database=None)
EOS = 1


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        name: Tokenizer(make(), {"bos_token": "<s>", "eos_token": "</s>"})
        for name, make in FAMILIES.items()
    }


@pytest.fixture
def tokenizer(tokenizers) -> Tokenizer:
    return tokenizers["byte_level"]


def logprob(token_id: int, place: int) -> TokenLogprob:
    return TokenLogprob(token_id, -float(place), 1)


def step(ids, finish=None, first=0, **more) -> StepOutput:
    logprobs = tuple(logprob(token, first + i) for i, token in enumerate(ids))
    return StepOutput("r", tuple(ids), logprobs, finish_reason=finish, **more)


def steps_of(ids: list[int], cuts: list[int], finish: FinishReason | None) -> list[StepOutput]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    spans = list(pairwise(edges)) or [(0, 0)]
    return [step(ids[a:b], finish if b == len(ids) else None, a) for a, b in spans]


def pieces(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """One token a character or word, so that the tests know where tokens begin and end."""
    ids = [tokenizer.encode_ordinary(text) for text in texts]
    return [token for group in ids for token in group]


def naive(tokenizer, ids, stops, ended_by_engine):
    """Decode every prefix and look for the stop strings: (text, how many tokens, stop string)."""
    body = ids[:-1] if ended_by_engine else ids
    for count in range(1, len(body) + 1):
        text = tokenizer.decode(body[:count])
        settled = text if count == len(body) else text.rstrip("�")
        for end in range(1, len(settled) + 1):
            found = [stop for stop in stops if settled[:end].endswith(stop)]
            if found:
                stop = max(found, key=len)
                return settled[: end - len(stop)], count, stop
    return tokenizer.decode(body), len(ids), None


@given(st.data())
@SETTINGS
def test_deltas_equal_the_naive_answer(tokenizers, data):
    name = data.draw(st.sampled_from(sorted(tokenizers)))
    tokenizer = tokenizers[name]
    text = data.draw(st.text(alphabet="ab c☃🙂é", min_size=1, max_size=25))
    stops = data.draw(st.lists(st.text(alphabet="ab c☃🙂", min_size=1, max_size=4), max_size=3))
    by_eos = data.draw(st.booleans())
    ids = pieces(tokenizer, *text) + [EOS] * by_eos
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=10))
    params = SamplingParams(stop=tuple(stops), logprobs=0)
    finish = FinishReason.STOP if by_eos else FinishReason.LENGTH

    assembler = SequenceAssembler(tokenizer, params)
    deltas = [assembler.push(one) for one in steps_of(ids, cuts, finish)]

    expected_text, count, stop = naive(tokenizer, ids, stops, by_eos)
    assert "".join(delta.text for delta in deltas) == expected_text == assembler.released.text
    assert (
        [i for delta in deltas for i in delta.token_ids]
        == ids[:count]
        == list(assembler.released.token_ids)
    )
    released = [one for delta in deltas for one in delta.logprobs]
    expected = [logprob(token, i) for i, token in enumerate(ids[:count])]
    assert released == expected == list(assembler.released.logprobs)
    assert assembler.num_tokens == count
    assert assembler.stop_reason == stop
    assert assembler.finish_reason == ("stop" if stop or by_eos else "length")
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [
        assembler.finish_reason
    ]


@given(st.data())
@SETTINGS
def test_a_token_is_released_with_or_after_its_text(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    stops = data.draw(st.lists(st.text(alphabet="abc �", min_size=1, max_size=3), max_size=2))
    assembler = SequenceAssembler(tokenizer, SamplingParams(stop=tuple(stops), logprobs=0))
    for i, token in enumerate(ids):
        assembler.push(step([token], FinishReason.LENGTH if i == len(ids) - 1 else None, i))
        if assembler.finished:
            break
        whole = tokenizer.decode(assembler.released.token_ids)
        settled = whole.rstrip("�")
        assert assembler.released.text.startswith(settled)
    said = assembler.released
    offsets = list(said.text_offsets)
    assert len(offsets) == len(said.token_ids) == len(said.logprobs)
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(said.text)
    if assembler.finish_reason == "length":
        assert offsets == text_offsets(tokenizer, ids)


def test_a_stop_string_cuts_all_at_the_token_that_completes_it(tokenizer):
    ids = pieces(tokenizer, *"xyEND after")
    assembler = SequenceAssembler(tokenizer, SamplingParams(stop=("END",), logprobs=0))
    first = assembler.push(step(ids[:3]))
    scored = (logprob(ids[0], 0), logprob(ids[1], 1))
    assert first == Delta("xy", tuple(ids[:2]), scored, (0, 1), events=(Content("xy", (0, 1)),))
    second = assembler.push(step(ids[3:8], first=3))  # the engine was faster than the match
    assert (second.text, second.token_ids, second.finish_reason, second.stop_reason) == (
        "",
        tuple(ids[2:5]),
        "stop",
        "END",
    )
    assert second.text_offsets == (2, 2, 2)
    assert assembler.wants_abort and assembler.finished and assembler.num_tokens == 5
    late = assembler.push(step(ids[8:], FinishReason.ABORT, error=EngineError("aborted")))
    assert not late and late == Delta()
    expected = CompletionOutput(
        0, "xy", tuple(ids[:5]), tuple(logprob(t, i) for i, t in enumerate(ids[:5])), "stop", "END"
    )
    assert assembler.completion() == expected


def test_a_stop_string_in_the_engines_last_step_wants_no_abort(tokenizer):
    ids = pieces(tokenizer, *"xEND")
    assembler = SequenceAssembler(tokenizer, SamplingParams(stop=("END",)))
    delta = assembler.push(StepOutput("r", tuple(ids), finish_reason=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.logprobs) == ("x", "stop", ())
    assert not assembler.wants_abort and assembler.completion(2).logprobs is None
    assert assembler.completion(2).index == 2


def test_end_tokens_count_but_have_no_text(tokenizer):
    ids = pieces(tokenizer, *"hi")
    assembler = SequenceAssembler(tokenizer, SamplingParams())
    delta = assembler.push(step([*ids, EOS], FinishReason.STOP))
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("hi", (*ids, EOS), None)
    assert delta.finish_reason == "stop" and assembler.num_tokens == 3
    stop_id = pieces(tokenizer, "!")[0]
    assembler = SequenceAssembler(tokenizer, SamplingParams(stop_token_ids=(stop_id,)))
    delta = assembler.push(step([*ids, stop_id], FinishReason.STOP))
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("hi", (*ids, stop_id), stop_id)


def test_special_tokens_inside_a_text_are_skipped_but_counted(tokenizer):
    ids = [*pieces(tokenizer, "a"), tokenizer.encode(SPECIALS[3])[0], *pieces(tokenizer, "b")]
    assembler = SequenceAssembler(tokenizer, SamplingParams())
    assembler.push(step(ids, FinishReason.LENGTH))
    assert (assembler.released.text, assembler.num_tokens) == ("ab", 3)


def stopped(tokenizer, ids, *stops, finish=None, **params):
    """The assembler after these tokens, one a step, and the text that its deltas sent."""
    assembler = SequenceAssembler(
        tokenizer, SamplingParams(stop=stops, logprobs=0, max_tokens=99, **params)
    )
    sent = ""
    for i, token in enumerate(ids):
        sent += assembler.push(step([token], finish if i == len(ids) - 1 else None, i)).text
    assert sent == assembler.released.text
    assert len(assembler.released.token_ids) == len(assembler.released.logprobs)
    return assembler


IM_END = "<|im_end|>"


@pytest.mark.case("A4")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("stop", "count", "text"),
    [
        (IM_END, 3, "ab"),
        (f"{IM_END}\n", 4, "ab"),
        (f"b{IM_END}", 3, "a"),
        (f"b{IM_END}\nc", 5, "a"),
        (f"{IM_END}\n{IM_END}", None, None),
        (f"{IM_END}c", None, None),
        (f"{IM_END}<s>", None, None),
        (f"c<s>{IM_END}", 7, f"ab{IM_END}\n"),
        (f"<s>{IM_END}d", 8, f"ab{IM_END}\nc"),
        ("</s>", None, None),
    ],
)
def test_a_stop_string_may_name_special_tokens(tokenizers, skip, stop, count, text):
    for tokenizer in tokenizers.values():
        special, start = tokenizer.encode(IM_END, False)[-1], tokenizer.encode("<s>", False)[-1]
        a, b, line, c, d = (tokenizer._backend.token_to_id(x) for x in ("a", "b", "Ċ", "c", "d"))
        if line is None:
            line = tokenizer._backend.token_to_id("<0x0A>") or tokenizer._backend.token_to_id("\n")
        ids = [a, b, special, line, c, start, special, d]
        if None in ids:
            continue
        end = stopped(tokenizer, ids, stop, skip_special_tokens=skip)
        if count is None:
            assert not end.finished
            continue
        assert (end.finish_reason, end.stop_reason, end.num_tokens) == ("stop", stop, count)
        assert end.released.token_ids == tuple(ids[:count]) and end.wants_abort
        assert end.released.text == (text.replace(IM_END, "") if skip else text)


@pytest.mark.case("A4")
def test_special_tokens_and_stop_strings_at_the_edges(tokenizer):
    special, eos = tokenizer.encode(IM_END)[0], EOS
    a, b = pieces(tokenizer, "a", "b")
    # What is inside a special token's text is no text while it is left out.
    assert not stopped(tokenizer, [a, special, b], "im_end", "|", ">").finished
    shown = stopped(tokenizer, [a, special, b], "im_end", skip_special_tokens=False)
    assert (shown.released.text, shown.stop_reason, shown.num_tokens) == ("a<|", "im_end", 2)
    # The text that is sent holds no stop string either, whatever was left out of it.
    across = stopped(tokenizer, [a, special, b], "ab")
    assert (across.released.text, across.stop_reason) == ("", "ab")
    # The same spelled in ordinary tokens.
    spelled = stopped(tokenizer, [a, *tokenizer.encode_ordinary(IM_END), b], IM_END)
    assert (spelled.released.text, spelled.stop_reason) == ("a", IM_END)
    # min_tokens counts for them as for others.
    late = stopped(tokenizer, [a, special, b, special, a], IM_END, min_tokens=3)
    assert (late.released.text, late.num_tokens) == ("ab", 4)
    # An end token that is named is the stop reason; not named, or named as an id, it is what it
    # was.
    for stops, ids, reason in (
        ((), (), None),
        (("</s>",), (), "</s>"),
        ((), (eos,), eos),
        (("a",), (), None),
    ):
        ended = stopped(tokenizer, [b, eos], *stops, finish=FinishReason.STOP, stop_token_ids=ids)
        assert (ended.released.text, ended.finish_reason, ended.stop_reason) == (
            "b",
            "stop",
            reason,
        )
        assert not ended.wants_abort and ended.num_tokens == 2
    cut = stopped(tokenizer, [a, b, eos], "b</s>", finish=FinishReason.STOP)
    assert (cut.released.text, cut.stop_reason) == ("a", "b</s>")
    ignored = stopped(tokenizer, [b, eos, a], "</s>", ignore_eos=True)
    assert (ignored.released.text, ignored.stop_reason, ignored.num_tokens) == ("b", "</s>", 2)
    # A character that was never finished is at the end of the text.
    fox = tokenizer.encode("🦊")[:2]
    assert stopped(tokenizer, [a, *fox, special], IM_END).released.text == "a�"


@pytest.mark.case("A4")
@given(st.data())
@SETTINGS
def test_stop_strings_with_special_tokens_equal_the_naive_answer(tokenizers, data):
    tokenizer = tokenizers["byte_level"]
    names = ["a", "b", "<s>", IM_END]
    drawn = data.draw(st.lists(st.sampled_from(names), max_size=14))
    stops = data.draw(
        st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=4), min_size=1, max_size=3)
    )
    ids = [tokenizer.encode(name)[0] for name in drawn]

    def visible(symbols):
        return [symbol for symbol in symbols if len(symbol) == 1]

    expected = ("".join(visible(drawn)), len(drawn), None)
    for end in range(1, len(drawn) + 1):
        seen = drawn[:end]
        shown = visible(seen) if len(seen[-1]) == 1 else []
        found = [
            stop
            for stop in stops
            if seen[-len(stop) :] == stop or (shown and shown[-len(stop) :] == stop)
        ]
        if found:
            longest = max(found, key=lambda stop: (len(visible(stop)), len("".join(stop))))
            text = visible(seen)
            expected = ("".join(text[: len(text) - len(visible(longest))]), end, "".join(longest))
            break
    end = stopped(tokenizer, ids, *("".join(stop) for stop in stops))
    released = end.released.text if end.finished else tokenizer.decode(ids)
    assert (released, end.num_tokens, end.stop_reason) == expected


def test_special_tokens_are_text_where_they_are_not_to_be_skipped(tokenizer):
    ids = [*pieces(tokenizer, "a"), tokenizer.encode(SPECIALS[3])[0], *pieces(tokenizer, "b")]
    assembler = SequenceAssembler(tokenizer, SamplingParams(skip_special_tokens=False))
    assembler.push(step([*ids, EOS], FinishReason.STOP))
    assert (assembler.released.text, assembler.num_tokens) == (
        "a<|im_start|>b",
        4,
    )  # never the one that ended it


def test_no_stop_string_before_min_tokens(tokenizer):
    ids = pieces(tokenizer, *"..a.")
    for minimum, count in [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4)]:
        assembler = SequenceAssembler(tokenizer, SamplingParams(stop=(".",), min_tokens=minimum))
        for token in ids:
            assembler.push(step([token]))
        assert assembler.num_tokens == count, minimum


def test_an_unfinished_character_is_flushed_at_the_end(tokenizer):
    fox = tokenizer.encode("🦊")
    assembler = SequenceAssembler(tokenizer, SamplingParams(logprobs=0))
    assert not assembler.push(step(fox[:1]))
    assert assembler.released.token_ids == () and assembler.num_tokens == 1
    delta = assembler.push(step(fox[1:2], FinishReason.LENGTH, 1))
    assert (delta.text, delta.token_ids, delta.text_offsets) == ("�", tuple(fox[:2]), (0, 0))


def test_a_stop_of_replacement_characters_ends_at_the_flush(tokenizer):
    fox = tokenizer.encode("🦊")
    assembler = SequenceAssembler(tokenizer, SamplingParams(stop=("�",)))
    delta = assembler.push(step(fox[:2], FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "�")


def test_continuing_a_prompt_keeps_the_space(tokenizers):
    tokenizer = tokenizers["mistral"]
    prompt, ids = tokenizer.encode("the quick"), tokenizer.encode("dog", add_special_tokens=False)
    for prompt_ids, text in [(prompt, " dog"), ((), "dog")]:
        assembler = SequenceAssembler(tokenizer, SamplingParams(), prompt_ids=prompt_ids)
        assembler.push(step(ids, FinishReason.LENGTH))
        assert assembler.released.text == text


def test_errors_of_the_engine_are_raised(tokenizer):
    for finish in (FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR):
        assembler = SequenceAssembler(tokenizer, SamplingParams())
        with pytest.raises(DeadlineError, match="too late"):
            assembler.push(step([5], finish, error=DeadlineError("too late")))
        with pytest.raises(EngineError, match=finish.value):
            SequenceAssembler(tokenizer, SamplingParams()).push(step([], finish))


def test_what_an_engine_cannot_hold_to_names_its_field(tokenizer):
    """The one that it came in; an error that names another is left as it is."""
    wanted = StructuredOutput(regex="a", param="guided_regex")
    for params, error, param in (
        (SamplingParams(structured=wanted), ConstraintError("no"), "guided_regex"),
        (
            SamplingParams(structured=StructuredOutput(regex="a")),
            ConstraintError("no"),
            "structured",
        ),
        (SamplingParams(bad_words=("a",)), ConstraintError("no"), "bad_words"),
        (SamplingParams(structured=wanted), ConstraintError("no", param="x"), "x"),
        (SamplingParams(structured=wanted), RequestError("no"), None),
        (SamplingParams(), ConstraintError("no"), None),
    ):
        with pytest.raises(type(error), match="no") as caught:
            SequenceAssembler(tokenizer, params).push(step([], FinishReason.ERROR, error=error))
        assert caught.value.param == param


def test_prompt_logprobs_and_cached_tokens_are_kept(tokenizer):
    assembler = SequenceAssembler(tokenizer, SamplingParams(prompt_logprobs=0))
    first, second = logprob(7, 1), logprob(8, 2)
    assert not assembler.push(step([], prompt_logprobs=(first,), num_cached_tokens=3))
    assembler.push(step([9], FinishReason.LENGTH, prompt_logprobs=(second,)))
    assert assembler.prompt_logprobs == [first, second] and assembler.num_cached_tokens == 3
    assert math.isclose(sum(one.logprob for one in assembler.prompt_logprobs), -3)


def test_usage_of_a_request():
    outputs = (CompletionOutput(0, "a", (1, 2)), CompletionOutput(1, "b", (3,)))
    output = RequestOutput("r", "p", (4, 5, 6), outputs)
    assert (output.prompt_tokens, output.completion_tokens, output.total_tokens) == (3, 3, 6)
