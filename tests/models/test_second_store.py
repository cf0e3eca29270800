"""A second kind of file, and a format of bytes in it: each is one class, and no loader knows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Self

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import Store, StoredTensor, fingerprint, open_checkpoint
from moebius.models.store import kinds as kinds_module
from moebius.models.store.load import load_decoder
from moebius.nn.linear import Linear
from moebius.ops import FORMATS, Matrix
from moebius.ops.formats import Format, Planes, PlaneShape
from moebius.ops.reference import ReferenceOps
from oracle import Server, save_tiny

HEADER = "weights.toy.json"
DATA = "weights.toy"


class RowBlocks(Format):
    """A row is one block of bytes: its scale as float32, then int8 codes."""

    name = "toy-blocks"

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        return ((torch.uint8, (rows, 4 + columns)),)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        scales = planes[0][:, :4].contiguous().view(torch.float32)
        return (planes[0][:, 4:].contiguous().view(torch.int8) * scales).to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


def encoded(weight: Tensor) -> bytes:
    rows = weight.flatten(0, -2)
    scales = rows.abs().amax(1, keepdim=True) / 127
    codes = (rows / scales).round().to(torch.int8).view(torch.uint8)
    return torch.cat([scales.view(torch.uint8), codes], dim=1).numpy().tobytes()


class ToyStore(Store):
    """One file of bytes, and JSON beside it that says what they are."""

    dtypes = ("blocks", "F32")

    def __init__(self, directory: Path) -> None:
        entries = json.loads((directory / HEADER).read_text())
        formats = {"blocks": "toy-blocks", "F32": "float32"}
        self.tensors = {
            name: StoredTensor(
                directory / DATA, name, dtype, formats.get(dtype), tuple(shape), start, stop
            )
            for name, (dtype, shape, start, stop) in entries.items()
        }

    @classmethod
    def is_in(cls, directory: Path) -> bool:
        return (directory / HEADER).exists()

    @classmethod
    def open(cls, directory: Path) -> Self:
        return cls(directory)

    def header(self, file: Path) -> bytes:
        return (file.parent / HEADER).read_bytes()


class ReadsBlocks(ReferenceOps):
    """A backend that is meant to read the toy's matrices in place."""

    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        return super().formats(dtype) | {RowBlocks.name}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, RowBlocks.name, RowBlocks())
    monkeypatch.setattr(kinds_module, "KINDS", (ToyStore, *kinds_module.KINDS))


def save_toy(directory: Path, model_type: str) -> dict[str, Tensor]:
    """A tiny model whose matrices are blocks; returns what they mean, by name."""
    save_tiny(directory, model_type)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    data, entries, meant = b"", {}, {}
    for name, tensor in tensors.items():
        plain = tensor.ndim == 1
        raw = tensor.numpy().tobytes() if plain else encoded(tensor)
        data += bytes(-len(data) % 4)
        entries[name] = (
            "F32" if plain else "blocks",
            list(tensor.shape),
            len(data),
            len(data) + len(raw),
        )
        data += raw
        matrix = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        rows = math.prod(tensor.shape[:-1])
        widened = tensor if plain else RowBlocks().widened((matrix.view(rows, -1),), torch.float32)
        meant[name] = widened.view(tensor.shape)
    (directory / DATA).write_bytes(data)
    (directory / HEADER).write_text(json.dumps(entries))
    return meant


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    server = Server(decoder, block_size=4, num_blocks=8)
    server.step([(0, [5, 66, 0, 17, 23])])
    return server.all_logits(0)


@pytest.mark.parametrize("model_type", ["llama", "granitemoe"])
def test_blocks_of_bytes_are_held_where_they_lie(tmp_path: Path, model_type: str) -> None:
    """granitemoe's experts are stacked, gate and up in one: row ranges of one tensor."""
    meant = save_toy(tmp_path, model_type)
    checkpoint = open_checkpoint(tmp_path)
    held = load_decoder(checkpoint, torch.float32, ops=ReadsBlocks())
    copied = load_decoder(checkpoint, torch.float32, ops=ReferenceOps())
    plan = checkpoint.plan_weights("float32", formats=ReadsBlocks().formats(torch.float32))
    blocks = [row for row in plan if row.format == RowBlocks.name]
    rows = {source.parameter: source.shape[0] for source in checkpoint.sources}
    assert {row.name for row in plan if row.mapped} == {row.name for row in plan}
    assert all(row.nbytes == row.count + 4 * rows[row.name] for row in blocks)
    parameters = dict(copied.named_parameters())
    assert set(dict(held.named_parameters())) == set(parameters) - {row.name for row in blocks}
    for source in checkpoint.sources:
        expected = meant[source.name]
        if source.entry is not None:
            expected = expected[source.entry, source.start : source.start + source.shape[0]]
        assert torch.equal(parameters[source.parameter], expected), source.parameter
    assert isinstance(held.embed_tokens.held(), Matrix)
    assert torch.equal(logits(held), logits(copied))


def test_what_is_computed_in_follows_from_the_plain_numbers(tmp_path: Path) -> None:
    """Blocks are nothing that one computes in, however many bytes they are."""
    save_toy(tmp_path, "granitemoe")
    assert open_checkpoint(tmp_path).dtype == "float32"
    prepared = prepare(tmp_path, EngineConfig(kv_cache_memory_bytes=2**20))
    assert prepared.dtype == torch.float32


def test_a_copy_of_every_weight_is_widened_to_train(tmp_path: Path) -> None:
    meant = save_toy(tmp_path, "llama")
    decoder = load_decoder(tmp_path, torch.float32, ops=ReadsBlocks(), mapped=False)
    parameters = dict(decoder.named_parameters())
    assert len(parameters) == len(meant)
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert torch.equal(parameters["embed_tokens.weight"], meant["model.embed_tokens.weight"])


def test_what_is_wrong_is_told_as_of_any_file(tmp_path: Path) -> None:
    save_toy(tmp_path, "llama")
    before = fingerprint(open_checkpoint(tmp_path))
    entries = json.loads((tmp_path / HEADER).read_text())
    name = "model.layers.0.mlp.up_proj.weight"

    def broken(change: tuple[object, ...]) -> None:
        (tmp_path / HEADER).write_text(json.dumps({**entries, name: change}))

    dtype, shape, *place = entries[name]
    broken(("blocks5", shape, *place))
    with pytest.raises(
        WeightsError, match=rf"'{name}' has dtype blocks5; supported are blocks, F32"
    ):
        open_checkpoint(tmp_path)
    broken((dtype, shape[::-1], *place))
    with pytest.raises(WeightsError, match=rf"{DATA}: tensor '{name}' has shape"):
        open_checkpoint(tmp_path)
    (tmp_path / HEADER).write_text(json.dumps(entries, indent=1))
    assert fingerprint(open_checkpoint(tmp_path)) != before


def test_linear_says_which_weight_it_computes_with() -> None:
    layer = Linear(ReferenceOps(), 3, 2, dtype=torch.float32)
    assert layer.held() is layer.weight
    raw = torch.frombuffer(bytearray(encoded(torch.ones(2, 3))), dtype=torch.uint8)
    matrix = Matrix(RowBlocks(), (2, 3), (raw.view(2, 7),))
    layer.hold(matrix)
    assert layer.held() is matrix and list(layer.parameters()) == []
    assert torch.equal(layer(torch.ones(1, 3)), matrix.widened(torch.float32).sum(1).unsqueeze(0))
