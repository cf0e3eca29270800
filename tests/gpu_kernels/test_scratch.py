"""What operations allocate is what the plan of memory was told of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_kernels.compiling import launches
from gpu_kernels.conftest import DEVICE
from gpu_kernels.test_attention import Drawn
from moebius.engine.config import EngineConfig
from moebius.engine.step_memory import workspace_bytes
from moebius.models.config import LayerSpec, ModelConfig
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig
from moebius.ops import ExpertWeights
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.config import RouterConfig
from moebius.ops.triton import TritonOps, attention, linear

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(DEVICE == "cuda", reason="nothing is launched here, so as to count alone"),
]

OPS = TritonOps()
ALLOCATING = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.zeros)


class Allocations(TorchDispatchMode):
    """The sizes in bytes of what is allocated within the context, the largest first."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in ALLOCATING:
            self.sizes = sorted([*self.sizes, made.nbytes], reverse=True)
        return made


def attends(drawn: Drawn, **options: Any) -> tuple[list[int], list[str]]:
    """What one call to paged_attention allocates, and the kernels that it launches."""
    with pytest.MonkeyPatch.context() as patch, launches() as seen:
        counted = Allocations()
        call = TritonOps.paged_attention

        def count(*args: Any, **kwargs: Any) -> object:
            with counted:
                return call(*args, **kwargs)

        patch.setattr(TritonOps, "paged_attention", count)
        drawn.attend(OPS, 0.1, **options)
    return counted.sizes, [each.name for each in seen]


def test_parts_of_splits_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, value_size = 32, 128
    spec = key_value_spec(8, 128, torch.bfloat16)
    drawn = Drawn.of([(1100, 1), (700, 2)], (heads, 8, 128, value_size), torch.bfloat16)
    parts = 3 * heads * 3 * (value_size + 2) * 4
    out = 3 * heads * value_size * 2
    sizes, names = attends(drawn)
    assert sum(sizes) == parts + out and "attend_split" in names
    assert parts <= OPS.scratch_bytes(64, spec, 16, 1100) == attention.PARTS_BYTES
    assert OPS.scratch_bytes(64, spec, 16, attention.SPLIT) == 0
    # No more than may be at a time: one tile of up to two rows after the other.
    bound = 2 * heads * 3 * (value_size + 2) * 4
    monkeypatch.setattr(attention, "PARTS_BYTES", bound)
    sizes, names = attends(drawn)
    assert sum(sizes) == bound + out and "attend_split" in names
    monkeypatch.setattr(attention, "PARTS_BYTES", bound - 1)
    sizes, names = attends(drawn)
    assert sum(sizes) == out and set(names) == {"attend_in_order"}


def test_parts_of_sums_are_planned() -> None:
    spec = key_value_spec(8, 128, torch.bfloat16)
    planned = OPS.scratch_bytes(4096, spec, 16, 1)
    for rows, columns in ((1, 4096), (16, 2048), (16, 32_768)):
        layers = OPS.prepare_linear((torch.zeros(4096, columns, dtype=torch.bfloat16), None))
        with launches(), Allocations() as counted:
            OPS.linear(torch.zeros(rows, columns, dtype=torch.bfloat16), layers)
        parts = sum(counted.sizes) - rows * 4096 * 2
        assert 0 < parts <= planned == linear.PARTS_BYTES


def test_sorted_rows_are_within_the_estimate() -> None:
    """Of experts, whose rows the plan counts with what a step's widest moment takes."""
    top_k, width, hidden, tokens = 4, 96, 64, 37
    layer = LayerSpec(
        GQA(1, 1, 8, rope=RopeConfig()), FeedForwardConfig(width, router=RouterConfig(8, top_k))
    )
    model = ModelConfig("mixtral", hidden, 100, 64, (layer,))
    without = replace(model, layers=(replace(layer, feed_forward=None),))
    config = EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=4)
    planned = workspace_bytes(model, config, 4) - workspace_bytes(without, config, 4)
    weights = ExpertWeights(
        *([torch.zeros(shape)] * 8 for shape in ((width, hidden), (width, hidden), (hidden, width)))
    )
    prepared = OPS.prepare_experts(weights, "silu", torch.float32)
    share, ids = torch.ones(tokens, top_k), torch.zeros(tokens, top_k, dtype=torch.int64)
    with launches(), pytest.MonkeyPatch.context() as patch, Allocations() as counted:
        patch.setattr("moebius.ops.triton.experts._require_held", lambda *_, **__: None)
        OPS.experts(torch.zeros(tokens, hidden), share, ids, prepared)
    rows = tokens * top_k * (width + hidden) * 4
    assert rows < sum(counted.sizes) <= planned
