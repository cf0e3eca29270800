"""How a step becomes pieces: graphs, which end where the host is called.

The computation runs twice: once as it is, so that all is compiled and made that is made once, and
once more while it is noted. The host is called in neither: what it would write is nobody's rows,
and of rows whose number it decides there are none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moebius.ops.host import HostFunction, HostResult
from moebius.ops.program import Rows
from moebius.ops.shapes import SHAPES
from moebius.ops.triton.card import Card, NotCaptured
from moebius.ops.triton.pieces import (
    DecidingCall,
    Graph,
    HostCall,
    Operation,
    Pieces,
    Places,
    tensors_in,
)
from moebius.ops.triton.static import StaticStep

_LEFT = "what is computed on rows whose number the host decides is not brought home"


class Capture:
    """Of one step, or of rows without a step.

    rows: how many it is captured for. places: where they cross to the host and back.
    """

    def __init__(self, card: Card, places: Places, rows: int, step: StaticStep | None) -> None:
        self.step = step
        self._card = card
        self._places = places
        self._rows = rows
        self._pieces = Pieces()
        self._noting = False
        # What stands for rows whose number the host decides, by id; and whether these are computed
        # on now, which is no graph.
        self._varying: dict[int, Tensor] = {}
        self._varies = False
        self._watch = _Watch()

    def take(self, work: Callable[[], None]) -> Pieces:
        """`work`, which leaves its results in memory that stays. Raises NotCaptured, and what the
        device raises."""
        try:
            # Places are made by the first time, too: what is made while a graph is, is in it.
            with self._card.beside():
                work()
                self._require_home()
            with self._card.beside():
                self._pieces = Pieces()
                self._noting = True
                self._card.begin()
                work()
                self._end()
        except BaseException:
            self._come_home()
            self._card.drop()
            raise
        return self._pieces

    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        """What a call to the host will have written."""
        if self.step is None:
            raise NotCaptured("the host is called for logits, of which a graph would have too few")
        device = inputs[0].device
        decides = any(
            isinstance(out.rows, Rows) or id(out.rows) in self._varying for out in outputs
        )
        given = [self._crossing(number, x) for number, x in enumerate(inputs)]
        if self._noting and not self._varies:
            self._end()
        if decides:
            made = [torch.empty((0, *out.row), dtype=out.dtype, device=device) for out in outputs]
            self._vary(made)
            self._pieces.add(DecidingCall(function, self._rows, given, outputs, made))
            return made
        self._come_home()
        written = []
        for number, out in enumerate(outputs):
            shape = (self._multiple(_count(out)), *out.row)
            written.append(self._places.of(("out", number), shape, out.dtype, device))
        self._pieces.add(HostCall(function, self._rows, given, written))
        if self._noting:
            self._card.begin()
        return [place.clone() for place in written]

    def called(
        self, compute: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """The result of an operation."""
        if not self._varying or self._watch.paused:
            return compute(*args, **kwargs)
        given = tensors_in((*args, *kwargs.values()))
        known = [id(x) in self._varying for x in given]
        if not self._varies:
            if any(known):
                raise NotCaptured(_LEFT)
            return compute(*args, **kwargs)
        if not all(known):
            # Rows that there are none of would meet some.
            raise NotCaptured("an operation on rows whose number the host decides is given others")
        with self._watch.pause():
            found = compute(*args, **kwargs)
        made = list(tensors_in((found,)))
        if any(x.numel() for x in made):
            raise NotCaptured("what is on a step's rows is computed among what is not")
        self._pieces.add(Operation(compute, args, kwargs, made))
        self._vary(made)
        return found

    def _crossing(self, number: int, x: Tensor) -> Tensor:
        """Where the host will find an input: the graph that ends now leaves it there."""
        if id(x) in self._varying:
            return x
        if self._varies:
            raise NotCaptured("the host is given rows of the step among others")
        shape = (self._multiple(len(x)), *x.shape[1:])
        place = self._places.of(("in", number), shape, x.dtype, x.device)
        place.copy_(x)
        return place

    def _multiple(self, rows: int) -> int:
        if not rows or rows % self._rows:
            raise NotCaptured(f"the host is called on {rows} rows of a step of {self._rows}")
        return rows

    def _vary(self, made: Sequence[Tensor]) -> None:
        """What is computed on from now on has as many rows as the host decides."""
        self._varying.update((id(x), x) for x in made)
        self._varies = True
        if self._noting:
            self._watch.begin()

    def _come_home(self) -> None:
        self._varies = False
        self._watch.end()

    def _require_home(self) -> None:
        if self._varies:
            raise NotCaptured(_LEFT)

    def _end(self) -> None:
        """Of a graph."""
        self._require_home()
        self._pieces.add(Graph(self._card.end()))


def _count(out: HostResult) -> int:
    """Rows of the step that are written."""
    assert isinstance(out.rows, Tensor), "or the host decides them"
    return len(out.rows)


class _Watch(TorchFunctionMode):
    """Refuses what torch would compute beside the operations, where no graph is made: it would be
    done once, and not in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._on = False

    def begin(self) -> None:
        if not self._on:
            self._on = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        if self._on:
            self._on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it an operation computes."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        looks = self.paused or name == "__get__" or func in SHAPES or func is Tensor.data_ptr
        if not looks and list(tensors_in((*args, *kwargs.values()))):
            raise NotCaptured(f"torch's {name} computes among rows whose number the host decides")
        return func(*args, **kwargs)
