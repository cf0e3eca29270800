"""A prepared weight is what its parameter is now: moved, replaced, freed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.ops.cpu import CpuOps
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from tiny import write_model

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_model(made)
    return made


@torch.inference_mode()
def logits(decoder: Decoder) -> Tensor:
    past = PackedPast(len(IDS))
    return decoder.logits(decoder(IDS, torch.arange(len(IDS)), past)[0])


def replaced(decoder: Decoder) -> None:
    for module in decoder.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                module.register_parameter(name, nn.Parameter(old * 1.5, requires_grad=False))


def assigned(decoder: Decoder) -> None:
    state = {name: value * 0.5 for name, value in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)
    decoder.requires_grad_(False)


def narrowed(decoder: Decoder) -> None:
    decoder.to(torch.bfloat16)


@pytest.mark.parametrize("change", [narrowed, replaced, assigned])
@pytest.mark.parametrize("backend", [lambda: CpuOps(1), ReferenceOps], ids=["kernels", "reference"])
def test_weights_that_changed_after_a_first_forward_are_the_ones_that_count(
    directory: Path, backend: Callable[[], Ops], change: Callable[[Decoder], None]
) -> None:
    used, fresh = (load_decoder(directory, torch.float32, ops=backend()) for _ in range(2))
    before = logits(used)
    change(used)
    change(fresh)
    after = logits(used)
    assert torch.equal(after, logits(fresh))
    assert not torch.equal(after, before)
