"""Gemma 4 beyond what all families are tested for: files with images, keys spelled both ways, what
a cache keeps, freed windows, quantised weights, and a chat that begins once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from engine.windows import assert_windows_are_given_back
from models.gguf_recurrent import converter
from moebius.engine.kv_cache import KVCache, block_bytes, lay_out
from moebius.models.family import model_config, read_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.beside import DenseBeside
from moebius.nn.mixers.normed_values import NormedValues
from moebius.nn.paged import PagedPast
from moebius.nn.rope import frequencies
from moebius.ops import Ops, select_ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from oracle import FAMILY, PROMPT, TINY, Server, assert_same_answers, save_tiny
from tiny import write_tokenizer

SLIDING = "sliding_attention"
FULL = "full_attention"
# What is published of the 26B-A4B's sizes.
LARGE: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 2816,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "intermediate_size": 2112,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "vocab_size": 262_144,
    "final_logit_softcapping": 30.0,
}


def sizes(model_type: str = "gemma4_text", **changes: Any) -> dict[str, Any]:
    return {**TINY, **FAMILY[model_type], "model_type": model_type, **changes}


def heads(raw: dict[str, Any]) -> list[tuple[int, int, bool]]:
    mixers = model_config(raw).mixers
    assert all(isinstance(mixer, NormedValues) for mixer in mixers)
    return [(m.head_dim, m.num_kv_heads, m.keys_as_values) for m in mixers]  # type: ignore[attr-defined]


def test_the_published_sizes() -> None:
    config = model_config(LARGE)
    assert Counter(heads(LARGE)) == {(256, 8, False): 25, (512, 2, True): 5}
    assert all(isinstance(part, DenseBeside) for part in config.feed_forward)
    total = sum(
        torch.Size(parameter.shape).numel()
        for layer in config.layers
        for parameter in layer.parameters(config.hidden_size)
    )
    assert total + 262_144 * 2816 + 2816 == pytest.approx(25.2e9, rel=0.01)


def test_what_a_token_takes_of_the_published_sizes() -> None:
    """91 % of a token's bytes are in layers with a window: 200 KiB, and 20 KiB in the others."""
    specs = model_config(LARGE).caches(torch.bfloat16)
    kept = Counter[int | None]()
    for spec in specs:
        kept[spec.window] += spec.bytes_per_token
    assert kept == {1024: 200 * 1024, None: 20 * 1024}
    layout = lay_out(specs)
    full = [window for window in layout.windows if window is None]
    block = block_bytes(specs, CpuOps(1), 16)
    assert len(full) == 1 and block == 16 * 20 * 1024, "nothing is unused where a context is long"
    whole = block * (131_072 // 16 + (len(layout.windows) - 1) * (1024 // 16 + 1))
    assert whole == pytest.approx(2.8e9, rel=0.06)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4_unified_text"])
def test_sizes_of_single_layers_are_read_however_they_are_spelled(model_type: str) -> None:
    raw = sizes(model_type)
    written = AutoConfig.for_model(**raw).to_dict()
    assert "global_head_dim" not in written and list(written["per_layer_config"]) == ["1"]
    assert heads(written) == heads(raw)
    given = {key: value for key, value in raw.items() if "global" not in key}
    assert heads({**given, "per_layer_config": {1: {"head_dim": 6}}})[1][0] == 6
    assert heads({**given, "per_layer_config": None})[1][0] == raw["head_dim"]
    assert heads(given)[1][0] == 512


def test_heads_of_another_number_go_with_keys_that_are_values() -> None:
    assert heads(sizes(attention_k_eq_v=False)) == [(10, 2, False), (16, 2, False)]


def test_frequencies_of_pairs_that_do_not_turn_are_zero() -> None:
    mixer = model_config(LARGE).mixers[-1]
    assert isinstance(mixer, NormedValues) and mixer.rope is not None
    inverse, factor = frequencies(mixer.rope, 512)
    assert factor == 1.0 and inverse.shape == (256,)
    wanted = 1.0 / (1e6 ** (torch.arange(0, 128, 2) / 512))
    torch.testing.assert_close(inverse[:64], wanted)
    assert not inverse[64:].any()


def test_the_last_layer_sees_everything_whatever_is_said() -> None:
    config = model_config(sizes(layer_types=[FULL, SLIDING]))
    assert [mixer.window for mixer in config.mixers] == [None, None]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("outer", "inner"), [("gemma4", "gemma4_text"), ("gemma4_unified", "gemma4_unified_text")]
)
def test_the_text_of_files_with_images(
    tmp_path: Path, outer: str, inner: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Names stand behind another prefix, and what sees and hears is left out with a line."""
    save_tiny(tmp_path, inner)
    plain = load_decoder(tmp_path, torch.float32).state_dict()
    text = json.loads((tmp_path / "config.json").read_text())
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    seeing = [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.layers.0.norm_out.weight",
        "model.embed_audio.embedding_projection.weight",
    ]
    beside = {name: torch.zeros(2) for name in seeing}
    save_file({**tensors, **beside}, tmp_path / "model.safetensors")
    whole = {
        "model_type": outer,
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 3},
        "audio_config": None,
        "image_token_id": 5,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with caplog.at_level("INFO", logger="moebius"):
        found = load_decoder(tmp_path, torch.float32).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in found)
    assert "4 tensors are left out" in caplog.text and "*vision_tower.*" in caplog.text
    assert read_config(whole).config.model_type == inner


@pytest.mark.parametrize("ops", [ReferenceOps(), select_ops("cpu", torch.float32)], ids=str)
def test_experts_apart(tmp_path: Path, ops: Ops) -> None:
    """A tensor for each expert, as quantised checkpoints have them."""
    save_tiny(tmp_path, "gemma4_text")
    plain = load_decoder(tmp_path, torch.float32, ops=ops).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        before = name.rpartition(".")[0]
        for e, matrix in enumerate(tensors.pop(name)):
            parts = {"down_proj": matrix}
            if "gate_up" in name:
                gate, up = matrix.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up}
            for part, tensor in parts.items():
                tensors[f"{before}.{e}.{part}.weight"] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_decoder(tmp_path, torch.float32, ops=ops).state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_windows_are_given_back(tmp_path: Path) -> None:
    changes = {"vocab_size": 320, "sliding_window": 24, "max_position_embeddings": 2048}
    save_tiny(tmp_path, "gemma4_text", **changes)
    write_tokenizer(tmp_path)
    assert_windows_are_given_back(tmp_path, full=1, windowed=1)


# 704 and 2112, which are whole blocks of 32 and not of 256, and no multiples of 512.
ODD: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 96,
    "intermediate_size": 352,
    "head_dim": 64,
    "global_head_dim": 128,
    "initializer_range": 0.05,
}


def fallback(place: str) -> Type:
    """What llama.cpp has in a Q4_K_M file: other types where rows are no blocks of 256."""
    if "ffn_down" in place:
        return Type.Q5_0 if "exps" in place else Type.Q8_0
    return Type.Q6_K if "attn_v" in place or "token_embd" in place else Type.Q4_K


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_file_of_mixed_types_answers_alike_in_any_batch(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_tiny(tmp_path, "gemma4_text", **ODD)
    path = tmp_path / "tiny.gguf"
    converter(tmp_path, fallback).save(path)
    stored = {tensor.dtype for tensor in open_checkpoint(path).tensors.values()}
    assert stored == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert_same_answers(load_decoder(path, torch.float32, ops=ReferenceOps()), tmp_path)
    decoder = load_decoder(path, dtype, ops=select_ops("cpu", dtype))
    alone, beside = (Server(decoder, block_size=5, num_blocks=12) for _ in range(2))
    for token in PROMPT:
        alone.step([(0, [token])])
    beside.step([(1, PROMPT[:7]), (0, PROMPT[:5])])
    beside.step([(0, PROMPT[5:]), (1, PROMPT[3:9])])
    assert torch.equal(alone.all_logits(0), beside.all_logits(0))


def test_a_scale_of_a_layer_that_was_moved_is_seen(tmp_path: Path) -> None:
    """It is a parameter like others: programs that were recorded before are of another."""
    save_tiny(tmp_path, "gemma4_text")
    decoder = load_decoder(tmp_path, torch.float32)
    before = decoder.changes.count
    decoder.layers[0].scale = torch.nn.Parameter(torch.ones(1))  # type: ignore[union-attr]
    assert decoder.changes.count > before


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_layers_that_take_keys_keep_nothing(kv_dtype: torch.dtype) -> None:
    raw = sizes(
        layer_types=[SLIDING, FULL, SLIDING, FULL], num_hidden_layers=4, num_kv_shared_layers=2
    )
    config = model_config(raw)
    keeping = [bool(spec.token) for spec in config.caches(torch.bfloat16, kv_dtype)]
    assert keeping == [True, True, False, False]
    assert [mixer.kept_by for mixer in config.mixers] == [None, None, 0, 1]  # type: ignore[attr-defined]
    layers = [replace(layer, feed_forward=None, scaled=False) for layer in config.layers]
    names = [{p.name for p in layer.parameters(24)} for layer in layers]
    assert names[0] - names[2] == {
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.k_norm.weight",
    }


@pytest.mark.parametrize("ops", [ReferenceOps(), select_ops("cpu", torch.float32)], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@torch.inference_mode()
def test_one_pool_of_blocks_for_heads_of_two_sizes(
    tmp_path: Path, ops: Ops, kv_dtype: torch.dtype | None
) -> None:
    """As an engine lays them out: what a step answers is what it does with a cache for each layer,
    to the bit; where keys and values are codes, too."""
    save_tiny(tmp_path, "gemma4_text", num_hidden_layers=7, layer_types=None)
    decoder = load_decoder(tmp_path, torch.float32, ops=ops)
    specs = decoder.config.caches(torch.float32, kv_dtype)
    device = torch.device("cpu")
    cache = KVCache(specs, ops, num_blocks=60, block_size=4, device=device)
    order = torch.randperm(60).tolist()
    tables = [[order.pop() for _ in range(4)] for _ in cache.layout.windows]
    assert cache.layout.unequal and len(tables) > 1
    step = StepInputs.build([PROMPT], [0], tables[:1], 4, others=[[each] for each in tables[1:]])
    past = PagedPast(ops, cache.layers, cache.groups, step, 4, cache.states)
    found, _ = decoder(step.input_ids, step.positions, past)
    apart = [
        KVCache([spec], ops, num_blocks=60, block_size=4, device=device).layers[0] for spec in specs
    ]
    past = PagedPast(ops, apart, cache.groups, step, 4, cache.states)
    wanted, _ = decoder(step.input_ids, step.positions, past)
    assert torch.equal(found, wanted)
