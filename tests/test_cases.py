"""What strangers ran into, row by row: each row is held by at least one test that carries its
number.

`pytest -m "case" --collect-only -q` lists the tests. A is wrong answers, B what everybody suffered
from, C what was refused or broken though it was right.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROWS = {
    "A1": "a head of its own in the file, beside tie_word_embeddings: true, is used",
    "A2": "prompt_logprobs has an entry a token, the first None",
    "A3": "text_offset points into the text that is returned",
    "A4": "a special token's text stops where it is a stop string",
    "A5": "fine-tuning carries over what it does not train",
    "A6": "a router's logit_bias survives export and load",
    "A7": "a context that rope scaling widens is as wide as that",
    "B1": "a prompt of megabytes stops nobody",
    "B2": "the container's limits are the machine",
    "B3": "priority is the operator's to allow",
    "B4": "a large top_k costs its own row alone",
    "B5": "a penalised row costs itself alone",
    "B6": "a full disk under --trace, and foreign errors, do not end the engine",
    "B7": "connections and bodies are bounded",
    "B8": "a submit to an engine that dies fails at once",
    "C1": "config.json keys that the model does not read change nothing",
    "C2": "assistant messages without content, as templates take them",
    "C3": "past tool calls with broken arguments are tolerated",
    "C4": "usage in every chunk",
    "C5": "a prompt that is too long gets OpenAI's sentence and code",
    "C6": "harmless fields are accepted",
    "C7": "browsers on other origins, where the operator allows them",
    "C8": "a pooled connection lives longer than its client's patience",
    "C9": "HTTP/1.0 gets no chunks",
    "C10": "figures that are not finite are valid JSON",
    "C11": "a corpus of one long line is trained on",
    "C12": "memory does not grow with a corpus file",
    "C13": "what is not our result is never replaced",
    "C14": "end ids beyond the vocabulary, and sampling defaults that only transformers accepts",
    "C15": "a byte order mark is read over",
    "C16": "a name that is no model is one line",
    "C17": "an unknown device is refused",
    "C18": "IPv6 addresses are printed in brackets",
    "C19": "a full disk at the final export is one line and keeps the checkpoint",
    "C20": "refused requests are logged, and X-Request-Id comes back",
    "C21": "the metrics that dashboards ask for",
    "C22": "each unfinished stream of an LLM gets its own tokens",
    "C23": "float16 stays float16 on cuda",
    "C24": "an LLM leaves torch's threads to the program around it",
    "C25": "small things that clients look for",
}


@functools.cache
def rows_held() -> set[str]:
    """The arguments of every `pytest.mark.case(...)` in the tests."""
    held: set[str] = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        text = path.read_text()
        if "pytest.mark.case" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                held |= {
                    argument.value for argument in node.args if isinstance(argument, ast.Constant)
                }
    return held


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_held_by_a_test(row: str) -> None:
    assert row in rows_held(), f"no test holds {row}: {ROWS[row]}"


def test_no_test_names_a_row_that_is_not_there() -> None:
    assert rows_held() <= set(ROWS)
