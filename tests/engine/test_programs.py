"""Recorded steps compute with what a model's parameters are now, whatever part was given others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from covering import rest
from engine.test_one_answer import KINDS
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.ops.steps import StepInputs
from ops.levels import bits
from oracle import FAMILY, save_tiny
from rank_steps import BLOCK_SIZE, runner

cpu = pytest.importorskip("moebius.ops.cpu")
STEP = StepInputs.build([[3, 1, 4, 1]], [0], [[0]], BLOCK_SIZE)


def owners(decoder: Decoder) -> dict[str, nn.Module]:
    """The parts that have parameters of their own, by name."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if any(each is not None for each in module._parameters.values())
    }


def moved(module: nn.Module) -> None:
    """As `.to()` does it."""
    module._apply(lambda tensor: tensor.detach() * 1.5)


def replaced(module: nn.Module) -> None:
    """Each by an assignment, as the last of a part's parameters too."""
    for name, old in list(module._parameters.items()):
        if old is not None:
            setattr(module, name, nn.Parameter(old.detach() * 1.5, requires_grad=False))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change) if name in KINDS and i % 2 == j else rest(name, change)
        for i, name in enumerate(sorted(FAMILY))
        for j, change in enumerate((moved, replaced))
    ],
)
def test_no_part_of_a_model_changes_unnoticed(
    name: str, change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    save_tiny(tmp_path, name)
    decoder = load_decoder(tmp_path, torch.float32, ops=cpu.CpuOps(1))
    for part, module in owners(decoder).items():
        before = decoder.changes.count
        change(module)
        assert decoder.changes.count > before, part


@pytest.mark.parametrize("change", [moved, replaced])
@pytest.mark.parametrize("part", ["norm", "layers.1.self_attn.o_proj", "layers.0.mlp.router"])
def test_a_step_after_a_part_has_changed_is_that_of_a_model_that_always_was_so(
    part: str, change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    save_tiny(tmp_path, "qwen3_moe")

    def decoder() -> Decoder:
        return load_decoder(tmp_path, torch.float32, ops=cpu.CpuOps(1))

    used = runner(decoder())
    before = used.execute(STEP).clone()
    assert not used.programs.step.trace.reason
    always = decoder()
    change(always.get_submodule(part))
    change(used.model.get_submodule(part))
    after = used.execute(STEP).clone()
    assert torch.equal(bits(after), bits(runner(always).execute(STEP)))
    assert not torch.equal(after, before)


def test_what_changes_elsewhere_records_nothing_anew(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    used, other = (
        runner(load_decoder(tmp_path, torch.float32, ops=cpu.CpuOps(1))) for _ in range(2)
    )
    programs = used.programs
    replaced(other.model.norm)
    used.execute(STEP)
    assert used.programs is programs
