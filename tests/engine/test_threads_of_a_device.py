"""A process of several GPUs' machine computes on its own one, on each of its threads: to a new
thread CUDA gives the first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moebius.engine.in_process import InProcessClient
from moebius.models.store import load as loading
from moebius.models.store.load import load_decoder
from moebius.ops.reference import ReferenceOps

OURS = 3


class Threads:
    """torch.cuda's device of each thread, as CUDA has it."""

    def __init__(self) -> None:
        self._here = threading.local()

    def set_device(self, device: int) -> None:
        self._here.device = device

    def current_device(self) -> int:
        return getattr(self._here, "device", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    threads = Threads()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", threads.current_device)
    monkeypatch.setattr(torch.cuda, "set_device", threads.set_device)
    threads.set_device(OURS)
    yield threads


def test_the_engine_s_thread(cuda: Threads) -> None:
    seen: list[int] = []
    engine: Any = SimpleNamespace(
        has_work=False,
        scheduler=SimpleNamespace(requests={}),
        drop=lambda request_id: None,
        close=lambda: None,
    )
    client = InProcessClient(engine, step_deadline=60)
    client.start(lambda outputs: None)
    done = threading.Event()
    client.between_steps(lambda: seen.append(cuda.current_device()))
    client.between_steps(done.set)
    assert done.wait(10)
    client.close(10)
    assert seen == [OURS]


def test_threads_that_load(
    cuda: Threads, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, bool]] = set()
    converted = loading._converted

    def noted(*args: Any) -> Any:
        other = threading.current_thread() is not threading.main_thread()
        seen.add((cuda.current_device(), other))
        return converted(*args)

    monkeypatch.setattr(loading, "_converted", noted)
    load_decoder(tiny_model, torch.float16, ops=ReferenceOps(), mapped=False)
    assert seen == {(OURS, True)}
