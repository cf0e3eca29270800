"""OpenAI's Responses API without a memory: answers, and prompts that are counted."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moebius.server.faults import Fault
from moebius.server.messages import Begin, count_tokens
from moebius.server.responses_bodies import ResponsesChat
from moebius.server.responses_format import ResponsesAnswer, ResponsesFormat
from moebius.text import ReplyFormat, Tokenizer


class Responses:
    """The routes' handlers, but for reading bodies."""

    def __init__(self, begin: Begin, tokenizer: Tokenizer, replies: ReplyFormat) -> None:
        self._begin = begin
        self._tokenizer = tokenizer
        self._replies = replies

    def answer(self, request: Request, asked: ResponsesChat) -> Response:
        """POST /v1/responses."""
        call, model = self._begin(request, asked)
        return ResponsesAnswer(
            call, ResponsesFormat(call, asked, self._tokenizer, model), asked.stream
        )

    def count(self, request: Request, asked: ResponsesChat, *, context: int) -> Response:
        """POST /v1/responses/input_tokens."""
        found = count_tokens(asked, self._tokenizer, self._replies, context)
        body = {"object": "response.input_tokens", "input_tokens": found}
        return Response(msgspec.json.encode(body), media_type="application/json")

    async def kept(self, request: Request) -> Response:
        """Whatever is asked about an earlier response."""
        name = request.path_params["id"][:100]
        message = f"there is no response {name!r}: this server keeps none; send the conversation"
        raise Fault(404, message, "response_not_found", param="response_id")
