"""The server's tests of answers and of errors once more, with an engine that hears frames only."""

from __future__ import annotations

from typing import Any

import pytest

import server.serving as servers
from engine.wire_client import WireClient
from moebius.engine.client import EngineClient
from moebius.server.app import create_app
from server.test_chat_api import *  # noqa: F403
from server.test_completions_api import *  # noqa: F403
from server.test_faults_api import *  # noqa: F403
from server.test_timeouts import *  # noqa: F403

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def crossed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clients that each test's servers were given; all of them were used."""
    clients: list[WireClient] = []

    def over_frames(client: EngineClient, *rest: Any, **options: Any) -> Any:
        clients.append(WireClient(client, client.info.hasher(KEY)))
        return create_app(clients[-1], *rest, prefix_key=KEY, **options)

    monkeypatch.setattr(servers, "create_app", over_frames)
    yield clients
    for client in clients:
        assert client.frames or not client.inner.requests
        assert all(request.prompt_hashes is not None for request in client.inner.requests)
