"""Quantised checkpoints are held as they are stored, and mean what their tools say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.models.store.save import save_checkpoint
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import Matrix, Weight
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.weights import planes_of
from oracle import Server, assert_close, load_theirs, save_tiny
from quantised import (
    BF16,
    F32,
    KINDS,
    Kind,
    args,
    awq,
    change_config,
    compressed,
    fp8,
    gptq,
    gptq_config,
    packed_integers,
    write_quantised,
)

PROMPT = [5, 66, 0, 17, 23, 23, 41, 8]
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 72},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 16},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def made(directory: Path, kind: Kind, model_type: str = "qwen3_moe") -> dict[str, Tensor]:
    """A tiny checkpoint in float32, its matrices quantised; returns what they mean."""
    directory.mkdir(exist_ok=True)
    save_tiny(directory, model_type, **SIZES[model_type])
    return write_quantised(directory, kind)


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


def held(decoder: Decoder) -> dict[str, Weight]:
    """What every parameter is, by its name; holes left out."""
    found: dict[str, Weight] = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        if isinstance(module, Weighted):
            found[f"{name}.weight"] = module.held()
        elif isinstance(module, WeightList):
            for number, weight in enumerate(module.held()):
                if weight is not None:
                    found[f"{name}.{number}"] = weight
    return found


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


@pytest.mark.parametrize("kind", ["fp8-block", "pack-4-zeros", "gptq-ordered", "mlx-4"])
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


# --- what is wrong ---


def tampered(directory: Path, change: dict[str, Tensor | None]) -> None:
    """Other tensors under these names, or none."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "fp8-block",
            {f"{UP}.weight_scale_inv": None},
            [f"{UP}.weight' needs", "weight_scale'", "missing"],
        ),
        (
            "fp8-block",
            {f"{UP}.weight_scale_inv": torch.ones(4, 3)},
            [f"{UP}.weight_scale_inv", "[4, 3]", "[4, 2]"],
        ),
        ("fp8-block", {f"{UP}.weight_scale_inv": torch.ones(4, 2).long()}, ["I64", "F32 or BF16"]),
        (
            "fp8-block",
            {f"{UP}.weight": torch.zeros(96, 60).to(torch.float8_e4m3fn)},
            [f"{UP}.weight", "[96, 60]", "[96, 64]"],
        ),
        (
            "fp8-block",
            {f"{UP}.weight": torch.zeros(96, 64).to(torch.float8_e5m2)},
            [f"{UP}.weight", "F8_E5M2", "F8_E4M3"],
        ),
        (
            "pack-4",
            {f"{UP}.weight_packed": torch.zeros(96, 9, dtype=torch.int32)},
            ["weight_packed", "[96, 9]", "[96, 8]"],
        ),
        (
            "pack-4",
            {f"{UP}.weight_zero_point": torch.zeros(12, 2).int()},
            ["weight_zero_point", "left over"],
        ),
        (
            "pack-4",
            {f"{UP}.weight_packed": None, f"{UP}.weight_scale": None},
            [f"{UP}.weight", "missing"],
        ),
        (
            "pack-4-zeros",
            {f"{UP}.weight_zero_point": None},
            ["weight_packed", "weight_zero_point", "missing"],
        ),
        (
            "mxfp4",
            {f"{UP}.weight_scales": torch.zeros(96, 3, dtype=torch.uint8)},
            ["weight_scales", "[96, 3]", "[96, 2]"],
        ),
        ("gptq", {f"{UP}.g_idx": torch.zeros(63).int()}, ["g_idx", "[63]", "[64]"]),
        ("awq", {f"{UP}.qzeros": torch.zeros(4, 11).int()}, ["qzeros", "[4, 11]", "[4, 12]"]),
        ("mlx-4", {f"{UP}.biases": torch.zeros(96, 2)}, ["biases", "F32", "F16"]),
        (
            "nvfp4-pack-quantized",
            {f"{UP}.weight_global_scale": torch.zeros(2)},
            ["global_scale", "[2]", "[1]"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, kind: str, change: dict[str, Tensor | None], words: list[str]
) -> None:
    made(tmp_path, KINDS[kind], "llama")
    tampered(tmp_path, change)
    with pytest.raises(WeightsError) as error:
        open_checkpoint(tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_is_said_not_to_be_quantised_and_is(tmp_path: Path) -> None:
    made(tmp_path, KINDS["pack-4"], "llama")
    change_config(
        tmp_path,
        quantization_config=compressed(
            "pack-quantized",
            KINDS["pack-4"].config["config_groups"]["group_0"]["weights"],
            ignore=[UP],
        ),
    )
    with pytest.raises(
        WeightsError, match=rf"'{UP}.weight_packed' is quantised, but .* '{UP}' is not"
    ):
        open_checkpoint(tmp_path)


def test_sizes_that_groups_do_not_divide(tmp_path: Path) -> None:
    made(tmp_path, KINDS["pack-4"], "llama")
    weights = {**KINDS["pack-4"].config["config_groups"]["group_0"]["weights"], "group_size": 48}
    change_config(tmp_path, quantization_config=compressed("pack-quantized", weights))
    with pytest.raises(
        WeightsError, match=r"cannot hold the shape \[64, 64\].*no whole groups of 48"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {f"{UP}.qzeros": torch.full((4, 12), 0x66666666).int()},
            ["all 7, or all 8", "sym = true"],
        ),
        ({f"{UP}.g_idx": torch.arange(64).flip(0).int() // 16}, ["g_idx", "desc_act = false"]),
        ({f"{UP}.g_idx": torch.full((64,), 4).int()}, ["g_idx", "none of the 4"]),
    ],
)
def test_gptq_that_is_not_what_it_says(
    tmp_path: Path, change: dict[str, Tensor | None], words: list[str]
) -> None:
    made(tmp_path, KINDS["gptq"], "llama")
    tampered(tmp_path, change)
    with pytest.raises(WeightsError) as error:
        load_decoder(tmp_path, F32, ops=ReferenceOps())
    assert all(word in str(error.value) for word in [f"{UP}.weight", *words]), error.value


def test_every_plane_counts_in_the_fingerprint(tmp_path: Path) -> None:
    made(tmp_path, KINDS["pack-4-zeros"], "llama")
    seen = {fingerprint(open_checkpoint(tmp_path))}
    for suffix in ("packed", "scale", "zero_point"):
        name = f"{UP}.weight_{suffix}"
        tensor = load_file(tmp_path / "model.safetensors")[name]
        tampered(tmp_path, {name: tensor + 1})
        seen.add(fingerprint(open_checkpoint(tmp_path)))
    assert len(seen) == 4


def test_scales_of_activations_are_not_read(tmp_path: Path) -> None:
    meant = made(tmp_path, KINDS["fp8-tensor"], "llama")
    more = {f"{UP}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_scale": torch.ones(())}
    tampered(tmp_path, more)
    decoder = load_decoder(tmp_path, F32, ops=ReferenceOps())
    assert torch.equal(
        held(decoder)["layers.1.mlp.experts.up_proj.0"].widened(F32), meant[f"{UP}.weight"]
    )


def test_what_is_saved_is_not_quantised(tmp_path: Path) -> None:
    """Loaded to be trained, its numbers are plain, and so is the checkpoint that is made of it."""
    meant = made(tmp_path, KINDS["gptq"], "llama")
    decoder = load_decoder(tmp_path, F32, ops=ReferenceOps(), mapped=False)
    saved = tmp_path / "saved"
    save_checkpoint(decoder, json.loads((tmp_path / "config.json").read_text()), saved)
    stored = load_file(saved / "model.safetensors")
    assert stored.keys() == meant.keys()
    assert all(torch.equal(stored[name], meant[name]) for name in meant)
    assert load_decoder(saved, F32, ops=ReferenceOps()) is not None


# --- as blocks, for kernels that read these ---

BLOCKS = {
    "mxfp4": (KINDS["mxfp4"], "mxfp4"),
    "pack-4": (KINDS["pack-4"], "q4_0"),
    "pack-4-zeros": (
        Kind(
            compressed("pack-quantized", args(4, 32, symmetric=False)),
            packed_integers(4, 32, BF16, zeros=True),
        ),
        "q5_0",
    ),
    "pack-8-channel": (KINDS["pack-8-channel"], "q8_0"),
    "int-quantized": (KINDS["int-quantized"], "q8_0"),
    "gptq": (Kind(gptq_config(4, 32), gptq(4, 32, stored_zero=7)), "q4_0"),
    "gptq-8": (KINDS["gptq-8"], "q8_0"),
    "gptq-zeros": (KINDS["gptq-zeros"], "q5_0"),
    "awq": (Kind({**KINDS["awq"].config, "group_size": 32}, awq(32)), "q5_0"),
}


@pytest.mark.parametrize(("kind", "format"), BLOCKS.values(), ids=BLOCKS)
def test_kernels_get_blocks_with_the_same_numbers(tmp_path: Path, kind: Kind, format: str) -> None:
    meant = made(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    kernels = CpuOps(1)
    decoder = load_decoder(checkpoint, F32, ops=kernels)
    formats = kernels.formats(F32)
    plan = {row.name: row for row in checkpoint.plan_weights("float32", formats=formats)}
    weights = held(decoder)
    blocks = 0
    for source in checkpoint.sources:
        if len(source.shape) != 2:
            continue
        weight, row = Matrix.of(weights[source.parameter]), plan[source.parameter]
        assert torch.equal(weight.widened(F32), meant[source.name]), source.parameter
        assert (row.format, row.nbytes) == (weight.format.name, weight.nbytes)
        if row.format != "float32":
            assert row.format == format and not row.mapped
            blocks += 1
    assert blocks == 2 * (4 + 5 * 3)
    plain = logits(load_decoder(plain_copy(tmp_path, meant), F32, ops=ReferenceOps()))
    # Kernels quantise activations too.
    assert_close(logits(decoder), plain, tolerance=0.15)


def test_stacked_experts_become_blocks(tmp_path: Path) -> None:
    meant = write_stacked(tmp_path, KINDS["mxfp4"])
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint, F32, ops=CpuOps(1))
    plan = checkpoint.plan_weights("float32", formats=decoder.ops.formats(F32))
    planned = {row.name: row.nbytes for row in plan}
    weights = held(decoder)
    for name, numbers in meant.items():
        weight = weights[name]
        assert isinstance(weight, Matrix) and weight.format.name == "mxfp4"
        assert torch.equal(weight.widened(F32), numbers), name
        assert weight.nbytes == planned[name]


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    """A matrix with such a scale is widened; where its codes are all 0 there is nothing to hold."""
    kind = KINDS["pack-4"]
    meant = made(tmp_path, kind, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    down, up = "model.layers.0.mlp.down_proj.weight", f"{UP}.weight"
    scales, others = tensors[f"{down}_scale"].clone(), tensors[f"{up}_scale"].clone()
    scales[3, 1] = 1.0078125e-9
    meant[down][3, 32:64] *= scales[3, 1].float() / tensors[f"{down}_scale"][3, 1].float()
    others[5, 0] = 1.0078125e-9
    words = tensors[f"{up}_packed"].clone()
    words[5, :4] = -0x77777778
    meant[up][5, :32] = 0.0
    tampered(tmp_path, {f"{down}_scale": scales, f"{up}_scale": others, f"{up}_packed": words})
    weights = held(load_decoder(tmp_path, F32, ops=CpuOps(1)))
    widened = weights["layers.0.mlp.experts.down_proj.0"]
    assert isinstance(widened, Tensor)
    torch.testing.assert_close(widened, meant[down], rtol=1e-6, atol=0)
    blocks = weights["layers.1.mlp.experts.up_proj.0"]
    assert isinstance(blocks, Matrix) and blocks.format.name == "q4_0"
    assert torch.equal(blocks.widened(F32), meant[up])


@pytest.mark.parametrize("kind", ["fp8-block", "mxfp4", "gptq-zeros"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_answer_depends_on_no_neighbour(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Promise P1: the same bits alone and among others, in whatever chunks."""
    made(tmp_path, KINDS[kind])
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
