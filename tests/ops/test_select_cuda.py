"""Who computes on a CUDA device, which stands here for torch.cuda's answers."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import pytest
import torch

from moebius.engine.devices import choose_device
from moebius.errors import ConfigError
from moebius.ops import select_ops
from moebius.ops.capability import Operation, Use
from moebius.ops.reference import ReferenceOps

pytest.importorskip("triton")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An H100, and what a test makes of it."""
    card: dict[str, Any] = {"capability": (9, 0), "triton": "3.7.1"}
    version = importlib.metadata.version
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.delenv("MOEBIUS_CPU_ISA", raising=False)

    def installed(name: str) -> str:
        if name != "triton":
            return version(name)
        if card["triton"] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(card["triton"])

    monkeypatch.setattr(importlib.metadata, "version", installed)
    return card


def test_kernels_serve_a_card_that_can(card: dict[str, Any]) -> None:
    from moebius.ops.triton.checked import CheckedOps

    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        card["capability"] = capability
        ops = select_ops("cuda", torch.bfloat16)
        assert isinstance(ops, CheckedOps)
        assert ops.name == f"triton-sm_{capability[0]}{capability[1]}"
        linear = ops.capability(Use(Operation.LINEAR, torch.bfloat16))
        assert linear is not None and linear.by == ops.name and not linear.batch_invariant


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"capability": (7, 5)}, "Tesla V100 has compute capability 7.5; kernels need 8.0"),
        ({"triton": None}, "triton is not installed; pip install 'triton>=3.6'"),
        ({"triton": "3.5.1"}, "triton 3.5.1 is too old; pip install 'triton>=3.6'"),
        ({"triton": "2.3"}, "triton 2.3 is too old"),
    ],
    ids=["old card", "no triton", "old triton", "older triton"],
)
def test_what_cannot_is_served_by_plain_pytorch_with_one_line(
    card: dict[str, Any],
    changed: dict[str, Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    card |= changed
    ops = select_ops("cuda", torch.bfloat16)
    assert type(ops) is ReferenceOps
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and said in record.getMessage()
    assert "\n" not in record.getMessage() and record.exc_info is None


def test_plain_pytorch_can_be_asked_for(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")
    assert type(select_ops("cuda", torch.bfloat16)) is ReferenceOps
    assert not caplog.records


def test_a_driver_that_is_too_old_is_named_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=r"driver on your system is too old \(found version 110"):
        choose_device("cuda", ranks=1)
    assert choose_device("auto", ranks=1).type == "cpu"
