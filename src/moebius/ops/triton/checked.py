"""Our kernels as a card was seen to compute them: what failed there, plain PyTorch computes.

Where the proof is made: moebius.engine.proof; what it looks at: moebius.ops.triton.inspector.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

from moebius.ops.capability import Capability, Operation, Use
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.linear import ReferenceLinear
from moebius.ops.triton import OWN, TritonOps
from moebius.ops.triton.attention import TritonPlan
from moebius.ops.triton.experts import TritonExperts
from moebius.ops.triton.linear import TritonLinear

METHODS = {each: (each.value,) for each in OWN if each != Operation.SAMPLING} | {
    Operation.SAMPLING: (
        "argmax",
        "draw",
        "draw_candidates",
        "choose",
        "log_softmax_top_k",
        "ranks",
        "shaped",
    )
}
"""What is called of each operation that has kernels of ours."""
_REFERENCE = ReferenceOps()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An operation with its arguments, to be computed by either backend."""

    operation: Operation
    name: str
    ops: "CheckedOps"
    args: Sequence[object]
    kwargs: Mapping[str, object]

    def ours(self) -> object:
        return getattr(TritonOps, self.name)(self.ops, *self.args, **self.kwargs)

    def plain(self) -> object:
        """By plain PyTorch, of the same weights, cache and step."""
        args = [_plain(each) for each in self.args]
        kwargs = {name: _plain(each) for name, each in self.kwargs.items()}
        return getattr(_REFERENCE, self.name)(*args, **kwargs)


class Watch(Protocol):
    """Computes calls in its own way while a proof is made."""

    def call(self, call: Call) -> object: ...


class CheckedOps(TritonOps):
    """TritonOps, but for operations that fell back; batch invariant where a proof was seen."""

    def __init__(self) -> None:
        self.reference = _REFERENCE
        self.failed: dict[Operation, str] = {}
        """Why operations are plain PyTorch's."""
        self._proven: frozenset[Operation] = frozenset()
        self._watch: Watch | None = None

    def for_trial(self) -> Self:
        """The same kernels, before anything was found out about them: what is done with these
        changes nothing of ours."""
        another = copy(self)
        another.failed = {}
        another._proven = frozenset()
        another._watch = None
        return another

    def watched(self, watch: Watch | None) -> None:
        """Let `watch` compute all calls from now on; None: nobody but this."""
        self._watch = watch

    def fall_back(self, operation: Operation, reason: str) -> None:
        """Let plain PyTorch compute an operation from now on."""
        self.failed.setdefault(operation, reason)
        self._proven -= {operation}

    def prove(self, operations: frozenset[Operation]) -> None:
        """Rows of these were seen to depend on themselves alone, on the card that computes."""
        self._proven = operations - self.failed.keys()

    def capability(self, use: Use) -> Capability | None:
        known = super().capability(use)
        if known is None or known.by != self.name:
            return known
        if use.operation in self.failed:
            return self.reference.capability(use)
        return Capability(self.name, use.operation in self._proven, known.recorded)

    def called(self, operation: Operation, name: str, *args: object, **kwargs: object) -> object:
        """The result of the operation's method `name`, by whoever computes it."""
        call = Call(operation, name, self, args, kwargs)
        watch = self._watch
        if watch is not None:
            # What an operation calls in its turn is part of it.
            self._watch = None
            try:
                return watch.call(call)
            finally:
                self._watch = watch
        return call.plain() if operation in self.failed else call.ours()


def _called(operation: Operation, name: str) -> Callable[..., object]:
    def method(self: CheckedOps, *args: object, **kwargs: object) -> object:
        return self.called(operation, name, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(TritonOps, name).__doc__
    return method


for _operation, _names in METHODS.items():
    for _name in _names:
        setattr(CheckedOps, _name, _called(_operation, _name))


def _plain(value: object) -> object:
    """What plain PyTorch takes in place of one of our handles."""
    if isinstance(value, TritonLinear):
        return ReferenceLinear(value.layers)
    if isinstance(value, TritonExperts):
        return value.plain
    if isinstance(value, TritonPlan):
        return _REFERENCE.plan_attention(value.step, value.block_size, value.window)
    return value
