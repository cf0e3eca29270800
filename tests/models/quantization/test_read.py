"""What a quantization_config says of a module, and what is refused in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AwqConfig, FbgemmFp8Config, FineGrainedFP8Config, GPTQConfig, Mxfp4Config

from moebius.errors import ConfigError
from moebius.models.quantization import Scheme, quantization_beside, read_quantization
from moebius.models.quantization.schemes import (
    AffineScheme,
    AwqScheme,
    BytesScheme,
    Fp8Scheme,
    GptqScheme,
    MxFp4Scheme,
    NvFp4Scheme,
    WordsScheme,
)
from quantised import args, compressed, gptq_config

LAYER = "model.layers.3."
UP = f"{LAYER}mlp.experts.7.up_proj"


def scheme(config: dict[str, Any], module: str = UP, kind: str = "Linear") -> Scheme | None:
    found = read_quantization({"quantization_config": json.loads(json.dumps(config))})
    assert found is not None
    return found.scheme(module, kind)


def fp8(**more: object) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": [128, 128], **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (fp8(), Fp8Scheme((128, 128))),
        (fp8(scale_fmt="ue8m0", activation_scheme="dynamic"), Fp8Scheme((128, 128))),
        (fp8(weight_block_size=None, activation_scheme="static"), Fp8Scheme(None)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, Fp8Scheme((1, 0))),
        ({"quant_method": "mxfp4"}, MxFp4Scheme()),
        (AWQ, AwqScheme(128)),
        (AwqConfig(group_size=64).to_dict(), AwqScheme(64)),
        (FineGrainedFP8Config().to_dict(), Fp8Scheme((128, 128))),
        (FbgemmFp8Config().to_dict(), Fp8Scheme((1, 0))),
        (Mxfp4Config().to_dict(), MxFp4Scheme()),
        (GPTQConfig(bits=8, group_size=32).to_dict(), GptqScheme(8, 32, "symmetric", False)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, AwqScheme(64)),
        (gptq_config(4, 128), GptqScheme(4, 128, "symmetric", False)),
        (gptq_config(8, 0, sym=False), GptqScheme(8, 0, "minus one", False)),
        (
            gptq_config(4, 32, sym=False, checkpoint_format="gptq_v2"),
            GptqScheme(4, 32, "plain", False),
        ),
        (gptq_config(4, 32, desc_act=True, format="gptq"), GptqScheme(4, 32, "symmetric", True)),
        (compressed("pack-quantized", args(4, 128)), WordsScheme(4, 128)),
        (compressed("pack-quantized", args(8, 0, symmetric=False)), WordsScheme(8, 0, True)),
        (compressed("pack-quantized", args(4, 64, actorder="weight")), WordsScheme(4, 64)),
        (
            compressed("pack-quantized", args(4, 64, actorder="group")),
            WordsScheme(4, 64, False, True),
        ),
        (compressed("int-quantized", args(8, 0)), BytesScheme(0)),
        (compressed("naive-quantized", args(8, 0, "float")), Fp8Scheme((1, 0))),
        (compressed("float-quantized", args(8, 0, "float", strategy="tensor")), Fp8Scheme((0, 0))),
        (
            compressed(
                "float-quantized", args(8, 0, "float", strategy="block", block_structure=[128, 64])
            ),
            Fp8Scheme((128, 64)),
        ),
        (
            compressed("mxfp4-pack-quantized", args(4, 32, "float")),
            MxFp4Scheme(("_packed", "_scale")),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
            NvFp4Scheme(("", "_scale", "_scale_2"), False),
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Fp8Scheme((0, 0))),
    ],
)
def test_schemes(config: dict[str, Any], expected: Scheme) -> None:
    assert scheme(config) == expected


@pytest.mark.parametrize(
    ("names", "module", "skipped"),
    [
        (["lm_head"], "lm_head", True),
        (["lm_head"], UP, False),
        (["model.layers.3.mlp"], UP, True),
        (["model.layers.3."], UP, True),
        (["model.layers.3"], "model.layers.31.mlp.up_proj", False),
        (["mlp.gate"], f"{LAYER}mlp.gate", True),
        (["mlp.gate"], f"{LAYER}mlp.gate_proj", False),
        (["model.layers.*.mlp.gate"], f"{LAYER}mlp.gate", True),
        (["model.layers.*.mlp.gate"], f"{LAYER}mlp.gate_proj", False),
        (["up_proj"], UP, True),
        ([r"model\.layers\.[0-2]\."], UP, False),
        ([], UP, False),
    ],
)
@pytest.mark.parametrize("method", ["fp8", "awq", "mxfp4"])
def test_modules_that_are_not_converted(
    method: str, names: list[str], module: str, skipped: bool
) -> None:
    """As transformers' should_convert_module has it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = {"fp8": fp8(), "awq": AWQ, "mxfp4": {"quant_method": "mxfp4"}}[method]
    found = scheme({**config, "modules_to_not_convert": names}, module)
    assert (found is None) == skipped
    assert should_convert_module(module, names) == (not skipped)


