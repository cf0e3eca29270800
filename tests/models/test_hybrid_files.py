"""LFM2, Granite 4, Nemotron-H, Kimi Linear and Ling 3 with long prompts, quantised, and as GGUF files
that Moebius writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from covering import chosen, each_value
from models.gguf_recurrent import converter
from models.quantization.test_loading import plain_copy
from models.test_hybrids import FULL, IDS, LINEAR, assert_same, recurrent
from moebius.errors import ConfigError
from moebius.gguf import open_gguf
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops.reference import ReferenceOps
from moebius.quantize.cached import Quantized
from moebius.quantize.export import write_model
from oracle import ONE_OF_EACH_KIND, Server, assert_close, load_theirs, save_tiny, saved_tiny
from quantised import KINDS, write_quantised
from tiny import write_tokenizer

WIDE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
LATENT = {
    **WIDE,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
SIZES: dict[str, dict[str, Any]] = {
    "lfm2": WIDE,
    "lfm2_moe": WIDE,
    "granitemoehybrid": {**WIDE, "shared_intermediate_size": 32, "mamba_d_state": 16},
    "nemotron_h": {**WIDE, "head_dim": 16, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
                   "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 32},
    "kimi_linear": {**LATENT, "linear_head_dim": 32, "tie_word_embeddings": False},
    "bailing_hybrid": {**LATENT, "head_dim": 16},
}  # fmt: skip


def served(decoder: Any) -> torch.Tensor:
    server = Server(decoder, block_size=4, num_blocks=8)
    server.step([(0, IDS[:13])])
    server.step([(0, IDS[13:])])
    return server.all_logits(0)


@pytest.mark.parametrize("model_type", SIZES)
def test_prompts_equal_transformers_chunks(tmp_path: Path, model_type: str) -> None:
    """It computes a prompt in chunks of 64 or 256 tokens: other sums of the same numbers."""
    model = saved_tiny(tmp_path, model_type, max_position_embeddings=512)
    ids = [(7 * i * i + i) % 67 for i in range(300)]
    server = Server(load_decoder(tmp_path, torch.float32), block_size=16, num_blocks=20)
    server.step([(0, ids)])
    with torch.inference_mode():
        assert_same(server.all_logits(0), model(torch.tensor([ids]), use_cache=False).logits[0])


@pytest.mark.parametrize("model_type", chosen(SIZES, ONE_OF_EACH_KIND.__contains__))
def test_a_quantised_checkpoint_computes_what_a_file_of_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The file has decays and rows of heads otherwise than the checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    save_tiny(model, model_type, **SIZES[model_type])
    write_tokenizer(model)
    write_model(model, tmp_path / "out.gguf", "q8_0")
    made = Quantized.of(open_checkpoint(model), "q8_0")
    made.make()
    logits = []
    for checkpoint in (made.checkpoint, open_checkpoint(tmp_path / "out.gguf")):
        assert checkpoint.formats["q8_0"] > 20_000
        logits.append(served(load_decoder(checkpoint, torch.bfloat16)))
    assert torch.equal(*logits)


@pytest.mark.parametrize("model_type", chosen(SIZES, ONE_OF_EACH_KIND.__contains__))
def test_a_written_file_answers_as_the_original(tmp_path: Path, model_type: str) -> None:
    model = saved_tiny(tmp_path / "model", model_type, vocab_size=320)
    write_tokenizer(tmp_path / "model")
    write_model(tmp_path / "model", tmp_path / "out.gguf", "f32")
    found = served(load_decoder(tmp_path / "out.gguf", torch.float32))
    assert_same(found, recurrent(model, IDS))


DENSE = {"layers_block_type": [LINEAR, "mlp", FULL, "mlp"]}


def test_a_written_file_of_a_dense_nemotron_answers_as_the_original(tmp_path: Path) -> None:
    model = saved_tiny(tmp_path / "model", "nemotron_h", vocab_size=320, **DENSE)
    write_tokenizer(tmp_path / "model")
    write_model(tmp_path / "model", tmp_path / "out.gguf", "f32")
    assert open_gguf(tmp_path / "out.gguf").metadata["general.architecture"] == "nemotron_h"
    found = served(load_decoder(tmp_path / "out.gguf", torch.float32))
    assert_same(found, recurrent(model, IDS))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feed_forward_length", [0, 20, 0, 24], r"several widths, \[20, 24\]"),
        ("feed_forward_length", [0, 20, 20, 20], "is not 0 in layers that have attention"),
        ("feed_forward_length", 20, "feed_forward_length is 20; it must be a list"),
        ("attention.layer_norm_rms_epsilon", 0.5, "is 0.5, but layer_norm_epsilon another"),
        ("attention.value_length", 12, "attention.value_length is 12; only 10"),
        ("expert_count", 4, "expert_count is 4, but there is no router"),
        ("expert_used_count", 2, "nemotron_h.expert_used_count = 2 is not supported"),
    ],
)
def test_bad_keys_of_a_dense_nemotrons_file_are_a_line(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    save_tiny(tmp_path, "nemotron_h", **DENSE)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(changed(tmp_path, f"nemotron_h.{key}", value))


def changed(directory: Path, key: str, value: Any) -> Path:
    """A file of the model in a directory, in which a key has another value."""

    def change(writer: gguf.GGUFWriter) -> None:
        for keys in writer.kv_data:
            keys.pop(key, None)
        kind = gguf.GGUFValueType.get_type(value)
        sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, kind, sub_type=sub)

    converter(directory).save(directory / "tiny.gguf", change)
    return directory / "tiny.gguf"


@pytest.mark.parametrize(
    ("model_type", "kind"),
    each_value(SIZES, ["fp8-block", "pack-4-zeros"], among=ONE_OF_EACH_KIND),
)
def test_projections_may_be_quantised(tmp_path: Path, model_type: str, kind: str) -> None:
    save_tiny(tmp_path, model_type, **SIZES[model_type])
    meant = write_quantised(tmp_path, KINDS[kind])
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    assert_same(served(decoder), recurrent(load_theirs(plain_copy(tmp_path, meant)), IDS))
    in_kernels = served(load_decoder(tmp_path, torch.float32))
    assert_close(in_kernels, served(decoder), 1e-3)


@pytest.mark.parametrize(
    ("model_type", "key", "value", "message"),
    [
        ("lfm2_moe", "lfm2moe.shortconv.l_cache", 1, "conv_L_cache is 1"),
        ("lfm2_moe", "lfm2moe.attention.head_count_kv", [2, 0], "must be a number for each of 3"),
        ("lfm2_moe", "lfm2moe.attention.head_count_kv", [2, 1, 0], "several numbers of heads"),
        ("granitemoehybrid", "granitehybrid.ssm.inner_size", 25, "must be a multiple of 4 heads"),
        ("nemotron_h", "nemotron_h_moe.ssm.inner_size", 0, "must be a multiple of 4 heads"),
        ("kimi_linear", "kimi-linear.attention.key_length_mla", 4, "is 4, of which 4 turn"),
        ("kimi_linear", "kimi-linear.attention.key_length", 17, "no latent with its key"),
        ("bailing_hybrid", "bailingmoe3.kda.safe_gate", False, "only True is supported"),
    ],
)  # fmt: skip
def test_bad_keys_of_files_are_a_line(
    tmp_path: Path, model_type: str, key: str, value: Any, message: str
) -> None:
    save_tiny(tmp_path, model_type)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(changed(tmp_path, key, value))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "conv"]}, "no layer has attention"),
        ("lfm2", {"conv_bias": True}, "conv_bias is True, but llama.cpp takes False"),
        ("lfm2_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("granitemoehybrid", {"layer_types": [FULL, FULL]}, "layers with attention, and others"),
        ("nemotron_h", {"layers_block_type": [LINEAR, "moe", FULL, "mlp"]}, "no experts"),
        ("kimi_linear", {"layer_types": [LINEAR, LINEAR]}, "no layer has attention"),
        ("kimi_linear", {"linear_num_heads": 3}, "with as many heads"),
        ("bailing_hybrid", {"kda_safe_gate": False}, "kda_safe_gate is False"),
    ],
)  # fmt: skip
def test_what_files_cannot_say_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    save_tiny(tmp_path / "model", model_type, vocab_size=320, **changes)
    write_tokenizer(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        write_model(tmp_path / "model", tmp_path / "out.gguf", "f32")
