"""Steps without prompts as CUDA graphs: a decoding step is one launch, whatever it is made of.

Some numbers of rows are captured, the largest first, all in one pool of memory; a step takes the
least that it fits into, and its other rows are inert. What fits none is computed as it is. Both
leave their results in the same place, which the next program is captured to read.
"""

import logging
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic

import torch
from torch import Tensor

from moebius.ops.config import PLAIN_HEADS, HeadRows, RouterConfig, Temperature
from moebius.ops.host import HostFunction, HostResult
from moebius.ops.prepared import AttentionPlan, LayerCache, StatePlan
from moebius.ops.program import Given, Program, Trace
from moebius.ops.reference.program import Unrecorded
from moebius.ops.reference.routing import count
from moebius.ops.sources import RowSource, Source, StepSource, Wanted
from moebius.ops.steps import Pair, Rotation, RouterTally, Step, StepInputs
from moebius.ops.triton.card import Card, CudaCard, NotCaptured
from moebius.ops.triton.checked import CheckedOps
from moebius.ops.triton.inspector import why
from moebius.ops.triton.static import Shape, StaticCache, StaticInputs, StaticStep, at_once

log = logging.getLogger(__name__)

_MIB = 2**20
_NOT_CAPTURED = "they are not captured"


def captured_rows(most: int) -> list[int]:
    """The numbers of rows that are captured, the largest first: powers of two, and `most`."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [most, *reversed(powers)] if most else []


class CapturedOps(CheckedOps):
    """CheckedOps whose programs are graphs where they can be.

    card: what captures; None: the CUDA device that a program is recorded for. chip: what kernels
    are compiled for, which is part of the fingerprint.
    """

    def __init__(self, card: Card | None = None, chip: str = "") -> None:
        super().__init__()
        self.name = f"{self.name}-{chip}" if chip else self.name
        self._card = card
        self._capturing: StaticStep | None = None

    def record(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        planned: Trace | None = None,
    ) -> Program[Given]:
        device = torch.device(device)
        plain = Unrecorded(compute, source, device, self.trace(compute, source))
        if self._card is None and device.type == "cuda":
            self._card = CudaCard(device)
        if self._card is None or not _rows_to_capture(source):
            return plain
        if planned is not None and planned.reason.startswith(_NOT_CAPTURED):
            plain.trace = planned
            return plain
        before = self._card.taken()
        start = time.perf_counter()
        try:
            program = CapturedProgram(self, compute, source, self._card)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            plain.trace = Trace(0, 1, frozenset(), f"{_NOT_CAPTURED}: {why(error)}")
            return plain
        log.info(
            "captured %s in %.1f s: graphs of %s %s take %.0f MiB",
            source.rows.name,
            time.perf_counter() - start,
            ", ".join(map(str, program.sizes)),
            source.rows.name,
            (self._card.taken() - before) / _MIB,
        )
        return program

    @contextmanager
    def captures(self, step: StaticStep | None) -> Iterator[None]:
        """Within it a step is captured; None: rows without a step."""
        self._capturing = step
        try:
            yield
        finally:
            self._capturing = None

    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        if self._capturing is not None:
            raise NotCaptured("the host is called in the middle of a step")
        return super().host(function, inputs, outputs)

    def plan_attention(
        self, step: Step, block_size: int, window: int | None = None
    ) -> AttentionPlan:
        if isinstance(step, StaticStep):
            return step.attention_plan(block_size, window)
        return super().plan_attention(step, block_size, window)

    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
        heads: HeadRows = PLAIN_HEADS,
    ) -> Tensor:
        if self._capturing is not None:
            cache = StaticCache.of(cache)
        return super().rotate_and_store(
            qkv_TI, rotation, cache, slot_mapping_T, q_norm_N, k_norm_N, eps, heads
        )

    def rotate_and_store_latent(
        self,
        q_THN: Tensor,
        latent_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        norm_C: Tensor,
        eps: float,
        *,
        temperature: Temperature | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        if self._capturing is not None:
            cache = StaticCache.of(cache)
        return super().rotate_and_store_latent(
            q_THN,
            latent_TI,
            rotation,
            cache,
            slot_mapping_T,
            norm_C,
            eps,
            temperature=temperature,
            positions_T=positions_T,
        )

    def plan_states(self, step: Step) -> StatePlan:
        return step.state_plan() if isinstance(step, StaticStep) else super().plan_states(step)

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
        expert_scale_E: Tensor | None = None,
    ) -> Pair:
        """Of a captured step the tally counts those rows alone that are there."""
        step = self._capturing
        counted = tally if step is None else None
        weights_TK, ids_TK = super().route(
            logits_TE, config, selection_bias_E, counted, expert_scale_E
        )
        if step is not None and tally is not None:
            count(tally, logits_TE, ids_TK, config, step.real_rows)
        return weights_TK, ids_TK


def _rows_to_capture(source: object) -> list[int]:
    if isinstance(source, StepSource):
        return captured_rows(source.decodes.sequences) if source.decodes else []
    return captured_rows(source.rows.most) if isinstance(source, RowSource) else []


class CapturedProgram(Program[Given], Generic[Given, Wanted]):
    """Graphs by their numbers of rows, and the computation as it is for all else.

    sizes: the numbers that were captured, the largest first.
    """

    def __init__(
        self,
        ops: CapturedOps,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        card: Card,
    ) -> None:
        self._compute = compute
        self._source = source
        self._card = card
        self.sizes = _rows_to_capture(source)
        self._graphs: list[_Graph] = []
        for rows in self.sizes:
            self._graphs.append(self._captured(ops, rows))
        self._graphs.reverse()
        assert self.whole is not None
        self.trace = Trace(self.whole.nbytes, 1, frozenset())

    def _captured(self, ops: CapturedOps, rows: int) -> "_Graph":
        source = self._source
        inputs: _StepInputs | _RowInputs
        if isinstance(source, StepSource):
            assert source.decodes is not None
            shape = Shape.of(rows, source.width - 2, source.decodes)
            inputs = _StepInputs(StaticInputs(shape, self._card))
        else:
            inputs = _RowInputs(rows, self._card)
        wanted: Wanted = inputs.wanted  # type: ignore[assignment]

        def work() -> None:
            with ops.captures(inputs.step):
                found = self._compute(wanted)
            self._put(found)

        return _Graph(rows, inputs, self._card.capture(work))

    def _put(self, found: Tensor) -> None:
        """Leave results in their place, which is made for the first of them."""
        if self.whole is None:
            shape = (self._source.rows.most, *found.shape[1:])
            # No tensor of inference mode: graphs write to it outside of that, too.
            with torch.inference_mode(False):
                self.whole = torch.zeros(shape, dtype=found.dtype, device=found.device)
        self.whole[: len(found)].copy_(found)

    def run(self, given: Given) -> Tensor:
        assert self.whole is not None
        for graph in self._graphs:
            rows = graph.inputs.rows_of(given)
            if rows:
                graph.inputs.put(given)
                graph.replay()
                return self.whole[:rows]
        found = self._compute(self._source.wanted(given, self._card.device))
        with torch.inference_mode():
            self._put(found)
        return self.whole[: len(found)]


class _StepInputs:
    """Where a captured step finds its numbers."""

    def __init__(self, static: StaticInputs) -> None:
        self._static = static
        self.step: StaticStep | None = StaticStep(static)
        self.wanted: object = self.step

    def rows_of(self, given: object) -> int:
        """How many rows of the graph a run takes; 0 where it does not fit."""
        assert isinstance(given, StepInputs)
        return len(given.seq_lens_host) if self._static.shape.fits(given) else 0

    def put(self, given: object) -> None:
        assert isinstance(given, StepInputs)
        self._static.put(given)


class _RowInputs:
    """Where captured logits find which rows are wanted: of the rows beyond, row 0."""

    def __init__(self, rows: int, card: Card) -> None:
        self._rows = rows
        self._card = card
        self._host = [card.pinned(rows) for _ in range(2)]
        self._free: list[Callable[[], None]] = [at_once, at_once]
        self._turn = 0
        self.step: StaticStep | None = None
        self._there = torch.zeros(rows, dtype=torch.int64, device=card.device)
        self.wanted: object = self._there

    def rows_of(self, given: object) -> int:
        assert isinstance(given, array)
        return len(given) if len(given) <= self._rows else 0

    def put(self, given: object) -> None:
        assert isinstance(given, array)
        values = torch.frombuffer(given, dtype=torch.int64)
        self._turn ^= 1
        self._free[self._turn]()
        host = self._host[self._turn]
        host[: len(values)] = values
        host[len(values) :] = 0
        self._free[self._turn] = self._card.send(host, self._there)


class _Graph:
    def __init__(
        self, rows: int, inputs: _StepInputs | _RowInputs, replay: Callable[[], None]
    ) -> None:
        self.rows = rows
        self.inputs = inputs
        self.replay = replay
