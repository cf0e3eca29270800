"""What is wrong with a quantised checkpoint is named; and what of one is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moebius.errors import WeightsError
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.store.save import save_checkpoint
from moebius.ops.reference import ReferenceOps
from quantised import F32, KINDS, change_config, compressed, held, made, tampered

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
        ({f"{UP}.g_idx": torch.full((64,), 4).int()}, ["g_idx", "beyond the 4"]),
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


def test_what_a_file_beside_says_counts_in_the_fingerprint(tmp_path: Path) -> None:
    """modelopt's, which says how bytes are to be read."""
    made(tmp_path, KINDS["fp8-tensor"], "llama")
    seen = {fingerprint(open_checkpoint(tmp_path))}
    file = tmp_path / "hf_quant_config.json"
    for skipped in ([], ["lm_head"]):
        inner = {"quant_algo": "FP8", "exclude_modules": skipped}
        file.write_text(json.dumps({"quantization": inner}))
        seen.add(fingerprint(open_checkpoint(tmp_path)))
    assert len(seen) == 3


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
    load_decoder(saved, F32, ops=ReferenceOps())
