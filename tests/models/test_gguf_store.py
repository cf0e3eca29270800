"""A GGUF file's tensors: read where they lie, in whatever layout, by whoever holds a part of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from models.gguf_writing import Converter, TypeOf, plain
from models.test_gguf import PROMPT
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import ConfigError, WeightsError
from moebius.gguf import open_gguf
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import FORMATS
from moebius.ops.reference import ReferenceOps
from oracle import Server, save_tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32}


class ReadsAll(ReferenceOps):
    """A backend that is meant to read every format in place."""

    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        return frozenset(FORMATS)


def blocks(place: str) -> Type:
    return Type.Q4_1 if "down" in place else Type.Q8_0


def saved(directory: Path, type_of: TypeOf = blocks, **changes: Any) -> Path:
    save_tiny(directory, "qwen3_moe", **{**SIZES, **changes})
    path = directory / "tiny.gguf"
    Converter(directory, type_of).save(path)
    return path


@torch.no_grad()
def logits(path: Path) -> Tensor:
    server = Server(load_decoder(path, torch.float32, ops=ReadsAll()), block_size=8, num_blocks=4)
    server.step([(0, PROMPT)])
    return server.all_logits(0)


def held_by(module: nn.Module) -> list[Tensor]:
    """All tensors that a decoder's matrices lie in."""
    found: list[Tensor] = []
    for each in module.modules():
        weights = [each.held()] if isinstance(each, Weighted) else []
        weights += each.held() if isinstance(each, WeightList) else []
        for weight in weights:
            found += [weight] if isinstance(weight, Tensor) else weight.planes
    return found


