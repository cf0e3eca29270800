"""The application: routes, start and end, and how errors reach clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from moebius.engine.client import EngineClient
from moebius.errors import ContextLengthError, MoebiusError, RequestError
from moebius.server import responses as r
from moebius.server.answer import Answer
from moebius.server.faults import HTTPFault, fault_of
from moebius.server.formats import ChatFormat, CompletionFormat
from moebius.server.guard import Guard, read_body
from moebius.server.metrics import ServerMetrics
from moebius.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    decode_body,
    parse,
)
from moebius.server.settings import ServerSettings
from moebius.server.stream import Ask, Call, FrontDoor
from moebius.text import GenerationDefaults, Tokenizer

# A body up to this size is parsed and tokenised on the event loop: handing it to a thread would take longer.
_SMALL_BODY = 16 * 1024
_CLOSE_SECONDS = 5.0

_T = TypeVar("_T")


class _Api:
    """The routes' handlers."""

    def __init__(
        self, door: FrontDoor, tokenizer: Tokenizer, defaults: GenerationDefaults, settings: ServerSettings
    ) -> None:
        self.door = door
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.settings = settings
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        self._created = int(time.time())

    async def completions(self, request: Request) -> Response:
        return await self._with_body(request, self._open_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._with_body(request, self._open_chat)

    async def tokenize(self, request: Request) -> Response:
        return await self._with_body(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._with_body(request, self._detokenize)

    async def models(self, request: Request) -> Response:
        return _json(r.ModelList([self._card(name) for name in self.settings.served_model_names]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        self._check_model(name)
        return _json(self._card(name))

    async def live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if not self.door.ready:
            state = "draining" if self.door.draining else "not_ready"
            raise HTTPFault(503, "the server is not ready", state, {"Retry-After": "5"})
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.door.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        return _json({"version": self.settings.version})

    async def _with_body(self, request: Request, handle: Callable[[Request, bytes], _T]) -> _T:
        """Read the body, then parse and tokenise it: on a thread where that could take long."""
        body = await read_body(request.scope, request.receive, self.settings.body_timeout)
        if len(body) <= _SMALL_BODY:
            return handle(request, body)
        return await asyncio.get_running_loop().run_in_executor(self.executor, handle, request, body)

    def _open_completion(self, request: Request, body: bytes) -> Response:
        asked = parse(CompletionRequest, decode_body(body))
        self._check_model(asked.model)
        params = asked.sampling(self.defaults)
        texts = [prompt if isinstance(prompt, str) else None for prompt in asked.prompt]
        prompts = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in asked.prompt]
        ask = Ask(prompts, params, asked.priority, _salt(request, asked), continues=True)
        call = self._open("cmpl", ask, asked, "prompt")
        model, fingerprint = self._name(asked), self.door.client.info.fingerprint
        return Answer(
            call, CompletionFormat(call, asked, self.tokenizer, model, fingerprint, texts), stream=asked.stream
        )

    def _open_chat(self, request: Request, body: bytes) -> Response:
        asked = parse(ChatRequest, decode_body(body))
        self._check_model(asked.model)
        params = asked.sampling(self.defaults)
        prompt = self.tokenizer.encode_chat(asked.messages, variables=asked.chat_template_kwargs)
        ask = Ask([prompt], params, asked.priority, _salt(request, asked))
        call = self._open("chatcmpl", ask, asked, "messages")
        model, fingerprint = self._name(asked), self.door.client.info.fingerprint
        return Answer(call, ChatFormat(call, asked, self.tokenizer, model, fingerprint), stream=asked.stream)

    def _open(self, kind: str, ask: Ask, asked: GenerationRequest, prompt_param: str) -> Call:
        """Open a call; errors name the field as this endpoint's client wrote it."""
        try:
            return self.door.open(f"{kind}-{secrets.token_hex(12)}", ask)
        except ContextLengthError as error:
            raise ContextLengthError(str(error), param=prompt_param) from error
        except RequestError as error:
            names = {"prompt": prompt_param, "max_tokens": asked.length_param}
            param = names.get(error.param or "", error.param)
            raise RequestError(str(error), param=param, code=error.code) from error

    def _tokenize(self, request: Request, body: bytes) -> Response:
        asked = parse(TokenizeRequest, decode_body(body))
        self._check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if asked.messages is not None:
            ids = self.tokenizer.encode_chat(
                asked.messages,
                add_generation_prompt=asked.add_generation_prompt,
                variables=asked.chat_template_kwargs,
            )
        else:
            ids = self.tokenizer.encode(asked.prompt or "", asked.add_special_tokens)
        texts = [self.tokenizer.token_text(token_id) for token_id in ids] if asked.return_token_strs else None
        return _json(r.Tokens(len(ids), self.door.client.info.limits.max_model_len, ids, texts))

    def _detokenize(self, request: Request, body: bytes) -> Response:
        asked = parse(DetokenizeRequest, decode_body(body))
        self._check_model(asked.model)
        vocab_size = self.door.client.info.limits.vocab_size
        for token_id in asked.tokens:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"tokens: {token_id} is not an id from 0 to {vocab_size - 1}", param="tokens")
        return _json(r.Detokenized(self.tokenizer.decode(asked.tokens, skip_special_tokens=False)))

    def _card(self, name: str) -> r.ModelCard:
        return r.ModelCard(name, self._created, self.door.client.info.limits.max_model_len)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.served_model_names:
            raise RequestError(f"the model {name!r} is not served here", param="model", code="model_not_found")

    def _name(self, asked: GenerationRequest) -> str:
        return asked.model or self.settings.served_model_names[0]


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
    client: EngineClient, tokenizer: Tokenizer, defaults: GenerationDefaults, settings: ServerSettings
) -> FastAPI:
    """The server as an ASGI application. It starts `client` when it starts and closes it when it ends.

    app.state.front_door is its FrontDoor.
    """
    metrics = ServerMetrics(client, settings.served_model_names[0], vllm_names=settings.vllm_metric_names)
    door = FrontDoor(client, tokenizer, metrics, settings)
    api = _Api(door, tokenizer, defaults, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        door.start()
        try:
            yield
        finally:
            api.executor.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(door.close, _CLOSE_SECONDS)

    app = FastAPI(
        lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, title="Moebius"
    )
    app.state.front_door = door
    for path, handler in (
        ("/v1/completions", api.completions),
        ("/v1/chat/completions", api.chat_completions),
        ("/tokenize", api.tokenize),
        ("/detokenize", api.detokenize),
    ):
        app.add_route(path, handler, methods=["POST"])
    for path, handler in (
        ("/v1/models", api.models),
        ("/v1/models/{id:path}", api.model),
        ("/health", api.ready),
        ("/health/live", api.live),
        ("/health/ready", api.ready),
        ("/metrics", api.metrics),
        ("/version", api.version),
    ):
        app.add_route(path, handler, methods=["GET"])

    async def answer_error(request: Request, error: Exception) -> Response:
        fault = fault_of(error)
        metrics.rejected(fault.reason)
        return fault.response()

    for kind in (MoebiusError, HTTPFault, HTTPException):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(Guard, api_keys=settings.api_keys, metrics=metrics)
    return app
