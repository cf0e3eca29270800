"""A random model whose reply is held to a grammar, for the tests of tool calls."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from moebius.request.structured import StructuredOutput
from moebius.text import EncodedPrompt, Expected, ReplyFormat, Tokenizer
from moebius.text.grammar import checked_grammar
from moebius.text.masks import Vocabulary
from moebius.text.replies import HeldTool, Said, fold

Tools = Mapping[str, Mapping[str, Any]]
_CLOSES = tuple("\"'}]),<\n:;`")


class Held:
    """Replies in a format that are held to these tools."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        replies: ReplyFormat,
        tools: Tools,
        *,
        must: bool = True,
        several: bool = True,
        strict: bool = True,
    ) -> None:
        given = [HeldTool(name, schema, strict) for name, schema in tools.items()]
        grammar, self.whole = replies.held(given, must=must, several=several)
        checked = checked_grammar(StructuredOutput(calls=grammar, whole=self.whole, param="tools"))
        self.start = vocabulary.matcher(checked.text())
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.replies = replies
        self.tools = tools
        texts = map(tokenizer.token_text, range(tokenizer.vocab_size + 5))
        self.closing = np.array([text.startswith(_CLOSES) for text in texts], dtype=np.uint8)
        self.expected = Expected(tools=tools, parallel=several, held=True)

    def takes(self, ids: Sequence[int]) -> bool:
        """Whether the grammar takes a whole reply, up to an end token."""
        matcher = self.start.deep_copy()
        left = [token for token in ids if token not in self.tokenizer.end_ids]
        return matcher.try_consume_tokens(left) == len(left) and matcher.is_accepting()

    def draw(self, rng: random.Random, most: int = 300) -> list[int] | None:
        """A whole reply of a random model's, which likes to close what is open; None where it does
        not come to an end."""
        matcher = self.start.deep_copy()
        width = self.tokenizer.vocab_size + 5
        mask = allocate_token_bitmask(1, width)
        drawn: list[int] = []
        while len(drawn) < most:
            if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.4):
                return drawn
            fill_next_token_bitmask(matcher, mask)
            assert not matcher.is_error(), matcher.get_error()
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:width]
            bits[list(self.vocabulary.ends)] = 0
            allowed = np.flatnonzero(bits)
            if not len(allowed):
                assert matcher.is_accepting(), self.tokenizer.decode(drawn, False)
                return drawn
            closing = np.flatnonzero(bits & self.closing)
            likely = closing if len(closing) and rng.random() < 0.7 else allowed
            token = int(likely[rng.randrange(len(likely))])
            drawn.append(token)
            assert matcher.consume_token(token)
        return None

    def read(self, ids: Sequence[int]) -> Said:
        """What the format's own parser makes of it."""
        prompt = EncodedPrompt([])
        if self.whole:
            prompt = self.tokenizer.chat_prompt([{"role": "user", "content": "hello"}])
        parser = self.replies.parser(prompt, self.expected, "r")
        found = []
        run: list[int] = []
        for token in (*ids, -1):
            symbol = parser.symbols.get(token, "" if token < 0 else None)
            if symbol is None:
                run.append(token)
                continue
            found += parser.push(self.tokenizer.decode(run, False) + symbol)
            run = []
        assert not parser.malformed
        return fold(found + parser.finish())

    def check(self, ids: Sequence[int]) -> Said:
        """Every call of the reply is one of a tool, with arguments that its schema describes."""
        found = self.read(ids)
        text = self.tokenizer.decode(ids, False)
        for call in found.calls:
            assert call.name in self.tools, text
            try:
                jsonschema.validate(json.loads(call.arguments), self.tools[call.name])
            except (ValueError, jsonschema.ValidationError) as error:
                raise AssertionError(f"{text!r} is read as {call.arguments!r}") from error
        return found
