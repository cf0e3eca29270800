"""Ollama's API (https://github.com/ollama/ollama/blob/main/docs/api.md), for clients that know no
other: which models there are, chat and generate.

Answers are objects of one line each (NDJSON). What is asked becomes an OpenAI body, which is then
parsed and answered as one that came by /v1.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moebius.errors import RequestError
from moebius.front.assemble import Delta
from moebius.server.answer import Answer
from moebius.server.dialects import ollama_error
from moebius.server.faults import Fault
from moebius.server.formats import Format
from moebius.server.objects import object_of
from moebius.server.ollama_bodies import OllamaBody, OllamaChat, OllamaGenerate, OllamaShow
from moebius.server.protocol import ChatRequest, CompletionRequest, parse
from moebius.server.stream import Call, LiveChoice, News
from moebius.text import ReplyFormat, Tokenizer
from moebius.text.replies import CallEnd, Content, Event, Reasoning, SaidCall, fold

Json = dict[str, Any]
Generation = ChatRequest | CompletionRequest
Begin = Callable[[Request, Generation], tuple[Call, str]]
"""Opens the call that is asked for: itself, and the model's name in answers."""

SPOKEN = "0.6.4"
"""The version of Ollama whose API this is: what Copilot wants at least."""
_NDJSON = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache")]


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaFormat(Format):
    """Both routes' lines; `said` is what they differ in."""

    kind = chunk_kind = ""

    def _prepare(self) -> None:
        # Of the call that is open: lines hold whole ones.
        self._call_events: list[Event] = []

    def chunks(self, news: News) -> list[Json]:
        events = (event for _, delta in news for event in delta.events)
        return [self._line(said) for event in events if (said := self._piece(event)) is not None]

    def closing(self) -> list[Json]:
        return [self._line({**self.said(""), **self._end(self._call.choices[0])})]

    def whole(self) -> Iterator[bytes]:
        choice = self._call.choices[0]
        said = fold(choice.assembler.released.events)
        found = self.said(said.content or "", said.reasoning, said.calls)
        yield msgspec.json.encode(self._line({**found, **self._end(choice)}))

    def said(self, text: str, thinking: str | None = None, calls: Sequence[SaidCall] = ()) -> Json:
        """The fields that hold a piece of the answer."""
        raise NotImplementedError

    def _piece(self, event: Event) -> Json | None:
        match event:
            case Content(text):
                return self.said(text)
            case Reasoning(text):
                return self.said("", text)
            case CallEnd():
                calls = fold(self._call_events).calls
                self._call_events = []
                return self.said("", calls=calls)
        self._call_events.append(event)
        return None

    def _line(self, fields: Json) -> Json:
        return {"model": self._head["model"], "created_at": now(), "done": False, **fields}

    def _end(self, choice: LiveChoice) -> Json:
        """What the last line says beside; durations are in nanoseconds."""
        times = choice.times
        first = times.first or times.arrival
        last = times.last or first
        return {
            "done": True,
            "done_reason": choice.assembler.finish_reason,
            "total_duration": round(1e9 * (last - times.arrival)),
            "load_duration": 0,
            "prompt_eval_count": self._call.prompt_tokens,
            "prompt_eval_duration": round(1e9 * (first - times.arrival)),
            "eval_count": self._call.completion_tokens,
            "eval_duration": round(1e9 * (last - first)),
        }

    def _choice(self, choice: LiveChoice, said: Delta) -> Json:
        raise NotImplementedError

    def _chunks(self, choice: LiveChoice, delta: Delta, *, first: bool) -> Iterator[Json]:
        raise NotImplementedError


class ChatLines(OllamaFormat):
    """/api/chat."""

    def said(self, text: str, thinking: str | None = None, calls: Sequence[SaidCall] = ()) -> Json:
        message: Json = {"role": "assistant", "content": text, **_thinking(thinking)}
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": object_of(call.arguments)}}
                for call in calls
            ]
        return {"message": message}


