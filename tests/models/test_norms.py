"""Norms whose weights stay float32, and zero-centred ones: how they are held and planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moebius.errors import ConfigError
from moebius.models.layout import Layout, sources
from moebius.models.store import Checkpoint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.spec import Norm
from moebius.ops.reference import ReferenceOps
from oracle import save_tiny, saved_tiny

BF16, F32 = torch.bfloat16, torch.float32
DTYPES = {"bfloat16": BF16, "float32": F32}


def opened(
    directory: Path, norm: Norm, dtype: torch.dtype, layout: Layout | None = None
) -> Checkpoint:
    """A Qwen3, which has norms of heads too, as if its norms were of this kind."""
    saved_tiny(directory, "qwen3").to(dtype).save_pretrained(directory)
    checkpoint = open_checkpoint(directory)
    config = replace(checkpoint.config, norm=norm)
    return replace(checkpoint, config=config, sources=tuple(sources(config, layout or Layout())))


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("stored", [BF16, F32], ids=str)
@pytest.mark.parametrize("norm", ["float32", "zero-centred"])
def test_weights_of_norms_are_float32(
    tmp_path: Path, norm: Norm, stored: torch.dtype, near: bool
) -> None:
    """All of them, and nothing else; zero-centred ones are 1 more than what is stored, to the last
    bit, in copies that the plan counts."""
    checkpoint = opened(tmp_path, norm, stored)
    decoder = load_decoder(checkpoint, BF16, ops=ReferenceOps())
    tensors = load_file(tmp_path / "model.safetensors")
    added = 1.0 if norm == "zero-centred" else 0.0
    norms = 0
    plan = checkpoint.plan_weights("bfloat16", near=near)
    parameters = dict(decoder.named_parameters())
    for source, row in zip(checkpoint.sources, plan, strict=True):
        parameter = parameters[source.parameter]
        if "norm" not in source.parameter:
            assert parameter.dtype == BF16
            continue
        norms += 1
        assert parameter.dtype == F32
        assert torch.equal(parameter, tensors[source.name].float() + added)
        as_it_lies = stored == F32 and not added
        assert (row.mapped, row.near) == (as_it_lies and not near, as_it_lies and near)
        assert (row.format, row.nbytes) == ("float32", 4 * parameter.numel())
    assert norms == 2 * 4 + 1
    assert decoder.dtype == BF16


def test_files_that_hold_the_sum_are_read_as_they_are(tmp_path: Path) -> None:
    """As GGUF files do."""
    checkpoint = opened(tmp_path, "zero-centred", F32, Layout(centred=False))
    decoder = load_decoder(checkpoint, BF16, ops=ReferenceOps())
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(decoder.norm.weight, stored)
    plan = {row.name: row for row in checkpoint.plan_weights("bfloat16")}
    assert plan["norm.weight"].mapped


def test_training_adds_it_too(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "zero-centred", F32)
    decoder = load_decoder(checkpoint, F32, ops=ReferenceOps(), mapped=False)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(decoder.norm.weight, stored + 1) and decoder.norm.weight.requires_grad


def test_there_are_no_other_kinds(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    with pytest.raises(ConfigError, match="norm is 'layer'; it must be one of"):
        replace(open_checkpoint(tmp_path).config, norm="layer")  # type: ignore[arg-type]
