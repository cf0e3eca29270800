"""T5's GGUF files, which hold an encoder and a decoder: beside transformers on the same numbers, and
what is refused of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from covering import each_value
from models.gguf_t5 import T5Converter, tokenizer_keys
from models.gguf_writing import TypeOf, plain
from models.test_encoder_decoder import PROMPT
from moebius import LLM, SamplingParams
from moebius.errors import ConfigError, WeightsError
from moebius.files import read_json
from moebius.gguf import open_gguf
from moebius.models.description import describe
from moebius.models.family import model_config
from moebius.models.gguf_keys import gguf_keys
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from moebius.quantize.export import write_model
from oracle import assert_close
from tiny_t5 import Reader, answers, load, save, write_tokenizer

OPS = [ReferenceOps(), select_ops("cpu", torch.float32)]
# llama.cpp takes it for granted.
DISTANCE = {"relative_attention_max_distance": 128}
GATED: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES: dict[str, dict[str, Any]] = {
    "first": {},
    "unlike-stacks": {"num_layers": 1, "num_decoder_layers": 3, "d_kv": 8, "num_heads": 5},
    "deep-encoder": {"num_layers": 3, "num_decoder_layers": 1, "decoder_start_token_id": 4},
    "1.1": {**GATED, "num_decoder_layers": 3},
    "published-distances": {"relative_attention_num_buckets": 32},
}

Change = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the first version."""
    directory = tmp_path_factory.mktemp("first")
    save(directory, "t5", **DISTANCE)
    return directory


def written(
    directory: Path, type_of: TypeOf = plain, change: Change | None = None, **changes: Any
) -> Path:
    """A tiny model's file; the directory beside it holds the same numbers."""
    save(directory, "t5", **DISTANCE, **changes)
    if changes.get("feed_forward_proj") == "gated-gelu":
        with_head(directory)
    path = directory / "tiny.gguf"
    T5Converter(directory, type_of).save(path, change)
    return path


def with_head(directory: Path) -> None:
    """As version 1.1 has it: a head that is not the embedding."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    tensors["lm_head.weight"] = torch.randn(tensors["shared.weight"].shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_same(path: Path, directory: Path, ops: Ops, tolerance: float = 1e-4) -> None:
    theirs = load(directory)
    start = theirs.config.decoder_start_token_id
    reader = Reader(load_decoder(path, torch.float32, ops=ops), start=start)
    for sequence, prompt in enumerate((PROMPT, [9], PROMPT[::-1] * 7)):
        expected, logits = answers(theirs, prompt, 5, start)
        found, ours = reader.answer(sequence, prompt, 5)
        assert found == expected
        assert_close(ours, logits, tolerance)


@pytest.mark.parametrize(
    ("case", "ops"), each_value(CASES, OPS), ids=lambda value: getattr(value, "name", value)
)
def test_it_answers_as_the_original(case: str, ops: Ops, tmp_path: Path) -> None:
    """Logits, so that those of the first version are divided, which probabilities show alike."""
    path = written(tmp_path, **CASES[case])
    assert_same(path, tmp_path, ops)
    again = tmp_path / "again.gguf"
    write_model(path, again, "f32")
    assert_same(again, tmp_path, ops)


def test_a_head_that_is_the_embedding_again_is_the_embedding(tmp_path: Path) -> None:
    """As older checkpoints have it; what follows from gates does not change by that."""

    def copied(writer: gguf.GGUFWriter) -> None:
        shared = load_file(tmp_path / "model.safetensors")["shared.weight"]
        writer.add_tensor("output.weight", shared.numpy())
        writer.add_tensor("dec.blk.0.cross_attn_rel_b.weight", np.ones((8, 3), dtype=np.float32))

    path = written(tmp_path, change=copied)
    assert open_checkpoint(path).config.tie_word_embeddings
    assert_same(path, tmp_path, OPS[1])


def test_a_file_alone_is_served(tmp_path: Path) -> None:
    """Its tokenizer, the end behind a prompt, and the token that a decoder begins with come from
    its keys: answers are those of the directory, which has them in other files."""
    write_tokenizer(tmp_path)
    path = written(tmp_path, change=tokenizer_keys(tmp_path), decoder_start_token_id=4)
    prompts = ["The man walks in a park", "a dog"]
    params = SamplingParams(temperature=0, max_tokens=12)
    found = []
    for model in (path, tmp_path):
        with LLM(str(model), kv_cache_memory_bytes=2**21, dtype="float32") as llm:
            found.append(
                [
                    (each.prompt_token_ids, each.outputs[0].token_ids, each.outputs[0].text)
                    for each in llm.generate(prompts, params)
                ]
            )
    assert found[0] == found[1]
    assert found[0][0][0][-1] == 1 and found[0][0][2] != found[0][1][2]


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.BF16], ids=lambda kind: kind.name)
def test_matrices_may_be_in_blocks(kind: Type, tmp_path: Path) -> None:
    """All but biases by distance, as llama.cpp's tool leaves them."""
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_heads": 2}
    path = written(tmp_path, lambda place: Type.F16 if "rel_b" in place else kind, **sizes)
    stored = {tensor.type.name for tensor in open_gguf(path).tensors.values()}
    assert stored == {"F32", "F16", kind.name}
    assert_same(path, tmp_path, OPS[0])