def test_all_matrices_are_where_the_file_is_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = open_checkpoint(path)
    decoder = load_decoder(checkpoint, torch.float32, ops=ReadsAll())
    maps = [
        [int(edge, 16) for edge in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    matrices = held_by(decoder)
    assert len(matrices) == sum(len(source.shape) == 2 for source in checkpoint.sources)
    for tensor in matrices:
        assert any(start <= tensor.data_ptr() < stop for start, stop in maps)
    plan = checkpoint.plan_weights("float32", formats=ReadsAll().formats(torch.float32))
    assert {weight.format for weight in plan} == {"q8_0", "q4_1", "float32"}
    assert all(weight.mapped for weight in plan)
    stored = sum(tensor.stop - tensor.start for tensor in checkpoint.tensors.values())
    assert sum(weight.nbytes for weight in plan) == stored


def test_a_split_model_answers_as_the_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole", plain)
    (tmp_path / "parts").mkdir()
    whole = open_gguf(path)
    writer = gguf.GGUFWriter(tmp_path / "parts" / "m.gguf", "qwen3moe", split_max_tensors=9)
    for key, value in whole.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in whole.tensors.items():
        content = path.read_bytes()[tensor.start : tensor.stop]
        writer.add_tensor(name, np.frombuffer(content, np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    assert torch.equal(logits(parts[0]), logits(path))
    assert torch.equal(logits(parts[1]), logits(path))


class Rewritten(Converter):
    """Experts as other files have them."""

    def __init__(self, directory: Path, how: str) -> None:
        super().__init__(directory)
        self.how = how

    def stacked(self) -> dict[str, Tensor]:
        found = super().stacked()
        for name in [name for name in found if ".experts.gate_proj" in name]:
            up = name.replace("gate_proj", "up_proj")
            down = name.replace("gate_proj", "down_proj")
            if self.how == "fused":
                found[name] = torch.cat([found[name], found.pop(up)], dim=1)
                continue
            for each in (name, up, down):
                for expert, part in enumerate(found.pop(each)):
                    found[each.replace(".experts.", f".experts.{expert}.")] = part
        return found

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        number = re.search(r"layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.)?(gate|up|down)_proj", name)
        if number is None or (self.how == "fused" and number[3] == "down"):
            return super().parts(name, tensor)
        if self.how == "fused":
            return [(tensor, f"blk.{number[1]}.ffn_gate_up_exps.weight")]
        return [(tensor, f"blk.{number[1]}.ffn_{number[3]}.{number[2]}.weight")]

    def put_back(self, name: str, numbers: Tensor) -> None:
        pass


@pytest.mark.parametrize("how", ["fused", "apart"])
def test_experts_may_be_stored_otherwise(tmp_path: Path, how: str) -> None:
    path = saved(tmp_path, plain)
    Rewritten(tmp_path, how).save(tmp_path / "other.gguf")
    assert len(open_gguf(path).tensors) != len(open_gguf(tmp_path / "other.gguf").tensors)
    assert torch.equal(logits(tmp_path / "other.gguf"), logits(path))


def test_the_fingerprint_is_of_keys_and_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    name = fingerprint(open_checkpoint(path))
    content = bytearray(path.read_bytes())
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    copy.write_bytes(content)
    assert fingerprint(open_checkpoint(copy)) == name
    tensor = open_gguf(path).tensors["blk.0.attn_q.weight"]
    content[tensor.start + 5] ^= 1
    copy.write_bytes(content)
    assert fingerprint(open_checkpoint(copy)) != name
    content[tensor.start + 5] ^= 1
    place = content.index(b"qwen3moe.rope.freq_base") + len("qwen3moe.rope.freq_base") + 4
    content[place] ^= 1
    copy.write_bytes(content)
    assert fingerprint(open_checkpoint(copy)) != name


def test_what_is_computed_in(tmp_path: Path) -> None:
    """The type of most numbers, whose norms and routers are F32 in any file."""
    kinds = {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16", Type.Q8_0: "bfloat16"}
    for kind, dtype in kinds.items():
        path = saved(tmp_path / dtype / kind.name, lambda _, kind=kind: kind)
        assert open_checkpoint(path).dtype == dtype


def test_types_that_nobody_reads_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, blocks, moe_intermediate_size=256)
    content = bytearray(path.read_bytes())
    # Q4_1 and I8 are of other sizes, TQ1_0 and IQ1_M of this many bytes are not written: a vector
    # of F32 that says to be of I32 is as long as before.
    place = content.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4 + 8
    assert content[place : place + 4] == b"\0\0\0\0"
    content[place] = Type.I32
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"'blk\.0\.attn_norm\.weight' has dtype I32; supported are F32, F16"
    ):
        open_checkpoint(path)


def test_tensors_that_do_not_belong_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    converter = Converter(tmp_path)
    extra = converter.tensors.pop("model.layers.1.mlp.up_proj.weight")
    converter.save(tmp_path / "missing.gguf")
    with pytest.raises(
        WeightsError, match=r"missing\.gguf: tensor 'blk\.1\.ffn_up\.weight' is missing"
    ):
        open_checkpoint(tmp_path / "missing.gguf")
    converter.tensors["model.layers.1.mlp.up_proj.weight"] = extra[:-1]
    converter.save(tmp_path / "small.gguf")
    with pytest.raises(
        WeightsError, match=r"has shape \[19, 24\]; the file's head needs \[20, 24\]"
    ):
        open_checkpoint(tmp_path / "small.gguf")


def test_ranks_hold_parts_of_stacked_experts(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = EngineConfig(ranks=2, max_num_seqs=2, kv_cache_memory_bytes=2**20)
    prepared = prepare(path, config)
    held = [weight.name for weight in prepared.weights if ".experts." in weight.name]
    every = [s.parameter for s in prepared.checkpoint.sources if s.expert is not None]
    assert len(every) * 0.3 < len(held) < len(every) * 0.7
    with pytest.raises(ConfigError, match="no experts"):
        save_tiny(tmp_path / "dense", "llama")
        Converter(tmp_path / "dense").save(tmp_path / "dense.gguf")
        prepare(tmp_path / "dense.gguf", replace(config))