class GenerateLines(OllamaFormat):
    """/api/generate, where no tools are."""

    def said(self, text: str, thinking: str | None = None, calls: Sequence[SaidCall] = ()) -> Json:
        return {"response": text, **_thinking(thinking)}


def _thinking(text: str | None) -> Json:
    return {} if text is None else {"thinking": text}


class OllamaAnswer(Answer):
    """Lines instead of events; errors are a text."""

    stream_headers = _NDJSON
    keep_alive = b""  # a line that is no object would end a client
    done = b""

    def framed(self, chunk: object) -> bytes:
        return msgspec.json.encode(chunk) + b"\n"

    def told(self, fault: Fault) -> object:
        return ollama_error(fault)


class Ollama:
    """The routes' handlers, but for reading bodies.

    begin: opens a call; names: what the model is called; created: when it was loaded, in seconds
    """

    def __init__(
        self, begin: Begin, tokenizer: Tokenizer, names: tuple[str, ...], created: int
    ) -> None:
        self._begin = begin
        self._tokenizer = tokenizer
        self._names = names
        self._created = created

    def version(self) -> Json:
        return {"version": SPOKEN}

    def tags(self, fingerprint: str) -> Json:
        """The models that there are."""
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        modified = datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")
        models = [
            {
                "name": name,
                "model": name,
                "modified_at": modified,
                "size": 0,
                "digest": digest,
                "details": _details(),
            }
            for name in self._names
        ]
        return {"models": models}

    def show(self, asked: OllamaShow, max_model_len: int, replies: ReplyFormat) -> Json:
        """What Copilot and others read of one model: what it can do, and its context."""
        name = asked.model or asked.name
        if name is not None and name not in self._names:
            raise RequestError(
                f"the model {name[:200]!r} is not served here",
                param="model",
                code="model_not_found",
            )
        return {
            "license": "",
            "modelfile": "",
            "parameters": "",
            "template": self._tokenizer.templates.get("default", ""),
            "details": _details(),
            "model_info": {
                "general.architecture": "moebius",
                "general.basename": self._names[0],
                "moebius.context_length": max_model_len,
            },
            "capabilities": [
                "completion",
                *(["tools"] if replies.tools else []),
                *(["thinking"] if replies.reasoning else []),
            ],
        }

    def chat(self, request: Request, asked: OllamaChat) -> Response:
        if not asked.messages:
            return self._loaded(asked, ChatLines)
        return self._answer(request, asked, ChatRequest, asked.chat, ChatLines)

    def generate(self, request: Request, asked: OllamaGenerate) -> Response:
        if not asked.prompt and not asked.suffix:
            return self._loaded(asked, GenerateLines)
        plain = asked.raw or asked.suffix or not self._tokenizer.has_chat_template
        if plain:
            return self._answer(request, asked, CompletionRequest, asked.completion, GenerateLines)
        return self._answer(request, asked, ChatRequest, asked.chat, GenerateLines)

    def _answer(
        self,
        request: Request,
        asked: OllamaBody,
        kind: type[Generation],
        body: Callable[[], Json],
        lines: type[OllamaFormat],
    ) -> Response:
        wanted = parse(kind, body())
        call, model = self._begin(request, wanted)
        return OllamaAnswer(call, lines(call, wanted, self._tokenizer, model, ""), asked.stream)

    def _loaded(self, asked: OllamaBody, lines: type[OllamaFormat]) -> Response:
        """Nothing is asked: a client has the model loaded, or let go of; it stays."""
        said: Json = {"message": {"role": "assistant", "content": ""}}
        if lines is GenerateLines:
            said = {"response": ""}
        reason = "unload" if asked.unloads else "load"
        line = {"model": asked.model or self._names[0], "created_at": now(), **said}
        body = msgspec.json.encode({**line, "done": True, "done_reason": reason}) + b"\n"
        return Response(body, media_type="application/x-ndjson")


def _details() -> Json:
    """What Ollama knows of a file; here nobody needs it."""
    return {
        "parent_model": "",
        "format": "",
        "family": "moebius",
        "families": ["moebius"],
        "parameter_size": "",
        "quantization_level": "",
    }
