"""Looks at each operation that our kernels compute: whether it is right, and whether a row's bits
are the row's own.

The same tokens go through the model several times, in other company each time. At first each result
is compared with plain PyTorch's of the very same arguments, and kept, row by row. Then each result
is compared with what was kept, bit for bit, and what was kept goes on: so an operation that differs
is found where it differs, and no other is blamed for what it was given.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moebius.ops.capability import Operation
from moebius.ops.prepared import own
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.steps import RouterTally
from moebius.ops.triton.checked import Call

# How far results may be apart, of the largest: what the order of sums, and a rounding more or less,
# make of it. Sums of numbers that were cut to 10 bits (TF32) are farther off.
_BOUNDS = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-14}
# Choices and codes that may be others than plain PyTorch's: scores may be equal but for rounding.
_OTHERS = 0.01
# Of what the log says of a failure.
_WORDS = 200
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Which arguments of what writes to a cache are that cache and slots of it.
_WRITES = {
    Operation.ROTATE_AND_STORE: (2, 3),
    Operation.ROTATE_AND_STORE_LATENT: (3, 4),
}
# What changes a tensor among its arguments that is read again: a state.
_CHANGE = {Operation.CAUSAL_CONV, Operation.GATED_DELTA}
# What says nothing of one operation: a device that has failed, or too little memory for the proof.
_BEYOND = (torch.AcceleratorError, torch.OutOfMemoryError)


class Abandoned(Exception):
    """Nobody waits for the proof any more."""


class Inspector:
    """`failed` says what was found wrong, `seen` what was looked at, `at` what was begun last.

    rows: how many rows there are in all, each with a number, whatever step it comes in.
    """

    def __init__(self, rows: int) -> None:
        self.failed: dict[Operation, str] = {}
        self.seen: set[Operation] = set()
        self.at: Operation | None = None
        self.abandoned = False
        """Set from another thread: the next operation raises Abandoned."""
        self._rows = rows
        self._kept: list[list[Tensor]] = []
        self._at: Tensor = torch.empty(0, dtype=torch.int64)
        self._number = 0
        self._first = True

    def begin(self, rows: Sequence[int], device: torch.device) -> None:
        """A step of these rows comes."""
        self._at = torch.tensor(rows, dtype=torch.int64, device=device)
        self._number = 0

    def narrow(self, count: int) -> None:
        """What follows in this step is computed of its first `count` rows alone."""
        self._at = self._at[:count]

    def compare(self) -> None:
        """From now on rows come again."""
        self._first = False

    def call(self, call: Call) -> object:
        if self.abandoned:
            raise Abandoned
        self.seen.add(call.operation)
        self.at = call.operation
        number = self._number
        self._number += 1
        if self._first:
            out = self._checked(call)
            self._keep(_results(call, out))
            return out
        if call.operation in self.failed:
            return self._as_kept(call, number, call.plain())
        try:
            out = call.ours()
            self._compare(call, number, _results(call, out))
        except _BEYOND:
            raise
        except Exception as error:
            self._fail(call.operation, why(error))
            out = call.plain()
        return self._as_kept(call, number, out)

    def _checked(self, call: Call) -> object:
        """What our kernels make of a call, or plain PyTorch where they fail."""
        copies = _Copies()
        args = [copies.of(each) for each in call.args]
        kwargs = {name: copies.of(each) for name, each in call.kwargs.items()}
        wanted = Call(call.operation, call.name, call.ops, args, kwargs).plain()
        try:
            found = call.ours()
            _synchronize(self._at.device)
        except _BEYOND:
            raise
        except Exception as error:
            self._fail(call.operation, why(error))
            found = wanted
        pairs = list(zip(_tensors(found), _tensors(wanted), strict=True))
        changed = copies.changed(call.operation)
        pairs += changed
        for one, its in pairs:
            reason = far_apart(one, its)
            if reason:
                self._fail(call.operation, f"{reason}, in {_dtype(one)}")
        if call.operation not in self.failed:
            return found
        for given, copy in changed:
            given.copy_(copy)
        return wanted

    def _keep(self, results: Sequence[Tensor]) -> None:
        kept = []
        for x in results:
            rows = _by_row(x, len(self._at))
            room = rows.new_zeros((self._rows, *rows.shape[1:]))
            room[self._at] = rows
            kept.append(room)
        self._kept.append(kept)

    def _compare(self, call: Call, number: int, results: Sequence[Tensor]) -> None:
        for x, kept in zip(results, self._kept[number], strict=True):
            rows = _by_row(x, len(self._at))
            if not same_bits(rows, kept[self._at]):
                count = len(self._at)
                self._fail(
                    call.operation, f"a row among {count} has not the bits that it had before"
                )

    def _as_kept(self, call: Call, number: int, out: object) -> object:
        """The rows that were kept, in the form of `out`; a cache gets those that it had, too."""
        kept = self._kept[number]
        written = _written(call)
        for (plane, at), rows in zip(written, kept[len(kept) - len(written) :], strict=True):
            plane[at] = rows[self._at].view(plane[at].shape)
        found = [x[self._at].view(one.shape) for x, one in zip(kept, _tensors(out), strict=False)]
        return found[0] if isinstance(out, Tensor) else tuple(found)

    def _fail(self, operation: Operation, reason: str) -> None:
        self.failed.setdefault(operation, reason)


class _Copies:
    """What plain PyTorch may change in place of what our kernels do, each beside its copy. Weights
    nobody changes, and tallies are counted once."""

    def __init__(self) -> None:
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._others: list[tuple[Tensor, Tensor]] = []

    def of(self, value: object) -> object:
        if isinstance(value, RouterTally):
            return None
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self._others.append((value, value.clone()))
            return self._others[-1][1]
        return self._of_cache(value) if isinstance(value, ReferenceCache) else value

    def _of_cache(self, cache: ReferenceCache) -> ReferenceCache:
        k = cache.k.clone()
        v = k[..., : cache.v.shape[-1]] if cache.shared else cache.v.clone()
        self._caches += [(cache.k, k), (cache.v, v)]
        scales = None
        if cache.scales is not None:
            scales = cache.scales[0].clone(), cache.scales[1].clone()
            self._caches += zip(cache.scales, scales, strict=True)
        return replace(cache, k=k, v=v, scales=scales)

    def changed(self, operation: Operation) -> list[tuple[Tensor, Tensor]]:
        """Those that the operation leaves its work in."""
        return self._caches + (self._others if operation in _CHANGE else [])


def far_apart(found: Tensor, wanted: Tensor) -> str:
    """What is wrong with a result beside plain PyTorch's; empty where nothing is."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{tuple(found.shape)} of {_dtype(found)} instead of {tuple(wanted.shape)}"
    if not found.numel():
        return ""
    if not found.is_floating_point():
        others = float((found != wanted).float().mean())
        return f"{others:.0%} of choices are others" if others > _OTHERS else ""
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return "numbers that are not finite"
    its = wanted.nan_to_num(0.0, 0.0, 0.0).double()
    bound = _BOUNDS.get(found.dtype, 0.0) * float(its.abs().amax())
    error = float((found.nan_to_num(0.0, 0.0, 0.0).double() - its).abs().amax())
    return f"{error:.1e} off, where {bound:.1e} is rounding" if error > bound else ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = _BITS[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def _results(call: Call, out: object) -> list[Tensor]:
    """What came of a call: its results, and what it wrote to a cache, row by row."""
    return _tensors(out) + [plane[at] for plane, at in _written(call)]


def _written(call: Call) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """The planes of a cache that a call writes to, and where in them."""
    if call.operation not in _WRITES:
        return []
    in_args, of_slots = _WRITES[call.operation]
    cache = own(call.args[in_args], ReferenceCache)
    slots_T = own(call.args[of_slots], Tensor)
    size = cache.block_size
    at = (slots_T // size, slots_T % size)
    return [(plane, at) for plane in (cache.k, cache.v, *(cache.scales or ()))]


def _by_row(x: Tensor, rows: int) -> Tensor:
    """(rows, ...) of results whose rows may each be several. Raises ValueError for others."""
    if not rows or len(x) % rows:
        raise ValueError(f"a result of {len(x)} rows where the step has {rows}")
    return x.reshape(rows, -1)


def _tensors(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    assert isinstance(out, tuple), "an operation gives a tensor, or a pair of them"
    return list(out)


def _synchronize(device: torch.device) -> None:
    """Wait for what was launched, so that what fails there is told of the right operation."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why(error: Exception) -> str:
    """What the log says of a kernel that raised, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_WORDS]


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
