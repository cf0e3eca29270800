"""Bodies that cost a server the most: each kind deterministic, of about a given size, with the
answer that is right.

`worst_bodies(size)` yields them; the test of this directory sends small ones to a fake engine, and
benchmarks/worst_bodies.py those of nearly 8 MB to a server, beside a stream.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LARGEST = 7_800_000
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SPECIAL = "<|im_end|>"
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class WorstBody:
    """One body.

    status   what is right, 0 where any answer but a 500 is; param and code are the error's, where
             it is one
    answers  True where the engine has to compute: the answer's price is not the body's
    """

    name: str
    path: str
    body: bytes
    status: int = 400
    param: str | None = None
    code: str | None = None
    answers: bool = False


def _text(pattern: str, size: int) -> str:
    """The pattern again and again: `size` bytes of it in JSON."""
    return pattern * max(1, size // len(json.dumps(pattern, ensure_ascii=False).encode()[1:-1]))


def _array(item: str, size: int) -> str:
    """A JSON list of `item` again and again."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def _object(size: int, value: str = "1") -> str:
    """A JSON object of as many different names as fit."""
    return "{" + ",".join(f'"{i:x}":{value}' for i in range(size // (len(value) + 10))) + "}"


def _filled(fields: dict[str, Any], name: str, value: str) -> bytes:
    """A body of `fields` and, last, a field whose value is JSON already."""
    comma = ", " if fields else ""
    return (json.dumps(fields)[:-1] + f'{comma}"{name}": {value}}}').encode()


def _chat(*contents: Any, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps(
        {"messages": messages, "max_tokens": 1, **fields}, ensure_ascii=False
    ).encode()


def _complete(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 1, **fields}, ensure_ascii=False).encode()


def _random_words(size: int) -> str:
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(2000)]
    return " ".join(rng.choices(words, k=size // 7))[:size]


_SCRIPTS = {
    "prose": "The quick brown fox jumps over the lazy dog, again. ",
    "one letter": "a",
    "spaces": " ",
    "line breaks": "\n",
    "Cyrillic": "съешь ещё этих мягких французских булок ",
    "Chinese": "今天天气很好我们去公园散步吧",
    "Thai": "สวัสดีครับวันนี้อากาศดี",
    "emoji": "😀👩‍👩‍👧",
    "combining accents": "e\u0301\u0323",
    "special tokens": SPECIAL,
    "begun special tokens": "<|im_<|",
    "digits": "0123456789",
    "quotes": '"\\',
}


def _prompts(size: int) -> Iterator[WorstBody]:
    for script, pattern in _SCRIPTS.items():
        body = _complete(_text(pattern, size))
        yield WorstBody(f"prompt of {script}", COMPLETIONS, body, param="prompt", code=TOO_LONG)
    words = _random_words(size)
    yield WorstBody(
        "prompt of random words", COMPLETIONS, _complete(words), param="prompt", code=TOO_LONG
    )
    escaped = '"' + "\\u0416" * (size // 6) + '"'
    yield WorstBody(
        "prompt of escapes",
        COMPLETIONS,
        _filled({}, "prompt", escaped),
        param="prompt",
        code=TOO_LONG,
    )
    halves = '"' + "\\ud83d" * (size // 6) + '"'
    yield WorstBody("prompt of half surrogates", COMPLETIONS, _filled({}, "prompt", halves))
    many = [words[i * (size // 64) : (i + 1) * (size // 64)] for i in range(64)]
    yield WorstBody("64 prompts", COMPLETIONS, _complete(many), param="prompt", code=TOO_LONG)
    ids = _filled({}, "prompt", _array("7", 2**21 - 4))
    yield WorstBody("prompt of ids", COMPLETIONS, ids, param="prompt", code=TOO_LONG)
    yield WorstBody(
        "prompt of ids without end",
        COMPLETIONS,
        _filled({}, "prompt", _array("7", max(size, 2**22))),
    )
    lists = _array("[]", size)
    yield WorstBody("prompt of empty lists", COMPLETIONS, _filled({}, "prompt", lists))
    yield WorstBody(
        "prompt of big numbers", COMPLETIONS, _filled({}, "prompt", "[" + "9" * size + "]")
    )


def _chats(size: int) -> Iterator[WorstBody]:
    for script in ("prose", "one letter", "Chinese", "special tokens", "begun special tokens"):
        text = _text(_SCRIPTS[script], size)
        yield WorstBody(f"chat of {script}", CHAT, _chat(text), param="messages", code=TOO_LONG)
    piece = _text(_SCRIPTS["prose"], size // 4200)
    yield WorstBody("4096 messages", CHAT, _chat(*[piece] * 4096), param="messages", code=TOO_LONG)
    special = _text(SPECIAL, size // 4200)
    yield WorstBody(
        "4096 messages of special tokens",
        CHAT,
        _chat(*[special] * 4096),
        param="messages",
        code=TOO_LONG,
    )
    parts = [{"type": "text", "text": "x" * max(1, size // 12_000 - 28)}] * 12_000
    yield WorstBody("12,000 content parts", CHAT, _chat(parts), param="messages", code=TOO_LONG)
    tiny = _filled(
        {},
        "messages",
        '[{"role":"user","content":' + _array('{"type":"text","text":""}', size) + "}]",
    )
    yield WorstBody("content parts without end", CHAT, tiny)
    yield WorstBody(
        "messages without end", CHAT, _filled({}, "messages", _array("{}", max(size, 2**19)))
    )
    private = "".join(map(chr, range(0xE000, 0xF900)))
    hidden = _text(private + SPECIAL, size)
    yield WorstBody("every private-use character", CHAT, _chat(hidden), param="messages", status=0)
    yield WorstBody(
        "a role",
        CHAT,
        _filled({}, "messages", '[{"role":"' + "r" * size + '"}]'),
        param="messages[0].role",
    )
    keyed = _filled({}, "messages", '[{"role":"user","content":"x","' + "k" * size + '":1}]')
    yield WorstBody("a message's unknown name", CHAT, keyed, status=200, answers=True)
    for name, value in (
        ("text", '{"x":"' + "y" * size + '"}'),
        ("names", _object(min(size, 2**19))),
    ):
        body = _filled(json.loads(_chat("x")), "chat_template_kwargs", value)
        yield WorstBody(f"template variables of {name}", CHAT, body, status=200, answers=True)
    tools = _array('{"type":"function","function":{"name":"f","parameters":{}}}', size)
    yield WorstBody(
        "tools without end",
        CHAT,
        _filled(json.loads(_chat("x", tool_choice="none")), "tools", tools),
    )
    call = '[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"%s"}}]}]'
    nested = call % ('{\\"a\\":' * (size // 8))
    yield WorstBody(
        "deep arguments of a tool call",
        CHAT,
        _filled({}, "messages", nested),
        status=0,
        answers=True,
    )


def _fields(size: int) -> Iterator[WorstBody]:
    good = {"prompt": "x", "max_tokens": 1}
    for name, value in (
        ("text", '{"a":"' + "b" * size + '"}'),
        ("numbers", _array("1", min(size, 2**20))),
    ):
        yield WorstBody(
            f"metadata of {name}",
            COMPLETIONS,
            _filled(good, "metadata", value),
            status=200,
            answers=True,
        )
    yield WorstBody(
        "metadata without end",
        COMPLETIONS,
        _filled(good, "metadata", _array("[]", max(size, 2**19))),
    )
    names = _filled(good, "metadata", _object(11 * (2**16 - 16)))
    yield WorstBody("metadata of names", COMPLETIONS, names, status=200, answers=True)
    lists = _filled(good, "metadata", _array("[]", 3 * (2**16 - 8)))
    yield WorstBody("metadata of lists", COMPLETIONS, lists, status=200, answers=True)
    yield WorstBody(
        "metadata of names without end",
        COMPLETIONS,
        _filled(good, "metadata", _object(max(size, 2**20))),
    )
    yield WorstBody(
        "metadata, deep",
        COMPLETIONS,
        _filled(good, "metadata", "[" * (size // 2) + "]" * (size // 2)),
    )
    yield WorstBody("unknown name", COMPLETIONS, _filled(good, "k" * size, "1"))
    yield WorstBody("unknown names", COMPLETIONS, _object(min(size, 11 * (2**16 - 16))).encode())
    doubled = _filled(good, "n", "1" + ',"n":1' * (size // 6))
    yield WorstBody("one name again and again", COMPLETIONS, doubled)
    few = min(size, 2**19)
    yield WorstBody(
        "logit_bias", COMPLETIONS, _filled(good, "logit_bias", _object(few)), param="logit_bias"
    )
    yield WorstBody(
        "stop", COMPLETIONS, _filled(good, "stop", _array('"a"', 4 * (2**16 - 16))), param="stop"
    )
    yield WorstBody(
        "one stop", COMPLETIONS, _filled(good, "stop", '"' + "s" * size + '"'), param="stop"
    )
    ids = _array("1", 2**20)
    yield WorstBody(
        "stop_token_ids", COMPLETIONS, _filled(good, "stop_token_ids", ids), param="stop_token_ids"
    )
    yield WorstBody(
        "cache_salt",
        COMPLETIONS,
        _filled(good, "cache_salt", '"' + "s" * size + '"'),
        param="cache_salt",
    )
    yield WorstBody(
        "a model's name", COMPLETIONS, _filled(good, "model", '"' + "m" * size + '"'), 404, "model"
    )
    yield WorstBody("an exponent", COMPLETIONS, _filled(good, "temperature", "1e" + "9" * size))
    yield WorstBody(
        "digits",
        COMPLETIONS,
        _filled(good, "temperature", "0." + "1" * size),
        status=200,
        answers=True,
    )
    yield WorstBody("an integer", COMPLETIONS, _filled(good, "n", "9" * size))
    yield WorstBody(
        "blanks", COMPLETIONS, json.dumps(good).encode() + b" " * size, status=200, answers=True
    )
    yield WorstBody("brackets", COMPLETIONS, b"[" * size)
    yield WorstBody("no JSON", COMPLETIONS, b"\x00" * size)
    yield WorstBody("byte order marks", COMPLETIONS, b"\xef\xbb\xbf" * (size // 3))
    yield WorstBody(
        "UTF-16", COMPLETIONS, json.dumps({"prompt": "x" * (size // 2)}).encode("utf-16")
    )


def _tokenizing(size: int) -> Iterator[WorstBody]:
    for script in ("prose", "one letter", "special tokens"):
        body = json.dumps({"prompt": _text(_SCRIPTS[script], size)}).encode()
        yield WorstBody(f"tokenize {script}", "/tokenize", body, param="prompt", code=TOO_LONG)
    fits = json.dumps(
        {"prompt": _text(_SCRIPTS["prose"], 3000), "return_token_strs": True}
    ).encode()
    yield WorstBody("tokenize what fits", "/tokenize", fits, status=200)
    chat = {"messages": [{"role": "user", "content": _text(SPECIAL, size)}]}
    yield WorstBody(
        "tokenize a chat", "/tokenize", json.dumps(chat).encode(), param="messages", code=TOO_LONG
    )
    yield WorstBody(
        "detokenize", "/detokenize", _filled({}, "tokens", _array("7", 2**20)), status=200
    )
    yield WorstBody(
        "detokenize without end",
        "/detokenize",
        _filled({}, "tokens", _array("7", max(size, 2**22))),
    )


def worst_bodies(size: int = LARGEST) -> Iterator[WorstBody]:
    """All kinds, made one after the other, each of about `size` bytes."""
    kinds: list[Callable[[int], Iterator[WorstBody]]] = [_prompts, _chats, _fields, _tokenizing]
    for kind in kinds:
        yield from kind(size)
