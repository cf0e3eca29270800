"""Quantised checkpoints are held as they are stored, and mean what their tools say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from covering import chosen, rest
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops import Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.weights import planes_of
from oracle import Server, assert_close, load_theirs, save_tiny
from packing import awq, fp8, gptq, packed_integers
from quantised import (
    BF16,
    F32,
    KINDS,
    SIZES,
    Kind,
    args,
    change_config,
    compressed,
    gptq_config,
    held,
    made,
)

UP = "model.layers.1.mlp.up_proj"
PROMPT = [5, 66, 0, 17, 23, 23, 41, 8]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# One of each way to lay codes, scales and zero points beside each other.
LAID_OUT = (
    "fp8-block",
    "mxfp4",
    "modelopt",
    "pack-4-zeros",
    "int-zeros",
    "gptq-ordered",
    "awq",
    "mlx-4",
)


def plain_copy(directory: Path, meant: dict[str, Tensor]) -> Path:
    """The same checkpoint in plain numbers."""
    copy = directory / "plain"
    copy.mkdir()
    config = json.loads((directory / "config.json").read_text())
    for key in ("quantization_config", "quantization"):
        config.pop(key, None)
    (copy / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in meant.items()}, copy / "model.safetensors")
    return copy


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    server = Server(decoder, block_size=4, num_blocks=8)
    for chunk in (PROMPT[:5], PROMPT[5:], [7]):
        server.step([(0, chunk)])
    return server.all_logits(0)


@each_kind
def test_every_kind_is_held_as_it_is_stored(tmp_path: Path, kind: Kind) -> None:
    """Numbers bit for bit; logits as transformers has them of these numbers; memory as planned."""
    meant = made(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint, F32, ops=ReferenceOps())
    weights = held(decoder)
    formats = ReferenceOps().formats(F32)
    plan = {row.name: row for row in checkpoint.plan_weights("float32", formats=formats)}
    assert plan.keys() == weights.keys()
    found = set()
    for source in checkpoint.sources:
        weight = Matrix.of(weights[source.parameter]) if len(source.shape) == 2 else None
        row = plan[source.parameter]
        if weight is None:
            continue
        assert torch.equal(weight.widened(F32), meant[source.name]), source.parameter
        assert (row.format, row.nbytes) == (weight.format.name, weight.nbytes)
        plain = row.format == "float32"
        assert row.mapped == (plain or not kind.repacked)
        assert row.repacked == (not row.mapped)
        found |= set() if plain else {row.format}
    assert found == kind.formats
    with torch.inference_mode():
        theirs = load_theirs(plain_copy(tmp_path, meant))(torch.tensor([[*PROMPT, 7]])).logits[0]
    assert_close(logits(decoder), theirs)


@pytest.mark.parametrize("kind", chosen(KINDS, LAID_OUT.__contains__))
def test_matrices_that_are_joined_are_rows_of_planes(tmp_path: Path, kind: str) -> None:
    """Queries, keys and values in one tensor, gate and up in another."""
    meant = made(tmp_path, KINDS[kind], "phi3")
    with torch.inference_mode():
        theirs = load_theirs(plain_copy(tmp_path, meant))(torch.tensor([[*PROMPT, 7]])).logits[0]
    assert_close(logits(load_decoder(tmp_path, F32, ops=ReferenceOps())), theirs)


@pytest.mark.parametrize("kind", ["fp8-block", "pack-4-zeros", "gptq-ordered", "int-zeros"])
def test_kernels_compute_with_the_same_numbers(tmp_path: Path, kind: str) -> None:
    """What they do not read in place is widened when it is loaded."""
    meant = made(tmp_path, KINDS[kind], "llama")
    decoder = load_decoder(tmp_path, F32, ops=CpuOps(1))
    reference = logits(load_decoder(plain_copy(tmp_path, meant), F32, ops=ReferenceOps()))
    assert_close(logits(decoder), reference)


def test_half_precision_rounds_once(tmp_path: Path) -> None:
    meant = made(tmp_path, KINDS["pack-4-zeros"], "llama")
    decoder = load_decoder(tmp_path, BF16, ops=ReferenceOps(), mapped=False)
    parameters = dict(decoder.named_parameters())
    for source in open_checkpoint(tmp_path).sources:
        assert torch.equal(parameters[source.parameter], meant[source.name].to(BF16))


@pytest.mark.parametrize("kind", ["fp8-block", "mxfp4", "gptq-zeros"])
def test_other_devices_hold_codes_too(tmp_path: Path, kind: str) -> None:
    """On meta, for want of another: planes, and not their numbers."""
    made(tmp_path, KINDS[kind], "llama")
    checkpoint = open_checkpoint(tmp_path)
    decoder = Decoder(checkpoint.config, ReferenceOps(), F32, "meta")
    Loader(checkpoint, torch.device("meta")).fill(decoder)
    plan = checkpoint.plan_weights("float32", "meta", ReferenceOps().formats(F32))
    assert not any(row.mapped or row.near for row in plan)
    weights = held(decoder)
    for row in plan:
        weight = weights[row.name]
        assert weight.nbytes == row.nbytes
        name = weight.format.name if isinstance(weight, Matrix) else "float32"
        assert row.format == name
        assert {plane.device.type for plane in planes_of([weight])} == {"meta"}
    assert {row.format for row in plan} - {"float32"} == KINDS[kind].formats


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("kind", ["fp8-block", "pack-4-zeros", "gptq-ordered"])
def test_ranks_hold_their_own_experts(tmp_path: Path, kind: str, near: bool) -> None:
    """And get those that come to them."""
    meant = made(tmp_path, KINDS[kind])
    checkpoint = open_checkpoint(tmp_path)
    names = {source.parameter: source.name for source in checkpoint.sources}
    ranks = ExpertRank(Placement.linear(checkpoint.config.experts, 2), 0, 8)
    decoder = Decoder(checkpoint.config, ReferenceOps(), F32, "meta", ranks=ranks)
    loader = Loader(checkpoint, torch.device("cpu"), near=near)
    loader.fill(decoder)

    def experts() -> set[str]:
        weights = held(decoder)
        for name, weight in weights.items():
            wide = weight.widened(F32) if isinstance(weight, Matrix) else weight
            assert torch.equal(wide, meant[names[name]]), name
        return {name for name in weights if ".experts." in name}

    before = experts()
    layers = {layer: LayerPlacement(5, ((0, 3), (1, 2, 4))) for layer in range(2)}
    loader.move_experts(decoder, loader.bring_experts(decoder, Placement(layers)))
    after = experts()
    assert {name.rsplit(".", 1)[1] for name in after - before} == {"3"}
    assert {name.rsplit(".", 1)[1] for name in before - after} == {"1", "2"}


def write_stacked(directory: Path, kind: Kind) -> dict[str, Tensor]:
    """A checkpoint whose experts are two tensors of codes, gate and up in one; returns what each
    expert's parameters mean."""
    save_tiny(directory, "qwen3_moe", **SIZES["qwen3_moe"])
    file = directory / "model.safetensors"
    tensors = load_file(file)
    meant = {}
    for layer in range(2):
        before = f"model.layers.{layer}.mlp.experts."
        planes: dict[str, list[Tensor]] = {}
        for expert in range(5):
            gate, up, down = (
                tensors.pop(f"{before}{expert}.{which}_proj.weight")
                for which in ("gate", "up", "down")
            )
            both, wide = kind.pack(f"{before}gate_up_proj", torch.cat([gate, up]))
            parts, wide_down = kind.pack(f"{before}down_proj", down)
            for name, plane in (both | parts).items():
                planes.setdefault(name, []).append(plane)
            ours = f"layers.{layer}.mlp.experts."
            meant[f"{ours}gate_proj.{expert}"], meant[f"{ours}up_proj.{expert}"] = wide.chunk(2)
            meant[f"{ours}down_proj.{expert}"] = wide_down
        tensors |= {name: torch.stack(each) for name, each in planes.items()}
    save_file(tensors, file)
    change_config(directory, quantization_config=kind.config)
    return meant


