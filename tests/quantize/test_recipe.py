"""What recipes give each tensor, beside llama.cpp's own table worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.family import family, model_config
from moebius.models.layout import sources
from moebius.quantize.recipe import PLAIN, RECIPES, format_of, recipe


def config(**changes: Any) -> ModelConfig:
    """A qwen3_moe whose rows are whole blocks of 256, unless it is changed."""
    usual = {
        "model_type": "qwen3_moe",
        "vocab_size": 1000,
        "hidden_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "intermediate_size": 256,
    }
    return model_config(usual | changes)


def formats(name: str, model: ModelConfig) -> dict[str, str | None]:
    layout = family(model.model_type).layouts[0]
    return {
        source.parameter: format_of(recipe(name), source, model)
        for source in sources(model, layout)
    }


def test_q4_k_m_of_sixteen_layers() -> None:
    """Layers 0, 1 (below 16 / 8), 14, 15 (from 7 * 16 / 8), and every third one between."""
    found = formats("q4_k_m", config())
    with_more = {0, 1, 4, 7, 10, 13, 14, 15}
    for layer in range(16):
        wanted = "q6_k" if layer in with_more else "q4_k"
        assert found[f"layers.{layer}.self_attn.v_proj.weight"] == wanted, layer
        assert found[f"layers.{layer}.mlp.experts.down_proj.3"] == wanted, layer
        assert found[f"layers.{layer}.mlp.experts.gate_proj.0"] == "q4_k"
        assert found[f"layers.{layer}.self_attn.q_proj.weight"] == "q4_k"
        assert found[f"layers.{layer}.self_attn.o_proj.weight"] == "q4_k"
        for kept in ("self_attn.q_norm.weight", "input_layernorm.weight", "mlp.router.weight"):
            assert found[f"layers.{layer}.{kept}"] is None
    assert found["embed_tokens.weight"] == "q4_k"
    assert found["lm_head.weight"] == "q6_k"
    assert found["norm.weight"] is None


def test_a_tied_embedding_is_the_head() -> None:
    assert formats("q4_k_m", config(tie_word_embeddings=True))["embed_tokens.weight"] == "q6_k"


def test_rows_that_are_no_whole_blocks_of_256() -> None:
    found = formats("q4_k_m", config(moe_intermediate_size=224, hidden_size=320))
    assert found["layers.0.mlp.experts.down_proj.0"] == "q8_0"  # instead of q6_k
    assert found["layers.2.mlp.experts.down_proj.0"] == "q5_0"  # instead of q4_k
    assert found["lm_head.weight"] == "q8_0"
    assert found["layers.2.self_attn.o_proj.weight"] == "q4_k"  # its rows are the heads' 512
    narrow = formats("q5_k_m", config(moe_intermediate_size=224))
    assert narrow["layers.2.mlp.experts.down_proj.0"] == "q5_1"


def test_rows_that_are_no_blocks_at_all_stay_as_they_are() -> None:
    assert (
        formats("q8_0", config(moe_intermediate_size=24))["layers.0.mlp.experts.down_proj.0"]
        is None
    )


def test_eight_experts_are_mixtrals() -> None:
    found = formats("q4_k_m", config(num_experts=8))
    assert found["layers.3.self_attn.k_proj.weight"] == "q8_0"
    assert found["layers.3.self_attn.v_proj.weight"] == "q8_0"
    assert found["layers.3.self_attn.o_proj.weight"] == "q5_k"
    assert formats("q5_k_m", config(num_experts=8))["layers.3.self_attn.o_proj.weight"] == "q5_k"


def test_mxfp4_is_for_experts() -> None:
    found = formats("mxfp4", config())
    assert {each for name, each in found.items() if ".experts." in name} == {"mxfp4"}
    assert {each for name, each in found.items() if "_proj.weight" in name} == {"q8_0"}
    assert found["lm_head.weight"] == "q8_0"


@pytest.mark.parametrize("name", ["q8_0", "q6_k"])
def test_the_plain_ones_have_one_format(name: str) -> None:
    assert set(formats(name, config()).values()) == {name, None}


def test_plain_numbers_stay_plain_beside_eight_experts() -> None:
    """As in an f32 file of Mixtral, or of anything else with eight."""
    model = config(num_experts=8)
    layout = family(model.model_type).layouts[0]
    found = {format_of(PLAIN["bf16"], source, model) for source in sources(model, layout)}
    assert found == {"bfloat16", None}


def test_queries_keys_and_values_in_one_matrix_have_more_bits() -> None:
    model = model_config({"model_type": "qwen3_5_text", "num_hidden_layers": 4})
    found = formats("q4_k_m", model)
    assert found["layers.0.self_attn.in_proj_qkv.weight"] == "q5_k"
    assert found["layers.0.self_attn.in_proj_z.weight"] == "q4_k"
    for kept in ("conv1d.weight", "A_log", "dt_bias", "norm.weight"):
        assert found[f"layers.0.self_attn.{kept}"] is None


def test_others_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no quantization 'q4'; there are q8_0, .*mxfp4"):
        recipe("q4")
    assert set(RECIPES) == {"q8_0", "q6_k", "q5_k_m", "q4_k_m", "mxfp4"}
