"""gpt-oss as its checkpoints are published, in MXFP4 and in bfloat16, and as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import ConfigError, WeightsError
from moebius.files import read_json
from moebius.models.decoder import Decoder
from moebius.models.family import model_config, read_config
from moebius.models.gguf_keys import gguf_keys
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.nn.attention import GQA
from moebius.nn.rope import frequencies
from moebius.ops import Matrix, Ops
from moebius.ops.config import ClampedSwiGLU
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.quantize.cached import Quantized
from moebius.quantize.export import write_model
from oracle import PROMPT, Server, assert_close, assert_same_answers, load_theirs, saved_tiny
from quantised import held
from tiny import write_tokenizer
from tiny_gpt_oss import EXPERTS, PUBLISHED, SIZES, in_mxfp4

F32 = torch.float32
OPS = [ReferenceOps(), CpuOps(1, activations="float")]


def meant(directory: Path) -> dict[str, Tensor]:
    """Each expert's matrices and biases as their parameters have them, by these names."""
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for layer in range(2):
        before = EXPERTS.format(layer)
        ours = before.removeprefix("model.")
        both = tensors[f"{before}gate_up_proj"].transpose(1, 2)
        both_bias = tensors[f"{before}gate_up_proj_bias"]
        down = tensors[f"{before}down_proj"].transpose(1, 2)
        for expert in range(len(both)):
            found[f"{ours}gate_proj.{expert}"] = both[expert, ::2]
            found[f"{ours}up_proj.{expert}"] = both[expert, 1::2]
            found[f"{ours}down_proj.{expert}"] = down[expert]
            found[f"{ours}gate_bias.{expert}"] = both_bias[expert, ::2]
            found[f"{ours}up_bias.{expert}"] = both_bias[expert, 1::2]
            found[f"{ours}down_bias.{expert}"] = tensors[f"{before}down_proj_bias"][expert]
    return found


def assert_holds(decoder: Decoder, wanted: dict[str, Tensor]) -> None:
    weights = held(decoder)
    for name, numbers in wanted.items():
        weight = weights[name]
        wide = weight.widened(F32) if isinstance(weight, Matrix) else weight
        assert torch.equal(wide, numbers), name


@pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.name)
def test_mxfp4_means_what_transformers_makes_of_it(tmp_path: Path, ops: Ops) -> None:
    """All are read where they lie, gate and up too, whose rows take turns there."""
    plain = in_mxfp4(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint, F32, ops=ops)
    assert_holds(decoder, meant(plain))
    assert_same_answers(decoder, plain)
    experts = [
        row
        for row in checkpoint.plan_weights("float32", formats=ops.formats(F32))
        if "_proj." in row.name and ".experts." in row.name
    ]
    assert {row.format for row in experts} == {"mxfp4_planes"}
    assert all(row.mapped and not row.repacked for row in experts)
    assert all(row.nbytes == row.count // 32 * 17 for row in experts)


@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_layers_in_plain_numbers_stand_beside_those_in_mxfp4(
    tmp_path: Path, layers: tuple[int, ...]
) -> None:
    plain = in_mxfp4(tmp_path, layers)
    assert_holds(load_decoder(tmp_path, F32, ops=ReferenceOps()), meant(plain))


def test_square_matrices_are_told_from_their_transposes(tmp_path: Path) -> None:
    """As gpt-oss' down projections are; nothing but the kind of numbers tells which is which."""
    plain = in_mxfp4(tmp_path, intermediate_size=96)
    for directory in (tmp_path, plain):
        decoder = load_decoder(directory, F32, ops=ReferenceOps())
        assert_holds(decoder, meant(plain))
        assert_same_answers(decoder, plain)


@pytest.mark.parametrize("near", [False, True])
def test_ranks_hold_their_own_experts(tmp_path: Path, near: bool) -> None:
    """And get those that come to them."""
    wanted = meant(in_mxfp4(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    ranks = ExpertRank(Placement.linear(checkpoint.config.experts, 2), 0, 8)
    decoder = Decoder(checkpoint.config, ReferenceOps(), F32, "meta", ranks=ranks)
    loader = Loader(checkpoint, torch.device("cpu"), near=near)
    loader.fill(decoder)

    def experts() -> set[str]:
        names = {name for name in held(decoder) if ".experts." in name}
        assert_holds(decoder, {name: wanted[name] for name in names})
        return {name.rsplit(".", 1)[1] for name in names}

    assert experts() == {"0", "1"}
    layers = {layer: LayerPlacement(3, ((0, 2), (1,))) for layer in range(2)}
    loader.move_experts(decoder, loader.bring_experts(decoder, Placement(layers)))
    assert experts() == {"0", "2"}


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    """Within 5 % of the logits' scale; norms and sinks stay float32."""
    model = saved_tiny(tmp_path, "gpt_oss", **SIZES)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, torch.bfloat16, ops=ReferenceOps())
    kept = {name.split(".")[-1] for name, p in decoder.named_parameters() if p.dtype == F32}
    assert kept == {"sinks", "weight"}
    assert all(
        parameter.dtype == (F32 if "norm" in name or "sinks" in name else torch.bfloat16)
        for name, parameter in decoder.named_parameters()
    )
    assert decoder.dtype == torch.bfloat16
    server = Server(decoder, block_size=4, num_blocks=8)
    server.step([(0, PROMPT)])
    with torch.inference_mode():
        theirs = load_theirs(tmp_path)(torch.tensor([PROMPT])).logits[0]
    assert_close(server.all_logits(0), theirs, 5e-2)


@pytest.mark.parametrize("quantised", [False, True])
def test_experts_that_are_quantised_at_the_start(
    tmp_path: Path, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either checkpoint as Q8_0, which gguf-py makes of each matrix alike; all is mapped then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    plain = in_mxfp4(model)
    made = Quantized.of(open_checkpoint(model if quantised else plain), "q8_0")
    made.make()
    ops = ReferenceOps()
    weights = held(load_decoder(made.checkpoint, F32, ops=ops))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, numbers in meant(plain).items():
        weight = weights[name]
        if isinstance(weight, Matrix):
            encoded = gguf.quants.quantize(numbers.contiguous().numpy(), q8_0)
            wanted = torch.from_numpy(gguf.quants.dequantize(encoded, q8_0))
            assert torch.equal(weight.widened(F32), wanted), name
        else:
            assert torch.equal(weight, numbers), name
    plan = made.checkpoint.plan_weights("float32", formats=ops.formats(F32))
    assert all(row.mapped for row in plan)


def converted(blocks: Tensor, scales: Tensor) -> np.ndarray:
    """GGUF's blocks, as llama.cpp's converter makes them: a byte's halves are columns j and
    j + 16 of a block, where they were 2j and 2j + 1."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    both = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((scales.unsqueeze(-1), both), dim=-1).flatten(-2).numpy()


def test_mxfp4_becomes_gguf_as_the_converter_has_it(tmp_path: Path) -> None:
    """Byte for byte; read back, the answers are the same."""
    model = tmp_path / "model"
    plain = in_mxfp4(model, vocab_size=320)
    write_tokenizer(model)
    out = tmp_path / "out.gguf"
    write_model(model, out, "mxfp4")
    reader = gguf.GGUFReader(out)
    found = {tensor.name: tensor for tensor in reader.tensors}
    stored = load_file(model / "model.safetensors")
    for layer in range(2):
        for name, which, rows in (
            ("gate", "gate_up_proj", slice(0, None, 2)),
            ("up", "gate_up_proj", slice(1, None, 2)),
            ("down", "down_proj", slice(None)),
        ):
            theirs = EXPERTS.format(layer) + which
            blocks = stored[f"{theirs}_blocks"][:, rows]
            wanted = converted(blocks, stored[f"{theirs}_scales"][:, rows])
            tensor = found[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
            assert np.array_equal(tensor.data, wanted)
            bias = stored[f"{theirs}_bias"][:, rows].numpy()
            assert np.array_equal(found[f"blk.{layer}.ffn_{name}_exps.bias"].data, bias)
    assert reader.fields["gpt-oss.attention.sliding_window"].contents() == 4
    assert "blk.0.post_attention_norm.weight" in found and "blk.0.attn_sinks.weight" in found
    assert_holds(load_decoder(out, F32, ops=ReferenceOps()), meant(plain))


def test_a_gguf_file_is_mapped_but_for_vectors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    in_mxfp4(model, vocab_size=320, head_dim=16)
    write_tokenizer(model)
    write_model(model, tmp_path / "out.gguf", "mxfp4")
    checkpoint = open_checkpoint(tmp_path / "out.gguf")
    plan = checkpoint.plan_weights("bfloat16", formats=CpuOps(1).formats(torch.bfloat16))
    copied = {row.name for row in plan if not row.mapped}
    assert all("bias" in name or "router" in name for name in copied), copied
    assert not any(row.repacked for row in plan)


def test_what_the_published_configuration_says() -> None:
    config, ignored, assumed, _ = read_config(read_json(PUBLISHED))
    assert ignored == ["experts_per_token", "hidden_act", "initial_context_length"]
    assert "swiglu_alpha" in assumed
    mixers = [mixer for mixer in config.mixers if isinstance(mixer, GQA)]
    assert [mixer.window for mixer in mixers] == [128, None] * 12
    assert all(m.sinks and m.qkv_bias and m.output_bias for m in mixers)
    assert (config.attention.head_dim, config.norm, config.context) == (64, "float32", 131_072)
    (part,) = set(config.feed_forward)
    assert part.activation == ClampedSwiGLU(1.702, 7.0) and part.bias
    rope = mixers[0].rope
    assert rope is not None
    inverse_R, factor = frequencies(rope, 64)
    # 0.1 ln 32 + 1; of 32 pairs the first 8 turn as they did, and those from 18 on 32 times slower.
    assert factor == pytest.approx(1.3465735902799727)
    plain_R = 150_000.0 ** -(torch.arange(32) / 32)
    assert inverse_R[:9] == pytest.approx(plain_R[:9])
    assert inverse_R[18:] == pytest.approx(plain_R[18:] / 32)
    # The range is 8.0927... to 17.3980..., and its ends are not rounded.
    share = (9 - 8.092779115512402) / (17.39802450158856 - 8.092779115512402)
    assert float(inverse_R[9]) == pytest.approx(
        float(plain_R[9]) * (1 - share + share / 32), rel=1e-5
    )


def test_rope_is_yarn_where_nothing_is_said(tmp_path: Path) -> None:
    published = read_json(PUBLISHED)
    silent = {key: value for key, value in published.items() if not key.startswith("rope_")}
    assert model_config(silent) == model_config(published)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swiglu_limit": 0}, "limit is 0"),
        ({"swiglu_alpha": "big"}, "swiglu_alpha is 'big'; it must be a number"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["full_attention"]}, "layer_types must name one of"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types must name one of"),
        ({"num_experts_per_tok": 33}, "top_k .num_experts_per_tok. is 33"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"quantization_config": {"quant_method": "mxfp4", "bits": 3}}, "bits = 3"),
    ],
)
def test_what_is_wrong_is_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_config({**read_json(PUBLISHED), **changes})
    assert "\n" not in str(caught.value)


def lacks_scales(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]


def rows_first(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = tensors.pop(name).transpose(1, 2).contiguous()


def both_forms(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = torch.zeros(3, 160, 96)


@pytest.mark.parametrize(
    ("quantised", "change", "words"),
    [
        (True, lacks_scales, "needs 'model.layers.1.mlp.experts.down_proj_scales' beside it"),
        (True, both_forms, "in plain numbers, and as codes"),
        (False, rows_first, r"has shape \[3, 320, 96\]; config.json needs \[3, 96, 320\]"),
    ],
)
def test_checkpoints_that_contradict_themselves(
    tmp_path: Path, quantised: bool, change: Any, words: str
) -> None:
    plain = in_mxfp4(tmp_path)
    directory = tmp_path if quantised else plain
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 12}, "no sliding window in layer 0"),
        ({"layer_types": ["sliding_attention"] * 24}, "a sliding window in layer 1"),
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 32.0}}, "truncate is true"),
    ],
)  # fmt: skip
def test_what_gguf_files_do_not_say_is_not_written(changes: dict[str, object], words: str) -> None:
    published: dict[str, Any] = json.loads(PUBLISHED.read_text())
    with pytest.raises(ConfigError, match=words):
        gguf_keys({**published, **changes})
