"""Models as GGUF files: read back by gguf-py, and by ourselves to transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from covering import chosen
from moebius.cli.commands import app
from moebius.errors import ConfigError, TokenizerError
from moebius.models.family import family
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.ops.reference import ReferenceOps
from moebius.quantize.export import write_model
from moebius.quantize.rows import Rows
from oracle import FAMILY, assert_close, load_theirs, save_tiny
from tiny import write_tokenizer

IDS = torch.arange(3, 43)


def saved(directory: Path, model_type: str, **changes: object) -> Path:
    """A tiny model of a family with a tokenizer beside it."""
    directory.mkdir(exist_ok=True)
    save_tiny(directory, model_type, vocab_size=320, **changes)
    write_tokenizer(directory)
    return directory


def ours(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        decoder = load_decoder(open_checkpoint(path), torch.float32, ops=ReferenceOps())
        hidden, _ = decoder(IDS, torch.arange(len(IDS)), PackedPast(len(IDS)))
        return decoder.logits(hidden)


# Dense, with biases, routed, shared experts, latents, windows, sinks, and layers that recur: every
# run has one family of each. How each is read, tests/models/test_gguf_config.py shows.
KINDS = {
    "qwen2",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gemma4_text",
    "gpt_oss",
    "qwen3_next",
    "nemotron_h",
    "lfm2_moe",
}


@pytest.mark.parametrize(
    "model_type",
    chosen([kind for kind in FAMILY if family(kind).gguf], lambda name: name in KINDS),
)
def test_every_family_comes_back(tmp_path: Path, model_type: str) -> None:
    """As f32, to the logits of transformers."""
    model = saved(tmp_path / "model", model_type)
    out = tmp_path / "out.gguf"
    write_model(model, out, "f32")
    with torch.inference_mode():
        theirs = load_theirs(model)(IDS[None]).logits[0]
    assert_close(ours(out), theirs)


def test_names_keys_and_order_of_rows_are_llama_cpps(tmp_path: Path) -> None:
    """Of a llama, by hand: gguf-py's own writer is asked for nothing."""
    model = saved(
        tmp_path / "model", "llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    )
    out = tmp_path / "out.gguf"
    written = write_model(model, out, "f32", name="tiny")
    reader = gguf.GGUFReader(out)

    def key(name: str) -> object:
        return reader.fields[name].contents()

    assert key("general.architecture") == "llama"
    assert key("general.name") == "tiny"
    assert key("llama.block_count") == 2
    assert key("llama.embedding_length") == 32
    assert key("llama.attention.head_count_kv") == 2
    assert key("tokenizer.ggml.model") == "gpt2"
    assert key("tokenizer.ggml.pre") == "gpt-2"
    tokens = key("tokenizer.ggml.tokens")
    assert isinstance(tokens, list) and len(tokens) == 320 and tokens[0] == "<|endoftext|>"
    assert key("tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]  # type: ignore[index]
    assert key("tokenizer.ggml.eos_token_id") == 0
    assert key("tokenizer.ggml.eot_token_id") == 2
    assert key("tokenizer.ggml.add_bos_token") is False
    assert "<|im_start|>" in str(key("tokenizer.chat_template"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = load_file(model / "model.safetensors")
    gate = stored["model.layers.1.mlp.gate_proj.weight"]
    assert np.array_equal(tensors["blk.1.ffn_gate.weight"].data, gate.numpy())
    # Of each head of 8, rows 0 to 3 and 4 to 7 turn together: 0, 4, 1, 5 and so on.
    order = [8 * head + row for head in range(4) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    q = stored["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, q[order].numpy())
    assert written.nbytes == out.stat().st_size
    assert written.total.parameters == sum(tensor.numel() for tensor in stored.values())
    assert written.bits == 32


def test_experts_are_one_tensor(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "qwen3_moe")
    out = tmp_path / "out.gguf"
    write_model(model, out, "bf16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    stored = load_file(model / "model.safetensors")
    down = torch.stack(
        [stored[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(5)]
    )
    found = tensors["blk.0.ffn_down_exps.weight"]
    assert list(found.shape) == [14, 24, 5]
    assert found.tensor_type == gguf.GGMLQuantizationType.BF16
    wanted = down.bfloat16().float().numpy()
    assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), wanted)
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_quantised_tensors_are_gguf_pys_numbers(tmp_path: Path) -> None:
    """Q8_0 of a model whose rows are blocks of 32, byte for byte."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    model = saved(tmp_path / "model", "qwen3", **sizes)
    out = tmp_path / "out.gguf"
    write_model(model, out, "q8_0")
    stored = load_file(model / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    found = tensors["blk.1.ffn_up.weight"]
    wanted = gguf.quants.quantize(
        stored["model.layers.1.mlp.up_proj.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0
    )
    assert np.array_equal(found.data, wanted)


def test_a_gguf_file_becomes_another(tmp_path: Path) -> None:
    """Through f32 or not, the same tensors; keys are handed on, rows stay where they are."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    model = saved(tmp_path / "model", "llama", **sizes, rope_scaling=scaling)
    write_model(model, tmp_path / "f32.gguf", "f32", name="one")
    write_model(tmp_path / "f32.gguf", tmp_path / "again.gguf", "q8_0", name="one")
    write_model(model, tmp_path / "direct.gguf", "q8_0", name="one")
    again = gguf.GGUFReader(tmp_path / "again.gguf")
    direct = gguf.GGUFReader(tmp_path / "direct.gguf")
    contents = {name: field.contents() for name, field in direct.fields.items()}
    for name, content in contents.items():
        if not name.startswith("GGUF."):
            assert again.fields[name].contents() == content, name
    one = {tensor.name: tensor for tensor in again.tensors}
    assert "rope_freqs.weight" in one
    for tensor in direct.tensors:
        assert np.array_equal(one[tensor.name].data, tensor.data), tensor.name


def test_the_command_writes_and_sums_up(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "qwen3_moe")
    out = tmp_path / "out.gguf"
    asked = ["quantize", str(model), str(out), "--type", "Q8_0"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert f"{out.stat().st_size:,} bytes" in told.output
    again = CliRunner().invoke(app, asked)
    assert again.exit_code != 0
    assert "--force" in str(again.exception)
    assert CliRunner().invoke(app, [*asked, "--force"]).exit_code == 0


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama")
    other = tmp_path / "notes.gguf"
    other.write_text("no GGUF file at all")
    with pytest.raises(ConfigError, match="something else"):
        write_model(model, other, "f32", force=True)
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        write_model(model, tmp_path / "out.bin", "f32")
    with pytest.raises(ConfigError, match="no quantization 'q4'"):
        write_model(model, tmp_path / "out.gguf", "q4")
    assert other.read_text() == "no GGUF file at all"
    assert not (tmp_path / "out.gguf").exists()


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "llama")
    file = model / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ],
    }  # fmt: skip
    file.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=r"has no name in GGUF files; .*--quantization"):
        write_model(model, tmp_path / "out.gguf", "f32")
    assert not (tmp_path / "out.gguf").exists()


def test_what_is_more_than_is_stored_is_written_so(tmp_path: Path) -> None:
    """As of norms that are stored less 1."""
    saved(tmp_path / "model", "qwen3")
    checkpoint = open_checkpoint(tmp_path / "model")
    stored = checkpoint.tensors["model.norm.weight"]
    [source] = [each for each in checkpoint.sources if each.name == stored.name]
    with Rows(1) as rows:
        pieces = b"".join(rows.of(source._replace(added=1.0), stored, "float32"))
    norm = load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"]
    assert np.array_equal(np.frombuffer(pieces, np.float32), (norm + 1).numpy())
