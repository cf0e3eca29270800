"""The operations on a CPU: csrc's kernels. Weights are read where they lie, never packed or copied.

The instruction set is the best that the processor has; the environment variable MOEBIUS_CPU_ISA
limits it (portable, avx2, avx512, avx512bf16, amx, or reference for plain PyTorch). Every kernel
computes a row in the same way whatever rows surround it, however many threads there are and
wherever the KV cache holds its tokens: they are batch invariant (promise P1).
"""

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.capability import Capability, Feature, Operation, Use
from moebius.ops.cpu.attention import AttentionOps
from moebius.ops.cpu.base import DTYPES
from moebius.ops.cpu.experts import ExpertOps
from moebius.ops.cpu.linear import LinearOps
from moebius.ops.cpu.pointwise import PointwiseOps
from moebius.ops.cpu.recording import KernelsOnly, Recording
from moebius.ops.cpu.sampling import SamplingOps
from moebius.ops.steps import Captured, Compute, Logits, StepInputs

__all__ = ["CpuOps", "Recording"]


class CpuOps(LinearOps, PointwiseOps, AttentionOps, ExpertOps, SamplingOps):
    """C++ kernels on `threads` threads of a pool of their own."""

    def capability(self, use: Use) -> Capability | None:
        if use.dtype not in DTYPES or Feature.VALUE_SIZE in use.features:
            return None
        if use.operation == Operation.ROTARY or Feature.TWO_MATRICES in use.features:
            return self._fallback.capability(use)
        recorded = use.operation != Operation.SAMPLING
        return Capability(self.name, batch_invariant=True, recorded=recorded)

    def capture(
        self, compute: Compute, logits: Logits, example: StepInputs, max_tokens: int
    ) -> Captured:
        step, head = Recording(3, max_tokens), Recording(1, max_tokens)

        def on_step(inputs: StepInputs) -> Tensor:
            for plan in step.plans:
                plan.set(inputs)
            return step(inputs.input_ids_host, inputs.positions_host, inputs.slot_mapping_host)

        def noted(ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
            example.input_ids, example.positions, example.slot_mapping = ids, positions, slots
            return compute(example)

        plain = self._fallback.capture(compute, logits, example, max_tokens)
        if not self._note(step, noted):
            return plain
        whole = self._note(head, lambda rows_L: logits(step.out, rows_L))
        return on_step, (lambda _, rows: head(array("q", rows))) if whole else plain[1]

    def _note(self, recording: Recording, compute: Callable[..., Tensor]) -> bool:
        """Run `compute` on one row of each of the recording's inputs; False where torch computes a
        part of it."""
        self._recording, mode = recording, KernelsOnly()
        self._native.record(recording.program)
        try:
            with mode:
                out = compute(*(x[:1] for x in recording.inputs))
        finally:
            self._native.record(None)
            self._recording = None
        if mode.only:  # the result is read until the next call, and so is kept
            recording.out = torch.as_strided(
                out, (recording.max_rows, *out.shape[1:]), out.stride()
            )
        return mode.only
