"""The application: its parts, its start and its end. Errors are `gate.Gate`'s to answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from moebius.engine.client import EngineClient
from moebius.front.choices import ChoiceOpener
from moebius.server.access import AccessLog
from moebius.server.api import Api
from moebius.server.faults import routing_fault
from moebius.server.gate import Gate
from moebius.server.keys import KeyRing
from moebius.server.metrics import ServerMetrics, Spread
from moebius.server.settings import ServerSettings
from moebius.server.spans import Spans
from moebius.server.stream import FrontDoor, Refusal
from moebius.text import GenerationDefaults, ReplyFormat, Tokenizer

_CLOSE_SECONDS = 5.0


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    settings: ServerSettings,
    *,
    prefix_key: bytes | None = None,
    spread: Spread = lambda: None,
    replies: ReplyFormat | None = None,
    spans: Spans | None = None,
    refusal: Refusal = lambda account: None,
) -> Starlette:
    """The server as an ASGI application. It starts `client` when it starts and closes it when it
    ends.

    prefix_key: the launch's, which the engine was given; without it the engine hashes prompts.
    spread: how ranks share the model's experts. replies: how replies to chats are read; None: as
    the tokenizer tells. spans: where requests leave theirs; the server closes it when it ends.
    refusal: what the engines are known to refuse, which is then not read any further.

    app.state.front_door is its FrontDoor, app.state.access its AccessLog, app.state.keys its
    KeyRing. Raises ConfigError where the key file is wrong.
    """
    keys = KeyRing.of(settings)
    metrics = ServerMetrics(client, settings.served_model_names[0], spread=spread)
    hasher = None if prefix_key is None else client.info.hasher(prefix_key)
    opener = ChoiceOpener(tokenizer, client.info, hasher, replies)
    door = FrontDoor(client, opener, metrics, settings, refusal=refusal)
    api = Api(door, tokenizer, defaults, settings, spread)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        door.start()
        try:
            yield
        finally:
            await _close(api, spans)

    routes = api.routes()
    access = AccessLog(metrics, [route.path for route in routes], spans=spans)
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _leave_to_gate},
        middleware=[
            Middleware(
                Gate,
                keys=keys,
                access=access,
                cors_origins=settings.cors_origins,
            )
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.front_door = door
    app.state.access = access
    app.state.keys = keys
    return app


async def _close(api: Api, spans: Spans | None) -> None:
    api.executor.shutdown(wait=False, cancel_futures=True)
    api.grammars.close()
    await api.door.close(_CLOSE_SECONDS)
    if spans is not None:
        await asyncio.to_thread(spans.close)


async def _leave_to_gate(request: Request, error: Exception) -> Response:
    """Or Starlette would answer an unknown route by itself."""
    assert isinstance(error, HTTPException)
    raise routing_fault(error, request.method, request.scope["path"])
