"""A GGUF file's keys: what they become, and what is refused because it would change the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from models.gguf_writing import Converter
from models.ropes import YARN
from moebius.errors import ConfigError
from moebius.files import read_json
from moebius.models.description import describe
from moebius.models.family import family, model_types
from moebius.models.gguf_architecture import pair_rows
from moebius.models.gguf_keys import gguf_keys
from moebius.nn.attention import GQA
from oracle import save_tiny

Change = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama")
    return directory


def changed(directory: Path, to: Path, change: Change) -> Path:
    path = to / "changed.gguf"
    Converter(directory).save(path, change)
    return path


def setting(key: str, value: Any, kind: gguf.GGUFValueType | None = None) -> Change:
    """Gives a key this value; None takes it away."""

    def change(writer: gguf.GGUFWriter) -> None:
        for keys in writer.kv_data:
            keys.pop(key, None)
        if value is not None:
            given = kind or gguf.GGUFValueType.get_type(value)
            sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, given, sub_type=sub)

    return change


T = gguf.GGUFValueType
REFUSED: list[tuple[str, Any, T | None, str]] = [
    ("general.architecture", "gemma9", None, "general.architecture 'gemma9' is not supported; supported are afmoe, "),
    ("general.quantization_version", 1, T.UINT32, "general.quantization_version is 1"),
    ("llama.embedding_length", None, None, "llama.embedding_length is missing"),
    ("llama.block_count", "two", None, "llama.block_count is 'two'; it must be an integer"),
    ("llama.attention.head_count", 0, T.UINT32, "num_attention_heads is 0"),
    ("llama.attention.head_count_kv", [2, 1], None, "llama.attention.head_count_kv differs from layer to layer"),
    ("llama.attention.sliding_window", 4096, T.UINT32, "llama.attention.sliding_window = 4096 is not supported"),
    ("llama.attention.causal", False, None, "llama.attention.causal = False is not supported"),
    ("llama.attention.value_length", 12, T.UINT32, "llama.attention.value_length is 12"),
    ("llama.rope.dimension_count", 4, T.UINT32, "llama.rope.dimension_count is 4"),
    ("llama.rope.scaling.type", "longrope", None, "llama.rope.scaling.type"),
    ("llama.rope.freq_base", float("nan"), T.FLOAT32, "rope_theta is nan"),
    ("llama.expert_count", 4, T.UINT32, "llama.expert_used_count is missing"),
    ("llama.block_count", 2**31, T.UINT32, "block_count is 2147483648, in a file of"),
    ("llama.logit_scale", 0.5, T.FLOAT32, "llama.logit_scale = 0.5 is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"), REFUSED, ids=[f"{key}={value}" for key, value, *_ in REFUSED]
)
def test_what_would_change_the_answer_is_refused(
    tiny: Path, tmp_path: Path, key: str, value: Any, kind: T | None, words: str
) -> None:
    path = changed(tiny, tmp_path, setting(key, value, kind))
    with pytest.raises(ConfigError) as caught:
        describe(path)
    assert "changed.gguf: " in str(caught.value) and words in str(caught.value)


FINE: list[tuple[str, Any, T | None]] = [
    ("llama.expert_count", 0, T.UINT32),
    ("llama.attention.head_count_kv", [2, 2], None),
    ("llama.attention.sliding_window", 0, T.UINT32),
    ("llama.attention.causal", True, None),
    ("llama.rope.scaling.type", "none", None),
    ("llama.rope.scaling.finetuned", True, None),
    ("llama.tensor_data_layout", "Meta AI original pth", None),
    ("llama.feed_forward_length", [20, 20], None),
    ("general.file_type", 7, T.UINT32),
]


@pytest.mark.parametrize(
    ("key", "value", "kind"), FINE, ids=[f"{key}={value}" for key, value, _ in FINE]
)
def test_what_changes_nothing_is_read(
    tiny: Path, tmp_path: Path, key: str, value: Any, kind: T | None
) -> None:
    plain = describe(changed(tiny, tmp_path, lambda writer: None))
    found = describe(changed(tiny, tmp_path, setting(key, value, kind)))
    assert found == plain


def test_strangers_are_named(tiny: Path, tmp_path: Path) -> None:
    found = describe(changed(tiny, tmp_path, setting("vendor.note", "hello", None)))
    assert found.ignored == ["vendor.note"]


def test_an_older_name_of_linear_scaling(tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, tmp_path, setting("llama.rope.scale_linear", 4.0, T.FLOAT32))
    mixer = describe(path).config.mixers[0]
    assert isinstance(mixer, GQA) and mixer.rope is not None
    assert (mixer.rope.scaling, mixer.rope.factor) == ("linear", 4.0)


UNWRITABLE: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 4}, "has a sliding window in layer 0, but llama.cpp has none there for llama; load the model"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp takes 'silu' for granted of llama"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("mellum", {"mlp_layer_types": ["dense", "sparse"]}, "layer 0 has no experts, which files of mellum cannot say"),
    ("mellum", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9.0},
                                    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}}},
     "no such scaling of positions in layers with a window"),
    ("ernie4_5_moe", {"moe_layer_end_index": 1}, "layer 2 has no experts, which files of ernie4_5-moe cannot say"),
    ("afmoe", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}, "no sliding window in layer 0"),
    ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk is"),
    ("gemma4_text", {"rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 9.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}}, "positions are scaled, which files of this kind cannot"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}}, "with longrope"),
    ("gemma4_text", {"attention_bias": True}, "attention_bias is True"),
    ("gemma3_text", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7.0, but llama.cpp takes 10 for granted"),
    ("laguna", {"moe_router_logit_softcapping": 0.5}, "moe_router_logit_softcapping is 0.5"),
    ("cohere2_moe", {"attention_bias": True}, "attention_bias is True"),
    ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}, "shared_expert_combination_strategy is 'sum'"),
    ("cohere2_moe", {"prefix_dense_sliding_window_pattern": 2}, "prefix_dense_sliding_window_pattern is 2"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}, "rope mscale is 0.7"),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"]}, "layer 1 has no experts"),
    ("flex_olmo", {}, "GGUF files hold no flex_olmo models"),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
     "layer 3 has no experts, which files of nemotron_h_moe cannot say"),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp"]}, "no layer has attention"),
    ("qwen3_next", {"linear_value_head_dim": 10}, "linear_value_head_dim is 10, but llama.cpp takes linear_key_head_dim = 6"),
    ("qwen3_next", {"layer_types": ["full_attention"] * 2}, "this model none"),
    ("qwen3_5_text", {"attention_bias": True}, "attention_bias is True"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "overrides", "words"), UNWRITABLE)
def test_what_llama_cpp_does_not_have_is_not_written(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], words: str
) -> None:
    save_tiny(tmp_path, model_type, **overrides)
    with pytest.raises(ConfigError, match=words):
        gguf_keys(read_json(tmp_path / "config.json"))


def test_pairs_of_rows() -> None:
    assert pair_rows(2, 6) == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_every_published_family_has_a_file() -> None:
    """But for what llama.cpp does not have, or has with an indexer."""
    without = [name for name in model_types() if not family(name).gguf]
    bare = ["axk1", "deepseek_v32", "flex_olmo", "glm_moe_dsa", "moebius"]
    assert without == [*bare, "switch_transformers"]
