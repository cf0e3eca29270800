"""Experts that may stay on disk, asked for a layer ahead.

A layer's residual stream is much like the next one's, so what the next router makes of it names
most of the experts that it will choose. The system begins to read these while this layer computes,
on a thread of its own; those that were not foreseen are asked for when they are chosen, and those
that were in vain cost disk time alone.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from queue import SimpleQueue
from weakref import finalize

from torch import Tensor

from moebius.models.decoder import Decoder, Layer
from moebius.moe.experts import Experts
from moebius.moe.router import Router
from moebius.ops import Ops
from moebius.ops.weights import planes_of
from moebius.pages import Span, will_need

# More rows choose nearly all of a layer's experts, and there may be room for one layer alone.
_MOST_ROWS = 16


def look_ahead(decoder: Decoder) -> None:
    """Have each layer's feed-forward ask for the next one's experts. Of all experts here alone."""
    if decoder.ranks is not None:
        return
    reader = _Reader()
    parts = [layer.mlp if isinstance(layer, Layer) else None for layer in decoder.layers]
    for part, following in pairwise(parts):
        if part is not None and following is not None and following.router is not None:
            part.ahead = _Ahead(decoder.ops, following.router, following.experts, reader)


class _Ahead:
    """Of one layer: asks for what the next layer's router would choose for these rows."""

    def __init__(self, ops: Ops, router: Router, experts: Experts, reader: "_Reader") -> None:
        self._ops = ops
        self._router = router
        self._experts = experts
        self._reader = reader

    def __call__(self, x_TD: Tensor) -> None:
        router = self._router
        _, ids_TK = self._ops.route(router.logits(x_TD), router.config, router.selection_bias)
        self._ops.host(self._ask, [ids_TK], [])

    def _ask(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        (ids_TK,) = inputs
        if 0 < len(ids_TK) <= _MOST_ROWS:
            experts = set(ids_TK.flatten().tolist())
            self._reader.ask([span for each in experts for span in self._spans[each]])
        return {}

    @cached_property
    def _spans(self) -> list[list[Span]]:
        """Where each expert lies in memory."""
        kinds = (self._experts.gate_proj, self._experts.up_proj, self._experts.down_proj)
        found: list[list[Span]] = [[] for _ in self._experts.down_proj.held()]
        for kind in kinds:
            for spans, weight in zip(found, kind.held(), strict=False):
                for plane in planes_of([weight]):
                    assert plane is not None, "all experts are here"
                    spans.append((plane.data_ptr(), plane.data_ptr() + plane.nbytes))
        return found


class _Reader:
    """Asks the system for bytes, on a thread that ends with whoever asks."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Sequence[Span] | None] = SimpleQueue()
        self._started = False

    def ask(self, spans: Sequence[Span]) -> None:
        """For these, and no longer for what was asked before and not begun: its layer is over."""
        if not self._started:
            self._started = True
            thread = threading.Thread(
                target=_read, args=(self._asked,), name="cold experts", daemon=True
            )
            thread.start()
            finalize(self, self._asked.put, None)
        self._asked.put(spans)


def _read(asked: "SimpleQueue[Sequence[Span] | None]") -> None:
    while (spans := asked.get()) is not None:
        for start, stop in spans:
            if not asked.empty():
                break
            will_need(start, stop - start)
