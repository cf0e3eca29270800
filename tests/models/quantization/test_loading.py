"""Quantised checkpoints are held as they are stored, and mean what their tools say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import ConfigError, WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import Matrix, Weight
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from oracle import Server, assert_close, load_theirs, save_tiny
from quantised import BF16, F32, KINDS, Kind, change_config, compressed, fp8, write_quantised

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


def stack_experts(directory: Path, meant: dict[str, Tensor]) -> None:
    """All experts in two tensors, and their other planes likewise, as transformers 5 holds them."""
    file = directory / "model.safetensors"
    for tensors in (load_file(file), meant):
        stacked: dict[str, dict[int, Tensor]] = {}
        for name in [name for name in tensors if ".experts." in name]:
            before, _, after = name.partition(".experts.")
            number, projection, suffix = after.split(".")
            kind = "down_proj" if projection == "down_proj" else "gate_up_proj"
            part = stacked.setdefault(f"{before}.experts.{kind}{suffix.removeprefix('weight')}", {})
            place = 2 * int(number) + (projection == "up_proj")
            part[place] = tensors.pop(name)
        for name, parts in stacked.items():
            matrices = [parts[place].view(torch.uint8) if parts[place].itemsize == 1 else parts[place] for place in sorted(parts)]
            if "gate_up" in name:
                matrices = [torch.cat(matrices[i : i + 2]) for i in range(0, len(matrices), 2)]
            tensors[name] = torch.stack(matrices).view(next(iter(parts.values())).dtype)
        if tensors is not meant:
            save_file(tensors, file)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8-ue8m0", "fp8-half-blocks"])
def test_stacked_experts_are_parts_of_planes(tmp_path: Path, kind: str) -> None:
    """As gpt-oss has MXFP4, and transformers FP8; blocks of scales may span what gate and up
    share, but then rows have scales of their own."""
    config = {**KINDS["fp8-block"].config, "weight_block_size": [64, 16]}
    kinds = {**KINDS, "fp8-half-blocks": Kind(config, fp8((64, 16), "_scale_inv", F32))}
    made(tmp_path, kinds[kind])
    if kind == "fp8-half-blocks":
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        # Gate and up, 32 rows each, are one block of 64: both have gate's scales.
        for name in [name for name in tensors if name.endswith("up_proj.weight_scale_inv") and ".experts." in name]:
            tensors.pop(name)
        save_file(tensors, file)
    meant: dict[str, Tensor] = {}
    plain = load_file(tmp_path / "model.safetensors")
    checkpoint_names(plain)
    stack_experts(tmp_path, meant)
    decoder = load_decoder(tmp_path, F32, ops=ReferenceOps())
    assert decoder is not None


def checkpoint_names(tensors: dict[str, Tensor]) -> None:
    assert tensors
