"""How ranks trade the rows of a step's tokens: each to the ranks that hold its experts, and back.

Every rank calls the same operations in the same order, those with nothing to do with no rows:

    agree, then for each layer: dispatch, combine; and again

Bits are moved and never computed with: each (token, choice) pair has one row, which is made where
its expert is and comes home as it is, so that what home sums does not depend on who computed it.

Shapes: T tokens of this rank, R rows received, C rows of the owners table, E experts, K choices a
token, D hidden size.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ConfigError, PeerError, require_seconds

MOST_RANKS = 1024
MOST_VALUES = 16
"""How many numbers a rank may bring to `Exchange.agree`."""

_VERSION = 1
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """What all ranks of a group have in common.

    size        how many ranks
    tokens      T of a rank's largest step
    hidden      D
    top_k       K
    dtype       of the rows
    """

    size: int
    tokens: int
    hidden: int
    top_k: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_RANKS:
            raise ConfigError(f"a group of {self.size} ranks; it must have 1 to {MOST_RANKS}")
        for name in ("tokens", "hidden", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ConfigError(f"rows of {self.dtype} cannot be exchanged; they must be {known}")

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Epoch:
    """A membership of a group: a rank that comes or goes makes the next one."""

    group: str
    number: int

    def __str__(self) -> str:
        return f"epoch {self.number} of group {self.group}"


def identity(spec: ExchangeSpec, epoch: Epoch) -> dict[str, int]:
    """What ranks must have in common to exchange rows, as numbers of 64 bits."""
    group = hashlib.blake2b(epoch.group.encode(), digest_size=8).digest()
    return {
        "version": _VERSION,
        "group": int.from_bytes(group, signed=True),
        "epoch": epoch.number,
        "tokens": spec.tokens,
        "hidden": spec.hidden,
        "top_k": spec.top_k,
        "dtype": DTYPES.index(spec.dtype),
    }


def check_alike(
    spec: ExchangeSpec, epoch: Epoch, rank: int, found: Iterable[tuple[int, ...]]
) -> None:
    """ConfigError where a rank has said another `identity` than this one's."""
    mine = identity(spec, epoch)
    for other, theirs in enumerate(found):
        if theirs != tuple(mine.values()):
            named = dict(zip(mine, theirs, strict=False))
            unlike = ", ".join(name for name, value in mine.items() if named.get(name) != value)
            raise ConfigError(f"{epoch}: ranks {rank} and {other} differ in {unlike}")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an exchange has moved so far, between this rank and others.

    calls             of agree, dispatch and combine
    bytes_out         of rows that went to other ranks; counts and ids, far less, are left out
    bytes_in          of rows that came from them
    seconds_waited    for other ranks, and for what they send
    """

    calls: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    seconds_waited: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls + other.calls,
            self.bytes_out + other.bytes_out,
            self.bytes_in + other.bytes_in,
            self.seconds_waited + other.seconds_waited,
        )

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(
            self.calls - before.calls,
            self.bytes_out - before.bytes_out,
            self.bytes_in - before.bytes_in,
            self.seconds_waited - before.seconds_waited,
        )


class Exchange(ABC):
    """One rank's part in a group, for one epoch.

    timeout     seconds that any operation waits for other ranks. After that it raises PeerError,
                and so does every later one: the epoch is over.

    The operations are called from one thread, and return when their outputs are written. What they
    raise ValueError for they refuse before anything is sent, so that the call can be made again.
    """

    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch, timeout: float) -> None:
        if not 0 <= rank < spec.size:
            raise ConfigError(f"rank {rank} of a group of {spec.size}; it must be below that")
        require_seconds("timeout", timeout)
        self.spec = spec
        self.rank = rank
        self.epoch = epoch
        self.timeout = timeout

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    @abstractmethod
    def traffic(self) -> Traffic: ...

    @abstractmethod
    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Every rank's values, in the order of ranks.

        values   at most MOST_VALUES integers of 64 bits; ranks may bring different numbers of them

        Raises ValueError for more; PeerError.
        """

    @abstractmethod
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        """Sends each row of x once to every rank that holds any of its experts.

        x_TD        T may be 0
        ids_TK      int64, the experts of each row, in routing order
        owners_CE   int32: the rank that computes expert e of row t is owners[t % C, e], so that
                    replicas of an expert split its rows
        rows_RD     written: what this rank has to compute, in the order (home rank, home row); has
                    memory for size * spec.tokens rows
        ids_RK      written, int64: the experts of each received row, and E where another rank
                    computes that choice

        Returns R, the rows received; memory beyond them is left alone.
        Raises ValueError for tensors of other shapes or dtypes, and for ids and owners out of
        range; PeerError.
        """

    @abstractmethod
    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        """Brings the outputs of the last dispatch's rows home.

        outputs_RKD   a row for each choice that ids_RK names an expert of; others are not read
        back_TKD      written: all pairs' rows of this rank's own tokens

        Raises ValueError as `dispatch` does; PeerError.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves the group; whoever waits for this rank learns of it at once, where it can."""

    def give_up(self, ranks: Sequence[int]) -> None:
        """Ends the epoch, from any thread: what waits here raises a PeerError that names these
        ranks, and so does every later call. Other ranks learn of it where the transport can tell
        them; a transport that knows no better leaves the group."""
        self.close()

    def _check_dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> None:
        spec = self.spec
        tokens = x_TD.shape[0]
        room = rows_RD.shape[0]
        most = spec.size * spec.tokens
        if tokens > spec.tokens:
            raise ValueError(f"x has {tokens} rows; the group was made for {spec.tokens} a rank")
        if room < most:
            raise ValueError(f"there is room for {room} received rows; {most} may come")
        if 0 in owners_CE.shape:
            raise ValueError(f"an owners table of shape {tuple(owners_CE.shape)}")
        _check("x", x_TD, (tokens, spec.hidden), spec.dtype)
        _check("ids", ids_TK, (tokens, spec.top_k), torch.int64)
        _check("owners", owners_CE, (owners_CE.shape[0], owners_CE.shape[-1]), torch.int32)
        _check("received rows", rows_RD, (room, spec.hidden), spec.dtype)
        _check("received ids", ids_RK, (room, spec.top_k), torch.int64)

    def _check_combine(
        self, outputs_RKD: Tensor, back_TKD: Tensor, received: int, tokens: int
    ) -> None:
        spec = self.spec
        rows = outputs_RKD.shape[0]
        if rows < received:
            raise ValueError(f"outputs have {rows} rows; {received} were received")
        _check("outputs", outputs_RKD, (rows, spec.top_k, spec.hidden), spec.dtype)
        _check("back", back_TKD, (tokens, spec.top_k, spec.hidden), spec.dtype)


