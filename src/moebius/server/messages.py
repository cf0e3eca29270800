"""Anthropic's Messages API: answers, and prompts that are counted."""

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moebius.errors import RequestError
from moebius.server.access import Visit
from moebius.server.messages_bodies import MessagesChat
from moebius.server.messages_format import MessagesAnswer, MessagesFormat
from moebius.server.protocol import ChatRequest, counted_up_to
from moebius.server.stream import Call
from moebius.text import ReplyFormat, Tokenizer

Begin = Callable[[Request, ChatRequest], tuple[Call, str]]
"""Opens the call that is asked for: itself, and the model's name in answers."""


class Messages:
    """The routes' handlers, but for reading bodies."""

    def __init__(self, begin: Begin, tokenizer: Tokenizer, replies: ReplyFormat) -> None:
        self._begin = begin
        self._tokenizer = tokenizer
        self._replies = replies

    def answer(self, request: Request, asked: MessagesChat) -> Response:
        """POST /v1/messages."""
        call, model = self._begin(request, asked)
        visit: Visit = request.scope["moebius.visit"]
        return MessagesAnswer(call, MessagesFormat(call, asked, model), asked.stream, visit.id)

    def count(self, request: Request, asked: MessagesChat, *, context: int) -> Response:
        """POST /v1/messages/count_tokens."""
        found = count_tokens(asked, self._tokenizer, self._replies, context)
        body = msgspec.json.encode({"input_tokens": found})
        return Response(body, media_type="application/json")


def count_tokens(
    asked: ChatRequest, tokenizer: Tokenizer, replies: ReplyFormat, context: int
) -> int:
    """How many tokens the prompt of a chat has, with a model of this context. RequestError where it
    has too many to be counted."""
    try:
        prompt = asked.conversation.prompt(tokenizer, replies, at_most=counted_up_to(context))
    except RequestError as error:
        raise asked.as_written(error) from error
    return len(prompt.ids)
