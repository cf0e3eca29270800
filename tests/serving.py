"""A real server on a thread, for tests that speak HTTP to it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loop_guard
from moebius.engine.config import EngineConfig
from moebius.engine.disk_directory import launch_key
from moebius.engine.in_process import InProcessClient
from moebius.engine.load import load_engine
from moebius.server.app import create_app
from moebius.server.run import Server
from moebius.server.settings import ServerSettings
from moebius.text.defaults import GenerationDefaults
from moebius.text.tokenizer import Tokenizer


@contextmanager
def serving(
    directory: Path, name: str, *, api_keys: tuple[str, ...] = (), **options: Any
) -> Iterator[str]:
    """Its address, for as long as the block lasts; the model is served as `name`."""
    tokenizer = Tokenizer.load(directory)
    defaults = GenerationDefaults.load(directory, tokenizer)
    config = EngineConfig(kv_cache_memory_bytes=2**24, **options)
    key = launch_key(config)
    engine = load_engine(directory, config, eos_ids=defaults.eos_ids, prefix_key=key)
    client = InProcessClient(engine, step_deadline=60)
    settings = ServerSettings((name,), api_keys=api_keys)
    server = Server(create_app(client, tokenizer, defaults, settings, prefix_key=key))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=lambda: loop_guard.run(server.serve([sock])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