def test_layers_that_are_ignored_by_another_name() -> None:
    assert scheme(fp8(ignored_layers=["lm_head"]), "lm_head") is None


def test_targets_of_compressed_tensors() -> None:
    """A name counts for more than a pattern, and that for more than a class."""
    groups = {
        "a": {"targets": ["Linear"], "weights": args(4, 128)},
        "b": {"targets": [r"re:.*self_attn\..*"], "weights": args(8, 128)},
        "c": {"targets": [f"{LAYER}self_attn.q_proj"], "weights": args(4, 32)},
    }
    config = compressed(
        "pack-quantized", {}, config_groups=groups, ignore=["lm_head", r"re:.*\.gate$"]
    )
    assert scheme(config) == WordsScheme(4, 128)
    assert scheme(config, f"{LAYER}self_attn.k_proj") == WordsScheme(8, 128)
    assert scheme(config, f"{LAYER}self_attn.q_proj") == WordsScheme(4, 32)
    for module in ("lm_head", f"{LAYER}mlp.gate"):
        assert scheme(config, module) is None
    assert scheme(config, "model.embed_tokens", "Embedding") is None
    groups["d"] = {"targets": ["Embedding"], "weights": args(8, 64)}
    assert scheme(config, "model.embed_tokens", "Embedding") == WordsScheme(8, 64)


def test_groups_may_have_formats_of_their_own() -> None:
    groups = {
        "a": {
            "targets": ["re:.*mlp.*"],
            "weights": args(4, 16, "float"),
            "format": "nvfp4-pack-quantized",
        },
        "b": {"targets": ["Linear"], "weights": args(8, 0, "float"), "format": "float-quantized"},
    }
    config = compressed("mixed-precision", {}, config_groups=groups)
    assert isinstance(scheme(config), NvFp4Scheme)
    assert scheme(config, f"{LAYER}self_attn.q_proj") == Fp8Scheme((1, 0))
    del groups["a"]["format"]
    with pytest.raises(ConfigError, match="config_groups: a: format is missing"):
        scheme(config)


def test_gptq_s_overrides() -> None:
    """The first pattern that matches counts."""
    dynamic = {
        r"-:model\.layers\.3\.self_attn.*": {},
        r"+:.*down_proj": {"bits": 8, "group_size": 32},
        r".*\.experts\..*": {"sym": False},
    }
    config = gptq_config(4, 128, dynamic=dynamic)
    assert scheme(config, f"{LAYER}self_attn.q_proj") is None
    assert scheme(config, f"{LAYER}mlp.experts.0.down_proj") == GptqScheme(
        8, 32, "symmetric", False
    )
    assert scheme(config) == GptqScheme(4, 128, "minus one", False)
    assert scheme(config, f"{LAYER}mlp.up_proj") == GptqScheme(4, 128, "symmetric", False)


def test_mlx_has_modules_of_their_own() -> None:
    own = {"bits": 8, "group_size": 32}
    config = {"bits": 4, "group_size": 64, f"{LAYER}mlp.gate": own, "lm_head": False}
    for keys in ({"quantization": config}, {"quantization": config, "quantization_config": config}):
        found = read_quantization(keys)
        assert found is not None and found.method == "mlx"
        assert found.scheme(UP) == AffineScheme(4, 64)
        assert found.scheme("model.embed_tokens", "Embedding") == AffineScheme(4, 64)
        assert found.scheme(f"{LAYER}mlp.gate") == AffineScheme(8, 32)
        assert found.scheme("lm_head") is None