class CheckedExchange(Exchange):
    """What transports share: calls are checked before they come to `_agree`, `_dispatch` and
    `_combine`, and once a peer is lost every call says so again."""

    def __init__(self, spec: ExchangeSpec, rank: int, epoch: Epoch, timeout: float) -> None:
        super().__init__(spec, rank, epoch, timeout)
        self._over: PeerError | None = None
        # Between dispatch and combine: rows received, and this rank's tokens.
        self._dispatched: tuple[int, int] | None = None

    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        self._begin(combine=False)
        if len(values) > MOST_VALUES:
            raise ValueError(f"{len(values)} values; ranks can agree on {MOST_VALUES}")
        try:
            return self._agree(values)
        except PeerError as error:
            self._over = error
            raise

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        self._begin(combine=False)
        self._check_dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        try:
            received = self._dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        except PeerError as error:
            self._over = error
            raise
        self._dispatched = (received, x_TD.shape[0])
        return received

    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        received, tokens = self._begin(combine=True)
        self._check_combine(outputs_RKD, back_TKD, received, tokens)
        try:
            self._combine(outputs_RKD, back_TKD)
        except PeerError as error:
            self._over = error
            raise
        self._dispatched = None

    def close(self) -> None:
        left = PeerError(f"{self.epoch}: rank {self.rank} has left it", ranks=(self.rank,))
        self._over = self._over or left

    @abstractmethod
    def _agree(self, values: Sequence[int]) -> list[tuple[int, ...]]: ...

    @abstractmethod
    def _dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int: ...

    @abstractmethod
    def _combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None: ...

    def _begin(self, combine: bool) -> tuple[int, int]:
        """What was dispatched, for `combine`."""
        if self._over is not None:
            raise PeerError(str(self._over), ranks=self._over.ranks)
        if combine != (self._dispatched is not None):
            raise RuntimeError("combine follows dispatch, and nothing else does")
        return self._dispatched or (0, 0)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} of shape "
            f"{shape}, contiguous"
        )
