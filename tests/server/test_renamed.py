"""Errors in another protocol's words."""

from __future__ import annotations

import pytest

from moebius.errors import RequestError
from moebius.server.renamed import renamed

NAMES = {"stop": "stop_sequences", "format": "text.format", "format.schema": "text.schema"}


@pytest.mark.parametrize(
    "param, text, new_param, new_text",
    [
        ("stop", "stop has 99; stop it", "stop_sequences", "stop_sequences has 99; stop_sequences it"),
        ("stop[3]", "stop[3]: unstoppable", "stop_sequences[3]", "stop_sequences[3]: unstoppable"),
        ("stop_token_ids", "stop_token_ids: 5", "stop_token_ids", "stop_token_ids: 5"),
        ("format.schema.x", "format.schema.x: no", "text.schema.x", "text.schema.x: no"),
        ("format.name", "format.name: no", "text.format.name", "text.format.name: no"),
        (None, "stop", None, "stop"),
    ],
)  # fmt: skip
def test_fields_are_called_as_the_client_calls_them(
    param: str | None, text: str, new_param: str | None, new_text: str
) -> None:
    found = renamed(RequestError(text, param=param, code="x"), NAMES)
    assert (found.param, str(found), found.code) == (new_param, new_text, "x")
