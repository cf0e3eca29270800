"""T5 and Switch Transformers beside transformers, with every odd shape that their keys allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covering import rest
from moebius.errors import ConfigError, WeightsError
from moebius.models.encoder_decoder import EncoderDecoder
from moebius.models.family import read_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.store.save import save_checkpoint
from moebius.moe.router import Routing
from moebius.nn.mixers.source_past import PackedSourcePast
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from oracle import assert_close
from tiny_t5 import EXPERTS, START, TINY, Reader, answers, load, save

SWITCH = "switch_transformers"
OPS = [ReferenceOps(), select_ops("cpu", torch.float32)]
PROMPT = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1, 50, 3, 44, 12, 9, 61, 33, 7, 1]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", SWITCH, {}),
    ("tokens-beyond-capacity", SWITCH, {"expert_capacity": 3, "num_experts": 2}),
    ("capacity-of-one", SWITCH, {"expert_capacity": 1, "num_experts": 3, "num_layers": 3, "num_sparse_encoder_layers": 3}),
    ("all-sparse", SWITCH, {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "router_bias": True}),
    ("none-sparse", SWITCH, {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_layers": 3}),
    ("unlike-stacks", SWITCH, {"num_layers": 4, "num_decoder_layers": 3, "num_sparse_encoder_layers": 2}),
    ("named-steps", SWITCH, {"num_layers": 4, "num_decoder_layers": 3, "encoder_sparse_step": 3, "decoder_sparse_step": 1}),
    ("more-sparse-than-blocks", SWITCH, {"num_sparse_decoder_layers": 5}),
    ("as-deep-by-default", SWITCH, {"num_decoder_layers": None, "d_kv": 8, "num_heads": 5}),
    ("published-distances", SWITCH, {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    ("plain", "t5", {}),
    ("one-block-each", "t5", {"num_layers": 1, "num_decoder_layers": 1}),
    ("1.1", "t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3}),
    ("gated-silu", "t5", {"feed_forward_proj": "gated-silu"}),
    ("gelu", "t5", {"feed_forward_proj": "gelu"}),
    ("said-otherwise", "t5", {"dense_act_fn": "silu", "is_gated_act": True, "scale_decoder_outputs": False}),
]  # fmt: skip


# Every run has each case by our kernels, and the plainest by plain PyTorch too.
BY_BOTH = [(ops, *case) for case in CASES for ops in OPS]


@pytest.mark.parametrize(
    ("ops", "name", "kind", "changes"),
    [case if case[0] is OPS[1] or case[1] == "plain" else rest(*case) for case in BY_BOTH],
    ids=[f"{kind}-{name}-{ops.name}" for ops, name, kind, _ in BY_BOTH],
)
def test_it_answers_as_transformers_does(
    ops: Ops, name: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = save(tmp_path, kind, **changes)
    reader = Reader(load_decoder(tmp_path, torch.float32, ops=ops))
    for sequence, prompt in enumerate((PROMPT, [9], PROMPT[::-1] * 3)):
        expected, logits = answers(theirs, prompt, 5)
        found, ours = reader.answer(sequence, prompt, 5)
        assert found == expected
        assert_close(ours.log_softmax(-1), logits.log_softmax(-1))


@torch.inference_mode()
def test_tokens_are_beyond_capacity_for_real(tmp_path: Path) -> None:
    """Without a capacity the same model answers otherwise: the case above dropped some."""
    theirs = save(tmp_path, SWITCH, expert_capacity=3, num_experts=2)
    _, capped = answers(theirs, PROMPT, 1)
    for block in theirs.encoder.block:
        if hasattr(block.layer[-1].mlp, "router"):
            block.layer[-1].mlp.router.expert_capacity = 64
    _, free = answers(theirs, PROMPT, 1)
    assert (capped - free).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bfloat16_is_as_near_as_its_digits(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = save(tmp_path, SWITCH)
    _, logits = answers(theirs, PROMPT, 1)
    _, ours = Reader(load_decoder(tmp_path, dtype)).answer(0, PROMPT, 1)
    assert_close(ours, logits, tolerance=0.05)


def test_decoders_answer_beside_encoders_that_read(tmp_path: Path) -> None:
    """A step with both, one with an encoder alone, and one of a decoder that gets all at once what
    it has drawn before: the bits of each alone."""
    save(tmp_path, SWITCH, expert_capacity=3)
    decoder = load_decoder(tmp_path, torch.float32)
    tokens, alone = Reader(decoder).answer(0, PROMPT, 6)
    _, other = Reader(decoder).answer(0, [9, 8, 7], 2)
    reader = Reader(decoder, block_size=16)
    rows = reader.step([(0, PROMPT, [START])])
    rows += reader.step([(0, (), tokens[:1]), (1, [9, 8, 7], []), (2, PROMPT[:5], [START])])[:1]
    beside = reader.step([(1, (), [START]), (0, (), tokens[1:2]), (3, PROMPT, [START])])
    rows.append(beside[1])
    assert torch.equal(beside[0][0], other[0])
    assert torch.equal(beside[2][0], alone[0])
    rows += reader.step([(0, (), tokens[2:5])])
    assert torch.equal(torch.cat(rows), alone)
    again = reader.step([(4, PROMPT, [START, *tokens[:5]]), (5, [9, 8, 7], [START])])
    assert torch.equal(again[0], alone) and torch.equal(again[1][0], other[0])


@torch.inference_mode()
def test_documents_in_rows_are_read_one_by_one(tmp_path: Path) -> None:
    """As inspection has them: an encoder reads each, with room of its own for each, and so does the
    decoder."""
    theirs = save(tmp_path, SWITCH, expert_capacity=3, num_experts=2)
    decoder = load_decoder(tmp_path, torch.float32)
    assert isinstance(decoder, EncoderDecoder)
    documents = [PROMPT[:9], PROMPT[9:16], PROMPT]
    ids = torch.tensor([*documents[0], *documents[1], *documents[2][:16]])
    names = torch.tensor([0] * 9 + [1] * 7 + [2] * 16)
    positions = torch.arange(16).repeat(2)
    past = PackedSourcePast(decoder.ops, 16, names)
    hidden, routings = decoder(ids, positions, past)
    found = decoder.logits(hidden)
    assert len([each for each in routings if isinstance(each, Routing)]) == len(decoder.routers)
    theirs.double()  # float32's own error differs from processor to processor
    for name, document in enumerate((documents[0], documents[1], documents[2][:16])):
        given = torch.tensor([document])
        for block in theirs.decoder.block:  # which takes all tokens, as ours does
            if hasattr(block.layer[-1].mlp, "router"):
                block.layer[-1].mlp.router.expert_capacity = 64
        expected = theirs(input_ids=given, decoder_input_ids=given).logits[0]
        assert_close(found[names == name].double(), expected)


def test_a_checkpoint_is_saved_under_its_names(tmp_path: Path) -> None:
    save(tmp_path / "theirs", SWITCH)
    checkpoint = open_checkpoint(tmp_path / "theirs")
    state = load_decoder(checkpoint, torch.float32).state_dict()
    save_checkpoint(state, dict(checkpoint.config_json), tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(theirs)
    _, one = answers(load(tmp_path / "theirs"), PROMPT, 2)
    _, other = answers(load(tmp_path / "ours"), PROMPT, 2)
    assert torch.equal(one, other)


def test_copies_of_the_embedding_are_left_out_and_a_head_that_differs_counts(
    tmp_path: Path,
) -> None:
    save(tmp_path, "t5")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert not tensors.keys() & copies
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    beside = {name: tensors["shared.weight"].clone() for name in copies}
    beside[stray] = torch.zeros(8, 3)
    _, plain = Reader(load_decoder(tmp_path, torch.float32)).answer(0, PROMPT, 1)
    save_file({**tensors, **beside}, file)
    assert open_checkpoint(tmp_path).config.tie_word_embeddings
    _, again = Reader(load_decoder(tmp_path, torch.float32)).answer(0, PROMPT, 1)
    assert torch.equal(plain, again)
    beside["lm_head.weight"] += 1
    save_file({**tensors, **beside}, file)
    assert not open_checkpoint(tmp_path).config.tie_word_embeddings
    beside["encoder.embed_tokens.weight"][3, 4] += 1
    save_file({**tensors, **beside}, file)
    with pytest.raises(
        WeightsError, match=r"'encoder\.embed_tokens\.weight' is not the model's emb"
    ):
        open_checkpoint(tmp_path)


RAW: dict[str, Any] = {**TINY, **EXPERTS, "model_type": SWITCH}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"router_dtype": "bfloat16"}, "router_dtype is 'bfloat16'; supported are float32"),
        ({"expert_capacity": 0}, "expert_capacity is 0"),
        ({"dense_act_fn": "tanh"}, "dense_act_fn is 'tanh'"),
        ({"num_sparse_encoder_layers": -1}, "num_sparse_encoder_layers is -1"),
        ({"decoder_start_token_id": 67}, "decoder_start_token_id is 67; the vocabulary has no"),
        ({"relative_attention_num_buckets": 10}, "must be a multiple of 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"model_type": "t5", "feed_forward_proj": "shared-relu"}, "feed_forward_proj is 'shared-"),
    ],
)
def test_keys_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    raw = {**RAW, **changes}
    if raw["model_type"] == "t5":
        raw = {key: value for key, value in raw.items() if key not in EXPERTS}
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(raw)
    assert "\n" not in str(caught.value)


# Of google/switch-base-8: keys that older versions of transformers wrote and none reads.
PUBLISHED: dict[str, Any] = {
    "model_type": SWITCH,
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "num_experts": 8,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "expert_capacity": 64,
    "router_type": "tokens_masked",
    "router_jitter_noise": 0.01,
    "router_z_loss_coef": 0.001,
    "dropout_rate": 0.0,
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "dense_act_fn": "relu",
    "decoder_start_token_id": 0,
    "n_positions": 512,
    "vocab_size": 32128,
}
SIZES: list[tuple[str, dict[str, Any], float]] = [
    ("switch-base-8", {}, 0.62),
    ("switch-base-256", {"num_experts": 256}, 14.7),
    ("switch-large-128", {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16,
                          "num_experts": 128, "num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12}, 26.0),
    ("switch-xxl-128", {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64,
                        "num_experts": 128, "num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12,
                        "dense_act_fn": "gated-gelu"}, 395.0),
    ("switch-c-2048", {"d_model": 2080, "d_ff": 6144, "num_layers": 15, "num_decoder_layers": 15, "num_heads": 32,
                       "num_experts": 2048, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15,
                       "encoder_sparse_step": 1, "decoder_sparse_step": 1}, 1571.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "billions"), SIZES, ids=[name for name, _, _ in SIZES])
def test_published_sizes_are_read(name: str, changes: dict[str, Any], billions: float) -> None:
    """Every other block of both stacks is sparse, in the largest every one; parameters are as many
    as the names say."""
    reading = read_config({**PUBLISHED, **changes})
    config = reading.config
    blocks = config.encoder_layers
    assert config.num_layers == 3 * blocks and config.context >= 2048 and config.start_id == 0
    step = changes.get("encoder_sparse_step", 2)
    sparse = [i for i in range(blocks) if step == 1 or i % 2 == 1]
    assert list(config.experts) == sparse + [blocks + 2 * i + 1 for i in sparse]
    width = config.hidden_size
    total = config.vocab_size * width
    for layer in config.layers:
        for parameter in layer.parameters(width):
            total += torch.Size(parameter.shape).numel()
    assert total / 1e9 == pytest.approx(billions, rel=0.02)
    assert set(reading.ignored) <= {
        "router_type",
        "n_positions",
        "is_gated_act",
        "feed_forward_proj",
    }


def test_a_config_of_transformers_is_read_as_it_is_written(tmp_path: Path) -> None:
    save(tmp_path, SWITCH)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert read_config(raw).ignored == ["add_router_probs"]
