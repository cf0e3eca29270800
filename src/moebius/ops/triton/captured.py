"""Steps without prompts as CUDA graphs: a decoding step is one launch, whatever it is made of, or
some (pieces.py) where the host is called in the middle.

Some numbers of rows are captured, the largest first, all in one pool of memory; a step takes the
least that it fits into, and its other rows are inert. What fits none is computed as it is. Both
leave their results in the same place, which the next program is captured to read.
"""

import logging
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.config import PLAIN_HEADS, HeadRows, RouterConfig, Temperature
from moebius.ops.host import HostFunction, HostResult
from moebius.ops.prepared import AttentionPlan, LayerCache, StatePlan
from moebius.ops.program import Given, Program, Trace
from moebius.ops.reference.program import Unrecorded
from moebius.ops.reference.routing import count
from moebius.ops.sources import RowSource, Source, StepSource, Wanted
from moebius.ops.steps import Pair, Rotation, RouterTally, Step, StepInputs
from moebius.ops.triton.capture import Capture
from moebius.ops.triton.card import Card, CudaCard, ended_capture
from moebius.ops.triton.checked import CheckedOps
from moebius.ops.triton.inspector import why
from moebius.ops.triton.pieces import Pieces, Places
from moebius.ops.triton.static import Shape, StaticCache, StaticInputs, StaticStep, at_once

log = logging.getLogger(__name__)

_MIB = 2**20
_NOT_CAPTURED = "they are not captured"
# How many times as many rows the next larger graph has: of one, and of several with the host
# between them, which are a graph a layer and more. What such a step waits for is the host, which
# computes no row that pads it.
_APART = 2
_PIECES_APART = 4


def captured_rows(most: int, apart: int = _APART) -> list[int]:
    """The numbers of rows that are captured, the largest first: `most`, and powers of `apart`."""
    sizes = [most] if most else []
    power = 1
    powers = []
    while power < most:
        powers.append(power)
        power *= apart
    return sizes + powers[::-1]


class CapturedOps(CheckedOps):
    """CheckedOps whose programs are graphs where they can be.

    card: what captures; None: the CUDA device that a program is recorded for. chip: what kernels
    are compiled for, which is part of the fingerprint.
    """

    def __init__(self, card: Card | None = None, chip: str = "") -> None:
        super().__init__()
        self.name = f"{self.name}-{chip}" if chip else self.name
        self._card = card
        self._capturing: Capture | None = None

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
        if self._card is None:
            return plain
        if not _rows_to_capture(source):
            reason = f"{_NOT_CAPTURED}: none is known beforehand"
            plain.trace = Trace(0, 1, frozenset(), reason)
            return plain
        if planned is not None and planned.reason.startswith(_NOT_CAPTURED):
            plain.trace = planned
            return plain
        before = self._card.taken()
        start = time.perf_counter()
        try:
            program = CapturedProgram(self, compute, source, self._card)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not ended_capture(error):
                raise
            plain.trace = Trace(0, 1, frozenset(), f"{_NOT_CAPTURED}: {why(error)}")
            return plain
        log.info(
            "captured %s in %.1f s: graphs of %s %s, each in %d pieces, take %.0f MiB",
            source.rows.name,
            time.perf_counter() - start,
            ", ".join(map(str, program.sizes)),
            source.rows.name,
            program.trace.segments,
            (self._card.taken() - before) / _MIB,
        )
        return program

    @contextmanager
    def captures(self, capture: Capture) -> Iterator[None]:
        """Within it what is computed is captured."""
        self._capturing = capture
        try:
            yield
        finally:
            self._capturing = None

    def looks(self) -> bool:
        """Never: the host would wait for the card in each layer. Requests were checked for their
        ids, and a router chooses among the experts that there are."""
        return False

    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        if self._capturing is not None:
            return self._capturing.host(function, inputs, outputs)
        return super().host(function, inputs, outputs)

    def called(self, operation: Operation, name: str, *args: object, **kwargs: object) -> object:
        if self._capturing is None:
            return super().called(operation, name, *args, **kwargs)
        return self._capturing.called(partial(super().called, operation, name), args, kwargs)

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
        step = None if self._capturing is None else self._capturing.step
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
        self._places = Places()
        most, *fewer = _rows_to_capture(source)
        self._captured = [self._capture(ops, most)]
        segments = self._captured[0].pieces.graphs
        if segments > 1:
            _, *fewer = captured_rows(most, _PIECES_APART)
        self._captured += [self._capture(ops, rows) for rows in fewer]
        self.sizes = [most, *fewer]
        self._captured.reverse()
        assert self.whole is not None
        self.trace = Trace(self.whole.nbytes, segments, frozenset())

    def _capture(self, ops: CapturedOps, rows: int) -> "_Captured":
        source = self._source
        inputs: _StepInputs | _RowInputs
        if isinstance(source, StepSource):
            assert source.decodes is not None
            shape = Shape.of(rows, source.width - 2, source.decodes)
            inputs = _StepInputs(StaticInputs(shape, self._card))
        else:
            inputs = _RowInputs(rows, self._card)
        wanted: Wanted = inputs.wanted  # type: ignore[assignment]
        capture = Capture(self._card, self._places, rows, inputs.step)

        def work() -> None:
            with ops.captures(capture):
                found = self._compute(wanted)
            self._put(found)

        return _Captured(inputs, capture.take(work))

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
        for captured in self._captured:
            rows = captured.inputs.rows_of(given)
            if rows:
                captured.inputs.put(given)
                captured.pieces.replay(rows)
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


class _Captured(NamedTuple):
    inputs: _StepInputs | _RowInputs
    pieces: Pieces
