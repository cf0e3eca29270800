"""A CUDA device that fails at start, for processes that find this file on their path.

A machine without one cannot show what a driver, a card or Triton says. Here torch's questions to a
driver are answered by CARD, a JSON object, and no more of torch is replaced than that; what would
be written to the card is not written: it is full.

    free, total   bytes of its memory
    capability    its compute capability
    driver        what the driver's start raises, if it does; then there is no device
    triton        the version that is installed; null for none
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CARD: dict[str, Any] = json.loads(os.environ["MOEBIUS_TEST_CARD"])


def _as_card(torch: Any) -> None:
    def init() -> None:
        if "driver" in CARD:
            raise RuntimeError(CARD["driver"])

    def nothing(*_: Any, **__: Any) -> int:
        return 0

    torch.cuda.init = init
    torch.cuda.is_available = lambda: "driver" not in CARD
    torch.cuda.device_count = lambda: int("driver" not in CARD)
    torch.cuda.mem_get_info = lambda device=None: (CARD["free"], CARD["total"])
    torch.cuda.get_device_capability = lambda device=None: tuple(CARD["capability"])
    torch.cuda.get_device_name = lambda device=None: "Test Card"
    for name in ("memory_reserved", "memory_allocated", "empty_cache", "synchronize", "set_device"):
        setattr(torch.cuda, name, nothing)


def _as_full(load: Any) -> None:
    import torch

    def fill(self: Any, *_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 1 GiB"
        )

    load.Loader.fill = load.Loader.fill_some = fill


def _as_full_trainer(trainer: Any) -> None:
    import torch

    def decoder(self: Any, config: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has")

    trainer.Trainer._decoder = decoder


CHANGES = {
    "torch": _as_card,
    "moebius.models.store.load": _as_full,
    "moebius.train.trainer": _as_full_trainer,
}


class _Changed(Loader):
    """Loads a module as it is, then changes it."""

    def __init__(self, loader: Any, change: Any) -> None:
        self._loader = loader
        self._change = change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        change = CHANGES.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _Changed(spec.loader, change)
        return spec


sys.meta_path.insert(0, _Finder())
_version = importlib.metadata.version


def _installed(name: str) -> str:
    if name != "triton" or "triton" not in CARD:
        return _version(name)
    if CARD["triton"] is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return str(CARD["triton"])


importlib.metadata.version = _installed