def test_modelopt_writes_a_file_of_its_own(tmp_path: Path) -> None:
    assert quantization_beside(tmp_path) is None
    inner = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.3.self_attn*"],
    }
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": inner}))
    found = quantization_beside(tmp_path)
    assert found is not None and isinstance(found.scheme(UP), NvFp4Scheme)
    assert found.scheme(f"{LAYER}self_attn.q_proj") is None
    inner["quant_algo"] = "W4A16_MIXED"
    file.write_text(json.dumps({"quantization": inner}))
    with pytest.raises(ConfigError, match=r"hf_quant_config.*W4A16_MIXED.*NVFP4, FP8"):
        quantization_beside(tmp_path)


def test_nothing_is_quantised() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None}) is None
    older = {"compression_config": compressed("pack-quantized", args(4, 128))}
    found = read_quantization(older)
    assert found is not None and found.method == "compressed-tensors"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes", "gptq", "bfloat16"]),
        ({"quant_method": "torchao"}, ["torchao", "compressed-tensors"]),
        ({"bits": 4}, ["None", "supported are"]),
        ("fp8", ["'fp8'", "supported are"]),
        (fp8(fmt="e5m2"), ["fmt", "e5m2", "e4m3"]),
        (fp8(weight_block_size=[128]), ["weight_block_size", "[128]", "two positive integers"]),
        (fp8(weight_block_size=[128, 0]), ["weight_block_size", "two positive integers"]),
        (fp8(expert_dtype="fp4"), ["expert_dtype", "fp4"]),
        (fp8(scale_fmt="ue9m0"), ["scale_fmt", "ue9m0"]),
        (fp8(rotation="hadamard"), ["rotation", "hadamard", "not supported"]),
        (fp8(modules_to_not_convert="lm_head"), ["modules_to_not_convert", "list of names"]),
        (fp8(modules_to_not_convert=["(["]), ["([", "regular expression"]),
        (gptq_config(3, 128), ["bits", "3", "4 and 8"]),
        (gptq_config(4, 100), ["group_size", "100", "multiple of 8"]),
        (gptq_config(4, 128, checkpoint_format="marlin"), ["checkpoint_format", "marlin", "gptq_v2"]),
        (gptq_config(4, 128, is_marlin_format=True), ["is_marlin_format"]),
        (gptq_config(4, 128, pack_dtype="int16"), ["pack_dtype", "int16"]),
        (gptq_config(4, 128, desc_act="yes"), ["desc_act", "true or false"]),
        (gptq_config(4, 128, dynamic={".*up.*": {"bits": 2}}), ["dynamic", ".*up.*", "bits is 2"]),
        (gptq_config(4, 128, dynamic={".*up.*": {"tilt": 2}}), ["dynamic", "tilt"]),
        ({**AWQ, "version": "gemv"}, ["version", "gemv", "gemm"]),
        ({**AWQ, "bits": 8}, ["bits is 8", "4"]),
        ({**AWQ, "group_size": None}, ["q_group_size", "missing"]),
        (compressed("marlin-24", args(4, 128)), ["format", "marlin-24", "pack-quantized"]),
        (compressed("pack-quantized", args(3, 128)), ["num_bits is 3", "4 of type int"]),
        (compressed("pack-quantized", args(4, 128, tilt=1)), ["weights", "tilt"]),
        (compressed("pack-quantized", args(4, 128, dynamic=True)), ["dynamic"]),
        (compressed("int-quantized", args(8, 0, strategy="tensor")), ["strategy", "tensor", "channel"]),
        (compressed("int-quantized", args(8, 0, actorder="group")), ["actorder", "pack-quantized"]),
        (compressed("pack-quantized", args(4, 128), transform_config={"R1": {}}), ["transform_config"]),
        (compressed("pack-quantized", args(4, 128), sparsity_config={"format": "sparse-24-bitmask"}), ["sparse-24"]),
        (compressed("pack-quantized", args(4, 128), config_groups={}), ["config_groups"]),
        (compressed("float-quantized", args(8, 0, "float", strategy="block")), ["block_structure", "None"]),
        (compressed("mxfp4-pack-quantized", args(4, 32)), ["num_bits is 4 of type int", "4 of type float"]),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, ["quant_algo", "W4A8_AWQ", "NVFP4"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, ["group_size", "16"]),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_in_one_line(config: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_quantization({"quantization_config": config})
    message = str(error.value)
    assert message.startswith("config.json: quantization_config")
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_other_modes_of_mlx_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantization: mode is '{mode}'; supported are affine"):
        read_quantization({"quantization": {"bits": 4, "group_size": 32, "mode": mode}})
