"""Weights that a rank copies to memory of its own: the same bits, once, and given back."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.test_rank_memory import resident
from moebius.errors import WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader
from moebius.models.store.near import _PIECE, NearFiles
from moebius.models.store.tensors import StoredTensor
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops import Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from tiny import write_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks need Linux")

CPU = torch.device("cpu")
EXPERTS = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of three matrices of 256 KiB in each of two layers."""
    made = tmp_path_factory.mktemp("near")
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": EXPERTS}
    write_model(made, dtype=torch.bfloat16, **sizes)
    return made


def load(
    directory: Path, *, near: bool, dtype: torch.dtype = torch.bfloat16, ops: Ops | None = None
) -> tuple[Decoder, Loader]:
    """The first of two ranks."""
    checkpoint = open_checkpoint(directory)
    ranks = ExpertRank(Placement.linear(checkpoint.config.experts, 2), 0, 8)
    decoder = Decoder(checkpoint.config, ops or CpuOps(1), dtype, "meta", ranks=ranks)
    loader = Loader(checkpoint, CPU, near=near)
    loader.fill(decoder)
    return decoder, loader


def anonymous() -> int:
    """Bytes of this process's own memory that are present."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def stored(file: Path, name: str, start: int, stop: int) -> StoredTensor:
    return StoredTensor(file, name, "U8", "uint8", (stop - start,), start, stop)


def test_copies_are_what_the_files_hold(tmp_path: Path) -> None:
    """Spans in any order, that touch, overlap or lie apart, of two files; more than is read at
    once."""
    rng = random.Random(1)
    contents = {}
    for name in ("a", "b"):
        file = tmp_path / name
        contents[file] = rng.randbytes(_PIECE + 5000)
        file.write_bytes(contents[file])
    spans = [(4096, _PIECE + 4900), (10, 75), (75, 200), (150, 300), (301, 302)]
    made = NearFiles({file: spans for file in contents}, threads=3)
    for file, data in contents.items():
        for start, stop in [*spans, (10, 300), (4097, 4099), (_PIECE - 3, _PIECE + 4900)]:
            here = stored(file, "x", start, stop)
            found = made.view(here, torch.uint8, 0, (stop - start,))
            assert found.numpy().tobytes() == data[start:stop]
            assert found.data_ptr() % 64 == start % 64
        whole = stored(file, "x", 4096, 4096 + 48)
        found = made.view(whole, torch.int16, 4, (5, 4))
        assert found.numpy().tobytes() == data[4104 : 4104 + 40]


def test_a_file_that_is_gone_or_has_shrunk(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with pytest.raises(WeightsError, match="weights cannot be read: No such file"):
        NearFiles({file: [(0, 10)]})
    file.write_bytes(bytes(100))
    with pytest.raises(WeightsError, match="weights shrank while it was loaded"):
        NearFiles({file: [(0, 50), (90, 101)]}, threads=2)


@pytest.mark.parametrize("ops", [lambda: CpuOps(1), ReferenceOps], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_rank_with_copies_holds_the_same_numbers(
    directory: Path, dtype: torch.dtype, ops: type[Ops]
) -> None:
    """As they are stored and, in float32, with vectors converted and matrices not."""
    mapped, near = (load(directory, near=near, dtype=dtype, ops=ops())[0] for near in (False, True))
    expected = dict(mapped.named_parameters())
    found = dict(near.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    matrices = [[each for each in planes(made)] for made in (mapped, near)]
    assert len(matrices[0]) == len(matrices[1])
    assert all(torch.equal(*pair) for pair in zip(*matrices, strict=True))
    assert found or matrices[1]


def planes(decoder: Decoder) -> list[Tensor]:
    """Of all matrices that take a parameter's place."""
    found: list[Tensor] = []
    for module in decoder.modules():
        held = getattr(module, "held", None)
        if held is None:
            continue
        weights = held() if isinstance(held(), tuple) else (held(),)
        for weight in weights:
            if isinstance(weight, Matrix):
                found += weight.planes
    return found


def test_nothing_is_there_twice(directory: Path) -> None:
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    load(directory, near=True)  # what comes with a first use is there from now on
    before = anonymous()
    decoder, _ = load(directory, near=True)
    held = sum(each.nbytes for each in decoder.parameters())
    assert size // 2 < held < size
    assert resident(directory) == 0
    # A huge page is more than what is used of it.
    assert anonymous() - before < held + 4 * 2**20


def test_a_rank_reads_its_own_experts_alone(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And later those that come to it."""
    read = 0
    copy = NearFiles._copy

    def counted(self: NearFiles, file: object, run: object) -> None:
        nonlocal read
        read += run.stop - run.start  # type: ignore[attr-defined]
        copy(self, file, run)  # type: ignore[arg-type]

    monkeypatch.setattr(NearFiles, "_copy", counted)
    decoder, loader = load(directory, near=True)
    assert read == sum(each.nbytes for each in decoder.parameters())
    read = 0
    layers = {layer: LayerPlacement(EXPERTS, ((0, 2), (1, 3))) for layer in range(2)}
    loader.bring_experts(decoder, Placement(layers))
    assert read == 2 * 3 * 2**18


def test_what_goes_to_another_rank_is_given_back(directory: Path) -> None:
    """Whole pages of it, which are zeros from then on for who still looks; others' stay."""
    decoder, loader = load(directory, near=True)
    experts = decoder.get_submodule("layers.0.mlp.experts.gate_proj")
    stays, goes = (experts.held()[number] for number in range(2))
    assert isinstance(stays, Tensor) and isinstance(goes, Tensor)
    before = stays.clone()
    assert goes.abs().min(1).values.max() > 0
    layers = {layer: LayerPlacement(EXPERTS, ((0, 2), (1, 3))) for layer in range(2)}
    loader.move_experts(decoder, loader.bring_experts(decoder, Placement(layers)))
    rows = slice(8, -8)  # of 1 KiB, beyond the pages that neighbours have a part in
    assert not goes[rows].any()
    assert torch.equal(stays, before)
    assert torch.equal(experts.held()[2], expert(directory, 2))
    # What comes back is read anew.
    placement = Placement.linear({0: EXPERTS, 1: EXPERTS}, 2)
    loader.move_experts(decoder, loader.bring_experts(decoder, placement))
    assert torch.equal(experts.held()[1], expert(directory, 1))


def expert(directory: Path, number: int) -> Tensor:
    from safetensors.torch import load_file

    (file,) = directory.glob("*.safetensors")
    return load_file(file)[f"model.layers.0.mlp.experts.{number}.gate_proj.weight"]