@pytest.mark.parametrize("case", CASES)
def test_keys_and_configuration_say_the_same(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, **CASES[case])
    config_json = read_json(tmp_path / "config.json")
    theirs = model_config(config_json)
    ours = describe(path).config
    assert ours.norm_eps == pytest.approx(theirs.norm_eps)
    assert ours.layers == theirs.layers
    assert (ours.start_id, ours.encoder_layers) == (theirs.start_id, theirs.encoder_layers)
    assert ours.logits_divisor == theirs.logits_divisor
    metadata = open_gguf(path).metadata
    ours_written = gguf_keys(config_json).keys
    for key, value in metadata.items():
        if key.startswith("t5.") and not key.endswith("context_length"):
            assert ours_written[key] == pytest.approx(value), key


T = gguf.GGUFValueType
REFUSED: list[tuple[str, Any, T, str]] = [
    ("t5.block_count", 2**31, T.UINT32, "block_count is 2147483648, in a file of"),
    ("t5.decoder_block_count", 2**31, T.UINT32, "decoder_block_count is 2147483648, in a file of"),
    ("t5.decoder_block_count", "two", T.STRING, "decoder_block_count is 'two'; it must be an integer"),
    ("t5.attention.relative_buckets_count", 10, T.UINT32, "must be a multiple of 4"),
    ("t5.attention.value_length", 12, T.UINT32, "attention.value_length is 12"),
    ("t5.attention.head_count_kv", 1, T.UINT32, "attention.head_count_kv is 1, where num_heads is 3"),
    ("t5.attention.layer_norm_epsilon", 0.5, T.FLOAT32, "attention.layer_norm_epsilon is 0.5"),
    ("t5.decoder_start_token_id", 67, T.UINT32, "the vocabulary has no such token"),
    ("t5.expert_count", 4, T.UINT32, "expert_count is 4, but there is no router"),
    ("t5.attention.scale", 0.5, T.FLOAT32, "attention.scale = 0.5 is not supported"),
    ("general.architecture", "t5encoder", T.STRING, "'t5encoder' is not supported: an encoder alone"),
    ("general.architecture", "umt5", T.STRING, "'umt5' is not supported: each of its blocks has biases"),
    ("general.architecture", "switch_transformers", T.STRING, "'switch_transformers' is not supported"),
]  # fmt: skip


def setting(key: str, value: Any, kind: T) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        for keys in writer.kv_data:
            keys.pop(key, None)
        writer.add_key_value(key, value, kind)

    return change


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"), REFUSED, ids=[f"{key}={value}" for key, value, *_ in REFUSED]
)
def test_what_would_change_the_answer_is_refused(
    first: Path, key: str, value: Any, kind: T, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "changed.gguf"
    T5Converter(first, plain).save(path, setting(key, value, kind))
    with pytest.raises(ConfigError) as caught:
        describe(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_a_decoders_depth_has_one_as_deep_as_the_encoder(tmp_path: Path) -> None:
    def without(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("t5.decoder_block_count")
        writer.kv_data[0].pop("t5.decoder_start_token_id")

    assert_same(written(tmp_path, change=without), tmp_path, OPS[1])


def test_biases_of_every_block_are_anothers(tmp_path: Path) -> None:
    """UMT5's files, which go by T5's name."""

    def beside(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("enc.blk.1.attn_rel_b.weight", np.zeros((8, 3), dtype=np.float32))

    path = written(tmp_path, change=beside)
    with pytest.raises(WeightsError, match=r"'enc\.blk\.1\.attn_rel_b\.weight' is left over"):
        open_checkpoint(path)


def test_gates_in_some_blocks_alone_are_refused(tmp_path: Path) -> None:
    def beside(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("dec.blk.1.ffn_gate.weight", np.zeros((20, 24), dtype=np.float32))

    path = written(tmp_path, change=beside)
    with pytest.raises(WeightsError, match=r"'dec\.blk\.1\.ffn_gate\.weight' is left over"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_proj": "gated-silu"}, "with gates whose activation is 'silu'"),
        ({"feed_forward_proj": "gated-gelu"}, "logits that are divided are none of the two"),
        ({"feed_forward_proj": "gelu"}, "without gates whose activation is 'gelu'"),
        ({"tie_word_embeddings": False}, "logits that are not divided are none of the two"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance is 64"),
    ],
)
def test_what_files_cannot_say_is_not_written(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save(tmp_path, "t5", **{**DISTANCE, **changes})
    with pytest.raises(ConfigError, match=words):
        gguf_keys(read_json(tmp_path / "config.json"))
