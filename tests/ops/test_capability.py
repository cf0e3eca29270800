"""What a backend declares holds: what it lacks is left to another openly, and claims nothing."""

from __future__ import annotations

import pytest
import torch

from moebius.ops import Operation, Use
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from ops.levels import ROUNDOFF


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_each_operation_says_how_it_is_computed(ops: CpuOps, dtype: torch.dtype) -> None:
    for operation in Operation:
        plain = ops.capability(Use(operation, dtype))
        assert plain is not None
        assert plain.batch_invariant == (plain.by == ops.name), operation
        reference = ReferenceOps().capability(Use(operation, dtype))
        assert not reference.batch_invariant and not reference.recorded


def test_what_the_reference_computes_for_the_kernels_claims_nothing(ops: CpuOps) -> None:
    use = Use(Operation.ROTARY, torch.float32)
    found = ops.capability(use)
    assert found is not None and found.by == "reference" and not found.batch_invariant
    assert not ops.batch_invariant([Use(Operation.LINEAR, torch.float32), use])
    assert ops.batch_invariant([Use(Operation.LINEAR, torch.float32)])


def test_a_dtype_without_kernels_is_not_there(ops: CpuOps) -> None:
    assert ops.capability(Use(Operation.LINEAR, torch.float64)) is None
    assert not ops.batch_invariant([Use(Operation.LINEAR, torch.float64)])


def test_what_is_computed_in_float32_alone_is_refused_in_words(ops: CpuOps) -> None:
    x = torch.ones(2, 4).bfloat16()
    for call in (
        lambda: ops.softcap(x, 1.0),
        lambda: ops.divide(x, 2.0),
        lambda: ops.route(x, RouterConfig(4, 2)),
        lambda: ops.argmax(x),
    ):
        with pytest.raises(ValueError, match=r"want torch.float32 here, not torch.bfloat16"):
            call()


def test_handles_of_another_backend_are_refused(ops: CpuOps) -> None:
    x = torch.ones(2, 4)
    reference = ReferenceOps()
    layer = (torch.ones(3, 4), None)
    with pytest.raises(TypeError, match="ReferenceLinear was made by another backend"):
        ops.linear(x, reference.prepare_linear(layer))
    with pytest.raises(TypeError, match="CpuLinear was made by another backend"):
        reference.linear(x, ops.prepare_linear(layer))


def test_every_operation_is_implemented_on_its_own() -> None:
    """Neither backend is the other's base, and the interface computes nothing."""
    assert not issubclass(CpuOps, ReferenceOps)
    for operation in set(Operation) - {Operation.SAMPLING}:
        assert getattr(getattr(Ops, operation), "__isabstractmethod__", False), operation