def test_experts_as_mlx_stacks_them(tmp_path: Path) -> None:
    """A tensor for each kind of matrix; its router is quantised as well."""
    save_tiny(tmp_path, "qwen3_moe", **SIZES["qwen3_moe"])
    file = tmp_path / "model.safetensors"
    kind = KINDS["mlx-4"]
    meant, planes = {}, dict[str, list[Tensor]]()
    for name, tensor in load_file(file).items():
        if tensor.ndim != 2:
            planes[name] = [tensor]
            continue
        before, numbered, after = name.partition("experts.")
        stacked = f"{before}switch_mlp.{after.partition('.')[2]}" if numbered else name
        parts, meant[name] = kind.pack(stacked, tensor)
        for part, plane in parts.items():
            planes.setdefault(part, []).append(plane)
    tensors = {n: torch.stack(p) if "switch_mlp" in n else p[0] for n, p in planes.items()}
    save_file(tensors, file)
    change_config(tmp_path, quantization=kind.config, quantization_config=kind.config)
    checkpoint = open_checkpoint(tmp_path)
    weights = held(load_decoder(checkpoint, F32, ops=ReferenceOps()))
    checked = 0
    for source in checkpoint.sources:
        weight = weights[source.parameter]
        if isinstance(weight, Matrix):
            name = source.name.replace("switch_mlp", f"experts.{source.entry}")
            assert torch.equal(weight.widened(F32), meant[name]), name
            checked += 1
    assert checked == len(meant) == 2 + 2 * (4 + 1 + 15)


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 16]}
STACKED = {
    "mxfp4": KINDS["mxfp4"],
    "fp8-ue8m0": KINDS["fp8-ue8m0"],
    # 32 rows are gate's and 32 up's: up begins within a block.
    "fp8-parted": Kind(_BLOCKS, fp8((48, 16), "_scale_inv", F32)),
}


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("kind", STACKED.values(), ids=STACKED)
def test_stacked_experts_are_parts_of_planes(tmp_path: Path, kind: Kind, near: bool) -> None:
    """As gpt-oss has MXFP4, and transformers 5 FP8; of all, and of a rank's own."""
    meant = write_stacked(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    plan = checkpoint.plan_weights("float32", formats=ReferenceOps().formats(F32))
    experts = [row for row in plan if row.name in meant]
    assert len(experts) == len(meant) and all(row.mapped for row in experts)
    stored = {
        checkpoint.tensors[source.name].name: checkpoint.tensors[source.name]
        for source in checkpoint.sources
        if source.expert
    }
    assert sum(row.nbytes for row in experts) == sum(each.nbytes for each in stored.values())
    ranks = ExpertRank(Placement.linear(checkpoint.config.experts, 2), 1, 8) if near else None
    decoder = Decoder(checkpoint.config, ReferenceOps(), F32, "meta", ranks=ranks)
    Loader(checkpoint, torch.device("cpu"), near=near).fill(decoder)
    weights = {name: weight for name, weight in held(decoder).items() if name in meant}
    assert len(weights) == (12 if near else 30)
    for name, weight in weights.items():
        assert isinstance(weight, Matrix)
        assert torch.equal(weight.widened(F32), meant[name]), name


# --- as kernels read them ---

READ = {
    "mxfp4": (KINDS["mxfp4"], "mxfp4_planes"),
    "pack-4": (KINDS["pack-4"], "int4"),
    "pack-4-zeros": (
        Kind(
            compressed("pack-quantized", args(4, 32, symmetric=False)),
            packed_integers(4, 32, BF16, zeros=True),
        ),
        "int4",
    ),
    "pack-8-channel": (KINDS["pack-8-channel"], "int8_words"),
    "int-quantized": (KINDS["int-quantized"], "int8"),
    "gptq": (Kind(gptq_config(4, 32), gptq(4, 32, stored_zero=7), repacked=True), "int4"),
    "gptq-8": (KINDS["gptq-8"], "int8_words"),
    "gptq-zeros": (KINDS["gptq-zeros"], "int4"),
    "gptq-ordered": (
        Kind(
            gptq_config(4, 32, desc_act=True),
            gptq(4, 32, ordered=True, stored_zero=7),
            repacked=True,
        ),
        "int4_ordered",
    ),
    "gptq-ordered-zeros": (
        Kind(
            gptq_config(4, 32, desc_act=True, sym=False), gptq(4, 32, ordered=True), repacked=True
        ),
        "int4_ordered",
    ),
    "gptq-8-ordered": (
        Kind(
            gptq_config(8, 32, desc_act=True),
            gptq(8, 32, ordered=True, stored_zero=127),
            repacked=True,
        ),
        "int8_words_ordered",
    ),
    "pack-4-ordered": (
        Kind(
            compressed("pack-quantized", args(4, 32, actorder="group")),
            packed_integers(4, 32, BF16, ordered=True),
            repacked=True,
        ),
        "int4_ordered",
    ),
    "mlx-4": (KINDS["mlx-4"], "affine4"),
    "mlx-8": (KINDS["mlx-8"], "affine8"),
    "awq": (Kind({**KINDS["awq"].config, "group_size": 32}, awq(32), repacked=True), "int4"),
}


# Every run has the first of each format, and what is repacked from another layout.
FIRST_READ = {format: name for name, (_, format) in reversed(READ.items())}
IN_EVERY_RUN = {*FIRST_READ.values(), "gptq-zeros", "awq"}


@pytest.mark.parametrize(
    ("kind", "format"),
    [case if name in IN_EVERY_RUN else rest(*case) for name, case in READ.items()],
    ids=READ,
)
def test_kernels_read_what_the_file_holds(tmp_path: Path, kind: Kind, format: str) -> None:
    """Where it lies, but for what is stored column by column."""
    meant = made(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    kernels = CpuOps(1)
    decoder = load_decoder(checkpoint, F32, ops=kernels)
    formats = kernels.formats(F32)
    plan = {row.name: row for row in checkpoint.plan_weights("float32", formats=formats)}
    weights = held(decoder)
    read = 0
    for source in checkpoint.sources:
        if len(source.shape) != 2:
            continue
        weight, row = Matrix.of(weights[source.parameter]), plan[source.parameter]
        assert torch.equal(weight.widened(F32), meant[source.name]), source.parameter
        assert (row.format, row.nbytes) == (weight.format.name, weight.nbytes)
        if row.format != "float32":
            assert row.format.partition("[")[0] == format
            assert row.mapped == (not kind.repacked) and row.repacked == kind.repacked
            read += 1
    assert read == 2 * (4 + 5 * 3) + 2 * kind.embedding
    plain = logits(load_decoder(plain_copy(tmp_path, meant), F32, ops=ReferenceOps()))
    # Activations in 8 bits choose other experts of so small a model; tests/ops holds their products.
    as_they_are = load_decoder(checkpoint, F32, ops=CpuOps(1, activations="float"))
    assert_close(logits(as_they_are), plain, tolerance=1e-3)


def test_stacked_experts_are_read_where_they_lie(tmp_path: Path) -> None:
    meant = write_stacked(tmp_path, KINDS["mxfp4"])
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint, F32, ops=CpuOps(1))
    plan = checkpoint.plan_weights("float32", formats=decoder.ops.formats(F32))
    planned = {row.name: row.nbytes for row in plan}
    weights = held(decoder)
    for name, numbers in meant.items():
        weight = weights[name]
        assert isinstance(weight, Matrix) and weight.format.name == "mxfp4_planes"
        assert torch.equal(weight.widened(F32), numbers), name
        assert weight.nbytes == planned[name]


def test_groups_that_are_no_whole_blocks_are_widened(tmp_path: Path) -> None:
    """Of 16 columns; and so is what is left of eight bits when zero points are taken off."""
    for name, kind in (
        ("groups", Kind(compressed("pack-quantized", args(4, 16)), packed_integers(4, 16, BF16))),
        ("zeros", KINDS["int-zeros"]),
    ):
        directory = tmp_path / name
        directory.mkdir()
        meant = made(directory, kind, "llama")
        checkpoint = open_checkpoint(directory)
        weights = held(load_decoder(checkpoint, F32, ops=CpuOps(1)))
        plan = checkpoint.plan_weights("float32", formats=CpuOps(1).formats(F32))
        assert {row.format for row in plan} == {"float32"}
        assert all(isinstance(weight, Tensor) for weight in weights.values())
        for source in checkpoint.sources:
            assert torch.equal(weights[source.parameter], meant[source.name])


@pytest.mark.parametrize(
    "kind",
    [KINDS["fp8-block"], KINDS["mxfp4"], KINDS["gptq-zeros"], READ["gptq-ordered"][0]],
    ids=["fp8-block", "mxfp4", "gptq-zeros", "gptq-ordered"],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_answer_depends_on_no_neighbour(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    """Promise P1: the same bits alone and among others, in whatever chunks."""
    made(tmp_path, kind)
    decoder = load_decoder(tmp_path, dtype, ops=CpuOps(2))
    alone = Server(decoder, block_size=4, num_blocks=8)
    for chunk in (PROMPT, [7], [9]):
        alone.step([(0, chunk)])
    among = Server(decoder, block_size=4, num_blocks=32, seed=1)
    others = [[1, 2, 3], [60, 61], list(range(30))]
    among.step([(1, others[0]), (0, PROMPT[:3]), (2, others[1])])
    among.step([(0, PROMPT[3:]), (3, others[2]), (1, [4])])
    among.step([(2, [5]), (0, [7])])
    among.step([(0, [9]), (1, [6]), (2, [8]), (3, [2])])
    assert torch.equal(alone.all_logits(0), among.all_logits(0))
