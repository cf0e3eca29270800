"""Families with latent attention: how their files hold it, and what they alone have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.gguf_writing import Converter
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.engine.weight_bytes import count_weights
from moebius.errors import ConfigError
from moebius.models.config import LayerSpec
from moebius.models.decoder import Decoder
from moebius.models.family import model_config, read_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.mixers.latent import MLA
from moebius.nn.packed import PackedPast
from moebius.ops import select_ops
from moebius.ops.reference import ReferenceOps
from moebius.quantize.cached import Quantized
from moebius.train.initial import init_weights
from oracle import (
    FAMILY,
    TINY,
    Server,
    assert_close,
    assert_same_answers,
    load_theirs,
    save_tiny,
    saved_tiny,
)
from tiny import write_tokenizer

IDS = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1]
HEADS = ("k_b.weight", "v_b.weight")
# Rows of whole blocks in what heads have.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "initializer_range": 0.05,
}


def raw(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**TINY, **FAMILY[model_type], "model_type": model_type, **changes}


def served(decoder: Decoder) -> Tensor:
    server = Server(decoder, block_size=5, num_blocks=8)
    server.step([(0, IDS[:6])])
    server.step([(0, IDS[6:])])
    return server.all_logits(0)


class Older(Converter):
    """As files were written before heads' matrices were taken apart."""

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        if name.endswith("kv_b_proj.weight"):
            return [(tensor, f"blk.{name.split('.')[2]}.attn_kv_b.weight")]
        return super().parts(name, tensor)

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else super().joined(name, parts)

    def keys(self, w: gguf.GGUFWriter) -> None:
        super().keys(w)
        c = self.config
        for keys in w.kv_data:
            for name in ("head_count_kv", "key_length", "value_length"):
                keys.pop(f"deepseek2.attention.{name}", None)
            for name in ("key_length_mla", "value_length_mla"):
                keys.pop(f"deepseek2.attention.{name}", None)
        w.add_head_count_kv(c["num_attention_heads"])
        w.add_key_length(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        w.add_value_length(c["v_head_dim"])


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("converter", [Older, Converter])
def test_heads_are_read_whether_files_have_them_apart_or_not(
    tmp_path: Path, converter: type[Converter], kind: Type
) -> None:
    """As the same numbers in transformers; what is apart lies where it is, the other is widened."""
    save_tiny(tmp_path, "deepseek_v3", **WIDE)
    path = tmp_path / "tiny.gguf"
    converter(tmp_path, lambda place: kind if place.endswith(HEADS) else Type.F32).save(path)
    decoder = load_decoder(path, torch.float32, ops=ReferenceOps())
    assert_same_answers(decoder, tmp_path)
    checkpoint = open_checkpoint(path)
    formats = ReferenceOps().formats(torch.float32)
    planned = checkpoint.plan_weights("float32", formats=formats)
    of_heads = [
        each for each in planned if each.name.endswith(("k_b_proj.weight", "v_b_proj.weight"))
    ]
    split = converter is Older
    assert {(each.mapped, each.split) for each in of_heads} == {(not split, split)}
    weights = count_weights(checkpoint.sources, planned, "", EngineConfig(), None)
    assert weights.split == (sum(each.count for each in of_heads) * 4 if split else 0)
    assert ("are kv_b_proj in plain numbers, split by heads" in weights.parts) == split


def test_codes_of_a_checkpoint_are_widened_and_taken_apart(tmp_path: Path) -> None:
    """FP8 in blocks, as DeepSeek-V3's own files have every matrix."""
    save_tiny(tmp_path, "deepseek_v3", **WIDE)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    name = "model.layers.{i}.self_attn.kv_b_proj.weight"
    for i in range(2):
        weight = tensors[name.replace("{i}", str(i))]
        codes = weight.to(torch.float8_e4m3fn)
        tensors[name.replace("{i}", str(i))] = codes
        scales = torch.full((-(-weight.shape[0] // 16), -(-weight.shape[1] // 32)), 1.0)
        tensors[name.replace("{i}", str(i)) + "_scale_inv"] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    every = sorted({each.rpartition(".")[0] for each in tensors if "kv_b_proj" not in each})
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [16, 32],
        "modules_to_not_convert": every,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    layer = plain.layers[0].self_attn
    heads, size, plain_dim, value = 4, 64, 32, 32
    codes = tensors[name.replace("{i}", "0")].float().view(heads, plain_dim + value, size)
    found = decoder.layers[0].self_attn
    keys = found.k_b_proj.weight.view(heads, size, plain_dim)
    assert torch.equal(keys, codes[:, :plain_dim].transpose(1, 2))
    assert torch.equal(found.v_b_proj.weight.view(heads, value, size), codes[:, plain_dim:])
    assert_close(found.k_b_proj.weight, layer.k_b_proj.weight, 0.07)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe_lite"])
def test_heads_are_apart_when_quantised_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny(tmp_path, model_type, **WIDE)
    made = Quantized.of(open_checkpoint(tmp_path), "q8_0")
    made.make()
    formats = {
        source.parameter: made.checkpoint.tensors[source.name].format
        for source in made.checkpoint.sources
    }
    assert formats["layers.0.self_attn.k_b_proj.weight"] == "q8_0"
    assert formats["layers.0.self_attn.v_b_proj.weight"] == "q8_0"
    ops = ReferenceOps()
    ours = served(load_decoder(made.checkpoint, torch.float32, ops=ops))
    assert_close(ours, served(load_decoder(tmp_path, torch.float32, ops=ops)), 0.05)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_the_context_ends_where_an_indexer_would_pick(tmp_path: Path, model_type: str) -> None:
    """The plan says why, and a longer sequence is refused with that reason."""
    save_tiny(tmp_path, model_type, index_topk=20)
    write_tokenizer(tmp_path)
    why = "layers attend to the index_topk = 20 tokens that an indexer picks"
    plan = prepare(tmp_path, EngineConfig()).plan
    assert plan.max_model_len == 20
    assert [row for row in plan.rows() if row[0] == "context" and why in row[2]]
    with pytest.raises(ConfigError, match=f"max_model_len = 21 is beyond .* {why}"):
        prepare(tmp_path, EngineConfig(max_model_len=21))
    assert model_config(raw(model_type)).capped == ""


def test_layers_with_an_indexer_by_their_former_name() -> None:
    """As transformers 5.17 wrote them, and maps them since."""
    count = raw("deepseek_v32")["num_hidden_layers"]
    former = raw("deepseek_v32", layer_types=["deepseek_sparse_attention"] * count)
    assert model_config(former) == model_config(raw("deepseek_v32"))


def test_a_token_takes_a_latent_and_a_key(tmp_path: Path) -> None:
    save_tiny(tmp_path, "glm4_moe_lite")
    plan = prepare(tmp_path, EngineConfig(dtype="bfloat16")).plan
    # Two layers of 12 numbers and 4 that turn, in 16 bits.
    assert plan.bytes_per_token == 2 * (12 + 4) * 2


def test_latents_are_not_held_in_8_bits(tmp_path: Path) -> None:
    save_tiny(tmp_path, "deepseek_v2")
    with pytest.raises(ConfigError, match="latents for keys and values"):
        prepare(tmp_path, EngineConfig(kv_cache_dtype="int8"))


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    save_tiny(tmp_path, "deepseek_v3")
    plain = served(load_decoder(tmp_path, torch.float32))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    assert torch.equal(served(load_decoder(tmp_path, torch.float32)), plain)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_of_mistral_small_4_is_read_out_of_its_files(tmp_path: Path, prefix: str) -> None:
    save_tiny(tmp_path, "mistral4")
    plain = served(load_decoder(tmp_path, torch.float32))
    tensors = load_file(tmp_path / "model.safetensors")
    head = "language_model." if prefix.startswith("language") else ""
    named = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else head + name: tensor
        for name, tensor in tensors.items()
    }
    named["vision_tower.patch_conv.weight"] = torch.zeros(2)
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    nested = {"model_type": "mistral3", "text_config": config, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert torch.equal(served(load_decoder(tmp_path, torch.float32)), plain)
    small_3 = {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}
    with pytest.raises(ConfigError, match=r"text_config\.model_type is 'mistral'; it must be"):
        read_config(small_3)


def test_published_ax_k1_has_its_norm_in_layers_and_no_selection_bias(tmp_path: Path) -> None:
    """As its repository has it; transformers takes a bias of zeros."""
    model = saved_tiny(tmp_path, "axk1")
    tensors = load_file(tmp_path / "model.safetensors")
    named = {}
    for name, tensor in tensors.items():
        if not name.endswith("e_score_correction_bias"):
            named[name.replace("mlp.post_mlp_layernorm", "post_mlp_layernorm")] = tensor
    named["model.layers.0.post_mlp_layernorm.weight"] = torch.full((24,), torch.nan)
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.zero_()
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS])).logits[0]
    assert_close(served(load_decoder(tmp_path, torch.float32)), theirs)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2, but each of num_attention_heads = 4"),
    ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
    ("deepseek_v3", {"qk_rope_head_dim": 5}, "needs an even one"),
    ("deepseek_v3", {"q_lora_rank": "no"}, "q_lora_rank is 'no'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported are greedy, group_limited_greedy"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True is not supported"),
    ("deepseek_v32", {"layer_types": ["indexed_attention", "full_attention"]}, "all layers must have indexed_attention"),
    ("deepseek_v32", {"index_topk": None}, "index_topk is null"),
    ("mistral4", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "by which queries grow"),
    ("mistral4", {"rope_parameters": {**FAMILY["mistral4"]["rope_parameters"], "partial_rotary_factor": 0.5}},
     "of 10 values 4 turn, so it must be 0.4"),
    ("axk1", {"mlp_layer_types": ["dense", "other"]}, "mlp_layer_types must name"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes", "words"), WRONG)
def test_keys_that_contradict_are_named(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(raw(model_type, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def _with(mixer: MLA) -> Decoder:
    config = model_config(raw("deepseek_v3"))
    layers = tuple(LayerSpec(mixer, layer.feed_forward) for layer in config.layers)
    decoder = Decoder(replace(config, layers=layers), ReferenceOps())
    init_weights(decoder, torch.Generator().manual_seed(0), std=0.2)
    return decoder


PLAIN = MLA(num_heads=4, kv_rank=12, nope_dim=6, rope_dim=4, value_dim=8)


@torch.inference_mode()
def test_gates_multiply_each_heads_output() -> None:
    """By sigmoid, as bailing_hybrid has it: of zeros they halve what attention adds."""
    gated = _with(replace(PLAIN, gated=True))
    halved = _with(PLAIN)
    state = gated.state_dict()
    for i in range(2):
        state[f"layers.{i}.self_attn.gate_proj.weight"].zero_()
    halved.load_state_dict(
        {name: x for name, x in state.items() if "gate_proj" not in name or "mlp" in name}
    )
    for layer in halved.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
    gated.load_state_dict(state)
    assert_close(served(gated), served(halved), 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernels_and_rows_of_documents_compute_the_same(gated: bool) -> None:
    """Without positions and with gates, as Kimi Linear and bailing_hybrid have it."""
    reference = _with(replace(PLAIN, gated=gated))
    kernels = Decoder(reference.config, select_ops("cpu", torch.float32))
    kernels.load_state_dict(reference.state_dict())
    packed, _ = reference(torch.tensor(IDS), torch.arange(len(IDS)), PackedPast(len(IDS)))
    assert_close(served(kernels), reference.logits(packed))
    assert_close(served(reference), reference.logits(packed))


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    from moebius.models.store.save import save_checkpoint

    save_tiny(tmp_path / "one", "deepseek_v3")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    decoder = load_decoder(tmp_path / "one", torch.float32, mapped=False)
    save_checkpoint(decoder, config, tmp_path / "two")
    with torch.inference_mode():
        theirs = load_theirs(tmp_path / "two")(torch.tensor([IDS])).logits[0]
    assert_close(served(load_decoder(tmp_path / "one", torch.float32)), theirs)
