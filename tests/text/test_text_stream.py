from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.text import StopMatcher

SETTINGS = settings(derandomize=True, deadline=None, max_examples=400, database=None)
WORDS = st.text(alphabet="abc", min_size=1, max_size=5)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first end of any stop string; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        released, stop = matcher.push(piece)
        out += released
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


def split(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)] or [""]


@given(
    st.lists(WORDS, max_size=4),
    st.text(alphabet="abc", max_size=30),
    st.lists(st.integers(0, 30), max_size=8),
)
@SETTINGS
def test_any_split_finds_what_a_search_of_the_whole_finds(stops, text, cuts):
    assert feed(stops, split(text, cuts)) == naive(text, stops)


@given(st.lists(WORDS, min_size=1, max_size=4), st.text(alphabet="abc", max_size=20))
@SETTINGS
def test_holds_back_what_could_become_a_stop_and_no_more(stops, text):
    matcher = StopMatcher(stops)
    out = ""
    for i, char in enumerate(text, start=1):
        released, stop = matcher.push(char)
        if stop is not None:
            return
        out += released
        seen = text[:i]
        longest = max(k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k]))
        assert out == seen[: i - longest]


def test_stops_across_pieces():
    assert feed(["STOP"], ["one S", "TO", "P two"]) == ("one ", "STOP")
    assert feed(["STOP"], ["one S", "TO", "M"]) == ("one STOM", None)
    assert feed(["\n\n"], ["a\n", "b\n", "\nc"]) == ("a\nb", "\n\n")
    assert feed(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert feed(["bc", "abc"], ["xabc"]) == ("x", "abc")
    assert feed(["😀👍"], ["ok 😀", "👍"]) == ("ok ", "😀👍")
    assert feed(["", "x"], ["axb"]) == ("a", "x")
    assert feed([], ["as ", "it is"]) == ("as it is", None)


def test_a_long_stop_costs_no_more_a_character_than_a_short_one():
    """'aaaa...b' against 'aaaa...': a search that starts anew at each character would need 10^9
    comparisons."""
    matcher = StopMatcher(["a" * 255 + "b"])
    released = "".join(matcher.push("a" * 50)[0] for _ in range(4000))
    assert len(released) == 200_000 - 255
    assert matcher.push("b") == ("", "a" * 255 + "b")
