"""When the system begins to read a model's files, and which."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest

from moebius import machine
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.errors import MemoryPlanError
from moebius.models.store import mapped
from moebius.pages import Span

SMALL = {"kv_cache_memory_bytes": 2**22, "max_model_len": 64}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Span]]:
    """The spans of files that are read into memory, as somebody asks for it."""
    asked: list[Sequence[Span]] = []

    def populate(address: int, spans: Sequence[Span], *, write: bool, owner: object) -> None:
        asked.append(spans)

    monkeypatch.setattr(mapped, "populate", populate)
    return asked


def test_a_plan_reads_nothing_and_an_engine_each_file_once(
    tiny_model: Path, read: list[Sequence[Span]]
) -> None:
    config = EngineConfig(**SMALL)
    prepare(tiny_model, config)
    assert read == []
    prepared = prepare(tiny_model, config, ahead=True)
    [file] = tiny_model.glob("*.safetensors")
    assert read == [[(0, file.stat().st_size)]]
    load_engine(tiny_model, config, prepared=prepared).close()
    assert len(read) == 1


@pytest.mark.parametrize("options", [{"ranks": 2}, {"mmap_cold": True}])
def test_what_is_held_in_part_is_not_read_as_a_whole(
    tiny_model: Path, read: list[Sequence[Span]], options: dict[str, object]
) -> None:
    prepare(tiny_model, EngineConfig(**SMALL, **options), ahead=True)
    assert read == []


def test_what_there_is_no_room_for_is_not_read(
    tiny_model: Path, read: list[Sequence[Span]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1000, 2000, "cgroup"))
    with pytest.raises(MemoryPlanError):
        prepare(tiny_model, EngineConfig(**SMALL), ahead=True)
    assert read == []


def test_garbage_is_collected_again_behind_a_load(tiny_model: Path) -> None:
    load_engine(tiny_model, EngineConfig(**SMALL)).close()
    assert gc.isenabled()
    with pytest.raises(MemoryPlanError):
        prepare(tiny_model, EngineConfig(**SMALL | {"kv_cache_memory_bytes": 1}))
    assert gc.isenabled()
