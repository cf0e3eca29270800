"""Bodies are counted as they will be parsed, and parsed as JSON says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import RequestError
from moebius.server import body as body_module
from moebius.server.body import decode_body
from moebius.server.limits import HTTP_LIMITS

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('\\"[]{},:aé😀\n', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text('\\"[,a', max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


def counted(value: Any) -> tuple[int, int, int]:
    """(values, empty lists and objects counted twice; strings, lists and objects; depth), the naive
    way."""
    if isinstance(value, str):
        return 1, 1, 0
    if not isinstance(value, (list, dict)):
        return 1, 0, 0
    inner = list(map(counted, value.values() if isinstance(value, dict) else value))
    values = 1 + sum(v for v, _, _ in inner) + (not inner)
    parts = 1 + sum(p for _, p, _ in inner) + (len(value) if isinstance(value, dict) else 0)
    return values, parts, 1 + max((d for _, _, d in inner), default=0)


@pytest.mark.case("B1")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(json_values, st.booleans(), st.integers(1, 40))
def test_counts_are_those_of_the_parsed_value(value: Any, ascii: bool, piece: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "_PIECE", piece)
        found = body_module._contents(body)
    assert (found.values, found.parts, found.depth) == counted(value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=5),
        json_values | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    )
)
def test_bodies_are_read_as_json_reads_them(value: dict[str, Any]) -> None:
    assert decode_body(json.dumps(value).encode()) == value


def at_depth(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("fits", "too_much", "words"),
    [
        (
            at_depth(HTTP_LIMITS.json_depth),
            at_depth(HTTP_LIMITS.json_depth + 1),
            "deeper than 64 levels",
        ),
        (
            b'{"a":[' + b"1," * (HTTP_LIMITS.json_values - 4) + b"1]}",
            b'{"a":[' + b"1," * HTTP_LIMITS.json_values + b"1]}",
            "more than 1048576 values",
        ),
        (
            b'{"a":[' + b'"",' * (HTTP_LIMITS.json_parts - 4) + b'""]}',
            b'{"a":[' + b'"",' * HTTP_LIMITS.json_parts + b'""]}',
            "more than 65536 strings, lists and objects",
        ),
    ],
    ids=["depth", "values", "parts"],
)
def test_the_limits(fits: bytes, too_much: bytes, words: str) -> None:
    assert list(decode_body(fits)) == ["a"]
    with pytest.raises(RequestError, match=words):
        decode_body(too_much)


def test_brackets_and_commas_inside_strings_do_not_count() -> None:
    text = '[{,"\\' * 300_000
    assert decode_body(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        decode_body(b'{"prompt": "\\ud83d"}')
