"""The application: its routes, its start and its end. Errors are `guard.Guard`'s to answer."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import moebius
from moebius.engine.client import EngineClient
from moebius.errors import DeadlineError, RequestError
from moebius.front.choices import ChoiceOpener
from moebius.schedule.params import check_asked
from moebius.server.access import AccessLog
from moebius.server.answer import Answer
from moebius.server.body import decode_body
from moebius.server.capacity import BodyRoom
from moebius.server.faults import Fault, routing_fault
from moebius.server.formats import ChatFormat, CompletionFormat
from moebius.server.guard import METRICS, Guard, body_of
from moebius.server.metrics import ServerMetrics
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
from moebius.server.stream import FrontDoor
from moebius.text import GenerationDefaults, Tokenizer

# A body up to this size is parsed and tokenised on the event loop: handing it to a thread would
# take longer.
_SMALL_BODY = 16 * 1024
_CLOSE_SECONDS = 5.0


Asked = TypeVar("Asked", bound=Body)


@dataclass(eq=False)
class _Api:
    """The routes' handlers."""

    door: FrontDoor
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    settings: ServerSettings

    def __post_init__(self) -> None:
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self.room = BodyRoom()
        self._created = int(time.time())

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
        return Response(
            self.door.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def moe_stats(self, request: Request) -> Response:
        """How each layer's router spread the tokens of the last steps; a dense model has no
        layers."""
        loads = self.door.client.expert_loads()
        return _json({"object": "moe.stats", "window_steps": loads.steps, "layers": loads.layers})

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
            ignore = (
                request.scope["moebius.visit"].ignore
                if self.settings.unknown_fields == "warn"
                else None
            )
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
        try:
            params = asked.sampling(self.defaults)
            timeout = asked.seconds(request.headers.getlist(TIMEOUT_HEADER))
            limits = self.door.client.info.limits
            check_asked(params, limits, asked.priority)
            prompts = asked.encode(self.tokenizer, limits.max_model_len)
            call = self.door.open(
                f"{asked.id_prefix}-{secrets.token_hex(12)}",
                prompts,
                params,
                continues=asked.continues,
                since=request.scope["moebius.visit"].started,
                timeout=timeout,
                priority=asked.priority,
                salt=_salt(request, asked),
            )
        except RequestError as error:
            raise asked.as_written(error) from error
        model = asked.model or self.settings.served_model_names[0]
        form = ChatFormat if isinstance(asked, ChatRequest) else CompletionFormat
        return Answer(
            call,
            form(call, asked, self.tokenizer, model, self.door.client.info.fingerprint),
            asked.stream,
        )

    def tokenize(self, request: Request, asked: TokenizeRequest) -> Response:
        length = self.door.client.info.limits.max_model_len
        ids = asked.encode(self.tokenizer, length)
        texts = (
            [self.tokenizer.token_text(token_id) for token_id in ids]
            if asked.return_token_strs
            else None
        )
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
        length = self.door.client.info.limits.max_model_len
        facts = {
            "object": "model",
            "owned_by": "moebius",
            "created": self._created,
            "max_model_len": length,
        }
        family = {"root": self.settings.served_model_names[0], "parent": None}
        return {"id": name, **facts, **family, "permission": [_permission(name, self._created)]}

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


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    settings: ServerSettings,
    *,
    prefix_key: bytes | None = None,
) -> Starlette:
    """The server as an ASGI application. It starts `client` when it starts and closes it when it
    ends.

    prefix_key: the launch's, which the engine was given; without it the engine hashes prompts.

    app.state.front_door is its FrontDoor, app.state.access its AccessLog.
    """
    metrics = ServerMetrics(
        client, settings.served_model_names[0], vllm_names=settings.vllm_metric_names
    )
    hasher = None if prefix_key is None else client.info.hasher(prefix_key)
    door = FrontDoor(client, ChoiceOpener(tokenizer, client.info, hasher), metrics, settings)
    api = _Api(door, tokenizer, defaults, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        door.start()
        try:
            yield
        finally:
            api.executor.shutdown(wait=False, cancel_futures=True)
            await door.close(_CLOSE_SECONDS)

    async def leave_to_guard(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # Or Starlette would answer an unknown route by itself.
        raise routing_fault(error, request.method, request.scope["path"])

    routes = [
        Route("/v1/completions", api.posted(CompletionRequest, api.generate), methods=["POST"]),
        Route("/v1/chat/completions", api.posted(ChatRequest, api.generate), methods=["POST"]),
        Route("/tokenize", api.posted(TokenizeRequest, api.tokenize), methods=["POST"]),
        Route("/detokenize", api.posted(DetokenizeRequest, api.detokenize), methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/", api.models),
        Route("/v1/models/{id:path}", api.model),
        Route("/health", api.ready),
        Route("/health/live", api.live),
        Route("/health/ready", api.ready),
        Route(METRICS, api.metrics),
        Route("/v1/moe/stats", api.moe_stats),
        Route("/version", api.version),
        Route("/v1/embeddings", api.embeddings, methods=["GET", "POST"]),
    ]
    access = AccessLog(metrics, [route.path for route in routes])
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: leave_to_guard},
        middleware=[
            Middleware(
                Guard,
                api_keys=settings.api_keys,
                access=access,
                cors_origins=settings.cors_origins,
                metrics_api_key=settings.metrics_api_key,
            )
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.front_door = door
    app.state.access = access
    return app
