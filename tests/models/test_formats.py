"""Weights as they are stored, in another format than is computed in: the same bits as a copy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import each_value
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.ops import FORMATS, Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from ops.toy_format import Int8, quantised
from oracle import (
    FAMILY,
    ONE_OF_EACH_KIND,
    Server,
    assert_close,
    load_theirs,
    save_tiny,
    saved_tiny,
)

PROMPT = [5, 66, 0, 17, 23, 23, 41, 8]
HALVES = [torch.float16, torch.bfloat16]
KERNELS = CpuOps(2)


def save_as(directory: Path, stored: torch.dtype, model_type: str, **overrides: Any) -> Path:
    """A tiny random checkpoint whose numbers are `stored`; returns its copy in float32."""
    model = saved_tiny(directory, model_type, **overrides).to(stored)
    model.save_pretrained(directory)
    copy = directory / "copy"
    model.float().save_pretrained(copy)
    return copy


def served(decoder: Decoder) -> Tensor:
    """Logits of a prompt, in two chunks, and of a decode step."""
    server = Server(decoder, block_size=4, num_blocks=8)
    for chunk in (PROMPT[:5], PROMPT[5:], [7]):
        server.step([(0, chunk)])
    return server.all_logits(0)


@pytest.mark.parametrize(
    ("model_type", "stored"), each_value(FAMILY, HALVES, among=ONE_OF_EACH_KIND), ids=str
)
def test_served_where_they_lie(tmp_path: Path, model_type: str, stored: torch.dtype) -> None:
    """Against transformers in float32, and bit for bit against a float32 copy of the file."""
    copy = save_as(tmp_path, stored, model_type)
    decoder = load_decoder(tmp_path, torch.float32, ops=KERNELS)
    assert {p.dtype for p in decoder.parameters() if p.ndim == 2} == {stored}
    ours = served(decoder)
    assert torch.equal(ours, served(load_decoder(copy, torch.float32, ops=KERNELS)))
    with torch.inference_mode():
        theirs = load_theirs(tmp_path)(torch.tensor([[*PROMPT, 7]])).logits[0]
    assert_close(ours, theirs)


def test_biases_and_a_tied_head(tmp_path: Path) -> None:
    copy = save_as(
        tmp_path,
        torch.float16,
        "llama",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    ours, theirs = (
        served(load_decoder(path, torch.float32, ops=KERNELS)) for path in (tmp_path, copy)
    )
    assert torch.equal(ours, theirs)


def replaced_by_int8(decoder: Decoder, *, widened: bool) -> Decoder:
    """Every matrix but routers quantised: held as it is, or its numbers as a parameter."""
    for module in decoder.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.ndim != 2 or not hasattr(module, "hold"):
                continue
            matrix = quantised(parameter)
            if widened:
                parameter.data = matrix.widened(torch.float32)
            elif name == "weight":
                module.hold(matrix)
            else:
                module.hold(int(name), matrix)
    return decoder


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, Int8.name, Int8())


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("model_type", ["llama", "granitemoe", "qwen2_moe"])
def test_a_format_of_two_planes_is_one_class(tmp_path: Path, model_type: str) -> None:
    """Codes and scales apart, held by every module that has a matrix, computed by widening."""
    save_tiny(tmp_path, model_type)
    plain, held, wide = (
        load_decoder(tmp_path, torch.float32, ops=ReferenceOps()) for _ in range(3)
    )
    ours = served(replaced_by_int8(held, widened=False))
    assert "embed_tokens.weight" not in dict(held.named_parameters())
    assert torch.equal(ours, served(replaced_by_int8(wide, widened=True)))
    assert not torch.equal(ours, served(plain))


@pytest.mark.usefixtures("int8")
def test_a_backend_without_a_format_says_so_before_it_computes(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    decoder = replaced_by_int8(load_decoder(tmp_path, torch.float32, ops=KERNELS), widened=False)
    with pytest.raises(ValueError, match="read no toy-int8 weights where they compute"):
        served(decoder)


@pytest.mark.parametrize("ops", [KERNELS, ReferenceOps()], ids=lambda ops: ops.name)
def test_a_matrix_of_another_shape_is_refused(tmp_path: Path, ops: Ops) -> None:
    save_tiny(tmp_path, "llama")
    decoder = load_decoder(tmp_path, torch.float32, ops=ops)
    other = quantised(torch.ones(3, 4))
    for hold in (
        decoder.embed_tokens.hold,
        lambda m: decoder.layers[0].mlp.experts.up_proj.hold(0, m),
    ):
        with pytest.raises(ValueError, match=r"a matrix \(3, 4\) where there is a weight"):
            hold(other)


@pytest.mark.usefixtures("int8")
def test_a_matrix_that_was_replaced_or_moved_is_the_one_that_counts(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2_moe")
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    experts = decoder.layers[0].mlp.experts.up_proj
    replaced_by_int8(decoder, widened=False)
    before = served(decoder)
    for hold, old in (
        (decoder.embed_tokens.hold, decoder.embed_tokens.held()),
        (lambda matrix: experts.hold(0, matrix), experts.held()[0]),
    ):
        hold(quantised(2 * old.widened(torch.float32)))
        after = served(decoder)
        assert not torch.equal(after, before)
        before = after
    places = [plane.data_ptr() for plane in decoder.embed_tokens.held().planes]
    decoder._apply(lambda x: x.clone())
    assert places != [plane.data_ptr() for plane in decoder.embed_tokens.held().planes]
    assert torch.equal(served(decoder), before)
    with pytest.raises(ValueError, match="toy-int8 matrix"):
        decoder.to(torch.bfloat16)
