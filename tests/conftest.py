"""What all tests share: one compute thread, a tiny model saved once a session, and a guard of
servers' event loops."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forked import PARENT
from moebius.engine import child

# While tests are collected and what they need is imported, almost all that is made stays.
gc.set_threshold(100_000)

# Before anything imports triton, whose own functions ask for it as they are made.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """A shell's job in the background ignores Ctrl-C, and so would all processes that tests start;
    a handler is nothing that they inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """All that is there by now stays: the collector need not walk it again each time. From here on
    it comes as often as in an engine (engine/garbage.py)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in ("exhaustive", "losses", "hosts", "faults", "signals"):
        if item.get_closest_marker(mark) and mark not in item.config.getoption("-m"):
            pytest.skip(f"takes minutes; ask for it with -m {mark}")
    for needed in item.iter_markers("needs_file"):
        variable, what = needed.args
        if variable not in os.environ:
            pytest.skip(f"{variable} has to name {what}")


@pytest.fixture(scope="session", autouse=True)
def _no_device_is_seeded() -> Iterator[None]:
    """torch keeps each seed for a device that is not there, with the stack of who has set it."""
    with pytest.MonkeyPatch.context() as patch:
        for devices in (torch.cuda, torch.xpu):
            if not devices.is_available():
                patch.setattr(devices, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _engines_are_forked() -> Iterator[None]:
    """From one process that has imported what they need: see forked.py."""
    known = SimpleNamespace(Popen=PARENT.popen, DEVNULL=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "subprocess", known)
        yield
    PARENT.close()


@pytest.fixture(scope="module")
def real_processes() -> Iterator[None]:
    """Engines' processes in a module begin as they do for users, and import what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "subprocess", subprocess)
        yield


@pytest.fixture(autouse=True)
def _no_callback_holds_a_loop() -> Iterator[None]:
    """Fails a test whose server's event loop was held by one callback for more than 50 ms of
    processor time."""
    yield
    guard = sys.modules.get("loop_guard")
    if guard is not None:
        found = list(guard.slow)
        guard.slow.clear()
        assert not found, "; ".join(found)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny float32 qwen3_moe and its tokenizer."""
    from tiny import write_model

    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory)
    return directory
