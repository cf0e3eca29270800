"""What each route answers."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import moebius
from moebius.errors import DeadlineError, RequestError
from moebius.request.params import check_asked
from moebius.server.access import Visit
from moebius.server.answer import Answer
from moebius.server.body import decode_body
from moebius.server.capacity import BodyRoom
from moebius.server.faults import Fault
from moebius.server.formats import ChatFormat, CompletionFormat
from moebius.server.gate import METRICS, body_of
from moebius.server.keys import ApiKey, Caller
from moebius.server.metrics import Spread
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
from moebius.server.settings import ServerSettings
from moebius.server.stream import Call, FrontDoor
from moebius.text import GenerationDefaults, Tokenizer

# A body up to this size is parsed and tokenised on the event loop: handing it to a thread would
# take longer.
_SMALL_BODY = 16 * 1024


Asked = TypeVar("Asked", bound=Body)


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
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        completions = self.posted(CompletionRequest, self.generate)
        chat = self.posted(ChatRequest, self.generate)
        return [
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/tokenize", self.posted(TokenizeRequest, self.tokenize), methods=["POST"]),
            Route("/detokenize", self.posted(DetokenizeRequest, self.detokenize), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/health", self.ready),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route(METRICS, self.metrics),
            Route("/v1/moe/stats", self.moe_stats),
            Route("/version", self.version),
            Route("/v1/embeddings", self.embeddings, methods=["GET", "POST"]),
        ]

    async def models(self, request: Request) -> Response:
        return _json(
            {
                "object": "list",
                "data": [self._card(name) for name in self.settings.served_model_names],
            }
        )

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

    async def embeddings(self, request: Request) -> Response:
        raise Fault(404, "this server generates text; it makes no embeddings", "not_found")

    async def version(self, request: Request) -> Response:
        return _json({"version": moebius.__version__})

    def posted(
        self, kind: type[Asked], answer: Callable[[Request, Asked], Response]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that reads the body, parses it as `kind` and answers: on a thread where that
        takes long."""

        def handle(request: Request, body: bytes) -> Response:
            visit: Visit = request.scope["moebius.visit"]
            ignore = visit.ignore if self.settings.unknown_fields == "warn" else None
            asked = parse(kind, decode_body(body), ignore)
            self._check_model(asked.model)
            return answer(request, asked)

        async def route(request: Request) -> Response:
            async with body_of(request, self.settings.body_timeout, self.room) as body:
                if len(body) <= _SMALL_BODY:
                    return handle(request, body)
                return await self._on_thread(request, partial(handle, request, body))

        return route

    async def _on_thread(self, request: Request, make: Callable[[], Response]) -> Response:
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
        try:
            call = self._open(request, asked)
        except RequestError as error:
            raise asked.as_written(error) from error
        model = asked.model or self.settings.served_model_names[0]
        fingerprint = self.door.client.info.fingerprint
        form = ChatFormat if isinstance(asked, ChatRequest) else CompletionFormat
        return Answer(call, form(call, asked, self.tokenizer, model, fingerprint), asked.stream)

    def _open(self, request: Request, asked: CompletionRequest | ChatRequest) -> Call:
        visit: Visit = request.scope["moebius.visit"]
        params = asked.sampling(self.defaults)
        timeout = asked.seconds(request.headers.getlist(TIMEOUT_HEADER))
        limits = self.door.client.info.limits
        # Before the prompts are encoded, which may take long.
        check_asked(params, limits, asked.priority)
        caller: Caller = request.scope["moebius.caller"]
        check_priority(asked.priority, caller.key)
        return self.door.open(
            f"{asked.id_prefix}-{secrets.token_hex(12)}",
            asked.encode(self.tokenizer, limits.max_model_len),
            params,
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
        return {
            "id": name,
            "object": "model",
            "owned_by": "moebius",
            "created": self._created,
            "max_model_len": self.door.client.info.limits.max_model_len,
            "root": self.settings.served_model_names[0],
            "parent": None,
            "permission": [_permission(name, self._created)],
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.served_model_names:
            served = " or ".join(map(repr, self.settings.served_model_names))
            message = f"the model {name[:200]!r} is not served here; use {served}"
            raise RequestError(message, param="model", code="model_not_found")


def _permission(name: str, created: int) -> dict[str, Any]:
    """What OpenAI's API once said of every model, and clients written for vLLM may still read."""
    allowed = {"sampling": True, "logprobs": True, "view": True}
    refused = {"create_engine": False, "search_indices": False, "fine_tuning": False}
    return {
        "id": "modelperm-" + hashlib.blake2b(name.encode(), digest_size=12).hexdigest(),
        "object": "model_permission",
        "created": created,
        **{f"allow_{what}": allows for what, allows in (allowed | refused).items()},
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


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
