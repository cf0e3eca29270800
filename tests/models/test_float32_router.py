"""ERNIE's and Hunyuan's routers stay in float32 in a model of any dtype, as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.router import Router
from moebius.ops import Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from ops.levels import LEVELS, bits, level
from oracle import PROMPT, Server, assert_close, save_tiny

BF16 = torch.bfloat16
OPS = [ReferenceOps(), *(level(isa, 2) for isa in LEVELS), CpuOps(2, ordered=True)]


GATES = {"ernie4_5_moe": "mlp.gate.weight", "hunyuan_v1_moe": "mlp.gate.wg.weight"}


@pytest.fixture(scope="module", params=GATES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves a model in bfloat16: all but routers."""
    path: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(path, request.param)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=BF16)
    theirs.save_pretrained(path)
    return path


@pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.name)
@torch.inference_mode()
def test_logits_are_those_of_weights_that_nobody_rounded(directory: Path, ops: Ops) -> None:
    """And a row's bits are its own, alone and among many."""
    decoder = load_decoder(directory, BF16, ops=ops)
    stored = load_file(directory / "model.safetensors")
    found = {name: x for name, x in decoder.named_modules() if isinstance(x, Router)}
    assert len(found) == 2
    for name, router in found.items():
        gate = GATES[decoder.config.model_type]
        theirs = stored[f"model.{name.replace('mlp.router', gate)}"]
        assert theirs.dtype == torch.float32 and not torch.equal(theirs, theirs.bfloat16().float())
        assert torch.equal(router.weight, theirs)
        x = torch.randn(70, theirs.shape[1]).to(BF16)
        logits = router.logits(x)
        exact = x.double() @ theirs.double().t()
        assert_close(logits, exact, 1e-6)
        if isinstance(ops, CpuOps):
            assert torch.equal(bits(router.logits(x[7:8].contiguous())), bits(logits[7:8]))


@torch.inference_mode()
def test_answers_are_within_5_percent_of_theirs(directory: Path) -> None:
    decoder = load_decoder(directory, BF16)
    server = Server(decoder, block_size=4, num_blocks=8)
    server.step([(0, PROMPT)])
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=BF16, experts_implementation="eager"
    )
    gate = GATES[decoder.config.model_type]
    assert theirs.model.layers[1].get_parameter(gate).dtype == torch.float32
    assert_close(server.all_logits(0), theirs(torch.tensor([PROMPT])).logits[0].float(), 5e-2)


def test_what_is_mapped(directory: Path) -> None:
    plan = open_checkpoint(directory).plan_weights("bfloat16", formats=CpuOps(1).formats(BF16))
    routers = [row for row in plan if row.name.endswith("router.weight")]
    assert len(routers) == 2
    assert all(row.mapped and row.format == "float32" for row in routers)
