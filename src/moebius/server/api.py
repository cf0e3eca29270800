"""What each route answers."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import moebius
from moebius.errors import DeadlineError, RequestError
from moebius.request.params import SamplingParams, check_asked
from moebius.server.access import Visit
from moebius.server.answer import Answer
from moebius.server.body import decode_body
from moebius.server.capacity import BodyRoom
from moebius.server.chat_format import ChatFormat
from moebius.server.compiling import GrammarDesk
from moebius.server.docs import HEADERS, page
from moebius.server.faults import Fault
from moebius.server.formats import CompletionFormat
from moebius.server.gate import DOCS, LIVE, METRICS, OPENAPI, body_of
from moebius.server.keys import ApiKey, Caller
from moebius.server.live import LiveFeed, LiveStream
from moebius.server.messages import Messages
from moebius.server.messages_bodies import read_count, read_messages
from moebius.server.methods import route
from moebius.server.metrics import Spread
from moebius.server.models import card, listing
from moebius.server.ollama import Ollama
from moebius.server.ollama_bodies import OllamaChat, OllamaGenerate, OllamaShow
from moebius.server.openapi import document
from moebius.server.page import page_routes
from moebius.server.protocol import (
    TIMEOUT_HEADER,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse,
)
from moebius.server.responses import Responses
from moebius.server.responses_bodies import read_responses
from moebius.server.settings import ServerSettings
from moebius.server.stream import Call, FrontDoor
from moebius.text import Expected, GenerationDefaults, Tokenizer

# A body up to this size is parsed and tokenised on the event loop: handing it to a thread would
# take longer.
_SMALL_BODY = 16 * 1024


Asked = TypeVar("Asked", bound=Body)
Read = Callable[[Mapping[str, Any], Callable[[Sequence[str]], None] | None], Asked]
"""What a body asks for, from its fields; the function gets the names of those that nobody knows."""
Made = TypeVar("Made")


@dataclass(eq=False)
class Api:
    """The routes' handlers."""

    door: FrontDoor
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    settings: ServerSettings
    spread: Spread = lambda: None

    def __post_init__(self) -> None:
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self.room = BodyRoom()
        self.feed = LiveFeed(self.door, self.spread)
        self.grammars = GrammarDesk()
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        completions = self.posted(reader(CompletionRequest), self.generate, computes=True)
        chat = self.posted(reader(ChatRequest), self.generate, computes=True)
        return [
            route("/v1/completions", completions, ["POST"]),
            route("/v1/chat/completions", chat, ["POST"]),
            route("/tokenize", self.posted(reader(TokenizeRequest), self.tokenize), ["POST"]),
            route("/detokenize", self.posted(reader(DetokenizeRequest), self.detokenize), ["POST"]),
            route("/v1/models", self.models),
            route("/v1/models/", self.models),
            route("/v1/models/{id:path}", self.model),
            route("/health", self.ready),
            route("/health/live", self.live),
            route("/health/ready", self.ready),
            route("/ping", self.ready, ["GET", "POST"]),
            route(METRICS, self.metrics),
            route("/v1/moe/stats", self.moe_stats),
            route(LIVE, self.live_stream),
            *page_routes(),
            route("/version", self.version),
            *self.messages_routes(),
            *self.responses_routes(),
            *self.ollama_routes(),
            route(OPENAPI, self.openapi),
            route(DOCS, self.docs),
            route("/v1/embeddings", self.embeddings, ["GET", "POST"]),
        ]

    def ollama_routes(self) -> list[Route]:
        """Ollama's API, beside OpenAI's."""
        names = self.settings.served_model_names
        ollama = Ollama(self._begin, self.tokenizer, names, self._created)
        info = self.door.client.info

        async def version(request: Request) -> Response:
            return _json(ollama.version())

        async def tags(request: Request) -> Response:
            return _json(ollama.tags(info.fingerprint))

        def show(request: Request, asked: OllamaShow) -> Response:
            return _json(ollama.show(asked, info.limits.max_model_len, self.door.opener.format))

        return [
            route("/api/version", version),
            route("/api/tags", tags),
            route("/api/show", self.posted(reader(OllamaShow), show), ["POST"]),
            route("/api/chat", self.posted(reader(OllamaChat), ollama.chat), ["POST"]),
            route("/api/generate", self.posted(reader(OllamaGenerate), ollama.generate), ["POST"]),
        ]

    def messages_routes(self) -> list[Route]:
        """Anthropic's API."""
        messages = Messages(self._begin, self.tokenizer, self.door.opener.format)
        count = partial(messages.count, context=self.door.client.info.limits.max_model_len)
        answer = self.posted(read_messages, messages.answer, computes=True)
        return [
            route("/v1/messages", answer, ["POST"]),
            route("/v1/messages/count_tokens", self.posted(read_count, count), ["POST"]),
        ]

    def responses_routes(self) -> list[Route]:
        """OpenAI's Responses API."""
        responses = Responses(self._begin, self.tokenizer, self.door.opener.format)
        count = partial(responses.count, context=self.door.client.info.limits.max_model_len)
        answer = self.posted(read_responses, responses.answer, computes=True)
        counted = self.posted(read_responses, count)
        kept = ["GET", "POST", "DELETE"]
        return [
            route("/v1/responses", answer, ["POST"]),
            route("/v1/responses/input_tokens", counted, ["POST"]),
            route("/v1/responses/{id:path}", responses.kept, kept),
        ]

    async def models(self, request: Request) -> Response:
        cards = [self._card(name) for name in self.settings.served_model_names]
        return _json(listing(cards))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        self._check_model(name)
        return _json(self._card(name))

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if not self.door.ready:
            state = "draining" if self.door.draining else "not_ready"
            raise Fault(503, "the server is not ready", state, headers={"Retry-After": "5"})
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        # On a thread: the engine may take a while to answer.
        text = await asyncio.to_thread(self.door.metrics.exposition)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def moe_stats(self, request: Request) -> Response:
        """How each layer's router spread the last steps' tokens, and how ranks share the experts; a
        dense model has no layers, and one process no group."""
        loads = await asyncio.to_thread(self.door.client.expert_loads)
        found = {
            "object": "moe.stats",
            "window_steps": loads.steps,
            "layers": loads.layers,
            "group": await asyncio.to_thread(self.spread),
        }
        return _json(found)

    async def live_stream(self, request: Request) -> Response:
        """The live page's figures, as they come."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return LiveStream(self.feed)

    async def embeddings(self, request: Request) -> Response:
        raise Fault(404, "this server generates text; it makes no embeddings", "not_found")

    async def version(self, request: Request) -> Response:
        return _json({"version": moebius.__version__})

    async def openapi(self, request: Request) -> Response:
        # On a thread: it takes some time, once.
        return Response(await asyncio.to_thread(_described), media_type="application/json")

    async def docs(self, request: Request) -> Response:
        text = await asyncio.to_thread(_documented)
        return Response(text, headers=HEADERS, media_type="text/html")

    def posted(
        self,
        read: Read[Asked],
        answer: Callable[[Request, Asked], Response],
        *,
        computes: bool = False,
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that takes the body, reads what it asks for and answers: on a thread where that
        takes long.

        computes: whatever is asked for, an engine is to compute; without room there it is not read.
        """

        def understood(request: Request, body: bytes) -> Asked:
            visit: Visit = request.scope["moebius.visit"]
            ignore = visit.ignore if self.settings.unknown_fields == "warn" else None
            asked = read(decode_body(body), ignore)
            if not asked.any_model:
                self._check_model(asked.model)
            return asked

        async def route(request: Request) -> Response:
            # A small body has come with its headers, and its connection can be used again.
            if computes and int(request.headers.get("content-length", 0)) > _SMALL_BODY:
                self.door.check_room(request.scope["moebius.caller"])
            async with body_of(request, self.settings.body_timeout, self.room) as body:
                if computes:
                    self.door.check_room(request.scope["moebius.caller"])
                if len(body) <= _SMALL_BODY:
                    asked = understood(request, body)
                    await self._check_grammar(request, asked)
                    return answer(request, asked)
                asked = await self._on_thread(request, partial(understood, request, body))
                await self._check_grammar(request, asked)
                return await self._on_thread(request, partial(answer, request, asked))

        return route

    async def _check_grammar(self, request: Request, asked: Body) -> None:
        """So that it is at hand when the call is opened; what is wrong with it is said here."""
        if not isinstance(asked, GenerationRequest):
            return
        try:
            wanted = asked.structured
            if isinstance(asked, ChatRequest):
                params = SamplingParams(structured=wanted)
                wanted = asked.conversation.params(params, self.door.opener.format).structured
            if wanted is None:
                return
            checked = await self.grammars.checked(wanted)
        except RequestError as error:
            raise asked.as_written(error) from error
        if checked.ignored:
            visit: Visit = request.scope["moebius.visit"]
            visit.facts["ignored_keywords"] = "; ".join(checked.ignored)

    async def _on_thread(self, request: Request, make: Callable[[], Made]) -> Made:
        """What `make` makes on one of a few threads, for which others may be waiting. DeadlineError
        when it is late."""
        late = request.scope["moebius.visit"].started + self.settings.request_timeout
        try:
            async with asyncio.timeout(late - self.door.clock()):
                return await asyncio.get_running_loop().run_in_executor(self.executor, make)
        except TimeoutError:
            raise DeadlineError("the request's deadline passed before it was read") from None

    def generate(self, request: Request, asked: CompletionRequest | ChatRequest) -> Response:
        """Open the call that is asked for; the answer submits it when it is awaited."""
        call, model = self._begin(request, asked)
        fingerprint = self.door.client.info.fingerprint
        if isinstance(asked, ChatRequest):
            chat = ChatFormat(call, asked, self.tokenizer, model, fingerprint)
            return Answer(call, chat, asked.stream)
        completion = CompletionFormat(call, asked, self.tokenizer, model, fingerprint)
        return Answer(call, completion, asked.stream)

    def _begin(self, request: Request, asked: CompletionRequest | ChatRequest) -> tuple[Call, str]:
        """The call that is asked for, and what the model is called in its answer."""
        try:
            call = self._open(request, asked)
        except RequestError as error:
            raise asked.as_written(error) from error
        call.as_written = asked.as_written
        return call, asked.model or self.settings.served_model_names[0]

    def _open(self, request: Request, asked: CompletionRequest | ChatRequest) -> Call:
        visit: Visit = request.scope["moebius.visit"]
        caller: Caller = request.scope["moebius.caller"]
        self.door.check_room(caller)
        params = asked.sampling(self.defaults)
        timeout = asked.seconds(request.headers.getlist(TIMEOUT_HEADER))
        limits = self.door.client.info.limits
        replies = self.door.opener.format
        expected = Expected()
        if isinstance(asked, ChatRequest):
            params = asked.conversation.params(params, replies)
            expected = asked.conversation.expected(replies)
        # Before the prompts are encoded, which may take long.
        check_asked(params, limits, asked.priority)
        check_priority(asked.priority, caller.key)
        if isinstance(asked, ChatRequest):
            most = limits.max_model_len
            prompts = [asked.conversation.prompt(self.tokenizer, replies, at_most=most)]
        else:
            prompts = asked.encode(self.tokenizer, limits.max_model_len)
        room = limits.max_model_len - len(prompts[0].ids)
        if asked.clamps and params.max_tokens is not None and params.max_tokens > room:
            params = params.with_(max_tokens=None)
        return self.door.open(
            f"{asked.id_prefix}-{secrets.token_hex(12)}",
            prompts,
            params,
            expected=expected,
            continues=asked.continues,
            since=visit.started,
            timeout=timeout,
            priority=asked.priority,
            salt=_salt(request, asked),
            caller=caller,
        )

    def tokenize(self, request: Request, asked: TokenizeRequest) -> Response:
        length = self.door.client.info.limits.max_model_len
        ids = asked.encode(self.tokenizer, length)
        texts = None
        if asked.return_token_strs:
            texts = [self.tokenizer.token_text(token_id) for token_id in ids]
        return _json(
            {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts}
        )

    def detokenize(self, request: Request, asked: DetokenizeRequest) -> Response:
        vocab_size = self.door.client.info.limits.vocab_size
        for token_id in set(asked.tokens):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"tokens: {token_id} is not an id from 0 to {vocab_size - 1}", param="tokens"
                )
        return _json({"prompt": self.tokenizer.decode(asked.tokens, skip_special_tokens=False)})

    def _card(self, name: str) -> dict[str, Any]:
        first = self.settings.served_model_names[0]
        found = card(name, first, self._created, self.door.client.info.limits.max_model_len)
        replies = self.door.opener.format
        return {**found, "tool_format": replies.tools, "reasoning_format": replies.reasoning}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.served_model_names:
            served = " or ".join(map(repr, self.settings.served_model_names))
            message = f"the model {name[:200]!r} is not served here; use {served}"
            raise RequestError(message, param="model", code="model_not_found")


def reader(kind: type[Asked]) -> Read[Asked]:
    """Takes a body as a record of this kind."""
    return partial(parse, kind)


@cache
def _described() -> bytes:
    return msgspec.json.encode(document())


@cache
def _documented() -> str:
    return page(document())


def check_priority(priority: int, key: ApiKey) -> None:
    """RequestError where requests with this key must not bring a priority."""
    if priority != 0 and not key.priority:
        raise RequestError(
            f"priority is {priority}; it must be 0 with this API key, which may bring none",
            param="priority",
        )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _salt(request: Request, asked: GenerationRequest) -> bytes:
    """What separates prefix caches: the API key, and within it the client's own salt."""
    tenant: bytes = request.scope["moebius.tenant"]
    if not tenant and not asked.cache_salt:
        return b""
    digest = hashlib.blake2b(tenant, digest_size=32, person=b"moebius-salt")
    digest.update(len(tenant).to_bytes(2, "little") + asked.cache_salt.encode())
    return digest.digest()
